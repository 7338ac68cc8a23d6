"""Image folders: `train/<class>/*` and `test/<class>/*`, or `<class>/*` with a rule to split."""

import os
import pathlib

import numpy as np

from qkd_jax.data.examples import Split
from qkd_jax.data.image_set import ImageSet
from qkd_jax.data.scan import Scan, Splitter, find_parts, holds_folders, shown
from qkd_jax.data.splits import HOW_TO_SPLIT
from qkd_jax.errors import DataError


def open_folder(
    path: str | os.PathLike, splitter: Splitter | None = None, follow_links: bool = False
) -> Split:
    """Opens an image folder; images are decoded when they are loaded.

    Ids are `train/<class>/<file>` and `test/<class>/<file>`, whatever the names of the two parts,
    or `<class>/<file>` with a `splitter`. Accents in them are composed (NFC).

    Args:
      path: holds `train/` (or `training/`, in any case) and `test/` (`testing/`), each with one
        folder a class; without a test part `val/` (`validation/`, `valid/`) is tested on, with one
        it is left alone. Or, with a `splitter`, one folder per class. Hidden files and loose files
        beside the class folders are passed over.
      splitter: (ids [N], labels [N]) -> bool [N], True for test.
      follow_links: also follow links that lead out of the folder; others are always followed.

    Raises:
      DataError: lists all problems: no such folders, two that could be the same part, empty ones,
        empty files, links that are broken or lead out, names that are not UTF-8 or differ only in
        how accents are composed, classes that differ between train and test.
    """
    root = pathlib.Path(path)
    train, test = find_parts(root, ImageSet.noun)
    scan = Scan(root, follow_links)
    name = root.absolute().name
    if splitter is not None:
        # A class may also have the name "train" or "val"; then it holds images and no folders.
        train, test = (part if part and holds_folders(part) else None for part in (train, test))
        if train and test:
            raise DataError(
                f"{shown(root)}: expected <class>/* to split, found {train.name}/ and "
                f"{test.name}/, which are already split; leave the split file out"
            )
        if not train and not test:
            everything = _image_set(_classes(scan, root), "", name, scan)
            is_test = splitter(everything.ids, everything.labels)
            return Split(
                train=everything.take(np.flatnonzero(~is_test), f"{everything.name}/train"),
                test=everything.take(np.flatnonzero(is_test), f"{everything.name}/test"),
            )
    if not train or not test:
        raise DataError(_what_is_missing(root, train or test))
    trained, tested = _classes(scan, train), _classes(scan, test)
    scan.compare((f"{train.name}/", trained), (f"{test.name}/", tested))
    return Split(
        train=_image_set(trained, "train/", f"{name}/{train.name}", scan),
        test=_image_set(tested, "test/", f"{name}/{test.name}", scan),
    )


def _what_is_missing(root: pathlib.Path, only: pathlib.Path | None) -> str:
    expected = f"{shown(root)}: expected train/<class>/* and test/<class>/* (or val/<class>/*)"
    if only:
        return (
            f"{expected}, found {only.name}/ alone. To divide the images of {only.name}/, give "
            f"{shown(only)} as the path, together with a split file (data.split_file); "
            f"{HOW_TO_SPLIT}"
        )
    found = f"other folders; {HOW_TO_SPLIT}" if any(root.iterdir()) else "an empty folder"
    return f"{expected}, or <class>/* together with a split file (data.split_file), found {found}"


def _classes(scan: Scan, part: pathlib.Path) -> dict[str, dict[str, pathlib.Path]]:
    """Class name -> file name -> file, sorted by the names on disk."""
    if not scan.may_be_read(part):
        return {}
    classes = {}
    for name, folder in scan.entries(part):
        if not folder.is_dir():
            continue
        files = {
            file_name: pathlib.Path(file.path)
            for file_name, file in scan.entries(folder.path)
            if scan.is_file(file, "an image")
        }
        if not files:
            scan.note(folder, "class folder without an image")
        classes[name] = files
    if not classes:
        scan.note(part, f"no class folder; expected {part.name}/<class>/*")
    return classes


def _image_set(
    classes: dict[str, dict[str, pathlib.Path]], prefix: str, name: str, scan: Scan
) -> ImageSet:
    scan.refuse()
    class_names = sorted(classes)
    files = [file for label in class_names for file in classes[label].values()]
    ids = [f"{prefix}{label}/{file}" for label in class_names for file in classes[label]]
    counts = [len(classes[label]) for label in class_names]
    return ImageSet(
        name=shown(name),
        labels=np.repeat(np.arange(len(class_names), dtype=np.int32), counts),
        ids=np.array(ids, str),
        class_names=tuple(class_names),
        fetch=lambda indices: [files[index] for index in indices],
    )
