"""A labelled set of images that is decoded on demand."""

import concurrent.futures
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from qkd_jax.data.crops import random_view
from qkd_jax.data.images import Encoded, centre_view, decode
from qkd_jax.errors import DataError


@dataclass(frozen=True, eq=False)
class ImageSet:
    """N labelled images, a set of `Examples`.

    Raises:
      DataError: labels or ids are not N, a label is outside [0, C), an id repeats or is not UTF-8.

    Attributes:
      name: of the set, in errors and reports.
      labels: int32 [N], indices into `class_names`.
      ids: str [N], one stable and unique id for each image.
      class_names: C names.
      fetch: encoded images (bytes, path or uint8 [H, W, 3]) at the given indices.
      margin: whether test views cut off the border, as published numbers do (224 of 256 pixels);
        False for images that fill their frame.
    """

    name: str
    labels: np.ndarray
    ids: np.ndarray
    class_names: tuple[str, ...]
    fetch: Callable[[Sequence[int]], list[Encoded]]
    margin: bool = True

    def __post_init__(self) -> None:
        _check_labels(self.name, self.labels, len(self.class_names))
        ids = self.ids
        if ids.shape != self.labels.shape or ids.dtype.kind != "U":
            found = f"{ids.dtype} {list(ids.shape)}"
            raise DataError(f"{self.name}: expected {len(self)} ids as text, found {found}")
        codes = np.ascontiguousarray(ids).view(np.uint32)
        if (codes >> 11 == 0xD800 >> 11).any():  # surrogates, from other encodings
            wrong = next(name for name in ids.tolist() if not _is_utf8(name))
            raise DataError(f"{self.name}: expected ids in UTF-8, found {wrong!r}")
        # Comparing ids that are in order, the usual case, is much faster than counting them.
        if not (ids[1:] > ids[:-1]).all() and len(set(ids.tolist())) < len(ids):
            names, counts = np.unique(ids, return_counts=True)
            name = str(names[counts.argmax()])
            raise DataError(
                f"{self.name}: expected unique ids, found {name!r} {counts.max()} times"
            )

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def view(self) -> str:
        """How the test view is made, beside its size."""
        return "margin cut off" if self.margin else "whole"

    def load(
        self,
        indices: Sequence[int] | np.ndarray,
        size: int,
        draws: np.ndarray | None = None,
    ) -> dict[str, np.ndarray]:
        """Decodes images in a pool of threads.

        Args:
          indices: n positions in the set.
          size: side S of the result in pixels.
          draws: of `crop_draws`, [n, NUM_DRAWS]: random crops and flips, to train on. None: the
            test view, the shorter side resized and the central square.

        Returns:
          {"image": uint8 [n, S, S, 3]}.

        Raises:
          DataError: an image cannot be read; the message names it.
        """
        indices = np.asarray(indices, np.int64)
        shorter_side = size * 256 // 224 if self.margin else size
        sources = self.fetch(indices.tolist())
        views = np.zeros((len(indices), size, size, 3), np.uint8)

        def one(row: int) -> None:
            image = decode(sources[row], f"{self.name}: {self.ids[indices[row]]}")
            if draws is None:
                views[row] = centre_view(image, size, shorter_side)
            else:
                views[row] = random_view(image, size, draws[row])

        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            for _ in pool.map(one, range(len(indices))):  # raises what a thread raised
                pass
        return {"image": views}

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


def concatenate(parts: Sequence[ImageSet], name: str) -> ImageSet:
    """The images of all parts in one set; if ids repeat, each gets the name of its part."""
    ids = [part.ids.tolist() for part in parts]
    if len({text for part in ids for text in part}) < sum(map(len, ids)):
        pairs = zip(parts, ids, strict=True)
        ids = [[f"{part.name}: {text}" for text in own] for part, own in pairs]
    starts = np.cumsum([0, *map(len, parts)])

    def fetch(indices: Sequence[int]) -> list[Encoded]:
        owners = np.searchsorted(starts, indices, side="right") - 1
        pairs = zip(indices, owners.tolist(), strict=True)
        return [parts[owner].fetch([int(index - starts[owner])])[0] for index, owner in pairs]

    return ImageSet(
        name=name,
        labels=np.concatenate([part.labels for part in parts]),
        ids=np.array([text for part in ids for text in part], str),
        class_names=parts[0].class_names,
        fetch=fetch,
        margin=parts[0].margin,
    )


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
      name: of the set, in errors.
      margin: see `ImageSet`.

    Raises:
      DataError: shapes, types or labels do not fit; names the first that does not.
    """
    images, labels = np.asarray(images), np.asarray(labels)
    if images.shape[3:] != (3,) or images.dtype != np.uint8 or not all(images.shape[1:]):
        found = f"{images.dtype} {list(images.shape)}"
        raise DataError(f"{name}: expected images as uint8 [N, H, W, 3], found {found}")
    if labels.shape != images.shape[:1]:
        raise DataError(f"{name}: expected {len(images)} labels, found {list(labels.shape)}")
    if class_names is None:
        class_names = [str(label) for label in range(int(labels.max(initial=-1)) + 1)]
    _check_labels(name, labels, len(class_names))  # before int32 can cut them
    if ids is None:
        ids = [f"{name}/{index:06d}" for index in range(len(images))]
    return ImageSet(
        name=name,
        labels=labels.astype(np.int32),
        ids=np.array(list(ids), str),
        class_names=tuple(class_names),
        fetch=lambda indices: [images[index] for index in indices],
        margin=margin,
    )


def _check_labels(name: str, labels: np.ndarray, num_classes: int) -> None:
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        found = f"{labels.dtype} {list(labels.shape)}"
        raise DataError(f"{name}: expected labels as integers [N], found {found}")
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if wrong.size:
        raise DataError(
            f"{name}: expected labels in [0, {num_classes}), found {labels[wrong[0]]} of image "
            f"{wrong[0]}"
        )


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
