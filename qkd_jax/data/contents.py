"""Image sets compared by content, and a check that every image can be read.

The content of an image is the bytes of its file (or record, or array), without its place and name.
So data that was moved is the same data, and other pixels under the same names are not.
"""

import concurrent.futures
import hashlib
import os
import pathlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import numpy as np

from qkd_jax.data.examples import Split
from qkd_jax.data.image_set import Encoded, ImageSet
from qkd_jax.data.images import decode
from qkd_jax.data.splits import summarise
from qkd_jax.errors import DataError

DIGEST_BYTES = 16
Result = TypeVar("Result")
Advance = Callable[[int], None]  # called with the number of images done since the last call


class Contents(NamedTuple):
    """The images of one set, in its order.

    Attributes:
      ids: str [N].
      labels: int32 [N].
      digests: uint8 [N, 16], the first half of the sha256 of each stored image.
    """

    ids: np.ndarray
    labels: np.ndarray
    digests: np.ndarray

    def take(self, rows: np.ndarray) -> "Contents":
        """The images at `rows`, indices or a mask."""
        return Contents(*(field[rows] for field in self))

    def keys(self) -> list[tuple[int, bytes]]:
        """(label, digest) of each image, by which sets are compared."""
        return [(int(k), d.tobytes()) for k, d in zip(self.labels, self.digests, strict=True)]


class SplitContents(NamedTuple):
    """The contents of both sides of a split, and its class names."""

    train: Contents
    test: Contents
    class_names: tuple[str, ...]

    def digests_of(self, split: Split) -> tuple[np.ndarray, np.ndarray]:
        """uint8 [n, 16] for each side of a split of these images, also where some of them stand on
        the other side than here.
        """
        sides = [dict(zip(s.ids.tolist(), s.digests, strict=True)) for s in (self.train, self.test)]
        known = (sides[1] | sides[0], sides[0] | sides[1])  # of an id on both sides, the own one
        train, test = (
            np.array([digests[text] for text in images.ids.tolist()], np.uint8).reshape(
                -1, DIGEST_BYTES
            )
            for digests, images in zip(known, split, strict=True)
        )
        return train, test

    def sha256(self) -> str:
        """One fingerprint of everything, which does not depend on the order of the images."""
        digest = hashlib.sha256(repr(self.class_names).encode("utf-8", "surrogatepass"))
        for side in (self.train, self.test):
            digest.update(len(side.labels).to_bytes(8, "big"))
            for label, content in sorted(side.keys()):
                digest.update(label.to_bytes(4, "big") + content)
        return digest.hexdigest()


def ignore(count: int) -> None:
    """An `Advance` that shows nothing."""


def read_contents(split: Split, advance: Advance = ignore) -> SplitContents:
    """Reads the stored bytes of every image, without decoding them.

    Raises:
      DataError: images whose file cannot be read; shows the first ten, and the number of all.
    """
    sides = []
    for images in split:
        digests = np.zeros((len(images), DIGEST_BYTES), np.uint8)
        problems = []
        for index, found in enumerate(_for_each(images, _digest, advance)):
            if isinstance(found, bytes):
                digests[index] = np.frombuffer(found, np.uint8)
            else:
                problems.append(found)
        _refuse(problems)
        sides.append(Contents(images.ids, images.labels, digests))
    return SplitContents(*sides, split.train.class_names)


class Repeated(NamedTuple):
    """Groups of images with the same pixels, even if their files differ; an entry names one group.

    Attributes:
      leaked: groups with images on both sides, which are both trained and tested on.
      copies: the other groups.
    """

    leaked: list[list[str]]
    copies: list[list[str]]


def verify(split: Split, advance: Advance = ignore) -> Repeated:
    """Decodes every image; returns those that occur more than once.

    Raises:
      DataError: images that cannot be read; shows the first ten, and the number of all.
    """
    problems: list[str] = []
    same: dict[bytes, list[tuple[int, str]]] = defaultdict(list)
    for side, images in enumerate(split):
        for index, found in enumerate(_for_each(images, _pixel_digest, advance)):
            if isinstance(found, bytes):
                same[found].append((side, f"{images.name}: {images.ids[index]}"))
            else:
                problems.append(found)
    _refuse(problems)
    repeated = Repeated([], [])
    for group in same.values():
        names = [name for _, name in group]
        if len({side for side, _ in group}) == 2:
            repeated.leaked.append(names)
        elif len(group) > 1:
            repeated.copies.append(names)
    return repeated


