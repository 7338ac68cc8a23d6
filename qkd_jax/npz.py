"""Reads `.npz` files that may be damaged, or made to do damage.

Nothing is unpickled, and no memory is taken because a header says so.
"""

import ast
import errno
import io
import math
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import BinaryIO

import numpy as np

from qkd_jax.errors import QkdError

# Archives may hold this many times the bytes of their file, or LEAST_LIMIT if that is more: arrays
# that compress better are not measurements, and deflate can make 1 GB out of 1 MB.
MOST_GROWTH = 50
LEAST_LIMIT = 1 << 26
_CHUNK = 1 << 20
_LONGEST_HEADER = 10_000  # bytes, as NumPy limits it
_PLAIN = re.compile(r"[<>|=]?[biufcSUV][0-9]{1,9}", re.ASCII)  # numbers, text, untyped bytes
_HEADERS = {(1, 0): "<H", (2, 0): "<I"}  # version -> type of the header's length

Fields = Mapping[str, tuple[str, int]]


class DamagedArchive(QkdError):
    """A file that can be opened and is not the `.npz` that was expected."""


def read_npz(
    path: str | os.PathLike,
    fields: Fields | None = None,
    optional: Fields | None = None,
    content: bytes | None = None,
) -> dict[str, np.ndarray]:
    """The arrays of a `.npz` file, compressed or not, in the byte order of this machine.

    Args:
      path: the file.
      fields: name -> (letters of kinds of dtype, number of axes) of arrays that must be there, such
        as {"label": ("iu", 1)}; see `numpy.dtype.kind`.
      optional: the same for arrays that may be there. Other arrays may be there as well.
      content: the bytes of the file, where they have been read already.

    Raises:
      DamagedArchive: no zip archive, truncated, encrypted, compressed by anything but deflate, a
        wrong checksum; a member that is no array of numbers, text or bytes, whose header states
        another size than its content has, or with characters that do not exist; a name twice;
        content of more than `MOST_GROWTH` times the file; other fields than expected.
      OSError: the file cannot be opened or read.
    """
    with open(path, "rb") if content is None else io.BytesIO(content) as file, _damage_in(path):
        arrays = _arrays_in(file)
        for name, (kinds, axes) in ((fields or {}) | (optional or {})).items():
            array = arrays.get(name)
            if array is None and name not in (fields or {}):
                continue
            if array is None or array.dtype.kind not in kinds or array.ndim != axes:
                found = "none" if array is None else f"{array.dtype} {list(array.shape)}"
                raise ValueError(
                    f"expected {name!r} with {axes} axes of type {kinds}, found {found}"
                )
    return arrays


@contextmanager
def _damage_in(path: str | os.PathLike) -> Iterator[None]:
    try:
        yield
    except (
        zipfile.BadZipFile,
        zlib.error,
        struct.error,
        EOFError,
        ValueError,
        NotImplementedError,  # of zipfile: several disks, newer versions
        OverflowError,
    ) as error:
        raise DamagedArchive(f"{path}: expected an .npz file, found damage ({error})") from error
    except OSError as error:
        if error.errno not in (errno.EINVAL, None):  # a failing disk is no damage of the file
            raise
        raise DamagedArchive(f"{path}: expected an .npz file, found damage ({error})") from error


def _arrays_in(file: BinaryIO) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        limit = max(MOST_GROWTH * file.seek(0, os.SEEK_END), LEAST_LIMIT)
        total = sum(member.file_size for member in members)
        if total > limit:
            raise ValueError(f"it would hold {total:,} bytes, more than the {limit:,} allowed")
        arrays = {}
        for member in members:
            name = member.filename.removesuffix(".npy")
            if name in arrays:
                raise ValueError(f"two arrays of the name {name!r}")
            if member.flag_bits & 1:
                raise ValueError(f"{member.filename}: an encrypted member")
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(
                    f"{member.filename}: expected a stored or deflated member, found method "
                    f"{member.compress_type}"
                )
            with archive.open(member) as stream:
                arrays[name] = _array(stream, member)
    return arrays


def _array(stream: BinaryIO, member: zipfile.ZipInfo) -> np.ndarray:
    dtype, shape, fortran_order = _header(stream, member.filename)
    claimed, stored = math.prod(shape) * dtype.itemsize, member.file_size - stream.tell()
    if claimed != stored:
        raise ValueError(
            f"{member.filename}: expected the {claimed} bytes of its header, found {stored}"
        )
    content = bytearray()  # grows with what is there, as the archive's word may be wrong as well
    while chunk := stream.read(_CHUNK):
        content += chunk
    if len(content) != claimed:
        raise ValueError(f"{member.filename}: expected {claimed} bytes, found {len(content)}")
    array = np.frombuffer(content, dtype).reshape(shape, order="F" if fortran_order else "C")
    array = array.astype(dtype.newbyteorder("="), copy=False)
    if dtype.kind == "U":
        points = array.reshape(-1).view(np.uint32)
        if (points > 0x10FFFF).any() or ((points >= 0xD800) & (points < 0xE000)).any():
            raise ValueError(f"{member.filename}: expected text, found no characters")
    if dtype.kind == "b" and (array.view(np.uint8) > 1).any():
        raise ValueError(f"{member.filename}: expected truth values 0 and 1, found others")
    return array


def _header(stream: BinaryIO, name: str) -> tuple[np.dtype, tuple[int, ...], bool]:
    start = stream.read(8)
    version = tuple(start[6:])
    if start[:6] != b"\x93NUMPY" or version not in _HEADERS:
        raise ValueError(f"{name}: expected an array (.npy 1.0 or 2.0), found {start!r}")
    kind = _HEADERS[version]
    (length,) = struct.unpack(kind, stream.read(struct.calcsize(kind)))
    if length > _LONGEST_HEADER:
        raise ValueError(f"{name}: a header of {length} bytes")
    text = stream.read(length).decode("latin-1")
    try:
        stated = ast.literal_eval(text)
        descr, shape, fortran = (stated[key] for key in ("descr", "shape", "fortran_order"))
    # MemoryError: of Python's parser, for brackets that are nested too deeply.
    except (ValueError, SyntaxError, TypeError, KeyError, RecursionError, MemoryError) as error:
        raise ValueError(f"{name}: expected a header of .npy, found {text[:80]!r}") from error
    if isinstance(descr, str) and descr[-1:] == "O":
        raise ValueError(f"{name}: expected numbers, found objects, whose reading would run pickle")
    if not isinstance(descr, str) or not _PLAIN.fullmatch(descr):
        raise ValueError(f"{name}: expected numbers or text, found the type {str(descr)[:80]!r}")
    if not isinstance(shape, tuple) or any(type(size) is not int or size < 0 for size in shape):
        raise ValueError(f"{name}: expected a shape, found {str(shape)[:80]!r}")
    try:
        dtype = np.dtype(descr)
    except TypeError as error:
        raise ValueError(f"{name}: expected a type of NumPy, found {descr!r}") from error
    if not dtype.itemsize:
        raise ValueError(f"{name}: expected values of at least one byte, found {descr!r}")
    return dtype, shape, bool(fortran)
