"""Archives of arrays that are damaged or made to do damage: each gives one error."""

import io
import re
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest

from qkd_jax import npz
from qkd_jax.npz import DamagedArchive, read_npz

VALUES = np.arange(6, dtype=np.float32).reshape(2, 3)


def npy(array=VALUES):
    content = io.BytesIO()
    np.save(content, array)
    return content.getvalue()


def header(text, data=b"", version=b"\1\0"):
    kind = "<H" if version == b"\1\0" else "<I"
    return b"\x93NUMPY" + version + struct.pack(kind, len(text)) + text.encode() + data


STORED = VALUES.tobytes()


def of(descr="'<f4'", shape="(2, 3)", data=STORED, order="False"):
    text = f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}\n"
    return header(text, data)


def archive(*members, method=zipfile.ZIP_STORED):
    """A zip of (name, content)."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", method) as file:
        for name, data in members:
            file.writestr(name, data)
    return content.getvalue()


def one(data, **options):
    return archive(("a.npy", data), **options)


def flipped(data, find, put, count=-1):
    assert find in data
    return data.replace(find, put, count)


def encrypted(data):
    """The flag of encryption set in both records of the first member."""
    data = bytearray(data)
    data[6] |= 1
    data[data.rindex(b"PK\1\2") + 8] |= 1
    return bytes(data)


def size_of_member(data, size):
    """An archive whose directory claims another size of its only member."""
    data, at = bytearray(data), data.rindex(b"PK\1\2")
    struct.pack_into("<I", data, at + 24, size)
    return bytes(data)


GOOD = {
    "c": VALUES,
    "fortran": np.asfortranarray(VALUES),
    "big": VALUES.astype(">f4"),
    "scalar": np.float64(3),
    "text": np.array(["cat", "鳥", ""]),
    "old text": np.array(["cat"]).astype(">U3"),
    "flags": np.array([True, False]),
    "nothing": np.zeros((0, 5), np.int8),
    "bytes": np.array([b"ab"], "V2"),
    "complex": np.array([1j]),
}
DEFLATED = one(npy(np.zeros(3000)), method=zipfile.ZIP_DEFLATED)

BAD = {
    "empty": (b"", "not a zip"),
    "no zip": (b"PK\3\4" + bytes(100), "not a zip"),
    "lone array": (npy(), "not a zip"),
    "truncated": (one(npy())[:-30], "not a zip"),
    "wrong checksum": (flipped(one(npy()), VALUES.tobytes(), bytes(24)), "CRC"),
    "encrypted": (encrypted(one(npy())), "encrypted"),
    "lzma": (one(npy(), method=zipfile.ZIP_LZMA), "expected a stored or deflated"),
    "bzip2": (one(npy(), method=zipfile.ZIP_BZIP2), "expected a stored or deflated"),
    "broken deflate": (flipped(DEFLATED, DEFLATED[40:60], b"\xff" * 20), "damage"),
    "twice": (archive(("a.npy", npy()), ("a", npy())), "two arrays of the name 'a'"),
    "no array": (one(b"hello, I am a text"), "expected an array"),
    "no content": (one(b""), "expected an array"),
    "version 3": (one(header("{}", version=b"\3\0")), "expected an array"),
    "long header": (one(header(" " * 20_000)), "a header of 20000 bytes"),
    "short header": (one(npy()[:9]), "requires a buffer"),
    "no dict": (one(header("[1]")), "expected a header"),
    "no keys": (one(header("{}")), "expected a header"),
    "code": (one(header("__import__('os').getpid()")), "expected a header"),
    "nesting": (one(header("(" * 9_000)), "expected a header"),
    "nested signs": (one(header("-" * 9_000 + "1")), "expected a header"),
    "objects": (one(of("'|O'")), "pickle"),
    "fields": (one(of("[('a', '<f4')]")), "found the type"),
    "dates": (one(of("'<M8[ns]'")), "found the type"),
    "repeated type": (one(of("'3f4'")), "found the type"),
    "no such type": (one(of("'<f5'")), "expected a type of NumPy"),
    "huge type": (one(of("'<U999999999'", "(0,)", b"")), "expected a type of NumPy"),
    "no bytes": (one(of("'<U0'", "(1000000000000,)", b"")), "at least one byte"),
    "negative": (one(of(shape="(-2, -3)")), "expected a shape"),
    "truth as size": (one(of(shape="(True, 6)")), "expected a shape"),
    "fraction as size": (one(of(shape="(6.0,)")), "expected a shape"),
    "too many axes": (one(of(shape=f"({'1, ' * 99}6)")), "damage"),
    "overflow": (one(of(shape=f"(0, {2**63})", data=b"")), "damage"),
    "too large": (one(of(shape=f"({2**40},)")), "expected the 4398046511104 bytes"),
    "too small": (one(of(shape="(5,)")), "expected the 20 bytes of its header, found 24"),
    "claim of the directory": (size_of_member(one(npy()), len(npy()) + 4), "damage"),
    "no characters": (one(npy(np.array([0x110000], np.uint32).view("U1"))), "no characters"),
    "surrogates": (one(npy(np.array(["\udcff"]))), "no characters"),
    "no truth": (one(of("'|b1'", "(3,)", b"\0\1\2")), "truth values"),
}


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_arrays_are_read_in_the_byte_order_of_this_machine(tmp_path, method):
    path = tmp_path / "a.npz"
    path.write_bytes(archive(*((f"{k}.npy", npy(v)) for k, v in GOOD.items()), method=method))
    found = read_npz(path)
    assert found.keys() == GOOD.keys()
    for name, values in GOOD.items():
        np.testing.assert_array_equal(found[name], values)
        assert found[name].dtype == np.asarray(values).dtype.newbyteorder("="), name


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_archive_is_named_with_the_reason(tmp_path, kind):
    content, message = BAD[kind]
    path = tmp_path / "a.npz"
    path.write_bytes(content)
    with pytest.raises(DamagedArchive, match=f"^{path}: expected an .npz.*{re.escape(message)}"):
        read_npz(path)


def test_a_file_that_is_absent_or_cannot_be_read_is_not_damaged(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError):
        read_npz(tmp_path / "a.npz")

    def failing(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(zipfile, "ZipFile", failing)
    with pytest.raises(OSError, match="Input/output"):
        read_npz(tmp_path / "a.npz", content=one(npy()))


FIELDS = {"labels": ("iu", 1)}


@pytest.mark.parametrize(
    "arrays, found",
    [
        ({}, "found none"),
        ({"labels": np.zeros(3)}, r"found float64 \[3\]"),
        ({"labels": np.zeros((3, 1), int)}, r"found int64 \[3, 1\]"),
    ],
)
def test_other_fields_than_expected_are_told(tmp_path, arrays, found):
    np.savez(tmp_path / "a.npz", other=VALUES, **arrays)
    with pytest.raises(DamagedArchive, match=f"expected 'labels' with 1 axes .*{found}"):
        read_npz(tmp_path / "a.npz", FIELDS)
    if arrays:
        with pytest.raises(DamagedArchive, match=found):
            read_npz(tmp_path / "a.npz", optional=FIELDS)
    else:
        assert read_npz(tmp_path / "a.npz", optional=FIELDS).keys() == {"other"}
    np.savez(tmp_path / "a.npz", labels=np.zeros(3, np.uint8))
    assert read_npz(tmp_path / "a.npz", FIELDS)["labels"].shape == (3,)


def test_content_that_deflates_to_much_more_than_the_file_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(npz, "LEAST_LIMIT", 1000)
    path = tmp_path / "a.npz"
    path.write_bytes(one(npy(np.zeros(1 << 20)), method=zipfile.ZIP_DEFLATED))
    with pytest.raises(DamagedArchive, match="it would hold 8,388,7"):
        read_npz(path)
    path.write_bytes(one(npy(np.arange(3000)), method=zipfile.ZIP_DEFLATED))
    assert len(read_npz(path)["a"]) == 3000


# The rest of the file is no array; a reader that believes the header asks for 900 MB first.
LIAR = of(shape=f"({900 << 18},)", data=bytes(1 << 20))
CLAIMS = 900 << 20


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_no_memory_is_taken_because_a_header_says_so(tmp_path, monkeypatch, method):
    path = tmp_path / "a.npz"
    path.write_bytes(size_of_member(one(LIAR, method=method), len(LIAR) - (1 << 20) + CLAIMS))
    monkeypatch.setattr(npz, "LEAST_LIMIT", 2 * CLAIMS)  # the growth alone is no reason here
    tracemalloc.start()
    try:
        with pytest.raises(DamagedArchive):
            read_npz(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 20 << 20
