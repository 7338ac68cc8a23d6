"""Large, damaged and strange files: what is read of them, and what a picture survives."""

import io
import random
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile

from qkd_jax.data import images
from qkd_jax.data.image_set import ImageSet
from qkd_jax.data.images import FORMATS, decode
from qkd_jax.errors import DataError
from tests.data.image_files import (
    COLOUR,
    DEEP,
    chunk,
    deep_png,
    encoded,
    entries,
    marked,
    pixels,
    tiff,
)

pytestmark = pytest.mark.floor


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"


def test_only_the_readers_of_images_see_a_file(monkeypatch):
    """Of a file of another format not even the header is read, whatever its name says."""
    Image.init()

    def forbidden(*_):
        raise AssertionError("another reader was asked")

    for name in Image.OPEN.keys() - FORMATS:
        monkeypatch.setitem(Image.OPEN, name, (forbidden, forbidden))
    assert {"EPS", "TGA", "PSD"} <= Image.OPEN.keys() - FORMATS
    for data in (POSTSCRIPT, bytes(2000), encoded(Image.fromarray(COLOUR), "TGA")):
        with pytest.raises(DataError, match="found another kind of file"):
            decode(data, "cat.jpg")
    np.testing.assert_array_equal(pixels(encoded(Image.fromarray(COLOUR))), COLOUR)


def icon_of(picture):
    """An icon whose table says 16 x 16."""
    return struct.pack("<HHH4B2H2I", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(picture), 22) + picture


Image.init()
SIDE = 40
SQUARE = Image.new("RGB", (SIDE, SIDE))
OF_SQUARE = {
    kind: encoded(SQUARE, kind)
    for kind in ("PNG", "GIF", "BMP", "TIFF", "WEBP", "JPEG", "JPEG2000", "AVIF")
    if kind in Image.SAVE
}
OF_SQUARE |= {
    "icon of PNG": icon_of(encoded(SQUARE, "PNG")),
    "icon of DIB": icon_of(encoded(SQUARE, "DIB")),
    "icon of old DIB": icon_of(struct.pack("<IHHHH", 12, SIDE, SIDE, 1, 24) + bytes(6000)),
}


@pytest.mark.parametrize("kind", OF_SQUARE)
def test_pixels_are_counted_before_they_are_decoded(monkeypatch, kind):
    monkeypatch.setattr(images, "MAX_PIXELS", SIDE * SIDE - 1)
    monkeypatch.setattr(ImageFile.ImageFile, "load", None)  # called by whatever decodes
    message = rf"^cat: expected at most 1,599 pixels, found {SIDE} x {SIDE}\. Scale it down"
    with pytest.raises(DataError, match=message):
        decode(OF_SQUARE[kind], "cat")


def test_pixels_in_memory_are_counted_too(monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 11)
    with pytest.raises(DataError, match="cat: expected at most 11 pixels, found 4 x 3"):
        decode(np.zeros((3, 4, 3), np.uint8), "cat")


def test_a_file_of_too_many_bytes_is_not_read(monkeypatch, tmp_path):
    data = encoded(Image.fromarray(COLOUR))
    (tmp_path / "cat.png").write_bytes(data)
    monkeypatch.setattr(images, "MAX_BYTES", len(data) - 1)
    one = folder_set(tmp_path / "cat.png")
    monkeypatch.setattr("pathlib.Path.read_bytes", None)
    message = rf"cat: expected an image of at most {len(data) - 1} bytes, found {len(data)}"
    for read in (lambda: decode(data, "cat"), lambda: decode(tmp_path / "cat.png", "cat")):
        with pytest.raises(DataError, match=message):
            read()
    with pytest.raises(DataError, match=message.replace("cat", "cats: cat.png", 1)):
        one.stored(0)


def folder_set(file):
    return ImageSet(
        "cats", np.zeros(1, np.int32), np.array([file.name]), ("cat",), lambda _: [file]
    )


def test_an_image_of_too_many_pixels_is_refused_and_a_large_one_is_not(monkeypatch):
    data = encoded(Image.fromarray(COLOUR))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", COLOUR.shape[0] * COLOUR.shape[1] - 1)
    np.testing.assert_array_equal(pixels(data), COLOUR)  # Pillow only warns
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", COLOUR.shape[0] * COLOUR.shape[1] // 2 - 1)
    with pytest.raises(DataError, match="cat: expected at most 78 pixels, found more"):
        decode(data, "cat")


def with_segment(marker, body):
    data = encoded(Image.fromarray(COLOUR), "JPEG", quality=95)
    segment = b"\xff" + bytes([marker]) + struct.pack(">H", len(body) + 2) + body
    return data[:2] + segment + data[2:]


