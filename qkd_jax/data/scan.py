"""A search of the folders of a set: parts, names, links, and all problems at once."""

import os
import pathlib
import unicodedata
from collections.abc import Callable, Iterable

import numpy as np

from qkd_jax.data.examples import counted
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


def find_parts(
    root: pathlib.Path, noun: str, suffixes: tuple[str, ...] = ()
) -> tuple[pathlib.Path | None, pathlib.Path | None]:
    """The folders to train and to test on, found by their names; None where there is none.

    Args:
      root: the folder with both.
      noun: what they hold, in errors.
      suffixes: find files with one of these instead of folders.

    Raises:
      DataError: there is no such folder, or several could be the same part.
    """
    if not os.path.isdir(root):
        found = "a file" if os.path.exists(root) else "nothing of this name"
        raise DataError(f"{shown(root)}: expected a folder of {noun}s, found {found}")
    try:
        entries = sorted(root.iterdir())
    except OSError as error:
        raise DataError(f"{shown(root)}: cannot be read ({error.strerror})") from None

    kind, end = ("file", "") if suffixes else ("folder", "/")
    named = {
        entry: entry.stem.lower() if suffixes else entry.name.lower()
        for entry in entries
        if entry.is_dir() != bool(suffixes) and (entry.suffix.lower() in suffixes or not suffixes)
    }

    def part(names: tuple[str, ...]) -> pathlib.Path | None:
        found = [entry for entry, name in named.items() if name in names]
        if len(found) > 1:
            raise DataError(
                f"{shown(root)}: expected one {kind} of {', '.join(names)}, found "
                f"{' and '.join(f'{entry.name}{end}' for entry in found)}. Rename or move one."
            )
        return found[0] if found else None

    return part(TRAIN), part(TEST) or part(VALIDATION)


class Scan:
    """A search of folders that collects all problems."""

    def __init__(self, root: pathlib.Path, follow_links: bool) -> None:
        self.root, self.inside = root, os.path.realpath(root)
        self.follow_links = follow_links
        self.problems: list[str] = []

    def entries(self, folder: str | os.PathLike) -> list[tuple[str, os.DirEntry]]:
        """(composed name, entry) of what is in a folder, without litter and problems."""
        try:
            with os.scandir(folder) as scanned:
                entries = sorted(scanned, key=lambda entry: entry.name)
        except OSError as error:
            self.note(folder, f"cannot be read ({error.strerror})")
            return []
        named: dict[str, os.DirEntry] = {}
        for entry in entries:
            # File systems differ in how they compose accents; classes and ids must not.
            name = unicodedata.normalize("NFC", entry.name)
            if is_litter(name) or not self.may_be_read(entry):
                continue
            if shown(name) != name:
                self.note(entry, "expected a name in UTF-8, found other bytes. Rename it")
            elif name in named:
                self.note(
                    entry,
                    f"expected names that differ in more than how accents are composed, found "
                    f"{named[name].name!a} and {entry.name!a}. Rename one",
                )
            else:
                named[name] = entry
        return list(named.items())

    def is_file(self, file: os.DirEntry, expected: str) -> bool:
        """Whether it is a file with something in it, where `expected` is; else notes a problem."""
        try:
            if file.is_dir():
                problem = f"a folder where {expected} is expected"
            elif not file.is_file():
                problem = "expected a file, found a pipe or device"
            elif file.stat().st_size == 0:
                problem = "the file is empty (0 bytes)"
            else:
                return True
        except OSError as error:
            problem = f"cannot be read ({error.strerror})"
        self.note(file, problem)
        return False

    def may_be_read(self, path: pathlib.Path | os.DirEntry) -> bool:
        """Whether it is no link, or one that may be followed; else notes a problem."""
        if not path.is_symlink():
            return True
        target = os.path.realpath(path)
        if not os.path.exists(path):  # also for a loop of links
            self.note(path, f"link to {shown(target)}, which does not exist")
        elif not self.follow_links and not pathlib.Path(target).is_relative_to(self.inside):
            self.note(
                path,
                f"link out of the folder, to {shown(target)}; data.follow_links=true follows it",
            )
        else:
            return True
        return False

    def note(self, path: str | os.PathLike, problem: str) -> None:
        """Adds a problem of a file or folder."""
        self.problems.append(f"{shown(path)}: {problem}")

    def compare(self, one: tuple[str, Iterable[str]], two: tuple[str, Iterable[str]]) -> None:
        """Adds a problem for every class that only one of two parts has.

        Args:
          one, two: the name of a part, and its classes; a part without any was noted before.
        """
        (here, trained), (there, tested) = ((name, set(names)) for name, names in (one, two))
        if trained and tested:
            only = [(name, here, there) for name in trained - tested]
            only += [(name, there, here) for name in tested - trained]
            self.problems += [f"class {name!r} is in {a} but not in {b}" for name, a, b in only]

    def refuse(self) -> None:
        """Raises DataError with all problems, if there are any."""
        if self.problems:
            count = counted(len(self.problems), "problem")
            listed = summarise(sorted(self.problems))
            raise DataError(f"{shown(self.root)}: {count}:{listed}")


def holds_folders(part: pathlib.Path) -> bool:
    """Whether there is a folder in it, beside litter."""
    try:
        return any(entry.is_dir() and not is_litter(entry.name) for entry in part.iterdir())
    except OSError:
        return True  # the error is reported when it is read


def is_litter(name: str) -> bool:
    """Whether a file is hidden, or left behind by an operating system."""
    return name.startswith(".") or name.lower() in LITTER


def shown(path: str | os.PathLike) -> str:
    """The path as printable text, with escapes for bytes that are not UTF-8."""
    return os.fspath(path).encode("utf-8", "backslashreplace").decode()
