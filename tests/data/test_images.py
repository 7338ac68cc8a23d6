"""Whatever a file may be, it becomes the right RGB pixels or one clear error."""

import contextlib
import io
import random
import struct
import sys
import warnings
import zlib

import numpy as np
import pillow_heif
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFile

from qkd_jax.data import images
from qkd_jax.data.crops import crop_draws, random_view
from qkd_jax.data.image_set import ImageSet
from qkd_jax.data.images import FORMATS, MAX_ASPECT, centre_view, decode
from qkd_jax.errors import DataError

pytestmark = pytest.mark.floor


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


def test_colour_is_left_alone():
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True}), ("BMP", {})):
        np.testing.assert_array_equal(
            pixels(encoded(Image.fromarray(COLOUR), kind, **options)), COLOUR
        )
    np.testing.assert_array_equal(pixels(COLOUR), COLOUR)


def test_a_path_is_read(tmp_path):
    file = tmp_path / "größe.png"
    Image.fromarray(COLOUR).save(file)
    np.testing.assert_array_equal(pixels(file), COLOUR)


def test_grey_fills_three_channels():
    expected = np.repeat(GREY[..., None], 3, axis=2)
    np.testing.assert_array_equal(pixels(encoded(Image.fromarray(GREY))), expected)
    one_bit = Image.fromarray(GREY > 100)
    np.testing.assert_array_equal(pixels(encoded(one_bit))[..., 0], (GREY > 100) * 255)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_grey_keeps_its_upper_byte(kind):
    deep = GREY.astype(np.uint16) * 256 + 17
    found = pixels(encoded(Image.fromarray(deep), kind))
    np.testing.assert_array_equal(found, np.repeat(GREY[..., None], 3, axis=2))


def test_transparency_is_laid_on_white():
    alpha = np.full((8, 10, 1), 255, np.uint8)
    alpha[:, :5] = 0
    alpha[0, 9] = 128
    image = Image.fromarray(np.concatenate([COLOUR, alpha], axis=2))
    weight = alpha / 255.0
    expected = COLOUR * weight + 255.0 * (1.0 - weight)
    assert np.abs(pixels(encoded(image)) - expected).max() <= 1.0  # one rounding to a level
    grey_alpha = of_mode("LA", np.stack([GREY, np.zeros_like(GREY)], axis=2))
    assert (pixels(encoded(grey_alpha)) == 255).all()


def test_palette_with_and_without_transparency():
    indices = np.array([[0, 1], [2, 1]], np.uint8)
    image = of_mode("P", indices)
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255]])
    np.testing.assert_array_equal(pixels(encoded(image)), colours[indices])
    colours[1] = 255
    np.testing.assert_array_equal(pixels(encoded(image, transparency=1)), colours[indices])


def test_cmyk_by_its_formula():
    inks = np.random.default_rng(1).integers(0, 256, (6, 6, 4), dtype=np.uint8)
    found = pixels(encoded(of_mode("CMYK", inks), "TIFF"))
    white = (255.0 - inks[..., :3]) * (255.0 - inks[..., 3:]) / 255.0
    assert np.abs(found - white).max() <= 1.0  # one rounding to a level
    jpeg = pixels(encoded(Image.new("CMYK", (8, 8), (0, 0, 0, 0)), "JPEG"))
    assert jpeg.min() > 250


@pytest.mark.parametrize(("orientation", "turns"), [(1, 0), (8, 1), (3, 2), (6, 3)])
def test_exif_rotation_is_applied(orientation, turns):
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = pixels(encoded(Image.fromarray(COLOUR), "PNG", exif=exif))
    np.testing.assert_array_equal(found, np.rot90(COLOUR, turns))


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(pixels(data), np.full((4, 4, 3), [255, 0, 0]))


def test_a_single_pixel_fills_every_view():
    image = decode(encoded(Image.new("RGB", (1, 1), (10, 20, 30))), "probe")
    assert (centre_view(image, 14, 16) == [10, 20, 30]).all()
    draws = crop_draws([0], seed=0, task=0, epoch=0)[0]
    assert (random_view(image, 8, draws) == [10, 20, 30]).all()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", r"cat\.jpg: expected an image, found an empty file \(0 bytes\)"),
        (b"hello, I am a text", r"cat\.jpg: expected an image \(AVIF.*found another kind"),
        (encoded(Image.fromarray(COLOUR), "JPEG")[:-20], r"cat\.jpg: cannot be read .*truncated"),
        (
            encoded(Image.fromarray(np.zeros((2, 2), np.float32)), "TIFF"),
            r"cat\.jpg: expected unsigned samples .*floating-point",
        ),
        (
            encoded(Image.fromarray(COLOUR), "TGA"),
            r"cat\.jpg: expected an image \(AVIF.*found another kind",
        ),
        (
            encoded(Image.new("L", (MAX_ASPECT + 1, 1))),
            r"cat\.jpg: expected sides that differ at most 100 times, found 101 x 1 pixels",
        ),
    ],
)
def test_a_bad_file_is_named(data, message):
    with pytest.raises(DataError, match=message):
        decode(data, "cat.jpg")


