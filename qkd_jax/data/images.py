"""One image, from the bytes of a file to RGB pixels and the test view.

Any kind of image file (grey, 16-bit, palette, transparent, CMYK, rotated by EXIF, animated) becomes
8-bit RGB here, or gives a DataError that names the file.
"""

import contextlib
import io
import pathlib
import re
import struct
import warnings
from collections.abc import Iterator

import numpy as np
from PIL import Image, UnidentifiedImageError

from qkd_jax.errors import DataError

Encoded = bytes | pathlib.Path | np.ndarray
# Bounds the memory of a view: with the shorter side at 256 the longer one is at most 25,600 pixels.
MAX_ASPECT = 100
# Bounds the memory of a decoding thread, whatever the size of the file, to 1.2 GB: the decoder of
# WebP and the laying of transparency on white take 24 bytes a pixel together. Cameras of phones
# take up to 8192 x 6144.
MAX_PIXELS = 8192 * 6144
MAX_BYTES = 1 << 28  # of a file
# Formats of photographs and drawings; no reader of another one sees a file. Pillow has more, but
# some read wrongly (opaque TGA as transparent) and others run another program (EPS).
FORMATS = frozenset("AVIF BMP DIB GIF HEIF ICO JPEG JPEG2000 MPO PNG PPM TIFF WEBP".split())
# Kinds of HEIF, after "ftyp" in a file; Pillow reads them with the help of pillow-heif.
HEIF_BRANDS = frozenset((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"))
# Modes that Pillow itself converts to RGB without loss of range.
MODES = frozenset("1 L LA La P PA RGB RGBA RGBa RGBX CMYK YCbCr LAB HSV".split())
# EXIF orientation: how the stored pixels must be turned to be upright.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
ORIENTATION = 0x0112
PHOTOMETRIC, PLANAR, YCBCR_SUBSAMPLING, SAMPLE_FORMAT = 262, 284, 530, 339  # tags of TIFF


def decode(source: Encoded, name: str) -> Image.Image:
    """Reads one image as 8-bit RGB.

    EXIF rotation is applied, transparency is put on white, 16-bit samples keep their upper byte
    (12-bit ones their upper 8 bits), and of an animation the first frame is taken. Metadata that
    cannot be read (EXIF, colour profiles, comments) is ignored.

    Args:
      source: the file's bytes, its path, or pixels as uint8 [H, W, 3].
      name: of the image, in errors.

    Raises:
      DataError: the file is missing, empty, truncated, too narrow, not an image, has more than
        `MAX_PIXELS` pixels or `MAX_BYTES` bytes (both found before anything is decoded), or has
        signed, floating-point or 32-bit samples, which have no fixed white.
    """
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.shape[2:] != (3,) or not source.size:
            found = f"{source.dtype} {list(source.shape)}"
            raise DataError(f"{name}: expected pixels as uint8 [H, W, 3], found {found}")
        return _of_usual_shape(Image.fromarray(source), name)
    data = read_bytes(source, name) if isinstance(source, pathlib.Path) else source
    _of_usual_length(len(data), name)
    if not data:
        raise DataError(f"{name}: expected an image, found an empty file (0 bytes). Remove it.")
    _silence_pillow()
    try:
        return _read(data, name)
    except DataError:
        raise
    except Image.DecompressionBombError as error:
        raise DataError(
            f"{name}: expected at most {2 * Image.MAX_IMAGE_PIXELS:,} pixels, found more: {error} "
            "Scale it down; if you trust it, raise PIL.Image.MAX_IMAGE_PIXELS."
        ) from None
    except Exception as error:  # Pillow's parsers raise many types on damaged bytes
        bare = _without_metadata(data)
        if bare != data:
            with contextlib.suppress(Exception):  # then the first error is reported
                return _read(bare, name)
        if isinstance(error, UnidentifiedImageError):
            known = ", ".join(sorted(FORMATS & Image.OPEN.keys()))
            raise DataError(
                f"{name}: expected an image ({known}), found "
                + (
                    'HEIC, as phones write it. pip install "qkd_jax[heif]" reads it; or convert it.'
                    if _is_heif(data) and "HEIF" not in Image.OPEN
                    else "another kind of file. Convert it or remove it."
                )
            ) from None
        raise DataError(f"{name}: cannot be read as an image ({error}). Replace it.") from error


def read_bytes(file: pathlib.Path, name: str) -> bytes:
    """The content of an image file; raises DataError if it cannot be read or is too large."""
    try:
        _of_usual_length(file.stat().st_size, name)
        return file.read_bytes()
    except OSError as error:
        raise DataError(f"{name}: cannot be read ({error.strerror or error}).") from error


def _of_usual_length(size: int, name: str) -> None:
    if size > MAX_BYTES:
        raise DataError(
            f"{name}: expected an image of at most {MAX_BYTES:,} bytes, found {size:,}. Scale it "
            "down."
        )


def _silence_pillow() -> None:
    """Ignores Pillow's warnings about what it repairs or ignores, mostly metadata."""
    # `warnings.catch_warnings` for each image is not safe in threads: the last one to end restores
    # the filters of another.
    rule = ("ignore", None, Warning, re.compile(r"PIL\."), 0)
    if warnings.filters[:1] != [rule]:
        warnings.filterwarnings("ignore", module=r"PIL\.")


def _read(data: bytes, name: str) -> Image.Image:
    for size in _sizes_in_icon(data):  # which Pillow decodes while it opens the file
        _of_usual_size(*size, name)
    Image.init()
    if _is_heif(data):
        _learn_heif()
    with Image.open(io.BytesIO(data), formats=sorted(FORMATS & Image.OPEN.keys())) as image:
        _of_usual_shape(image, name)
        if image.format == "TIFF":
            _check_samples(image, name)
        # The layout of samples in the file, such as "L;4", is known only before they are read.
        _, box, _, layout = image.tile[0] if image.tile else (None, None, None, "")
        layout = layout if isinstance(layout, str) else str(layout[0])
        image.load()
        rgb = _to_rgb(image, layout, name)
        if image.format == "GIF" and box != (0, 0, *image.size):
            # What the first frame does not cover is transparent.
            canvas = Image.new("RGB", image.size, "white")
            canvas.paste(rgb.crop(box), box)
            rgb = canvas
        turn = TURNS.get(_orientation(image))
        return rgb if turn is None else rgb.transpose(turn)


def _is_heif(data: bytes) -> bool:
    return data[4:8] == b"ftyp" and data[8:12] in HEIF_BRANDS


def _learn_heif() -> None:
    """Makes Pillow read HEIF, if pillow-heif is installed."""
    with contextlib.suppress(ImportError):
        from pillow_heif import register_heif_opener

        register_heif_opener(thumbnails=False, depth_images=False, aux_images=False)


def _of_usual_shape(image: Image.Image, name: str) -> Image.Image:
    if max(image.size) > MAX_ASPECT * min(image.size):
        raise DataError(
            f"{name}: expected sides that differ at most {MAX_ASPECT} times, found {image.width} x "
            f"{image.height} pixels, which cannot be cut to a square. Remove it."
        )
    _of_usual_size(*image.size, name)
    return image


def _of_usual_size(width: int, height: int, name: str) -> None:
    if width * height > MAX_PIXELS:
        raise DataError(
            f"{name}: expected at most {MAX_PIXELS:,} pixels, found {width} x {height}. Scale it "
            "down."
        )


def _sizes_in_icon(data: bytes) -> Iterator[tuple[int, int]]:
    """Width and height of the pictures in an icon; those in its table need not be theirs."""
    if data[:4] != b"\0\0\1\0":
        return
    for entry in range(6, min(6 + 16 * int.from_bytes(data[4:6], "little"), len(data)), 16):
        start = int.from_bytes(data[entry + 12 : entry + 16], "little")
        head = data[start : start + 24]
        if len(head) < 24:
            continue
        if head.startswith(b"\x89PNG"):
            yield struct.unpack_from(">II", head, 16)
        elif head[0] == 12:  # a bitmap of the oldest kind
            yield struct.unpack_from("<HH", head, 4)
        else:
            width, height = struct.unpack_from("<ii", head, 4)
            yield abs(width), abs(height)


def _check_samples(image: Image.Image, name: str) -> None:
    """Raises DataError for TIFF files that Pillow would read wrongly."""
    tags = image.tag_v2
    raw = image.info.get("compression") == "raw"
    bits = max(tags.get(258, (1,)))
    if any(kind != 1 for kind in tags.get(SAMPLE_FORMAT, (1,))):
        found = "signed or floating-point ones, which have no fixed white"
    elif raw and tags.get(PLANAR) == 2 and bits != 8:
        found = f"{bits}-bit ones in separate planes"
    elif (
        raw
        and tags.get(PHOTOMETRIC) == 6
        and (image.mode != "YCbCr" or tags.get(YCBCR_SUBSAMPLING, (2, 2)) != (1, 1))
    ):
        found = "YCbCr ones without compression"
    else:
        return
    raise DataError(
        f"{name}: expected unsigned samples of 8 or 16 bit, found {found}. Save it in 8 bit."
    )


def _to_rgb(image: Image.Image, layout: str, name: str) -> Image.Image:
    # Pillow scales 16-bit PPM files with any white to all 16 bits, in mode "I".
    deep = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM")
    if not deep and image.mode not in MODES:
        raise DataError(
            f"{name}: expected unsigned samples of 8 or 16 bit, found floating-point ones or 32 "
            f"bit (Pillow's mode {image.mode}), which have no fixed white. Save it in 8 bit."
        )
    opaque = None
    if "transparency" in image.info and (deep or image.mode in ("1", "L", "RGB")):
        if layout.startswith("RGB;16"):  # the lower byte, which may differ, is lost
            raise DataError(
                f"{name}: expected transparency as a channel, found one colour marked as "
                "transparent in 16-bit RGB. Save it in 8 bit."
            )
        opaque = _unmarked(image, image.info.pop("transparency"), layout)
    elif image.has_transparency_data:
        image = image.convert({"La": "LA", "RGBa": "RGBA"}.get(image.mode)).convert("RGBA")
        opaque = image.getchannel("A")
    if deep:
        levels = np.asarray(image).astype(np.uint16)
        if image.format == "TIFF" and image.tag_v2.get(PHOTOMETRIC) == 0:  # white is 0
            levels = ~levels
        image = Image.fromarray((levels >> (4 if layout == "I;12" else 8)).astype(np.uint8))
    rgb = image.convert("RGB")
    if opaque is None:
        return rgb
    canvas = Image.new("RGB", rgb.size, "white")
    canvas.paste(rgb, mask=opaque)
    return canvas


def _unmarked(image: Image.Image, marked: int | tuple[int, ...], layout: str) -> Image.Image:
    """A mask: 0 where a pixel has the grey or colour marked as transparent, 255 elsewhere."""
    bits = {"1": 1, "L;2": 2, "L;4": 4}.get(layout, 16 if image.mode.startswith("I") else 8)
    # The mark is a value in the bits of the file; Pillow spreads fewer than 8 bits over 0..255.
    scale = 255 // (2**bits - 1) if bits < 8 else 1
    levels = np.asarray(image.convert("L") if image.mode == "1" else image)
    differs = levels.reshape(*levels.shape[:2], -1) != np.asarray(marked) % 2**bits * scale
    return Image.fromarray(differs.any(axis=2).astype(np.uint8) * 255)


def _orientation(image: Image.Image) -> int:
    try:
        found = image.getexif().get(ORIENTATION)
    except Exception:  # an image must not be lost over its metadata
        return 1
    return found if type(found) is int else 1


def _without_metadata(data: bytes) -> bytes:
    """The file with only the parts that determine its pixels, and EXIF for the rotation."""
    kept = []
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        kept, at = [data[:8]], 8
        while at < len(data):
            kind = data[at + 4 : at + 8]
            end = at + 12 + int.from_bytes(data[at : at + 4], "big")
            if kind[:1].isupper() or kind in (b"tRNS", b"eXIf"):  # upper case: critical
                kept.append(data[at:end])
            at = end
    elif data.startswith(b"\xff\xd8"):
        kept, at = [data[:2]], 2
        while data[at : at + 1] == b"\xff" and data[at + 1 : at + 2] not in (b"\xda", b"\xff", b""):
            marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
            segment = data[at : at + 2 + length]
            # Whole JFIF and Adobe segments (APP0 and APP14) decide how colours are stored.
            if not (0xE0 <= marker <= 0xEF or marker == 0xFE) or (
                (marker == 0xE0 and length >= 16)
                or (marker == 0xE1 and segment[4:10] == b"Exif\0\0")
                or (marker == 0xEE and length >= 14)
            ):
                kept.append(segment)
            at += len(segment)
        kept.append(data[at:])
    return b"".join(kept) or data


def centre_view(image: Image.Image, image_size: int, shorter_side: int) -> np.ndarray:
    """The test view: shorter side to `shorter_side` (bicubic), then the central square.

    Sizes and offsets are rounded as in torchvision's Resize and CenterCrop, which published numbers
    are based on.

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
