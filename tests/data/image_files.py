"""Files of images, most of them written byte by byte, so that nothing of them is Pillow's work."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

from qkd_jax.data.images import decode


def of_mode(mode, array):
    """A Pillow image; `Image.fromarray` with a mode is deprecated in some versions of Pillow."""
    return Image.frombytes(mode, array.shape[1::-1], array.tobytes())


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixels(data):
    image = decode(data, "probe")
    assert image.mode == "RGB"
    return np.asarray(image)


GREY = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
COLOUR = np.random.default_rng(0).integers(0, 256, (8, 10, 3), dtype=np.uint8)


def chunk(kind, body, crc=0):
    return (
        struct.pack(">I", len(body))
        + kind
        + body
        + struct.pack(">I", zlib.crc32(kind + body) ^ crc)
    )


def png(rows, size, depth, colour_type, *chunks):
    """A PNG file from bytes, one item a row, so that nothing of it is Pillow's work."""
    header = struct.pack(">IIBBBBB", *size, depth, colour_type, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + bytes(row) for row in rows))
    parts = [chunk(b"IHDR", header), *chunks, chunk(b"IDAT", pixels), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def entries(*rows, order="<"):
    """A directory of TIFF, which EXIF has too: (tag, type, count, value of 4 bytes or number)."""
    packed = [
        struct.pack(f"{order}HHI", *row[:3])
        + (row[3] if isinstance(row[3], bytes) else struct.pack(f"{order}I", row[3]))
        for row in rows
    ]
    return struct.pack(f"{order}H", len(rows)) + b"".join(packed) + bytes(4)


def tiff(pixels, size, bits, photometric=1, more=(), samples=1, order="<"):
    """An uncompressed TIFF file of one strip per plane, written by hand."""

    def short(value):
        return struct.pack(f"{order}HH", value, 0)

    rows = [
        (256, 3, 1, short(size[0])),
        (257, 3, 1, short(size[1])),
        (258, 3, 1, short(bits)),
        (259, 3, 1, short(1)),
        (262, 3, 1, short(photometric)),
        (273, 4, 1, 8),
        (277, 3, 1, short(samples)),
        (278, 3, 1, short(size[1])),
        (279, 4, 1, len(pixels)),
        *((tag, 3, 1, short(value)) for tag, value in more),
    ]
    head = {"<": b"II", ">": b"MM"}[order] + struct.pack(f"{order}HI", 42, 8 + len(pixels))
    return head + pixels + entries(*sorted(rows), order=order)


def grey3(levels):
    return np.repeat(np.asarray(levels, np.uint8)[..., None], 3, axis=-1)


DEEP = np.array([[0, 255, 256, 4095], [4096, 40000, 65279, 65535]], np.uint16)
TWELVE = np.array([[0, 15, 16, 2048], [4080, 4095, 1000, 255]], np.uint16)
PAINT = np.array([[[9, 0, 1], [0, 0, 0]], [[255, 255, 255], [9, 0, 2]]], np.uint8)


def packed12(levels):
    flat = levels.ravel().tolist()
    pairs = zip(flat[::2], flat[1::2], strict=True)
    return bytes(b for one, two in pairs for b in (one >> 4, (one & 15) << 4 | two >> 8, two & 255))


def marked(values, white_where, levels):
    """(tRNS chunk, expected pixels)"""
    expected = grey3(levels) if np.ndim(levels) == 2 else np.array(levels)
    expected[white_where] = 255
    return chunk(b"tRNS", struct.pack(f">{len(values)}H", *values)), expected


def deep_png(*chunks):
    return png(DEEP.astype(">u2").view(np.uint8), (4, 2), 16, 0, *chunks)
