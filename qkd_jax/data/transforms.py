"""Image transforms that run on the device: pure functions with explicit keys and static shapes."""

import functools
import math

import jax
import jax.numpy as jnp
from jax import Array

TRIES = 10


def to_unit(images: Array) -> Array:
    """uint8 in [0, 255] to float32 in [0, 1]; floats are returned as they are."""
    if images.dtype == jnp.uint8:
        return images.astype(jnp.float32) / 255.0
    return images


def sample_crop(
    key: Array,
    aspect: Array,
    scale: tuple[float, float] = (0.05, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Array:
    """Draws the box of a random resized crop.

    The rule of torchvision's RandomResizedCrop without its rounding to whole pixels: an area,
    uniform in `scale` times the image's, and a width / height, log-uniform in `ratio`, are drawn up
    to ten times until the box fits in; else the largest central box whose shape is in `ratio`.

    Args:
      key: a typed key.
      aspect: width / height of the original image, a scalar.

    Returns:
      float32 [4], (top, left, height, width) as fractions of the image's height and width.
    """
    aspect = jnp.asarray(aspect, jnp.float32)
    # One draw for all: each call of the generator costs compile time.
    draws = jax.random.uniform(key, (2 * TRIES + 2,))
    area, shape, place = draws[:TRIES], draws[TRIES:-2], draws[-2:]
    # Unit: the image's height. Its area is then its aspect.
    area = aspect * (scale[0] + (scale[1] - scale[0]) * area)
    low, high = math.log(ratio[0]), math.log(ratio[1])
    shape = jnp.exp(low + (high - low) * shape)
    heights = jnp.sqrt(area / shape)
    widths = jnp.sqrt(area * shape) / aspect
    fits = (heights <= 1.0) & (widths <= 1.0)
    first = jnp.argmax(fits)
    fallback_height = jnp.minimum(1.0, aspect / ratio[0])
    fallback_width = jnp.minimum(1.0, ratio[1] / aspect)
    found = jnp.any(fits)
    height = jnp.where(found, heights[first], fallback_height)
    width = jnp.where(found, widths[first], fallback_width)
    place = jnp.where(found, place, 0.5)
    return jnp.stack([place[0] * (1.0 - height), place[1] * (1.0 - width), height, width])


def crop_and_resize(image: Array, box: Array, size: int, method: str = "linear") -> Array:
    """Resamples a box of an image to a square, antialiased, as Pillow's resize(box=...).

    Args:
      image: [H, W, 3], uint8 or float in [0, 1].
      box: float32 [4], (top, left, height, width) as fractions.
      size: side of the result in pixels.
      method: "linear" or "cubic".

    Returns:
      float32 [size, size, 3] in [0, 1].
    """
    image = to_unit(image)
    extent = jnp.asarray(image.shape[:2], jnp.float32)
    scale = size / (box[2:] * extent)
    resampled = jax.image.scale_and_translate(
        image,
        (size, size, image.shape[2]),
        (0, 1),
        scale,
        -box[:2] * extent * scale,
        method=method,
        antialias=True,
    )
    return jnp.clip(resampled, 0.0, 1.0)


def random_resized_crop(
    key: Array,
    image: Array,
    aspect: Array,
    size: int,
    scale: tuple[float, float] = (0.05, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    method: str = "linear",
) -> Array:
    """Cuts a random box, resized to `size`, out of an image squashed to a square canvas.

    The box is drawn in the geometry of the original image, of which `aspect` is the width / height.

    Returns:
      float32 [size, size, 3] in [0, 1].
    """
    return crop_and_resize(image, sample_crop(key, aspect, scale, ratio), size, method)


def random_flip(key: Array, image: Array) -> Array:
    """Mirrors [H, W, 3] left to right with probability one half."""
    return jnp.where(jax.random.bernoulli(key), image[:, ::-1, :], image)


def image_keys(key: Array, indices: Array) -> Array:
    """One key an image, from its index in the data set, so that batching does not matter.

    Args:
      key: the key of the epoch.
      indices: integers [B].

    Returns:
      typed keys [B].
    """
    return jax.vmap(functools.partial(jax.random.fold_in, key))(indices)


def augment(
    keys: Array,
    images: Array,
    aspect: Array,
    size: int,
    scale: tuple[float, float] = (0.05, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    method: str = "linear",
) -> Array:
    """Random resized crop and flip, each image by its own key.

    Args:
      keys: typed keys [B].
      images: [B, S, S, 3] canvases (`ImageSet.load` with view "train"), uint8 or float in [0, 1].
      aspect: float32 [B], width / height of the originals.
      size: side of the result in pixels.

    Returns:
      float32 [B, size, size, 3] in [0, 1].
    """

    def one(key: Array, image: Array, aspect: Array) -> Array:
        crop_key, flip_key = jax.random.split(key)
        cut = random_resized_crop(crop_key, image, aspect, size, scale, ratio, method)
        return random_flip(flip_key, cut)

    return jax.vmap(one)(keys, images, aspect)
