"""The manifest of a checkpoint: the SHA-256 of each of its files, written before the checkpoint is
visible and compared before it is read.
"""

import hashlib
import json
import os
from pathlib import Path

from qkd_jax.errors import CheckpointError
from qkd_jax.reports.writing import sync_folder, write_atomically

NAME = "manifest"  # the part of a checkpoint that holds it
FILE = f"{NAME}/sha256.json"
# Orbax's own notes on a checkpoint: written last, and listing its parts.
NOTES = "_CHECKPOINT_METADATA"


def write_manifest(checkpoint: Path, parts: tuple[str, ...], target: Path) -> None:
    """Writes the hashes of all files in some parts (folders) of a checkpoint to the folder
    `target`. They and their folders are on the disk when this returns.
    """
    hashes = {}
    for part in parts:
        for folder, _, names in sorted(os.walk(checkpoint / part)):
            for name in sorted(names):
                path = Path(folder) / name
                hashes[path.relative_to(checkpoint).as_posix()] = _sha256(path, sync=True)
            sync_folder(Path(folder))
    write_atomically(target / Path(FILE).name, (json.dumps(hashes, indent=1) + "\n").encode())


def damage_of(checkpoint: Path) -> str | None:
    """What differs from the manifest of a checkpoint, "" if nothing does; None for a checkpoint of
    a version that wrote no manifest.

    Raises:
      CheckpointError: a file is there, but cannot be read.
    """
    try:
        return _damage_of(checkpoint)
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or checkpoint} cannot be read: {error.strerror}; make it readable, "
            "or restore it from a copy"
        ) from None


def _damage_of(checkpoint: Path) -> str | None:
    try:
        notes = json.loads((checkpoint / NOTES).read_bytes())
    except FileNotFoundError:
        return f"{NOTES} is missing"
    except (ValueError, RecursionError):
        return f"{NOTES} is no JSON"
    handlers = notes.get("item_handlers") if isinstance(notes, dict) else None
    if not isinstance(handlers, dict) or NAME not in handlers:
        if not (checkpoint / NAME).exists():
            return None
    try:
        hashes = json.loads((checkpoint / FILE).read_bytes())
    except FileNotFoundError:
        return f"{FILE} is missing"
    except (ValueError, RecursionError):
        return f"{FILE} is no JSON"
    if not isinstance(hashes, dict) or any(".." in Path(name).parts for name in hashes):
        return f"{FILE} is no manifest"
    for name, expected in hashes.items():
        try:
            if _sha256(checkpoint / name) != expected:
                return f"{name} is not as it was written (SHA-256)"
        except FileNotFoundError:
            return f"{name} is missing"
    return ""


def _sha256(path: Path, *, sync: bool = False) -> str:
    with open(path, "rb") as file:
        if sync:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()
