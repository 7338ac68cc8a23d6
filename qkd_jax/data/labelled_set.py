"""What sets of images and of texts have in common: labels, ids, class names, and their checks."""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np

from qkd_jax.errors import DataError


@dataclass(frozen=True, eq=False)
class LabelledSet(ABC):
    """N labelled examples; a subclass has their contents and gives the rest of `Examples`.

    Raises:
      DataError: labels or ids are not N, a label is outside [0, C), an id repeats or is not UTF-8.
    """

    name: str
    labels: np.ndarray
    ids: np.ndarray
    class_names: tuple[str, ...]

    noun: ClassVar[str]

    def __post_init__(self) -> None:
        check_labels(self.name, self.labels, len(self.class_names), self.noun)
        ids = self.ids
        if ids.shape != self.labels.shape or ids.dtype.kind != "U":
            found = f"{ids.dtype} {list(ids.shape)}"
            raise DataError(f"{self.name}: expected {len(self)} ids as text, found {found}")
        codes = np.ascontiguousarray(ids).view(np.uint32)
        if (codes >> 11 == 0xD800 >> 11).any():  # surrogates, from other encodings
            wrong = next(name for name in ids.tolist() if not is_utf8(name))
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

    def take(self, indices: Sequence[int] | np.ndarray, name: str | None = None) -> Self:
        """The examples at `indices`, in that order, as a set of their own."""
        indices = np.asarray(indices, np.int64)
        return dataclasses.replace(
            self,
            name=name or self.name,
            labels=self.labels[indices],
            ids=self.ids[indices],
            **self._contents_at(indices),
        )

    @abstractmethod
    def _contents_at(self, indices: np.ndarray) -> dict[str, Any]:
        """The subclass's fields with the contents at `indices` int64 [n]."""

    @staticmethod
    @abstractmethod
    def _joined_contents(parts: Sequence[Self]) -> dict[str, Any]:
        """The subclass's fields with the contents of all parts, one after the other."""


def concatenate(parts: Sequence[LabelledSet], name: str) -> LabelledSet:
    """The examples of all parts, of one kind, in one set; if ids repeat, each gets the name of its
    part.
    """
    ids = [part.ids.tolist() for part in parts]
    if len({text for part in ids for text in part}) < sum(map(len, ids)):
        pairs = zip(parts, ids, strict=True)
        ids = [[f"{part.name}: {text}" for text in own] for part, own in pairs]
    return dataclasses.replace(
        parts[0],
        name=name,
        labels=np.concatenate([part.labels for part in parts]),
        ids=np.array([text for part in ids for text in part], str),
        **parts[0]._joined_contents(parts),
    )


def check_labels(name: str, labels: np.ndarray, num_classes: int, noun: str) -> None:
    """Raises DataError unless labels are integers [N] in [0, C); `noun`: what has them."""
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        found = f"{labels.dtype} {list(labels.shape)}"
        raise DataError(f"{name}: expected labels as integers [N], found {found}")
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if wrong.size:
        raise DataError(
            f"{name}: expected labels in [0, {num_classes}), found {labels[wrong[0]]} of {noun} "
            f"{wrong[0]}"
        )


def is_utf8(text: str) -> bool:
    """Whether a text can be written as UTF-8: it has no surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
