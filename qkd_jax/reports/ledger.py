"""The ledger of a run folder, files.json: length and SHA-256 of each file that the run wrote.

Before a file changes, the ledger has its old and its new content, so that a kill at any moment
leaves files that agree with it. Whoever reads a run compares first. Figures and pages are not in
it, since they can be drawn again, and checkpoints have manifests of their own.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from qkd_jax.errors import DataError
from qkd_jax.reports.writing import write_atomically

LEDGER = "files.json"
# What environment.json says, so that a ledger that is gone is missed.
NOTED = {"files": LEDGER}
# Only these grow: their beginning must be as it was written.
GROWING = ".jsonl"
# What a run writes anew from its checkpoint, settings and data, or can go on without.
WRITTEN_ANEW = ("class_order.json", "matrix.json", "summary.json", "examples.json", "circuit.txt")
LEDGER_ADVICE = (
    "restore it from a copy, or give the command that began the run, which takes the files as they "
    "are if it is gone"
)

Entry = tuple[int, str]


class Ledger:
    """The ledger of one run folder, of the process that writes there."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self._entries: dict[str, list[Entry]] = {}
        self._hashed: dict[str, tuple[int, Any]] = {}  # of growing files, up to a length

    def read(self) -> Ledger:
        """Takes over what an earlier process wrote, if there is a ledger; returns itself.

        Raises:
          DataError: it is damaged.
        """
        self._entries = _read(self.folder) or {}
        return self

    def write(self, contents: dict[str, bytes]) -> None:
        """Writes files, in this order, each of them whole or not at all; names are relative."""
        for name, entries in self._entries.items():
            self._entries[name] = entries[-1:]  # what was written before is complete
        for name, content in contents.items():
            new = _entry(content)
            self._entries[name] = [e for e in self._entries.get(name, []) if e != new] + [new]
            self._hashed.pop(name, None)
        self._save()
        for name, content in contents.items():
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, content)

    def grow(self, *names: str) -> None:
        """Takes over what was appended to files; those that are not there are left out."""
        for name in names:
            try:
                file = open(self.folder / name, "rb")
            except FileNotFoundError:
                continue
            with file:
                os.fsync(file.fileno())
                length, digest = self._hashed.get(name, (0, hashlib.sha256()))
                file.seek(length)
                more = file.read()
            digest.update(more)
            self._hashed[name] = length + len(more), digest
            self._entries[name] = [(length + len(more), digest.hexdigest())]
        self._save()

    def lose(self, *names: str) -> None:
        """Notes that files are gone for good."""
        self._entries |= {name: [] for name in names}
        self._save()

    def adopt(self, *names: str) -> None:
        """Takes over files as they are, of a run that had no ledger."""
        for name in names:
            self._entries[name] = [_entry((self.folder / name).read_bytes())]
        self._save()

    def agrees(self, name: str, content: bytes) -> bool:
        """Whether the last content of a file was this one."""
        return self._entries.get(name, [])[-1:] == [_entry(content)]

    def _save(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        files = {name: self._entries[name] for name in sorted(self._entries)}
        content = {"files": files, "sha256": _sealed(files)}
        write_atomically(self.folder / LEDGER, (json.dumps(content, indent=1) + "\n").encode())


def missing_files(folder: Path) -> tuple[str, ...]:
    """Compares every file of a run with its ledger; a run of a version without one is not compared.

    Returns:
      The names of files that are gone, and of logs that lost lines.

    Raises:
      DataError: the ledger is gone or damaged, or the content of a file is not what the run wrote,
        which is named.
    """
    folder = Path(folder)
    for _ in range(3):  # a run that is going on may write between the two reads
        entries = _read(folder)
        if entries is None:
            if needs_ledger(folder):
                raise DataError(
                    f"{folder / LEDGER} is missing, so that the files of the run cannot be "
                    f"compared with what it wrote; {LEDGER_ADVICE}"
                )
            return ()
        gone, changed = [], []
        for name, known in entries.items():
            try:
                content = (folder / name).read_bytes()
            except FileNotFoundError:
                gone.append(name)
                continue
            if known and not any(_is(name, content, entry) for entry in known):
                (gone if name.endswith(GROWING) else changed).append(name)
        if not changed:
            return tuple(name for name in gone if entries[name])
    path, advice = folder / changed[0], "restore it from a copy"
    if path.name in WRITTEN_ANEW or "predictions" in Path(changed[0]).parts:
        advice += (
            ", or delete it and give the command that began the run, which keeps what was learned"
        )
    raise DataError(
        f"{path}: expected what the run wrote (SHA-256 in {LEDGER}), found another content; "
        f"{advice}"
    )


def lost_files(folder: Path) -> tuple[str, ...]:
    """The names of files that the run itself found to be gone for good."""
    return tuple(name for name, known in (_read(folder) or {}).items() if not known)


def needs_ledger(folder: Path) -> bool:
    """Whether a run must have a ledger, but has none."""
    try:
        environment = json.loads((folder / "environment.json").read_bytes())
    except (OSError, ValueError, RecursionError):  # told by whoever needs it
        return False
    noted = isinstance(environment, dict) and environment.get("files") == LEDGER
    return noted and not (folder / LEDGER).exists()


def _read(folder: Path) -> dict[str, list[Entry]] | None:
    path = folder / LEDGER
    try:
        content = json.loads(path.read_bytes())
        files = content["files"]
        whole = content["sha256"] == _sealed(files)
        entries = {
            name: [(int(length), str(digest)) for length, digest in known]
            for name, known in files.items()
        }
        whole &= not any(Path(n).is_absolute() or ".." in Path(n).parts for n in entries)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        whole = False
    if not whole:
        raise DataError(f"{path} is damaged; delete it, or {LEDGER_ADVICE}")
    return entries


def _is(name: str, content: bytes, entry: Entry) -> bool:
    length, _ = entry
    if name.endswith(GROWING):
        return len(content) >= length and _entry(content[:length]) == entry
    return _entry(content) == entry


def _entry(content: bytes) -> Entry:
    return len(content), hashlib.sha256(content).hexdigest()


def _sealed(files: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