def with_exif(*rows):
    return with_segment(0xE1, b"Exif\0\0II*\0\x08\0\0\0" + entries(*rows))


TURNED = (0x112, 3, 1, 6)


@pytest.mark.parametrize(
    ("data", "turns"),
    [
        (with_exif(TURNED), 3),
        (with_exif(TURNED, (0x10F, 3, 1, 7), (0x128, 2, 2, b"2\0\0\0")), 3),
        (with_exif(TURNED, (0x11A, 5, 1, 99999)), 3),  # a resolution that lies outside the file
        (with_exif((0x112, 2, 2, b"6\0\0\0")), 0),  # text
        (with_exif((0x112, 11, 1, struct.pack("<f", 6.5))), 0),
        (with_exif((0x112, 1, 3, b"\6\6\6\0")), 0),
        (with_exif((0x112, 3, 1, 0)), 0),
        (with_exif((0x112, 3, 1, 9)), 0),
        (with_segment(0xE1, b"Exif\0\0nonsense"), 0),
        (with_segment(0xE1, b"Exif\0\0II*\0\xff\xff\xff\xff"), 0),
        (with_segment(0xE1, b'http://ns.adobe.com/xap/1.0/\0\xff tiff:Orientation="x"'), 0),
        (with_segment(0xE0, b"JFIF"), 0),
        (with_segment(0xE2, b"ICC_PROFILE\0\1"), 0),
        (with_segment(0xE2, b"MPF\0nonsense"), 0),
        (with_segment(0xEE, b"Adobe"), 0),
        (with_segment(0xFE, b"\xff\xfe"), 0),
    ],
)
def test_metadata_of_jpeg_never_loses_a_picture(data, turns):
    plain = np.asarray(Image.open(io.BytesIO(encoded(Image.fromarray(COLOUR), "JPEG", quality=95))))
    np.testing.assert_array_equal(pixels(data), np.rot90(plain, turns))


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize(
    "extra",
    [
        chunk(b"zTXt", b"comment\0\0" + zlib.compress(bytes(3_000_000))),
        chunk(b"zTXt", b"comment\0\1"),
        chunk(b"tEXt", b"comment\0checksum", crc=1),
        chunk(b"tEXt", b"Raw profile type exif\0nonsense"),
        chunk(b"iTXt", b'XML:com.adobe.xmp\0\0\0\0\0tiff:Orientation="9"'),
        chunk(b"iCCP", b""),
        chunk(b"iCCP", b"name\0\1"),
        chunk(b"gAMA", b"1"),
        chunk(b"pHYs", b"1"),
        chunk(b"cHRM", b"1"),
        chunk(b"sRGB", b""),
        chunk(b"acTL", b"1"),
        chunk(b"eXIf", b"nonsense"),
    ],
)
def test_metadata_of_png_never_loses_a_picture(extra, behind):
    data = encoded(Image.fromarray(COLOUR))
    at = data.index(b"IEND") - 4 if behind else 33
    np.testing.assert_array_equal(pixels(data[:at] + extra + data[at:]), COLOUR)


def test_rotation_survives_metadata_that_must_be_left_out():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(Image.fromarray(COLOUR), exif=exif)
    data = data[:33] + chunk(b"gAMA", b"1") + data[33:]
    np.testing.assert_array_equal(pixels(data), np.rot90(COLOUR, 3))


def test_tiff_is_turned_once():
    data = tiff(COLOUR.tobytes(), (10, 8), 8, 2, [(274, 6)], samples=3)
    np.testing.assert_array_equal(pixels(data), np.rot90(COLOUR, 3))


def test_pillows_warnings_do_not_become_errors_even_after_the_filters_change():
    data = with_segment(0xE2, b"MPF\0nonsense")
    with warnings.catch_warnings():
        decode(data, "cat")
        warnings.simplefilter("error")
        decode(data, "cat")


def test_random_damage_raises_nothing_else():
    generator = random.Random(0)
    image = Image.fromarray(COLOUR)
    good = [encoded(image, kind) for kind in ("PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP", "PPM")]
    good += [deep_png(marked([9], DEEP < 0, DEEP >> 8)[0]), with_exif(TURNED)]
    for number in range(1500):
        data = good[number % len(good)]
        head = generator.randrange(4, min(len(data), 90))
        data = data[:head] + generator.randbytes(generator.choice((0, 9, 200)))
        if number % 2:
            data += good[number % len(good)][len(data) :]
        try:
            found = decode(data, "cat")
        except DataError as error:
            assert str(error).startswith("cat: ")
        else:
            assert found.mode == "RGB" and min(found.size) > 0
