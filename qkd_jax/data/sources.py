"""One call for every image set: packaged ones, folders, arrays, tensorflow-datasets."""

import functools
import inspect
import os
import pathlib
import shlex

import numpy as np

from qkd_jax.data import packaged, splits
from qkd_jax.data.examples import Split
from qkd_jax.data.folder import Splitter, find_parts, open_folder
from qkd_jax.data.image_set import ImageSet, from_arrays
from qkd_jax.data.tfds_source import open_tfds, prepare
from qkd_jax.errors import DataError

__all__ = [
    "ImageSet",
    "Split",
    "describe",
    "fingerprint",
    "from_arrays",
    "load_split",
    "prepare",
]

# Benchmarks of the field and their names in tensorflow-datasets; None = only as an image folder
# (VTAB is the 50-class subset of the class-incremental literature).
BENCHMARKS = {
    "cifar100": "cifar100",
    "cub200": "caltech_birds2011",
    "imagenet_r": "imagenet_r",
    "imagenet_a": "imagenet_a",
    "vtab": None,
    "omnibenchmark": None,
    "objectnet": None,
}
# Benchmarks without a split, which `splits.fifth_to_test` divides.
UNSPLIT = ("imagenet_r", "imagenet_a", "objectnet")


def load_split(
    source: str,
    *,
    path: str | os.PathLike | None = None,
    split_file: str | os.PathLike | None = None,
    split_sha256: str | None = None,
    follow_links: bool = False,
    **options,
) -> Split:
    """Opens an image set by name.

    Args:
      source: `renditions` (packaged), `synthetic`, `folder`, `tfds:<name>`, `arrays`, or a
        benchmark: `cifar100`, `cub200`, `imagenet_r`, `imagenet_a`, `vtab`, `omnibenchmark`,
        `objectnet`.
      path: the image folder, or the data folder of tensorflow-datasets. A benchmark takes either.
        `~` is the home folder.
      split_file: a user's split (`splits.read_split_file`); all images are divided by it.
      split_sha256: the expected `fingerprint` of the split.
      follow_links: follow links that lead out of an image folder.
      **options: for `synthetic` its arguments; for `arrays` `train` and `test`, each a pair of
        images and labels, and `class_names`.

    Raises:
      DataError: an unknown source, a missing or unused argument, or an error of the source.
    """
    splitter = None
    if split_file is not None:
        splitter = functools.partial(_by_file, os.path.expanduser(split_file))
    if path is not None:
        path = pathlib.Path(os.path.expanduser(path))
    if source in ("renditions", "synthetic", "arrays"):
        if path is not None or splitter is not None:
            raise DataError(
                f"source {source!r}: expected no path and no split file, found "
                f"{path if path is not None else split_file}"
            )
        make = {
            "renditions": packaged.renditions,
            "synthetic": packaged.synthetic,
            "arrays": _from_pairs,
        }[source]
        try:
            inspect.signature(make).bind(**options)
        except TypeError as error:
            known = ", ".join(inspect.signature(make).parameters)
            raise DataError(
                f"source {source!r}: expected options of {known}, found {error}"
            ) from None
        split = make(**options)
    elif options:
        raise DataError(f"source {source!r}: expected no further options, found {sorted(options)}")
    elif source == "folder" or (source in BENCHMARKS and BENCHMARKS[source] is None):
        if path is None:
            raise DataError(f"source {source!r}: expected the path of an image folder, found none")
        split = open_folder(path, _rule(source, path, splitter), follow_links)
    elif source in BENCHMARKS:
        name = BENCHMARKS[source]
        if path is None or (path / name).is_dir():
            split = open_tfds(name, path, splitter)
        elif path.is_dir() and not any(path.iterdir()):
            raise DataError(
                f"{path}: expected train/<class>/* and test/<class>/*, or {name}/ of "
                "tensorflow-datasets, found an empty folder. To fill it: "
                f"python -m qkd_jax data prepare {source} --path {shlex.quote(str(path))}"
            )
        else:
            split = open_folder(path, _rule(source, path, splitter), follow_links)
    elif source.startswith("tfds:") and source != "tfds:":
        if path is not None and os.path.exists(path) and not os.path.isdir(path):
            raise DataError(f"{path}: expected a data folder, found a file")
        split = open_tfds(source.removeprefix("tfds:"), path, splitter)
    else:
        known = ["renditions", "synthetic", "arrays", "folder", "tfds:<name>", *BENCHMARKS]
        raise DataError(f"data.source: expected one of {', '.join(known)}, found {source!r}")
    found = fingerprint(split)
    if split_sha256 is not None and found != split_sha256:
        raise DataError(f"{source}: expected split sha256 {split_sha256}, found {found}")
    return split


def fingerprint(split: Split) -> str:
    """sha256 of which image is on which side (`splits.split_sha256`), to quote with a number.

    A leading `train/` or `test/` is removed from the ids, so that a set divided into folders has
    the same fingerprint as when it is divided by a split file.
    """
    ids = [name.removeprefix("train/") for name in split.train.ids.tolist()]
    ids += [name.removeprefix("test/") for name in split.test.ids.tolist()]
    return splits.split_sha256(ids, np.arange(len(ids)) >= len(split.train))


def describe(split: Split) -> str:
    """One line: numbers of images and classes, the fingerprint, and its name if it is known."""
    found = fingerprint(split)
    name = splits.KNOWN_SPLITS.get(found)
    return (
        f"{len(split.train)} train and {len(split.test)} test images of "
        f"{len(split.train.class_names)} classes, split sha256 {found}"
        + (f" ({name})" if name else "")
    )


def _by_file(path: str | os.PathLike, ids: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return splits.read_split_file(path, ids.tolist())


def _rule(source: str, path: pathlib.Path, splitter: Splitter | None) -> Splitter | None:
    if splitter is None and source in UNSPLIT and not any(find_parts(path)):
        return splits.fifth_to_test
    return splitter


def _from_pairs(train: tuple, test: tuple, class_names: tuple[str, ...] | None = None) -> Split:
    for side, pair in (("train", train), ("test", test)):
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise DataError(f"arrays/{side}: expected a pair (images, labels), found {type(pair)}")
    if class_names is None:
        labels = np.concatenate([np.ravel(train[1]), np.ravel(test[1])])
        class_names = tuple(str(label) for label in range(int(labels.max(initial=-1)) + 1))
    return Split(
        train=from_arrays(*train, class_names=class_names, name="arrays/train"),
        test=from_arrays(*test, class_names=class_names, name="arrays/test"),
    )
