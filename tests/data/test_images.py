"""Whatever a file may be, it becomes the right RGB pixels or one clear error."""

import io
import sys

import numpy as np
import pillow_heif
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from qkd_jax.data.crops import crop_draws, random_view
from qkd_jax.data.images import MAX_ASPECT, centre_view, decode
from qkd_jax.errors import DataError
from tests.data.image_files import (
    COLOUR,
    GREY,
    encoded,
    of_mode,
    pixels,
)

pytestmark = pytest.mark.floor


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