def told_leaks(leaked: list[list[str]]) -> str:
    """One sentence about the groups of `Repeated.leaked`, and the first ten of them."""
    groups = [" = ".join(group) for group in leaked]
    what = "1 image is" if len(leaked) == 1 else f"{len(leaked)} images are"
    return f"{what} both trained and tested on (the same pixels):{summarise(groups)}"


def joined(split: SplitContents) -> Contents:
    """The contents of both sides as one, the training side first."""
    pairs = zip(split.train, split.test, strict=True)
    return Contents(*(np.concatenate(pair) for pair in pairs))


def rows_of(then: Contents, now: Contents) -> tuple[np.ndarray, list[str]]:
    """Finds the images of an earlier reading in a newer one, by label and content.

    Returns:
      (rows int64 [N] of `now` for each image of `then`, -1 where it is gone; the ids of `now` that
      are new). Among copies of one image, the one with the same id is taken first, then the others
      in order.
    """
    places: dict[tuple[int, bytes], list[int]] = defaultdict(list)
    for row, key in enumerate(now.keys()):
        places[key].append(row)
    keys, here = then.keys(), now.ids.tolist()
    rows = np.full(len(keys), -1, np.int64)
    for index, (key, name) in enumerate(zip(keys, then.ids.tolist(), strict=True)):
        same = [row for row in places[key] if here[row] == name]
        if same:
            rows[index] = same[0]
            places[key].remove(same[0])
    for index in np.flatnonzero(rows < 0):
        if places[keys[index]]:
            rows[index] = places[keys[index]].pop(0)
    return rows, [here[row] for row in sorted(row for left in places.values() for row in left)]


def arrays_of(contents: SplitContents) -> dict[str, np.ndarray]:
    """The contents as arrays to store; `contents_of` is the inverse."""
    return {
        f"{side}_{name}": array
        for side in ("train", "test")
        for name, array in getattr(contents, side)._asdict().items()
    } | {"class_names": np.array(contents.class_names, str)}


def contents_of(arrays: Any) -> SplitContents:
    """The contents that `arrays_of` gave; raises KeyError where one is missing."""
    sides = (
        Contents(*(arrays[f"{side}_{name}"] for name in Contents._fields))
        for side in ("train", "test")
    )
    return SplitContents(*sides, tuple(arrays["class_names"].tolist()))


def _for_each(
    images: ImageSet, function: Callable[[Encoded, str], bytes], advance: Advance
) -> Iterator[bytes | str]:
    """The result of `function` for every image, in a pool of threads; an error gives its text."""

    def one(index: int) -> bytes | str:
        name = f"{images.name}: {images.ids[index]}"
        try:
            (encoded,) = images.fetch([index])
            return function(encoded, name)
        except DataError as error:
            return str(error)
        except OSError as error:
            return f"{name}: cannot be read ({error.strerror or error})"

    # After Ctrl-C, closing the iterator of `map` cancels the remaining images.
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for found in pool.map(one, range(len(images))):
            advance(1)
            yield found


def _digest(encoded: Encoded, name: str) -> bytes:
    if isinstance(encoded, pathlib.Path):
        encoded = encoded.read_bytes()
    if isinstance(encoded, np.ndarray):
        encoded = f"{encoded.dtype} {encoded.shape}".encode() + encoded.tobytes()
    return hashlib.sha256(encoded).digest()[:DIGEST_BYTES]


def _pixel_digest(encoded: Encoded, name: str) -> bytes:
    image = decode(encoded, name)
    return hashlib.sha256(f"{image.size}".encode() + image.tobytes()).digest()


def _refuse(problems: list[str]) -> None:
    if problems:
        what = "1 image" if len(problems) == 1 else f"{len(problems)} images"
        raise DataError(f"{what} cannot be read:{summarise(problems)}")