def heic(image, **options):
    """The bytes of a file as phones write them."""
    content = io.BytesIO()
    pillow_heif.from_pillow(image).save(content, quality=-1, chroma=444, **options)
    return content.getvalue()


def test_a_photograph_from_a_phone_is_read_upright():
    """The reader of HEIC has turned the picture already: its EXIF must not turn it again."""
    upright = np.zeros((40, 60, 3), np.uint8)
    upright[:20, :30] = 200  # the upper left
    exif = Image.Exif()
    exif[0x0112] = 6  # stored pixels are turned to the right to be upright
    stored = Image.fromarray(np.rot90(upright))
    read = np.asarray(decode(heic(stored, exif=exif.tobytes()), "cat.heic"))
    assert read.shape == upright.shape
    # Colours are kept as brightness and two differences, in whole steps of 8 bits.
    assert np.abs(read.astype(int) - upright).max() <= 4


def test_heic_without_its_reader_is_told_with_the_extra(monkeypatch):
    data = heic(Image.fromarray(COLOUR))
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)
    with pytest.raises(DataError, match=r'HEIC, as phones write it. pip install "qkd_jax\[heif\]"'):
        decode(data, "cat.heic")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"gone: cannot be read \(No such file"):
        decode(tmp_path / "gone.png", "gone")
    with pytest.raises(DataError, match=r"here: cannot be read"):
        decode(tmp_path, "here")


@pytest.mark.parametrize(
    "array",
    [
        COLOUR.astype(np.float32),
        COLOUR.astype(np.int64),
        COLOUR[..., 0],
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros((4, 0, 3), np.uint8),
        np.zeros((1, MAX_ASPECT + 1, 3), np.uint8),
    ],
)
def test_pixels_of_another_form_are_refused(array):
    with pytest.raises(DataError, match=r"cat: expected (pixels as uint8 \[H, W, 3\]|sides)"):
        decode(array, "cat")


@given(st.data())
def test_damaged_bytes_never_raise_anything_else(data):
    kind = data.draw(st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"]))
    good = bytearray(encoded(Image.fromarray(COLOUR), kind))
    for _ in range(data.draw(st.integers(0, 8))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(good)))
    try:
        found = decode(bytes(good[:cut]), "damaged")
    except DataError as error:
        assert str(error).startswith("damaged: ")
    else:
        assert found.mode == "RGB" and min(found.size) >= 1


@given(st.integers(1, 90), st.integers(1, 90))
def test_centre_view_has_the_sizes_of_resize_and_centre_crop(width, height):
    image = Image.fromarray(
        np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    )
    found = centre_view(image, 28, 32)
    # Oracle: the definition, shorter side 32 and the longer one cut to whole pixels.
    if width <= height:
        size = (32, int(32 * height / width))
    else:
        size = (int(32 * width / height), 32)
    resized = np.asarray(image.resize(size, Image.Resampling.BICUBIC))
    top, left = round((size[1] - 28) / 2), round((size[0] - 28) / 2)
    np.testing.assert_array_equal(found, resized[top : top + 28, left : left + 28])


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


