"""The interface of a set of examples, whether images or texts."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np


class Examples(Protocol):
    """N labelled examples.

    Attributes:
      name: of the set, in errors and reports.
      labels: int32 [N], indices into `class_names`.
      ids: str [N], one stable and unique id for each example.
      class_names: C names.
      view: how test inputs are made, beside content and size, such as "margin cut off".
    """

    name: str
    labels: np.ndarray
    ids: np.ndarray
    class_names: tuple[str, ...]
    view: str

    def __len__(self) -> int:
        """N."""

    def take(self, indices: Sequence[int] | np.ndarray, name: str | None = None) -> "Examples":
        """The examples at `indices`, in that order, as a set of their own."""

    def load(
        self, indices: Sequence[int] | np.ndarray, size: int, draws: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        """The fields of a batch that a backbone reads, such as {"image": uint8 [n, S, S, 3]}.

        Args:
          indices: n positions in the set.
          size: `spec.input_size` of the backbone, such as the side S of an image in pixels.
          draws: of `crop_draws`, to vary training examples; None = the test view.

        Raises:
          DataError: an example cannot be read; the message names it.
        """


class Split(NamedTuple):
    """What is trained on and what is tested on; both have the same `class_names`."""

    train: Examples
    test: Examples
