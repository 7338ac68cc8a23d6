"""Image folders: `train/<class>/*` and `test/<class>/*`, or `<class>/*` with a rule to split."""

import os
import pathlib
import unicodedata
from collections.abc import Callable

import numpy as np

from qkd_jax.data.examples import Split
from qkd_jax.data.image_set import ImageSet
from qkd_jax.data.splits import summarise
from qkd_jax.errors import DataError

# Files that operating systems and file servers leave behind; hidden files are ignored as well.
LITTER = frozenset({"thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx", "@eadir"})
# Names of the parts of a folder, in any case. A validation part is tested on if there is no test
# part.
TRAIN = ("train", "training")
TEST = ("test", "testing")
VALIDATION = ("val", "validation", "valid")

Splitter = Callable[[np.ndarray, np.ndarray], np.ndarray]


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
    train, test = find_parts(root)
    scan = _Scan(root, follow_links)
    name = root.absolute().name
    if splitter is not None:
        # A class may also have the name "train" or "val"; then it holds images and no folders.
        train, test = (part if part and _holds_folders(part) else None for part in (train, test))
        if train and test:
            raise DataError(
                f"{shown(root)}: expected <class>/* to split, found {train.name}/ and "
                f"{test.name}/, which are already split; leave the split file out"
            )
        if not train and not test:
            everything = _image_set(scan.classes(root), "", name, scan)
            is_test = splitter(everything.ids, everything.labels)
            return Split(
                train=everything.take(np.flatnonzero(~is_test), f"{everything.name}/train"),
                test=everything.take(np.flatnonzero(is_test), f"{everything.name}/test"),
            )
    if not train or not test:
        raise DataError(_what_is_missing(root, train or test))
    trained, tested = scan.classes(train), scan.classes(test)
    if trained and tested:
        here, there = f"{train.name}/", f"{test.name}/"
        only = [(name, here, there) for name in trained.keys() - tested]
        only += [(name, there, here) for name in tested.keys() - trained]
        scan.problems += [f"class {name!r} is in {one} but not in {two}" for name, one, two in only]
    return Split(
        train=_image_set(trained, "train/", f"{name}/{train.name}", scan),
        test=_image_set(tested, "test/", f"{name}/{test.name}", scan),
    )


def find_parts(root: pathlib.Path) -> tuple[pathlib.Path | None, pathlib.Path | None]:
    """The folders to train and to test on, found by their names; None where there is none.

    Raises:
      DataError: there is no such folder, or several could be the same part.
    """
    if not os.path.isdir(root):
        found = "a file" if os.path.exists(root) else "nothing of this name"
        raise DataError(f"{shown(root)}: expected a folder of images, found {found}")
    try:
        folders = sorted(entry for entry in root.iterdir() if entry.is_dir())
    except OSError as error:
        raise DataError(f"{shown(root)}: cannot be read ({error.strerror})") from None

    def part(names: tuple[str, ...]) -> pathlib.Path | None:
        found = [entry for entry in folders if entry.name.lower() in names]
        if len(found) > 1:
            raise DataError(
                f"{shown(root)}: expected one folder of {', '.join(names)}, found "
                f"{' and '.join(f'{entry.name}/' for entry in found)}. Rename or move one."
            )
        return found[0] if found else None

    return part(TRAIN), part(TEST) or part(VALIDATION)


def _holds_folders(part: pathlib.Path) -> bool:
    try:
        return any(entry.is_dir() and not _is_litter(entry.name) for entry in part.iterdir())
    except OSError:
        return True  # the error is reported when it is read


def _what_is_missing(root: pathlib.Path, only: pathlib.Path | None) -> str:
    expected = f"{shown(root)}: expected train/<class>/* and test/<class>/* (or val/<class>/*)"
    if only:
        return (
            f"{expected}, found {only.name}/ alone. To divide the images of {only.name}/, give "
            f"{shown(only)} as the path, together with a split file (data.split_file)"
        )
    found = "other folders" if any(root.iterdir()) else "an empty folder"
    return f"{expected}, or <class>/* together with a split file (data.split_file), found {found}"


class _Scan:
    """A search of folders that collects all problems."""

    def __init__(self, root: pathlib.Path, follow_links: bool) -> None:
        self.root, self.inside = root, os.path.realpath(root)
        self.follow_links = follow_links
        self.problems: list[str] = []

    def classes(self, part: pathlib.Path) -> dict[str, dict[str, pathlib.Path]]:
        """Class name -> file name -> file, sorted by the names on disk."""
        if not self._may_be_read(part):
            return {}
        classes = {}
        for name, folder in self._entries(part):
            if not folder.is_dir():
                continue
            files = {
                file_name: pathlib.Path(file.path)
                for file_name, file in self._entries(folder.path)
                if self._is_image(file)
            }
            if not files:
                self._note(folder, "class folder without an image")
            classes[name] = files
        if not classes:
            self._note(part, f"no class folder; expected {part.name}/<class>/*")
        return classes

    def _entries(self, folder: str | os.PathLike) -> list[tuple[str, os.DirEntry]]:
        """(composed name, entry) of what is in a folder, without litter and problems."""
        try:
            with os.scandir(folder) as scanned:
                entries = sorted(scanned, key=lambda entry: entry.name)
        except OSError as error:
            self._note(folder, f"cannot be read ({error.strerror})")
            return []
        named: dict[str, os.DirEntry] = {}
        for entry in entries:
            # File systems differ in how they compose accents; classes and ids must not.
            name = unicodedata.normalize("NFC", entry.name)
            if _is_litter(name) or not self._may_be_read(entry):
                continue
            if shown(name) != name:
                self._note(entry, "expected a name in UTF-8, found other bytes. Rename it")
            elif name in named:
                self._note(
                    entry,
                    f"expected names that differ in more than how accents are composed, found "
                    f"{named[name].name!a} and {entry.name!a}. Rename one",
                )
            else:
                named[name] = entry
        return list(named.items())

    def _is_image(self, file: os.DirEntry) -> bool:
        try:
            if file.is_dir():
                problem = "a folder where an image is expected"
            elif not file.is_file():
                problem = "expected a file, found a pipe or device"
            elif file.stat().st_size == 0:
                problem = "the file is empty (0 bytes)"
            else:
                return True
        except OSError as error:
            problem = f"cannot be read ({error.strerror})"
        self._note(file, problem)
        return False

    def _may_be_read(self, path: pathlib.Path | os.DirEntry) -> bool:
        if not path.is_symlink():
            return True
        target = os.path.realpath(path)
        if not os.path.exists(path):  # also for a loop of links
            self._note(path, f"link to {shown(target)}, which does not exist")
        elif not self.follow_links and not pathlib.Path(target).is_relative_to(self.inside):
            self._note(
                path,
                f"link out of the folder, to {shown(target)}; data.follow_links=true follows it",
            )
        else:
            return True
        return False

    def _note(self, path: str | os.PathLike, problem: str) -> None:
        self.problems.append(f"{shown(path)}: {problem}")


def _image_set(
    classes: dict[str, dict[str, pathlib.Path]], prefix: str, name: str, scan: _Scan
) -> ImageSet:
    if scan.problems:
        raise DataError(
            f"{shown(scan.root)}: {len(scan.problems)} problems:{summarise(sorted(scan.problems))}"
        )
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


def _is_litter(name: str) -> bool:
    return name.startswith(".") or name.lower() in LITTER


def shown(path: str | os.PathLike) -> str:
    """The path as printable text, with escapes for bytes that are not UTF-8."""
    return os.fspath(path).encode("utf-8", "backslashreplace").decode()
