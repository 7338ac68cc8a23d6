"""A labelled set of images that is decoded on demand."""

import base64
import concurrent.futures
import io
import os
import pathlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np

from qkd_jax.data.crops import random_view
from qkd_jax.data.examples import Reader
from qkd_jax.data.images import Encoded, centre_view, decode, read_bytes
from qkd_jax.data.labelled_set import LabelledSet, check_labels
from qkd_jax.errors import DataError

SHOWN = 96  # pixels of an image on a page


@dataclass(frozen=True, eq=False)
class ImageSet(LabelledSet):
    """N labelled images, a set of `Examples`.

    Raises:
      DataError: as `LabelledSet`.

    Attributes:
      name: of the set, in errors and reports.
      labels: int32 [N], indices into `class_names`.
      ids: str [N], one stable and unique id for each image.
      class_names: C names.
      fetch: encoded images (bytes, path or uint8 [H, W, 3]) at the given indices.
      margin: whether test views cut off the border, as published numbers do (224 of 256 pixels);
        False for images that fill their frame.
    """

    fetch: Callable[[Sequence[int]], list[Encoded]]
    margin: bool = True

    fields: ClassVar[tuple[str, ...]] = ("image",)
    noun: ClassVar[str] = "image"
    substance: ClassVar[str] = "pixels"

    @property
    def view(self) -> str:
        """How the test view is made, beside its size."""
        return "margin cut off" if self.margin else "whole"

    def load(
        self,
        indices: Sequence[int] | np.ndarray,
        backbone: Reader,
        draws: np.ndarray | None = None,
    ) -> dict[str, np.ndarray]:
        """Decodes images in a pool of threads.

        Args:
          indices: n positions in the set.
          backbone: its `spec.input_size` is the side S of the result in pixels.
          draws: of `crop_draws`, [n, NUM_DRAWS]: random crops and flips, to train on. None: the
            test view, the shorter side resized and the central square.

        Returns:
          {"image": uint8 [n, S, S, 3]}.

        Raises:
          DataError: an image cannot be read; the message names it.
        """
        indices, size = np.asarray(indices, np.int64), backbone.spec.input_size
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

    def cut(self, backbone: Reader) -> int:
        """0: images of any size are resized."""
        return 0

    def shown(self, index: int) -> dict[str, str]:
        """{"image": a JPEG as a data URL}, at most `SHOWN` pixels wide and high."""
        (source,) = self.fetch([index])
        image = decode(source, f"{self.name}: {self.ids[index]}")
        image.thumbnail((SHOWN, SHOWN))
        content = io.BytesIO()
        image.save(content, "JPEG", quality=85)
        return {"image": f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"}

    def stored(self, index: int) -> bytes:
        """The bytes of the file or record; of an array its type, shape and pixels."""
        (encoded,) = self.fetch([index])
        if isinstance(encoded, np.ndarray):
            return f"{encoded.dtype} {encoded.shape}".encode() + encoded.tobytes()
        if isinstance(encoded, pathlib.Path):
            return read_bytes(encoded, f"{self.name}: {self.ids[index]}")
        return encoded

    def seen(self, index: int) -> bytes:
        """The size and pixels of the decoded image, in whatever file they are kept."""
        (encoded,) = self.fetch([index])
        image = decode(encoded, f"{self.name}: {self.ids[index]}")
        return f"{image.size}".encode() + image.tobytes()

    def _contents_at(self, indices: np.ndarray) -> dict[str, Any]:
        return {"fetch": lambda inner: self.fetch(indices[np.asarray(inner, np.int64)].tolist())}

    @staticmethod
    def _joined_contents(parts: Sequence[Self]) -> dict[str, Any]:
        starts = np.cumsum([0, *map(len, parts)])

        def fetch(indices: Sequence[int]) -> list[Encoded]:
            owners = np.searchsorted(starts, indices, side="right") - 1
            pairs = zip(indices, owners.tolist(), strict=True)
            return [parts[owner].fetch([int(index - starts[owner])])[0] for index, owner in pairs]

        return {"fetch": fetch}


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
    check_labels(name, labels, len(class_names), ImageSet.noun)  # before int32 can cut them
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
