"""One call for every set: packaged ones, folders, arrays, tensorflow-datasets."""

import functools
import inspect
import os
import pathlib
import shlex
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from qkd_jax.data import packaged, splits
from qkd_jax.data.examples import Split
from qkd_jax.data.folder import open_folder
from qkd_jax.data.image_set import ImageSet, from_arrays
from qkd_jax.data.scan import Splitter, find_parts
from qkd_jax.data.text_files import open_texts
from qkd_jax.data.text_set import TextSet
from qkd_jax.data.tfds_source import open_tfds, prepare
from qkd_jax.errors import DataError

__all__ = [
    "ImageSet",
    "Split",
    "TextSet",
    "describe",
    "fingerprint",
    "from_arrays",
    "has_margin",
    "load_split",
    "prepare",
    "register_source",
    "source_names",
]

# Benchmarks of the field and their names in tensorflow-datasets; None = only as a folder (VTAB is
# the 50-class subset of the class-incremental literature).
BENCHMARKS = {
    "cifar100": "cifar100",
    "cub200": "caltech_birds2011",
    "imagenet_r": "imagenet_r",
    "imagenet_a": "imagenet_a",
    "vtab": None,
    "omnibenchmark": None,
    "objectnet": None,
    "ag_news": "ag_news_subset",
}
# Sources of texts; a path is a folder as `open_texts` reads it, and else as `open_folder` does.
TEXTS = ("texts", "ag_news")
# Benchmarks without a split, which `splits.fifth_to_test` divides.
UNSPLIT = ("imagenet_r", "imagenet_a", "objectnet")


class Source(NamedTuple):
    """A source from outside the package.

    Attributes:
      open: the path that was given, or None, -> `Split`.
      margin: whether test views of its images lose their border (`ImageSet.margin`).
    """

    open: Callable[[pathlib.Path | None], Split]
    margin: bool


_OWN: dict[str, Source] = {}


def register_source(
    name: str, open: Callable[[pathlib.Path | None], Split], *, margin: bool = True
) -> None:
    """Makes `data.source=<name>` open a set of one's own; for plugins.

    Args:
      name: of the source.
      open: called with `data.path`, or None where that is empty; returns the `Split`.
      margin: whether test views of its images lose their border, as photographs do.

    Raises:
      DataError: the name is one of the library's sources.
    """
    if name in (*WITHOUT_PATH, "folder", "texts", *BENCHMARKS) or name.startswith("tfds:"):
        raise DataError(f"source {name!r}: expected a new name, found one of the library's")
    _OWN[name] = Source(open, margin)


