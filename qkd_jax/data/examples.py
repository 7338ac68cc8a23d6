"""The interface of a set of examples, whether images or texts."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np


class Reader(Protocol):
    """Who reads the inputs of a set: as much of `nn.backbone.Backbone` as a set needs.

    Attributes:
      spec: its `input_size` or `num_tokens` says how large inputs are.
      preprocessing: for texts the tokenizer, (n texts, N) -> {"token_ids": int32 [n, N],
        "token_mask": bool [n, N]}.
    """

    spec: Any
    preprocessing: Any


class Examples(Protocol):
    """N labelled examples.

    Attributes:
      name: of the set, in errors and reports.
      labels: int32 [N], indices into `class_names`.
      ids: str [N], one stable and unique id for each example.
      class_names: C names.
      fields: names of the batch fields that `load` gives, such as ("image",).
      noun: what one example is, in messages: "image" or "text".
      substance: what two copies of an example have in common, in messages, such as "pixels".
      view: how test inputs are made, beside content and size, such as "margin cut off".
    """

    name: str
    labels: np.ndarray
    ids: np.ndarray
    class_names: tuple[str, ...]
    fields: tuple[str, ...]
    noun: str
    substance: str
    view: str

    def __len__(self) -> int:
        """N."""

    def take(self, indices: Sequence[int] | np.ndarray, name: str | None = None) -> "Examples":
        """The examples at `indices`, in that order, as a set of their own."""

    def load(
        self,
        indices: Sequence[int] | np.ndarray,
        backbone: Reader,
        draws: np.ndarray | None = None,
    ) -> dict[str, np.ndarray]:
        """The fields of a batch that a backbone reads, such as {"image": uint8 [n, S, S, 3]}.

        Args:
          indices: n positions in the set.
          backbone: who reads them.
          draws: of `crop_draws`, to vary training examples; None = the test view.

        Raises:
          DataError: an example cannot be read, and the message names it; or `draws` are given for
            examples that cannot be varied.
        """

    def cut(self, backbone: Reader) -> int:
        """How many examples are longer than the backbone reads, so that `load` cuts them."""

    def shown(self, index: int) -> dict[str, str]:
        """One example for a page: {"text": ...}, or {"image": a data URL}."""

    def stored(self, index: int) -> bytes:
        """The bytes of one example as they are kept, without its place and name.

        Raises:
          OSError, DataError: it cannot be read.
        """

    def seen(self, index: int) -> bytes:
        """The bytes of what a learner sees of one example, the same for all copies of it.

        Raises:
          OSError, DataError: it cannot be read.
        """


class Split(NamedTuple):
    """What is trained on and what is tested on; both have the same `class_names`."""

    train: Examples
    test: Examples


def counted(number: int, noun: str) -> str:
    """The number with its noun, such as "1 image" or "2 images"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
