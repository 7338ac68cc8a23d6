"""One image: from a file's bytes to RGB pixels, and the view that a test sees.

Everything that an image file may be (grey, 16-bit, palette, transparent, CMYK, rotated by EXIF,
animated) becomes 8-bit RGB here, or one DataError that names the file.
"""

import io
import pathlib

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from qkd_jax.errors import DataError

Encoded = bytes | pathlib.Path | np.ndarray
# Bounds the memory of a view: with the shorter side at 256 the longer one is at most 25,600 pixels.
MAX_ASPECT = 100


def decode(source: Encoded, name: str) -> Image.Image:
    """Reads one image as 8-bit RGB.

    EXIF rotation is applied, transparency is laid on white, 16-bit grey keeps its upper byte, of an
    animation the first frame is taken.

    Args:
      source: the file's bytes, its path, or pixels as uint8 [H, W, 3].
      name: what an error calls the image.

    Raises:
      DataError: the file is missing, empty, cut off, a mere line, or not an image.
    """
    if isinstance(source, np.ndarray):
        return Image.fromarray(source)
    try:
        data = source.read_bytes() if isinstance(source, pathlib.Path) else source
        if not data:
            raise DataError(f"{name}: the file is empty (0 bytes); expected an image. Remove it.")
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            if max(image.size) > MAX_ASPECT * min(image.size):
                raise DataError(
                    f"{name}: {image.width} x {image.height} pixels; sides that differ more than "
                    f"{MAX_ASPECT} times cannot be cut to a square. Remove it."
                )
            return _to_rgb(ImageOps.exif_transpose(image), name)
    except UnidentifiedImageError:
        raise DataError(
            f"{name}: not an image in any format that Pillow reads. Remove it or convert it."
        ) from None
    except DataError:
        raise
    except Exception as error:  # Pillow's parsers raise all sorts of types on damaged bytes
        raise DataError(f"{name}: cannot be read as an image ({error}). Replace it.") from error


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.has_transparency_data:
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, "white")
        canvas.alpha_composite(image)
        return canvas.convert("RGB")
    if image.mode == "F":
        raise DataError(
            f"{name}: floating-point pixels have no fixed white. Save it in 8 or 16 bit."
        )
    if image.mode.startswith("I"):  # Pillow's own conversion would clip at 255
        grey = np.asarray(image).astype(np.int64)
        if grey.min() < 0 or grey.max() > 65535:
            raise DataError(f"{name}: grey values beyond 16 bit. Save it in 8 or 16 bit.")
        image = Image.fromarray((grey >> 8).astype(np.uint8))
    return image.convert("RGB")


def centre_view(image: Image.Image, image_size: int, shorter_side: int) -> np.ndarray:
    """The test view: shorter side to `shorter_side` (bicubic), then the central square.

    The rounding of sizes and offsets is that of torchvision's Resize and CenterCrop, on which
    published numbers rest.

    Returns:
      uint8 [image_size, image_size, 3].
    """
    width, height = image.size
    if min(width, height) != shorter_side:
        if width <= height:
            size = (shorter_side, int(shorter_side * height / width))
        else:
            size = (int(shorter_side * width / height), shorter_side)
        image = image.resize(size, Image.Resampling.BICUBIC)
        width, height = size
    left = round((width - image_size) / 2.0)
    top = round((height - image_size) / 2.0)
    return np.asarray(image.crop((left, top, left + image_size, top + image_size)))