def load_split(
    source: str,
    *,
    path: str | os.PathLike | None = None,
    split_file: str | os.PathLike | None = None,
    splitter: Splitter | None = None,
    split_sha256: str | None = None,
    follow_links: bool = False,
    text_column: str = "text",
    label_column: str = "label",
    **options,
) -> Split:
    """Opens a set by name.

    Args:
      source: images: `renditions` (packaged), `synthetic`, `folder`, `arrays`, or a benchmark:
        `cifar100`, `cub200`, `imagenet_r`, `imagenet_a`, `vtab`, `omnibenchmark`, `objectnet`.
        Texts: `glosses` (packaged), `texts`, or the benchmark `ag_news`. Either: `tfds:<name>`.
      path: the folder of images or texts, or the data folder of tensorflow-datasets. A benchmark
        takes either. `~` is the home folder.
      split_file: a user's split (`splits.read_split_file`); all examples are divided by it.
      splitter: a rule in place of a file, such as `splits.fifth_to_test`: (ids [N], labels [N]) ->
        bool [N], True for test.
      split_sha256: the expected `fingerprint` of the split.
      follow_links: follow links that lead out of a folder of images or texts.
      text_column, label_column: names of the columns, where texts are in tables.
      **options: for `synthetic` its arguments; for `arrays` `train` and `test`, each a pair of
        images and labels, and `class_names`.

    Raises:
      DataError: an unknown source, a missing or unused argument, or an error of the source.
    """
    if split_file is not None and splitter is not None:
        raise DataError("load_split: expected split_file or splitter, found both")
    if split_file is not None:
        splitter = functools.partial(_by_file, os.path.expanduser(split_file))
    if path is not None:
        path = pathlib.Path(os.path.expanduser(path))

    def open_path() -> Split:
        if path is None:
            what = "texts" if source in TEXTS else "images"
            raise DataError(
                f"source {source!r}: expected the path of a folder of {what}, found none; name "
                "it by --data PATH, in `data check` by --path PATH, in Python by path="
            )
        if source in TEXTS:
            return open_texts(path, splitter, follow_links, text_column, label_column)
        return open_folder(path, _rule(source, path, splitter), follow_links)

    if source in _OWN:
        if splitter is not None or options:
            raise DataError(f"source {source!r}: expected a path at most, found further options")
        split = _OWN[source].open(path)
    elif source in WITHOUT_PATH:
        if path is not None or splitter is not None:
            raise DataError(
                f"source {source!r}: expected no path and no split file, found "
                f"{path or split_file or 'a splitter'}"
            )
        make = WITHOUT_PATH[source]
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
    elif source in ("folder", "texts") or (source in BENCHMARKS and BENCHMARKS[source] is None):
        split = open_path()
    elif source in BENCHMARKS:
        name = BENCHMARKS[source]
        if path is None or (path / name).is_dir():
            split = open_tfds(name, path, splitter)
        elif path.is_dir() and not any(path.iterdir()):
            end = ".txt" if source in TEXTS else "/*"
            raise DataError(
                f"{path}: expected train/<class>{end} and test/<class>{end}, or {name}/ of "
                "tensorflow-datasets, found an empty folder. To fill it: "
                f"python -m qkd_jax data prepare {source} --path {shlex.quote(str(path))}"
            )
        else:
            split = open_path()
    elif source.startswith("tfds:") and source != "tfds:":
        if path is not None and os.path.exists(path) and not os.path.isdir(path):
            raise DataError(f"{path}: expected a data folder, found a file")
        split = open_tfds(source.removeprefix("tfds:"), path, splitter)
    else:
        known = ", ".join(source_names())
        raise DataError(f"data.source: expected one of {known}, found {source!r}")
    found = fingerprint(split)
    if split_sha256 is not None and found != split_sha256:
        raise DataError(f"{source}: expected split sha256 {split_sha256}, found {found}")
    return split


def source_names() -> list[str]:
    """What `load_split` takes."""
    return [*_OWN, *WITHOUT_PATH, "folder", "texts", "tfds:<name>", *BENCHMARKS]


def has_margin(source: str) -> bool:
    """Whether test views of the images of a source lose their border (`ImageSet.margin`)."""
    return _OWN[source].margin if source in _OWN else source not in WITHOUT_PATH


def fingerprint(split: Split) -> str:
    """sha256 of which example is on which side (`splits.split_sha256`), to quote with a number.

    A leading `train/` or `test/` is removed from the ids, so that a set divided into folders has
    the same fingerprint as when it is divided by a split file.
    """
    ids = [name.removeprefix("train/") for name in split.train.ids.tolist()]
    ids += [name.removeprefix("test/") for name in split.test.ids.tolist()]
    return splits.split_sha256(ids, np.arange(len(ids)) >= len(split.train))


def describe(split: Split) -> str:
    """One line: numbers of examples and classes, the fingerprint, and its name if it is known."""
    found = fingerprint(split)
    name = splits.KNOWN_SPLITS.get(found)
    return (
        f"{len(split.train)} train and {len(split.test)} test {split.test.noun}s of "
        f"{len(split.train.class_names)} classes, split sha256 {found}"
        + (f" ({name})" if name else "")
    )


def _by_file(path: str | os.PathLike, ids: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return splits.read_split_file(path, ids.tolist())


def _rule(source: str, path: pathlib.Path, splitter: Splitter | None) -> Splitter | None:
    if splitter is None and source in UNSPLIT and not any(find_parts(path, ImageSet.noun)):
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


# Sources that need no path; their images fill the frame.
WITHOUT_PATH = {
    "renditions": packaged.renditions,
    "glosses": packaged.glosses,
    "synthetic": packaged.synthetic,
    "arrays": _from_pairs,
}