def forms():
    """Name, file, and the pixels that are right by the definition of the format."""
    upper = DEEP >> 8
    yield "png 16 grey", deep_png(), grey3(upper)
    for value in (0, 255, 40000, 65535):
        mark, expected = marked([value], DEEP == value, upper)
        yield f"png 16 grey, {value} transparent", deep_png(mark), expected
    mark, expected = marked([17], DEEP == 17, upper)
    yield "png 16 grey, a value that does not occur", deep_png(mark), expected
    for bits in (1, 2, 4, 8):
        largest = 2**bits - 1
        levels = np.array([[0, 1, 2, 3, 4, 5, 6, largest]]) % (largest + 1)
        row = int("".join(f"{v:0{bits}b}" for v in levels[0]), 2).to_bytes(bits, "big")
        seen = levels * (255 // largest)
        yield f"png {bits} grey", png([row], (8, 1), bits, 0), grey3(seen)
        for value in (0, 1, largest):
            mark, expected = marked([value], levels == value, seen)
            yield f"png {bits} grey, {value} marked", png([row], (8, 1), bits, 0, mark), expected
    rows = PAINT.reshape(2, 6)
    mark, expected = marked([9, 0, 1], ([0], [0]), PAINT)
    yield "png rgb, one colour marked", png(rows, (2, 2), 8, 2, mark), expected
    deep_rgb = (PAINT.astype(np.uint16) * 256 + 77).astype(">u2").view(np.uint8).reshape(2, 12)
    yield "png 16 rgb", png(deep_rgb, (2, 2), 16, 2), PAINT
    alpha = np.array([[0, 255], [255, 0]], np.uint8)
    clear = np.where(alpha[..., None] > 0, PAINT, 255)
    rgba = np.concatenate([PAINT, alpha[..., None]], axis=2)
    yield "png rgba", png(rgba.reshape(2, 8), (2, 2), 8, 6), clear
    deep_rgba = rgba.astype(">u2") * 257
    yield "png 16 rgba", png(deep_rgba.view(np.uint8).reshape(2, 16), (2, 2), 16, 6), clear
    grey_alpha = np.array([[[7, 0], [7, 255]], [[0, 255], [255, 0]]], np.uint8)
    seen = grey3(np.where(grey_alpha[..., 1] > 0, grey_alpha[..., 0], 255))
    yield "png grey alpha", png(grey_alpha.reshape(2, 4), (2, 2), 8, 4), seen
    deep_alpha = (grey_alpha.astype(">u2") * 257).view(np.uint8).reshape(2, 8)
    yield "png 16 grey alpha", png(deep_alpha, (2, 2), 16, 4), seen
    colours = np.arange(48, dtype=np.uint8).reshape(16, 3) * 5
    indices = np.arange(16).reshape(2, 8)
    rows = [bytes(16 * a + b for a, b in row.reshape(-1, 2).tolist()) for row in indices]
    palette = chunk(b"PLTE", colours.tobytes())
    yield "png palette of 16", png(rows, (8, 2), 4, 3, palette), colours[indices]
    for name, alphas in (("bytes", [255, 0, 255, 0]), ("index", [255, 255, 0])):
        seen = colours.copy()
        seen[[k for k, a in enumerate(alphas) if a == 0]] = 255
        chunks = palette, chunk(b"tRNS", bytes(alphas))
        yield f"png palette, tRNS as {name}", png(rows, (8, 2), 4, 3, *chunks), seen[indices]

    for order in "<>":
        raw = DEEP.astype(f"{order}u2").tobytes()
        yield f"tiff 16 grey {order}", tiff(raw, (4, 2), 16, order=order), grey3(upper)
    raw = DEEP.astype("<u2").tobytes()
    yield "tiff 16 grey, white is 0", tiff(raw, (4, 2), 16, 0), grey3(255 - upper)
    yield "tiff 12 grey", tiff(packed12(TWELVE), (4, 2), 12), grey3(TWELVE >> 4)
    dim = tiff(TWELVE.astype("<u2").tobytes(), (4, 2), 16)
    yield "tiff 16 grey that is dark", dim, grey3(TWELVE >> 8)
    yield "tiff 8 grey, white is 0", tiff(bytes([0, 9, 255]), (3, 1), 8, 0), grey3([[255, 246, 0]])
    yield "tiff 4 grey", tiff(bytes([0x0F, 0x80]), (3, 1), 4), grey3([[0, 255, 136]])
    yield "tiff 1 bit, white is 0", tiff(b"\xa0", (3, 1), 1, 0), grey3([[0, 255, 0]])
    blue_red = (PAINT.astype("<u2") * 256 + 77).tobytes()
    yield "tiff 16 rgb", tiff(blue_red, (2, 2), 16, 2, samples=3), PAINT
    extra = tiff(rgba.tobytes(), (2, 2), 8, 2, [(338, 0)], samples=4)
    yield "tiff rgb and a channel that is no alpha", extra, PAINT
    yield "tiff rgba", tiff(rgba.tobytes(), (2, 2), 8, 2, [(338, 2)], samples=4), clear
    premultiplied = np.where(alpha[..., None] > 0, rgba, 0).tobytes()
    yield (
        "tiff rgba, premultiplied",
        tiff(premultiplied, (2, 2), 8, 2, [(338, 1)], samples=4),
        clear,
    )
    both = np.where(grey_alpha[..., 1:] > 0, grey_alpha, 0).tobytes()
    seen = grey3(np.where(grey_alpha[..., 1] > 0, grey_alpha[..., 0], 255))
    yield "tiff grey alpha, premultiplied", tiff(both, (2, 2), 8, 1, [(338, 1)], samples=2), seen

    yield "pgm 16", b"P5 4 2 65535\n" + DEEP.astype(">u2").tobytes(), grey3(upper)
    yield "pgm 8 of 100", b"P5 2 1 100\n\0\x64", grey3([[0, 255]])
    yield "pbm", b"P1 3 1\n1 0 1\n", grey3([[0, 255, 0]])

    frame = of_mode("P", np.array([[0, 1]], np.uint8))
    frame.putpalette([200, 0, 0, 0, 90, 0])
    small = bytearray(encoded(frame, "GIF"))
    small[6:10] = struct.pack("<HH", 3, 2)  # a canvas larger than its only frame
    seen = np.full((2, 3, 3), 255)
    seen[0, :2] = [[200, 0, 0], [0, 90, 0]]
    yield "gif, bare canvas", bytes(small), seen
    shades = Image.fromarray(np.array([[0, 5, 7]], np.uint8))
    seen = grey3([[0, 255, 7]])
    yield "gif grey, one marked", encoded(shades, "GIF", transparency=5, optimize=False), seen
    yield "webp rgba", encoded(Image.fromarray(rgba), "WEBP", lossless=True, exact=True), clear
    paletted = Image.merge(
        "PA", [Image.fromarray(np.uint8([[0, 1], [2, 3]])), Image.fromarray(alpha)]
    )
    paletted.putpalette(PAINT.tobytes())
    yield "tiff palette and alpha", encoded(paletted, "TIFF"), clear
    frames = [Image.new("RGB", (2, 2), colour) for colour in ("red", "blue")]
    animated = encoded(frames[0], save_all=True, append_images=frames[1:])
    yield "animated png", animated, np.full((2, 2, 3), [255, 0, 0])


FORMS = {name: (data, expected) for name, data, expected in forms()}


@pytest.mark.parametrize("name", FORMS)
def test_each_form_is_shown_right(name):
    data, expected = FORMS[name]
    # Pillow before 12 does not read this one; it may be refused, but never be shown wrong.
    with contextlib.suppress(*[DataError] * (name == "tiff grey alpha, premultiplied")):
        np.testing.assert_array_equal(pixels(data), expected)


def test_modes_that_store_colours_otherwise_become_the_same_colours():
    """Within the rounding of what is stored.

    Half a level of Cb or Cr is at most 0.9 levels of a colour, of two channels 1.4, and Pillow
    rounds again on the way back: 3. Half a level of a or b, a whole unit being one just visible
    difference, is at most 4 levels of dark saturated sRGB; of both 8.
    """
    colours = np.array([[[255, 0, 0], [0, 128, 0], [30, 60, 200], [255, 255, 255]]], np.uint8)
    image = Image.fromarray(colours)
    for mode in ("YCbCr", "LAB"):
        if mode == "LAB":
            image_cms = pytest.importorskip("PIL.ImageCms")
            profiles = image_cms.createProfile("sRGB"), image_cms.createProfile("LAB")
            stored = image_cms.profileToProfile(image, *profiles, outputMode="LAB")
        else:
            stored = image.convert(mode)
        try:
            found = pixels(encoded(stored, "TIFF")).astype(int)
        except DataError:  # Pillow before 12 reads no YCbCr without compression
            assert mode == "YCbCr"
            continue
        assert np.abs(found - colours).max() <= (3 if mode == "YCbCr" else 8)


def test_cmyk_jpeg_is_read_as_adobe_writes_it():
    """Adobe stores inks inverted, and Pillow writes so: 0 ink is white, all black is black."""
    inks = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    # Flat JPEG blocks at this quality err by a few levels.
    assert np.abs(pixels(encoded(inks, "JPEG", quality=95)) - [255, 0, 0]).max() <= 4


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            png([bytes(12)] * 2, (2, 2), 16, 2, chunk(b"tRNS", bytes(6))),
            "one colour marked as transparent in 16-bit RGB",
        ),
        (tiff(DEEP.tobytes(), (4, 2), 16, 1, [(339, 2)]), "found signed or floating-point"),
        (tiff(bytes(8), (4, 2), 8, 1, [(339, 2)]), "found signed or floating-point"),
        (tiff(bytes(32), (4, 2), 32), "Pillow's mode I"),
        (encoded(Image.fromarray(np.full((2, 2), 9, np.int32)), "TIFF"), "found signed"),
        (tiff(bytes(24), (2, 2), 16, 2, [(284, 2)], samples=3), "16-bit ones in separate planes"),
        (tiff(bytes(12), (2, 2), 8, 6, samples=3), "found YCbCr ones without compression"),
    ],
)
def test_what_cannot_be_shown_right_is_refused(data, message):
    with pytest.raises(DataError, match=r"^cat: expected ") as caught:
        decode(data, "cat")
    assert message in str(caught.value)


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
