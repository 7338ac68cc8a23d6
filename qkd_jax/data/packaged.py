"""Sets that need no download: `renditions` and `glosses`, which ship in the package, and
`synthetic`.
"""

import hashlib
import pathlib

import numpy as np

from qkd_jax.data.examples import Split
from qkd_jax.data.image_set import ImageSet, from_arrays
from qkd_jax.data.text_set import TextSet
from qkd_jax.errors import DataError
from qkd_jax.npz import read_npz

RENDITIONS = pathlib.Path(__file__).with_name("renditions.npz")
GLOSSES = pathlib.Path(__file__).with_name("glosses.tsv")
RENDITIONS_SHA256 = "c63d90af55bbc49144df6130f7e49773543d7573fa5a7100f419af50ce633d02"
GLOSSES_SHA256 = "bf25ebb861a1a127b73ff255b3ea0a288190729f2222a61fcddfae7c15f03140"


def renditions(path: pathlib.Path = RENDITIONS) -> Split:
    """100 emoji classes; six drawing styles to train on, and three of other artists to test on.

    600 train and 300 test images of 128 x 128 pixels, one for each class and style. It is a small
    counterpart of ImageNet-R: the same things in other renditions. Origins and licences are in
    `RENDITIONS_ATTRIBUTION.md`.

    Raises:
      DataError: the packaged file is missing or not the one that was built.
    """
    fields = read_npz(path, content=_verified(path, RENDITIONS_SHA256))
    blobs, offsets = fields["bytes"].tobytes(), fields["offsets"].tolist()
    class_names, style_names = fields["class_names"].tolist(), fields["style_names"].tolist()
    labels, styles = fields["labels"], fields["styles"]
    ids = [
        f"{style_names[style]}/{class_names[label]}"
        for style, label in zip(styles, labels, strict=True)
    ]
    everything = ImageSet(
        name="renditions",
        labels=labels,
        ids=np.array(ids),
        class_names=tuple(class_names),
        fetch=lambda indices: [blobs[offsets[i] : offsets[i + 1]] for i in indices],
        margin=False,
    )
    is_test = fields["test_styles"][styles]
    return Split(
        train=everything.take(np.flatnonzero(~is_test), "renditions/train"),
        test=everything.take(np.flatnonzero(is_test), "renditions/test"),
    )


def glosses(path: pathlib.Path = GLOSSES) -> Split:
    """38 kinds of meaning of English nouns and verbs; 100 definitions of each to train on, 50 to
    test on.

    A class is a lexicographer file of WordNet 3.1, such as noun.animal or verb.motion, and a text
    the definition of one meaning. Origin and licence are in `GLOSSES_LICENCE.txt`.

    Raises:
      DataError: the packaged file is missing or not the one that was built.
    """
    lines = _verified(path, GLOSSES_SHA256).decode().splitlines()
    sides, ids, texts = zip(*(line.split("\t") for line in lines), strict=True)
    class_names, labels = np.unique([name.split("/")[0] for name in ids], return_inverse=True)
    everything = TextSet(
        name="glosses",
        labels=labels.astype(np.int32),
        ids=np.array(ids),
        class_names=tuple(class_names.tolist()),
        texts=texts,
    )
    is_test = np.array(sides) == "test"
    return Split(
        train=everything.take(np.flatnonzero(~is_test), "glosses/train"),
        test=everything.take(np.flatnonzero(is_test), "glosses/test"),
    )


def synthetic(
    num_classes: int = 10,
    train_per_class: int = 20,
    test_per_class: int = 5,
    side: int = 32,
    seed: int = 0,
) -> Split:
    """Learnable patterns: each class is a plane wave of its own direction, frequency and colour.

    The phase is random and noise is added, so that images of a class differ. A class does not
    depend on the number of classes. This set is for tests and smoke runs; numbers measured on it
    say nothing about a method.

    Raises:
      DataError: a number is below 1.
    """
    numbers = {
        "num_classes": num_classes,
        "train_per_class": train_per_class,
        "test_per_class": test_per_class,
        "side": side,
    }
    for name, number in numbers.items():
        if number < 1:
            raise DataError(f"synthetic: {name}: expected at least 1, found {number}")
    y, x = np.meshgrid(np.arange(side) / side, np.arange(side) / side, indexing="ij")

    def draw_class(label: int, part: int, number: int) -> np.ndarray:
        look = np.random.default_rng([seed, 0, label])
        angle, pace = look.uniform(0.0, np.pi), look.uniform(1.0, 4.0)
        colour = look.uniform(-1.0, 1.0, 3)
        noise = np.random.default_rng([seed, 1, part, label])
        phase = noise.uniform(0.0, 2.0 * np.pi, (number, 1, 1))
        wave = np.sin(2.0 * np.pi * pace * (np.cos(angle) * x + np.sin(angle) * y) + phase)
        pixels = 128.0 + 40.0 * wave[..., None] + 70.0 * colour
        pixels += noise.normal(0.0, 12.0, pixels.shape)
        return np.clip(pixels, 0.0, 255.0).astype(np.uint8)

    def draw(part: int, number: int) -> ImageSet:
        return from_arrays(
            np.concatenate([draw_class(label, part, number) for label in range(num_classes)]),
            np.repeat(np.arange(num_classes), number),
            class_names=[f"wave {k}" for k in range(num_classes)],
            name=f"synthetic/{('train', 'test')[part]}",
        )

    return Split(train=draw(0, train_per_class), test=draw(1, test_per_class))


def _verified(path: pathlib.Path, sha256: str) -> bytes:
    """The content of a packaged file."""
    if not path.is_file():
        raise DataError(f"{path}: expected a file of the package, found none. Install it again")
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise DataError(
            f"{path}: damaged: expected sha256 {sha256}, found {found}. Install the package again"
        )
    return content
