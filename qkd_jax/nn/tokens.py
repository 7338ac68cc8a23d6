"""Texts as the tokens that a text encoder was trained on."""

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from qkd_jax.errors import DataError
from qkd_jax.nn.backbone import Backbone


@dataclass(frozen=True)
class Tokenizer:
    """The tokenizer of an encoder, run by the `tokenizers` library.

    Two of the same definition are equal, and their hash is cheap: it is a static part of a
    `Backbone`.

    Attributes:
        definition: the content of a `tokenizer.json`.
        sha256: of the definition.
    """

    definition: str = field(repr=False, compare=False)
    sha256: str = field(init=False)

    def __post_init__(self):
        digest = hashlib.sha256(self.definition.encode()).hexdigest()
        object.__setattr__(self, "sha256", digest)

    def __call__(self, texts: Sequence[str], num_tokens: int) -> dict[str, np.ndarray]:
        """The fields of a batch, with the special tokens of the encoder around each text.

        Args:
            texts: n texts. One with more than `num_tokens` tokens loses the last of its own.
            num_tokens: N.

        Returns:
            {"token_ids": int32 [n, N], "token_mask": bool [n, N]}, zeros after the end of a text.
        """
        ids = np.zeros((len(texts), num_tokens), np.int32)
        mask = np.zeros((len(texts), num_tokens), bool)
        library = _library(self.definition, num_tokens)
        for row, encoding in enumerate(library.encode_batch_fast(list(texts))):
            ids[row, : len(encoding.ids)] = encoding.ids
            mask[row, : len(encoding.ids)] = True
        return {"token_ids": ids, "token_mask": mask}

    def lengths(self, texts: Sequence[str]) -> np.ndarray:
        """int [n], the tokens of each text before it is cut, with the special ones."""
        found = _library(self.definition, None).encode_batch_fast(list(texts))
        return np.array([len(encoding.ids) for encoding in found], int)

    @property
    def vocabulary(self) -> int:
        """V, one more than the largest token."""
        known = _library(self.definition, None).get_vocab(with_added_tokens=True)
        return 1 + max(known.values())


@functools.lru_cache(maxsize=8)
def _library(definition: str, num_tokens: int | None) -> Any:
    """A tokenizer of the library that cuts texts to `num_tokens` and never pads them."""
    from tokenizers import Tokenizer as Library

    library = Library.from_str(definition)
    library.no_padding()
    library.no_truncation()
    if num_tokens is not None:
        library.enable_truncation(num_tokens)
    return library


def tokenize(backbone: Backbone, texts: Sequence[str]) -> dict[str, np.ndarray]:
    """The fields that a text backbone reads: what a batch holds beside its labels.

    Args:
        texts: n texts; longer ones than `backbone.spec.num_tokens` tokens are cut.

    Returns:
        {"token_ids": int32 [n, N], "token_mask": bool [n, N]}.

    Raises:
        DataError: the backbone reads images, or `texts` is not a sequence of texts.

    Example:
        >>> import qkd_jax
        >>> backbone = qkd_jax.load_backbone("tiny_random_text", num_tokens=8)
        >>> batch = {**tokenize(backbone, ["a bird"]), "label": np.array([3])}
        >>> batch["token_ids"].shape, int(batch["token_mask"].sum())
        ((1, 8), 7)
    """
    if not isinstance(backbone.preprocessing, Tokenizer):
        reads = " and ".join(backbone.spec.fields)
        raise DataError(f"backbone: expected one with a tokenizer, found one that reads {reads}")
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise DataError("texts: expected a sequence of str, found another type")
    return backbone.preprocessing(texts, backbone.spec.num_tokens)
