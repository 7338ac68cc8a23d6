"""Outputs of frozen models, and trained teachers, on disk, shared by runs.

A frozen feature, or the stem that all adapters share, depends on the weights, the input and the
place of the first insert, but on nothing that a run learns. So it is computed once: every row is a
small file, named by the content of the input, in a folder named by everything else it depends on.
What a teacher has learned depends on settings, seed and data too, but not on its students, so that
runs that differ in the student share it.

Files are written under another name and renamed, so that several processes may read and write at
once, and have a checksum. What cannot be read is computed again. When the store exceeds its limit,
the least recently used folders are removed.
"""

import contextlib
import functools
import hashlib
import io
import os
import re
import shutil
import zlib
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jaxlib
import numpy as np
import PIL

from qkd_jax.data import crops, image_set, images, text_set
from qkd_jax.learners import features, passes
from qkd_jax.nn import backbone as nn_backbone
from qkd_jax.nn import bert, encode, layers, pixels, tokens, vit
from qkd_jax.nn.backbone import Backbone
from qkd_jax.npz import DamagedArchive, read_npz
from qkd_jax.paths import expanded
from qkd_jax.reports.writing import write_atomically
from qkd_jax.weights.fetch import cache_folder

CHECKSUM_BYTES = 4
# The code between an input's bytes and a frozen feature: where it changed, all is computed anew.
COMPUTES = (images, crops, image_set, text_set, pixels, vit, layers, nn_backbone, encode, features)
COMPUTES += (passes, bert, tokens)
# Read with the modules themselves: a file that is edited later is not what this process runs.
CODE = hashlib.sha256(b"".join(Path(m.__file__).read_bytes() for m in COMPUTES)).hexdigest()
ARRAYS = "arrays.npz"
NAME = re.compile("[0-9a-f]{24}")  # of a folder that this file makes


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
        self._shelves: dict[str, Shelf] = {}

    def shelf(self, *what: Any) -> "Shelf":
        """The rows of one kind, such as ("stem", first block, image size)."""
        key = hashlib.sha256(repr((self.backbone, what)).encode()).hexdigest()[:24]
        return self._shelves.setdefault(key, Shelf(self.folder / key, self.limit))

    def find(self, *what: Any) -> dict[str, np.ndarray] | None:
        """The arrays that `keep` wrote; None if there are none, or none that can be read."""
        path = self.shelf(*what).folder / ARRAYS
        try:
            return read_npz(path)
        except (OSError, DamagedArchive):
            return None

    def keep(self, arrays: dict[str, np.ndarray], *what: Any) -> None:
        """Writes arrays, if there is room; a full or unwritable disk is not an error."""
        shelf, content = self.shelf(*what), io.BytesIO()
        np.savez(content, **arrays)
        with contextlib.suppress(OSError):
            if shelf.make_room() >= content.tell():
                write_atomically(shelf.folder / ARRAYS, content.getvalue())


class Shelf:
    """One folder of rows of equal size."""

    def __init__(self, folder: Path, limit: int):
        self.folder, self.limit = folder, limit
        self.room: int | None = None  # bytes that may still be written; None = not looked yet
        self.touched = False

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
        self._touch()
        shapes, treedef = jax.tree.flatten(like)
        found = [np.zeros((len(digests), *s.shape[1:]), s.dtype) for s in shapes]
        missing = np.array([not self._read(d, found, i) for i, d in enumerate(digests)], bool)
        if missing.any():
            positions = np.flatnonzero(missing)
            for array, new in zip(found, jax.tree.leaves(compute(positions)), strict=True):
                array[positions] = new
            self._write(digests, found, positions)
        return treedef.unflatten(found)

    def _touch(self) -> None:
        """Marks the folder as used in this run, once."""
        if not self.touched:
            self.touched = True
            with contextlib.suppress(OSError):
                os.utime(self.folder)

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
                self.room = self.make_room()
            for row in positions:
                payload = b"".join(np.ascontiguousarray(array[row]).tobytes() for array in arrays)
                self.room -= len(payload) + CHECKSUM_BYTES
                if self.room < 0:
                    return
                checksum = zlib.crc32(payload).to_bytes(CHECKSUM_BYTES, "big")
                row_file = self.folder / digests[row].tobytes().hex()
                write_atomically(row_file, payload + checksum, sync=False)
        except OSError:
            self.room = -1

    def make_room(self) -> int:
        """Creates the folder and marks it as used; returns the free bytes.

        The least recently used other folders are removed until half of the limit is free.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        os.utime(self.folder)
        sizes, used = {}, {}
        for other in self.folder.parent.iterdir():
            if not NAME.fullmatch(other.name) or other.is_symlink():
                continue  # not made here
            sizes[other] = sum(map(_size_of, os.scandir(other)))
            used[other] = other.stat().st_mtime
        total = sum(sizes.values())
        for other in sorted(sizes, key=used.get):
            if total <= self.limit // 2:
                break
            if other != self.folder:
                shutil.rmtree(other, ignore_errors=True)
                total -= sizes[other]
        return self.limit - total


def _size_of(file: os.DirEntry) -> int:
    try:
        return file.stat().st_size
    except OSError:  # another process renames or removes it
        return 0


def backbone_key(backbone: Backbone, compute_dtype: str) -> str:
    """What results of the frozen model follow from beside the input: every weight, spec,
    preprocessing, type and code, and the device and versions, which round in their own way.
    """
    weights = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(backbone.params):
        array = np.ascontiguousarray(leaf)
        weights.update(repr((jax.tree_util.keystr(path), array.shape, array.dtype)).encode())
        weights.update(array.view(np.uint8).data)
    facts = (weights.hexdigest(), backbone.spec, backbone.preprocessing, compute_dtype, CODE)
    device = jax.local_devices()[0].device_kind, jax.config.jax_default_matmul_precision
    versions = jax.__version__, jaxlib.__version__, PIL.__version__, version("tokenizers")
    return repr((*facts, *device, *versions))


@functools.cache
def package_code() -> str:
    """A hash of this package's source files: whatever a trained model may follow from."""
    package = Path(__file__).parents[1]
    files = sorted(package.rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def store_folder() -> Path:
    """`$QKD_JAX_STORE`, or `frozen/` beside the fetched weights."""
    given = os.environ.get("QKD_JAX_STORE")
    return expanded(given) if given else cache_folder() / "frozen"
