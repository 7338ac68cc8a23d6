"""Random resized crops and flips, from uniform draws that depend on the image and the epoch.

Images are cropped on the host after decoding, so that only the small result goes to the device. The
geometry is that of torchvision, which published numbers are based on.
"""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

TRIES = 10
NUM_DRAWS = 2 * TRIES + 3  # areas, shapes, place (2), flip
SCALE = (0.05, 1.0)
RATIO = (3 / 4, 4 / 3)


def crop_draws(indices: Sequence[int], *, seed: int, task: int, epoch: int) -> np.ndarray:
    """Random numbers for the crops of images in one epoch, independent of the batches.

    They are raw draws of Philox, which NumPy keeps the same in all versions.

    Args:
      indices: n positions in the task's training set.

    Returns:
      float64 [n, NUM_DRAWS], uniform in [0, 1).
    """
    raw = np.zeros((len(indices), NUM_DRAWS), np.uint64)
    for row, index in enumerate(indices):
        seeds = np.random.SeedSequence(seed, spawn_key=(task, epoch, int(index)))
        raw[row] = np.random.Philox(seeds).random_raw(NUM_DRAWS)
    return (raw >> np.uint64(11)) * 2.0**-53


def crop_box(
    draws: np.ndarray,
    width: int,
    height: int,
    scale: tuple[float, float] = SCALE,
    ratio: tuple[float, float] = RATIO,
) -> tuple[int, int, int, int]:
    """The box of a random resized crop, by the rule of torchvision's RandomResizedCrop.

    An area, uniform in `scale` times the image's, and a ratio width / height, log-uniform in
    `ratio`, are drawn up to ten times until the box fits; otherwise it is the largest central box
    with a ratio in `ratio`. Sides are rounded to whole pixels.

    Args:
      draws: [NUM_DRAWS] of `crop_draws`.
      width, height: of the image in pixels.

    Returns:
      (left, top, right, bottom) in pixels.
    """
    areas, shapes = draws[:TRIES], draws[TRIES : 2 * TRIES]
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for area, shape in zip(areas.tolist(), shapes.tolist(), strict=True):
        area = width * height * (scale[0] + (scale[1] - scale[0]) * area)
        shape = math.exp(low + (high - low) * shape)
        wide, tall = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < wide <= width and 0 < tall <= height:
            left = int(draws[2 * TRIES] * (width - wide + 1))
            top = int(draws[2 * TRIES + 1] * (height - tall + 1))
            return left, top, left + wide, top + tall
    wide = min(width, max(1, round(height * ratio[1])))
    tall = min(height, max(1, round(width / ratio[0])))
    left, top = (width - wide) // 2, (height - tall) // 2
    return left, top, left + wide, top + tall


def random_view(image: Image.Image, image_size: int, draws: np.ndarray) -> np.ndarray:
    """The train view: a random box, resized (bilinear, antialiased), and mirrored half of the time.

    Returns:
      uint8 [image_size, image_size, 3].
    """
    view = image.crop(crop_box(draws, *image.size))
    view = view.resize((image_size, image_size), Image.Resampling.BILINEAR)
    if draws[-1] < 0.5:
        view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(view)
