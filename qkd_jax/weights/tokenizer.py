"""Finds and reads the tokenizer of a text encoder."""

import json
from pathlib import Path

from qkd_jax.errors import WeightsError
from qkd_jax.nn.tokens import Tokenizer

NAMES = ("tokenizer.json", "vocab.txt")
PROBE = [
    "",
    "a bird, 2 birds",
    "\u9ce5 \U0001f426 \u0439\u0301\0",
]  # rare letters are unknown tokens


def beside(weights: Path) -> Path:
    """The tokenizer's file in the folder of a weight file.

    Raises:
        WeightsError: there is none.
    """
    for name in NAMES:
        if (weights.parent / name).is_file():
            return weights.parent / name
    raise WeightsError(
        f"{weights.parent}: expected {' or '.join(NAMES)} beside {weights.name}, since every text "
        "encoder has its own tokens, found neither; copy it from where the weights come from."
    )


def read_tokenizer(file: Path, vocabulary: int) -> Tokenizer:
    """The tokenizer of a `tokenizer.json`, or of a BERT's `vocab.txt`.

    A `vocab.txt` does not say whether texts are put in lower case: the `tokenizer_config.json`
    beside it does, and else whether the vocabulary has words with capitals.

    Args:
        file: as `beside` finds it.
        vocabulary: V of the encoder.

    Raises:
        WeightsError: the file cannot be read, has more tokens than the encoder, or fails on texts.
    """
    try:
        text = file.read_text("utf-8")
        if file.suffix == ".txt":
            text = _from_vocabulary(file, text)
        tokenizer = Tokenizer(text)
        size = max(tokenizer.vocabulary, 1 + int(tokenizer(PROBE, 64)["token_ids"].max()))
    except OSError as error:
        raise WeightsError(
            f"{file}: expected a tokenizer that you may read, found: {error.strerror or error}."
        ) from error
    except Exception as error:  # the library raises plain Exceptions
        raise WeightsError(
            f"{file}: expected a tokenizer, found a file that cannot be read as one ({error})."
        ) from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of Rust, which is no Exception
            raise
        raise WeightsError(f"{file}: expected a tokenizer, found another file ({error}).") from None
    if size > vocabulary:
        raise WeightsError(
            f"{file}: expected a tokenizer of at most {vocabulary} tokens, as the weights have, "
            f"found {size}; take both files from the same model."
        )
    return tokenizer


def _from_vocabulary(file: Path, text: str) -> str:
    from tokenizers.implementations import BertWordPieceTokenizer

    words = text.splitlines()
    config = file.with_name("tokenizer_config.json")
    settings = json.loads(config.read_text("utf-8")) if config.is_file() else {}
    special = {name for name in words if name.startswith("[")}
    cased = any(word != word.lower() for word in words if word not in special)
    return BertWordPieceTokenizer(
        {word: index for index, word in enumerate(words)},
        lowercase=bool(settings.get("do_lower_case", not cased)),
    ).to_str()
