"""Image folders: `train/<class>/*` and `test/<class>/*`, or `<class>/*` with a rule to split."""

import os
import pathlib
import unicodedata
from collections.abc import Callable

import numpy as np

from qkd_jax.data.image_set import ImageSet, Split
from qkd_jax.data.splits import summarise
from qkd_jax.errors import DataError

LITTER = frozenset({"thumbs.db", "desktop.ini"})

Splitter = Callable[[np.ndarray, np.ndarray], np.ndarray]


def open_folder(path: str | os.PathLike, splitter: Splitter | None = None) -> Split:
    """Opens an image folder; images are decoded when they are loaded.

    Args:
      path: holds `train/` and `test/`, each with one folder a class; or, with a `splitter`, one
        folder a class. Hidden files are passed over.
      splitter: (ids [N], labels [N]) -> bool [N], True for test.

    Raises:
      DataError: with all problems found: no such folders, empty ones, empty files, links that lead
        out of the root, classes that differ between train and test.
    """
    root = pathlib.Path(path)
    if not root.is_dir():
        raise DataError(f"{root}: no such folder")
    parts = [part for part in ("train", "test") if (root / part).is_dir()]
    if len(parts) == 1 or (not parts and splitter is None):
        missing = " and ".join(f"{part}/" for part in ("train", "test") if part not in parts)
        raise DataError(
            f"{root}: {missing} missing; expected train/<class>/* and test/<class>/*, or <class>/* "
            "together with a split file"
        )
    problems: list[str] = []
    if not parts:
        everything = _image_set(root, _scan(root, root, problems), root.name, problems)
        is_test = splitter(everything.ids, everything.labels)
        return Split(
            train=everything.take(np.flatnonzero(~is_test), f"{root.name}/train"),
            test=everything.take(np.flatnonzero(is_test), f"{root.name}/test"),
        )
    if splitter is not None:
        raise DataError(f"{root}: already split into train/ and test/; leave the split file out")
    train, test = (_scan(root / part, root, problems) for part in parts)
    problems += [f"class {name!r} is in train/ but not in test/" for name in train.keys() - test]
    problems += [f"class {name!r} is in test/ but not in train/" for name in test.keys() - train]
    return Split(
        train=_image_set(root, train, f"{root.name}/train", problems),
        test=_image_set(root, test, f"{root.name}/test", problems),
    )


def _scan(part: pathlib.Path, root: pathlib.Path, problems: list[str]) -> dict[str, list]:
    """Files of each class in sorted order; what is wrong is appended to `problems`."""
    inside = root.resolve()

    def escapes(entry: os.DirEntry) -> bool:
        if not entry.is_symlink():
            return False
        target = pathlib.Path(entry.path).resolve()
        if not target.exists():
            problems.append(f"{entry.path}: link to {target}, which does not exist")
        elif not target.is_relative_to(inside):
            problems.append(f"{entry.path}: link out of the folder, to {target}")
        else:
            return False
        return True

    classes: dict[str, list] = {}
    with os.scandir(part) as folders:
        folders = sorted((entry for entry in folders), key=lambda entry: entry.name)
    for folder in folders:
        if folder.name.startswith(".") or escapes(folder) or not folder.is_dir():
            continue
        files = []
        with os.scandir(folder.path) as entries:
            entries = sorted((entry for entry in entries), key=lambda entry: entry.name)
        for entry in entries:
            if entry.name.startswith(".") or entry.name.lower() in LITTER or escapes(entry):
                continue
            if entry.is_dir():
                problems.append(f"{entry.path}: a folder where an image is expected")
            elif entry.stat().st_size == 0:
                problems.append(f"{entry.path}: the file is empty (0 bytes)")
            else:
                files.append(pathlib.Path(entry.path))
        if not files:
            problems.append(f"{folder.path}: class folder without an image")
        # File systems differ in how they compose accents; the class must not.
        classes[unicodedata.normalize("NFC", folder.name)] = files
    if not classes:
        problems.append(f"{part}: no class folder; expected {part.name}/<class>/*")
    return classes


def _image_set(root: pathlib.Path, classes: dict, name: str, problems: list[str]) -> ImageSet:
    if problems:
        raise DataError(f"{root}: {len(problems)} problems:{summarise(sorted(problems))}")
    names = sorted(classes)
    files = [file for label in names for file in classes[label]]
    ids = [unicodedata.normalize("NFC", file.relative_to(root).as_posix()) for file in files]
    return ImageSet(
        name=name,
        labels=np.repeat(np.arange(len(names), dtype=np.int32), [len(classes[k]) for k in names]),
        ids=np.array(ids, str),
        class_names=tuple(names),
        fetch=lambda indices: [files[index] for index in indices],
    )
