"""Each form that a format has is shown with the pixels that its definition says, or refused."""

import contextlib
import struct

import numpy as np
import pytest
from PIL import Image

from qkd_jax.data.images import decode
from qkd_jax.errors import DataError
from tests.data.image_files import (
    DEEP,
    PAINT,
    TWELVE,
    chunk,
    deep_png,
    encoded,
    grey3,
    marked,
    of_mode,
    packed12,
    pixels,
    png,
    tiff,
)

pytestmark = pytest.mark.floor


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
