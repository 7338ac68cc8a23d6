"""What the verbs take: one check of images, labels and masks, on the host, before anything learns.

Shapes and types are read off; the range of floating pixels is computed where the array lives, so
that images on a device stay there. Padded rows may hold anything.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qkd_jax.errors import DataError, ProtocolError
from qkd_jax.learners.state import LearnerState
from qkd_jax.settings.config import Config

Batch = Mapping[str, Any]
# Room for the rounding of whoever divided by 255 or resized; more is another range.
ROUNDING = 1e-3


def check_batch(state: LearnerState, batch: Batch, *, of_steps: bool = False) -> dict[str, Any]:
    """Checks a batch of the current task; returns the fields that a step reads, as it takes them.

    Args:
      batch: {"image": [B, H, W, 3], "label": [B]}, optionally "mask" [B].
      of_steps: whether a leading axis of steps is allowed, [S, B, ...].

    Raises:
      ProtocolError: no task has begun.
      DataError: names the field, what was expected and what was found.
    """
    if int(state.task) < 0:
        raise ProtocolError("no task has begun: call begin_task first")
    if not isinstance(batch, Mapping):
        raise DataError(
            f"batch: expected a dict with 'image' and 'label', found {type(batch).__name__}"
        )
    for name in ("image", "label"):
        if name not in batch:
            found = sorted(map(str, batch))
            raise DataError(f"batch: expected 'image' and 'label', found {found}")
    check_shape(state.config, batch["image"], "image", of_steps=of_steps)
    image = _native(batch["image"])
    rows = image.shape[:-3]
    label = _on_host("label", batch["label"])
    if label.shape != rows:
        raise DataError(f"label: expected shape {list(rows)}, found {list(label.shape)}")
    if not np.issubdtype(label.dtype, np.integer):
        raise DataError(f"label: expected whole numbers, found {label.dtype}")
    mask = _on_host("mask", batch.get("mask", np.ones(rows, bool)))
    if mask.shape != rows or mask.dtype != bool:
        raise DataError(f"mask: expected bool {list(rows)}, found {mask.dtype} {list(mask.shape)}")
    features = batch.get("features")
    if features is not None and (
        np.ndim(features) != len(rows) + 2 or np.shape(features)[:-2] != rows
    ):
        raise DataError(
            f"features: expected [{', '.join(map(str, rows))}, S, D], found "
            f"{list(np.shape(features))}"
        )
    if not mask.any(axis=-1).all():
        raise DataError("mask: expected at least one image in each batch, found only padding")
    allowed = np.asarray(state.task_classes)
    allowed = allowed[allowed >= 0]
    wrong = mask & ~np.isin(label, allowed)
    if wrong.any():
        found = sorted(set(label[wrong].tolist()))[:5]
        raise DataError(
            f"label: expected classes of task {int(state.task)}, {sorted(allowed.tolist())}, "
            f"found {found}"
        )
    check_pixels(image, "image", mask)
    checked = {"image": image, "label": label.astype(np.int32), "mask": mask}
    return checked if features is None else checked | {"features": features}


def check_batches(batches: Any) -> Iterable[Batch]:
    """Raises DataError where one batch, or nothing, is given in place of several."""
    if isinstance(batches, Mapping) or not isinstance(batches, Iterable):
        raise DataError(
            f"batches: expected a list or iterator of batches, found {type(batches).__name__}"
        )
    return batches


def check_images(config: Config, images: Any) -> Any:
    """Checks images [B, H, W, 3] to predict; what is being traced is checked by shape alone.
    Returns them as a compiled program takes them.

    Raises:
      DataError: as `check_batch`.
    """
    check_shape(config, images, "images")
    if isinstance(images, jax.core.Tracer):
        return images
    images = _native(images)
    check_pixels(images, "images", np.ones(images.shape[:1], bool))
    return images


def check_shape(config: Config, images: Any, name: str, *, of_steps: bool = False) -> None:
    """Raises DataError unless `images` is an array [B, H, W, 3] of at least one image."""
    size = config.backbone.image_size
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
        raise DataError(f"{name}: {where} has NaN or infinite pixels")
    raise DataError(
        f"{name}: expected floats in [0, 1], found {low[row]:g} to {high[row]:g} in {where}. "
        "Divide pixels of 0 to 255 by 255 or pass them as uint8, clip what resizing left outside, "
        "and do not normalise: the backbone's own mean and standard deviation are applied inside"
    )


def _native(images: Any) -> Any:
    """Floats of another byte order or wider than 64 bits, which jax does not take, as float32."""
    strange = isinstance(images, np.ndarray) and (
        not images.dtype.isnative or images.dtype.itemsize > 8
    )
    return images.astype(np.float32) if strange else images


def _on_host(name: str, values: Any) -> np.ndarray:
    try:
        return np.asarray(values)
    except ValueError as error:  # rows of different lengths
        raise DataError(f"{name}: expected an array, found what is none ({error})") from None


def _bounds(images: Any) -> tuple[Any, Any]:
    """Least and largest pixel of each image, float32; NaN where there is one."""
    if isinstance(images, jax.Array):
        return _bounds_on_device(images)
    pixels = images.reshape(*images.shape[:-3], -1)
    return pixels.min(-1).astype(np.float32), pixels.max(-1).astype(np.float32)


@jax.jit
def _bounds_on_device(images: jax.Array) -> tuple[jax.Array, jax.Array]:
    axes = (-3, -2, -1)
    return jnp.min(images, axes).astype(jnp.float32), jnp.max(images, axes).astype(jnp.float32)
