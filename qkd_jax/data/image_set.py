"""A labelled set of images that is decoded on demand, and the pair of sets to train and test on."""

import concurrent.futures
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from qkd_jax.data.crops import random_view
from qkd_jax.data.images import Encoded, centre_view, decode
from qkd_jax.errors import DataError


@dataclass(frozen=True, eq=False)
class ImageSet:
    """N labelled images.

    Attributes:
      name: what errors and reports call the set.
      labels: int32 [N], indices into `class_names`.
      ids: str [N], one stable and unique id an image.
      class_names: C names.
      fetch: encoded images (bytes, path or uint8 [H, W, 3]) at the given indices.
      margin: test views cut the border off as published numbers do (224 of 256 pixels); False for
        images that fill their frame.
    """

    name: str
    labels: np.ndarray
    ids: np.ndarray
    class_names: tuple[str, ...]
    fetch: Callable[[Sequence[int]], list[Encoded]]
    margin: bool = True

    def __len__(self) -> int:
        return len(self.labels)

    def load(
        self,
        indices: Sequence[int] | np.ndarray,
        image_size: int,
        draws: np.ndarray | None = None,
    ) -> np.ndarray:
        """Decodes images in a pool of threads.

        Args:
          indices: n positions in the set.
          image_size: side S of the result in pixels.
          draws: of `crop_draws`, [n, NUM_DRAWS]: random crops and flips, to train on. None: the
            test view, the shorter side resized and the central square.

        Returns:
          uint8 [n, S, S, 3].

        Raises:
          DataError: an image cannot be read; names it.
        """
        indices = np.asarray(indices, np.int64)
        shorter_side = image_size * 256 // 224 if self.margin else image_size
        sources = self.fetch(indices.tolist())
        views = np.zeros((len(indices), image_size, image_size, 3), np.uint8)

        def one(row: int) -> None:
            image = decode(sources[row], f"{self.name}: {self.ids[indices[row]]}")
            if draws is None:
                views[row] = centre_view(image, image_size, shorter_side)
            else:
                views[row] = random_view(image, image_size, draws[row])

        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            for _ in pool.map(one, range(len(indices))):  # raises what a thread raised
                pass
        return views

    def take(self, indices: Sequence[int] | np.ndarray, name: str | None = None) -> "ImageSet":
        """The images at `indices`, in that order, as a set of their own."""
        indices = np.asarray(indices, np.int64)
        return ImageSet(
            name=name or self.name,
            labels=self.labels[indices],
            ids=self.ids[indices],
            class_names=self.class_names,
            fetch=lambda inner: self.fetch(indices[np.asarray(inner, np.int64)].tolist()),
            margin=self.margin,
        )


class Split(NamedTuple):
    """What is trained on and what is tested on; both have the same `class_names`."""

    train: ImageSet
    test: ImageSet


def from_arrays(
    images: np.ndarray,
    labels: np.ndarray,
    class_names: Sequence[str] | None = None,
    ids: Sequence[str] | None = None,
    name: str = "arrays",
    margin: bool = False,
) -> ImageSet:
    """A set from pixels in memory.

    Args:
      images: uint8 [N, H, W, 3].
      labels: integers [N] in [0, C).
      class_names: C names; by default the numbers 0 to the largest label.
      ids: N unique names; by default `name` and the position.
      name: what errors call the set.
      margin: see `ImageSet`.

    Raises:
      DataError: shapes, types or labels do not fit; names the first that does not.
    """
    images, labels = np.asarray(images), np.asarray(labels)
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
        found = f"{images.dtype} {list(images.shape)}"
        raise DataError(f"{name}: images must be uint8 [N, H, W, 3], found {found}")
    if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        found = f"{labels.dtype} {list(labels.shape)}"
        raise DataError(f"{name}: labels must be integers [{len(images)}], found {found}")
    if class_names is None:
        class_names = [str(label) for label in range(labels.max(initial=-1) + 1)]
    wrong = np.flatnonzero((labels < 0) | (labels >= len(class_names)))
    if wrong.size:
        raise DataError(
            f"{name}: label {labels[wrong[0]]} of image {wrong[0]} is outside [0, "
            f"{len(class_names)})"
        )
    ids = np.array(
        [f"{name}/{i:06d}" for i in range(len(images))] if ids is None else list(ids), str
    )
    if ids.shape != labels.shape or len(np.unique(ids)) != len(ids):
        raise DataError(
            f"{name}: expected {len(images)} unique ids, found {len(set(ids.tolist()))}"
        )
    return ImageSet(
        name=name,
        labels=labels.astype(np.int32),
        ids=ids,
        class_names=tuple(class_names),
        fetch=lambda indices: [images[index] for index in indices],
        margin=margin,
    )
