"""Texts become the tokens that the library gives, cut and padded as documented."""

import numpy as np
import pytest

import qkd_jax
from qkd_jax.errors import DataError
from qkd_jax.nn.tokens import Tokenizer
from qkd_jax.weights.load import tiny_random, tiny_random_text

CLASS, SEPARATOR, UNKNOWN = 2, 3, 1


@pytest.fixture(scope="module")
def backbone():
    return tiny_random_text(num_tokens=6)


@pytest.mark.floor
def test_texts_are_cut_and_padded(backbone):
    found = qkd_jax.tokenize(backbone, ["a", "abcdefgh", ""])
    assert found["token_ids"].dtype == np.int32 and found["token_ids"].shape == (3, 6)
    np.testing.assert_array_equal(found["token_mask"].sum(axis=1), [3, 6, 2])
    a = found["token_ids"][0, 1]
    np.testing.assert_array_equal(found["token_ids"][0], [CLASS, a, SEPARATOR, 0, 0, 0])
    # A cut text keeps its end mark.
    assert found["token_ids"][1, 0] == CLASS and found["token_ids"][1, 5] == SEPARATOR
    assert found["token_ids"][1, 1] == a


def test_a_batch_does_not_change_a_text(backbone):
    texts = ["short", "a longer text than that", "é 東京 🙂"]
    together = qkd_jax.tokenize(backbone, texts)
    for row, text in enumerate(texts):
        alone = qkd_jax.tokenize(backbone, [text])
        np.testing.assert_array_equal(alone["token_ids"][0], together["token_ids"][row])
    assert UNKNOWN in together["token_ids"][2]


def test_lengths_are_those_before_the_cut(backbone):
    np.testing.assert_array_equal(backbone.preprocessing.lengths(["a", "abcdefgh", ""]), [3, 10, 2])


def test_tokenizers_of_one_definition_are_equal(backbone):
    """They are static arguments of compiled functions: an equal one compiles nothing again."""
    one = backbone.preprocessing
    same, other = Tokenizer(one.definition), Tokenizer(one.definition + " ")
    assert same == one and hash(same) == hash(one) and other != one
    assert one.definition not in repr(one) and one.sha256 in repr(one)


def test_other_inputs_are_refused(backbone):
    with pytest.raises(DataError, match="expected one with a tokenizer, found one"):
        qkd_jax.tokenize(tiny_random(), ["a"])
    for texts in ("a text", [b"bytes"], [None]):
        with pytest.raises(DataError, match="expected a sequence of str"):
            qkd_jax.tokenize(backbone, texts)
