"""Outputs of the frozen model on disk, shared by runs of all methods and seeds.

A frozen feature, or the stem that all adapters share, depends on the weights, the input and the
place of the first insert, but on nothing that a run learns. So it is computed once: every row is a
small file, named by the content of the input, in a folder named by everything else it depends on.

Files are written under another name and renamed, so that several processes may read and write at
once, and have a checksum. What cannot be read is computed again. When the store exceeds its limit,
the least recently used folders are removed.
"""

import hashlib
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from qkd_jax.nn.backbone import Backbone

CHECKSUM_BYTES = 4


class Store:
    """Rows of pytrees of arrays that depend on a backbone and an input alone."""

    def __init__(self, folder: Path, limit: int, backbone: str):
        """
        Args:
          folder: shared by all stores of this machine.
          limit: size of the folder, bytes.
          backbone: a text that identifies weights, preprocessing, type and machine.
        """
        self.folder, self.limit, self.backbone = folder, limit, backbone

    def shelf(self, *what: Any) -> "Shelf":
        """The rows of one kind, such as ("stem", first block, image size)."""
        key = hashlib.sha256(repr((self.backbone, what)).encode()).hexdigest()[:24]
        return Shelf(self.folder / key, self.limit)


class Shelf:
    """One folder of rows of equal size."""

    def __init__(self, folder: Path, limit: int):
        self.folder, self.limit = folder, limit
        self.room: int | None = None  # bytes that may still be written; None = not looked yet

    def rows(
        self,
        digests: np.ndarray,
        like: Any,
        compute: Callable[[np.ndarray], Any],
    ) -> Any:
        """The rows of some inputs, computed if they are not on disk.

        Args:
          digests: uint8 [n, 16], of the inputs' contents.
          like: a pytree of shapes and types [1, ...] of one row.
          compute: positions int [m] among the inputs -> pytree of arrays [m, ...].
        """
        shapes, treedef = jax.tree.flatten(like)
        found = [np.zeros((len(digests), *s.shape[1:]), s.dtype) for s in shapes]
        missing = np.array([not self._read(d, found, i) for i, d in enumerate(digests)], bool)
        if missing.any():
            positions = np.flatnonzero(missing)
            for array, new in zip(found, jax.tree.leaves(compute(positions)), strict=True):
                array[positions] = new
            self._write(digests, found, positions)
        return treedef.unflatten(found)

    def _read(self, digest: np.ndarray, arrays: list[np.ndarray], row: int) -> bool:
        """Fills one row of `arrays` from its file; returns whether the file is there and intact."""
        try:
            content = (self.folder / digest.tobytes().hex()).read_bytes()
        except OSError:
            return False
        size = sum(array[row].nbytes for array in arrays)
        payload, checksum = content[:-CHECKSUM_BYTES], content[-CHECKSUM_BYTES:]
        if len(payload) != size or zlib.crc32(payload).to_bytes(CHECKSUM_BYTES, "big") != checksum:
            return False
        start = 0
        for array in arrays:
            one = array[row]
            part = payload[start : start + one.nbytes]
            array[row] = np.frombuffer(part, one.dtype).reshape(one.shape)
            start += one.nbytes
        return True

    def _write(self, digests: np.ndarray, arrays: list[np.ndarray], positions: np.ndarray) -> None:
        """Writes rows while there is room; a full or unwritable disk is not an error."""
        try:
            if self.room is None:
                self.room = self._make_room()
            for row in positions:
                payload = b"".join(np.ascontiguousarray(array[row]).tobytes() for array in arrays)
                self.room -= len(payload) + CHECKSUM_BYTES
                if self.room < 0:
                    return
                name = digests[row].tobytes().hex()
                handle, aside = tempfile.mkstemp(prefix=".", dir=self.folder)
                with os.fdopen(handle, "wb") as file:
                    file.write(payload + zlib.crc32(payload).to_bytes(CHECKSUM_BYTES, "big"))
                os.replace(aside, self.folder / name)
        except OSError:
            self.room = -1

    def _make_room(self) -> int:
        """Creates the folder and marks it as used; returns the free bytes.

        The least recently used other folders are removed until half of the limit is free.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        os.utime(self.folder)
        sizes = {}
        for other in self.folder.parent.iterdir():
            try:
                sizes[other] = sum(file.stat().st_size for file in os.scandir(other))
            except OSError:  # another process removes it
                continue
        total = sum(sizes.values())
        for other in sorted(sizes, key=lambda path: path.stat().st_mtime if path.exists() else 0):
            if total <= self.limit // 2:
                break
            if other != self.folder:
                shutil.rmtree(other, ignore_errors=True)
                total -= sizes[other]
        return self.limit - total


def backbone_key(backbone: Backbone, fingerprint: str, compute_dtype: str) -> str:
    """A text of what outputs of the frozen model depend on beside the input: weights, spec,
    preprocessing, type, and the platform and version of jax, which affect rounding.
    """
    facts = (fingerprint, backbone.spec, backbone.preprocessing, compute_dtype)
    return repr((*facts, jax.default_backend(), jax.__version__))
