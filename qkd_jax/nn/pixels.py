"""Pixels given to a vision transformer: checks on the host, normalisation on the device.

The range of floating pixels is computed where the array lives, so that images on a device stay
there. Padded rows may hold anything.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qkd_jax.errors import DataError
from qkd_jax.nn.layers import as_row, at_least_float32

# Tolerance for rounding when pixels were divided by 255 or resized.
ROUNDING = 1e-3


@dataclass(frozen=True)
class Preprocessing:
    """How pixels in [0, 1] become the input: (pixel - mean) / std for each channel (RGB)."""

    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)


def normalize(images: jax.Array, preprocessing: Preprocessing, dtype=jnp.float32) -> jax.Array:
    """The transformer's input from pixels.

    Args:
        images: [B, H, W, 3]; uint8 in 0..255, or floating point in [0, 1].

    Returns:
        [B, H, W, 3] in `dtype`.
    """
    if jnp.issubdtype(images.dtype, jnp.integer):
        images = images.astype(dtype) * jnp.asarray(1.0 / 255.0, dtype)
    images = images.astype(dtype)
    mean = as_row(jnp.asarray(preprocessing.mean, dtype), images)
    std = as_row(jnp.asarray(preprocessing.std, dtype), images)
    return (images - mean) / std


def resize(images: jax.Array, size: int) -> jax.Array:
    """Images [B, size, size, 3] from square ones of any size; these are returned as they are if
    the size is right.

    Bicubic with antialiasing, as the test view of an image is, but without rounding to uint8.

    Args:
        images: [B, H, H, 3], uint8 in 0..255 or floating point in [0, 1].

    Returns:
        floating point in [0, 1] where the size differs.
    """
    if images.shape[1:3] == (size, size):
        return images
    images = normalize(images, Preprocessing(), at_least_float32(images.dtype))
    shape = (images.shape[0], size, size, images.shape[3])
    return jnp.clip(jax.image.resize(images, shape, "cubic", antialias=True), 0.0, 1.0)


def check_shape(images: Any, size: int, name: str, *, of_steps: bool = False) -> None:
    """Raises DataError unless `images` is an array [B, size, size, 3] of at least one image."""
    wanted = f"[B, {size}, {size}, 3]" + f" or [S, B, {size}, {size}, 3]" * of_steps
    if not isinstance(images, np.ndarray | jax.Array):
        raise DataError(f"{name}: expected an array {wanted}, found {type(images).__name__}")
    shape = tuple(images.shape)
    if len(shape) not in ((4, 5) if of_steps else (4,)) or shape[-3:] != (size, size, 3):
        raise DataError(
            f"{name}: expected {wanted} (backbone.image_size={size}), found {list(shape)}"
        )
    if 0 in shape:
        raise DataError(f"{name}: expected at least one image, found {list(shape)}")
    if images.dtype != np.uint8 and not jnp.issubdtype(images.dtype, jnp.floating):
        raise DataError(f"{name}: expected uint8 or floats in [0, 1], found {images.dtype}")


def check_pixels(images: Any, name: str, mask: np.ndarray) -> None:
    """Raises DataError unless floating pixels of real rows (mask [B] or [S, B]) are in [0, 1]."""
    if images.dtype == np.uint8:
        return
    low, high = (np.asarray(bound) for bound in _bounds(images))
    # NaN fails both comparisons.
    bad = mask & ~((low >= -ROUNDING) & (high <= 1 + ROUNDING))
    if not bad.any():
        return
    row = tuple(np.argwhere(bad)[0].tolist())
    where = f"image {row[0] if len(row) == 1 else list(row)} of the batch"
    if not (np.isfinite(low[row]) and np.isfinite(high[row])):
        raise DataError(f"{name}: expected finite pixels, found NaN or infinite ones in {where}")
    raise DataError(
        f"{name}: expected floats in [0, 1], found {low[row]:g} to {high[row]:g} in {where}. "
        "Divide pixels of 0 to 255 by 255 or pass them as uint8, clip what resizing left outside, "
        "and do not normalise: the backbone's own mean and standard deviation are applied inside"
    )


def as_native(images: Any) -> Any:
    """`images`; floats that jax does not take (byte-swapped, or above 64 bits) become float32."""
    strange = isinstance(images, np.ndarray) and (
        not images.dtype.isnative or images.dtype.itemsize > 8
    )
    return images.astype(np.float32) if strange else images


def _bounds(images: Any) -> tuple[Any, Any]:
    """Least and largest pixel of each image, float32; NaN if a pixel is NaN."""
    if isinstance(images, jax.Array):
        return _bounds_on_device(images)
    pixels = images.reshape(*images.shape[:-3], -1)
    return pixels.min(-1).astype(np.float32), pixels.max(-1).astype(np.float32)


@jax.jit
def _bounds_on_device(images: jax.Array) -> tuple[jax.Array, jax.Array]:
    axes = (-3, -2, -1)
    return jnp.min(images, axes).astype(jnp.float32), jnp.max(images, axes).astype(jnp.float32)
