"""A labelled set of texts, cut into tokens when they are loaded."""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np

from qkd_jax.data.examples import Reader
from qkd_jax.data.labelled_set import LabelledSet, is_utf8
from qkd_jax.errors import DataError

SHOWN = 300  # characters of a text on a page


@dataclass(frozen=True, eq=False)
class TextSet(LabelledSet):
    """N labelled texts, a set of `Examples`.

    Raises:
      DataError: as `LabelledSet`; or texts are not N, one is empty or not UTF-8.

    Attributes:
      name: of the set, in errors and reports.
      labels: int32 [N], indices into `class_names`.
      ids: str [N], one stable and unique id for each text.
      class_names: C names.
      texts: N texts as they are stored; a learner sees them as `plain` gives them.
    """

    texts: tuple[str, ...]

    fields: ClassVar[tuple[str, ...]] = ("token_ids", "token_mask")
    noun: ClassVar[str] = "text"
    substance: ClassVar[str] = "words"
    view: ClassVar[str] = "NFC without outer spaces"

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.texts) != len(self):
            raise DataError(f"{self.name}: expected {len(self)} texts, found {len(self.texts)}")
        for name, text in zip(self.ids.tolist(), self.texts, strict=True):
            if not isinstance(text, str) or not text.strip() or not is_utf8(text):
                raise DataError(
                    f"{self.name}: {name}: expected a text in UTF-8 that is more than spaces, "
                    f"found {text!a}"
                )

    def load(
        self,
        indices: Sequence[int] | np.ndarray,
        backbone: Reader,
        draws: np.ndarray | None = None,
    ) -> dict[str, np.ndarray]:
        """Cuts texts into tokens; those beyond `spec.num_tokens` are left out.

        Args:
          indices: n positions in the set.
          backbone: its `preprocessing` is the tokenizer and its `spec.num_tokens` N.
          draws: expected to be None, since texts are not varied.

        Returns:
          {"token_ids": int32 [n, N], "token_mask": bool [n, N], False for padding}.

        Raises:
          DataError: `draws` are given.
        """
        if draws is not None:
            raise DataError(f"{self.name}: data.augment: expected false for texts, found true")
        texts = [plain(self.texts[index]) for index in np.asarray(indices, np.int64).tolist()]
        return backbone.preprocessing(texts, backbone.spec.num_tokens)

    def cut(self, backbone: Reader) -> int:
        """How many texts have more tokens than `spec.num_tokens`."""
        lengths = backbone.preprocessing.lengths([plain(text) for text in self.texts])
        return int((lengths > backbone.spec.num_tokens).sum())

    def shown(self, index: int) -> dict[str, str]:
        """{"text": ...}, at most `SHOWN` characters of it."""
        text = plain(self.texts[index])
        return {"text": text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"}

    def stored(self, index: int) -> bytes:
        """The text as it is kept, in UTF-8."""
        return self.texts[index].encode()

    def seen(self, index: int) -> bytes:
        """The text as a tokenizer gets it, in UTF-8."""
        return plain(self.texts[index]).encode()

    def _contents_at(self, indices: np.ndarray) -> dict[str, Any]:
        return {"texts": tuple(self.texts[index] for index in indices.tolist())}

    @staticmethod
    def _joined_contents(parts: Sequence[Self]) -> dict[str, Any]:
        return {"texts": tuple(text for part in parts for text in part.texts)}


def plain(text: str) -> str:
    """The text with accents composed (NFC) and without spaces around it."""
    return unicodedata.normalize("NFC", text).strip()
