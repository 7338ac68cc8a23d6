"""Sets of texts: the same checks as sets of images, what a tokenizer gets, and what copies are."""

import unicodedata
from types import SimpleNamespace

import numpy as np
import pytest

from qkd_jax.data.contents import read_contents, told_leaks, verify
from qkd_jax.data.examples import Split
from qkd_jax.data.labelled_set import concatenate
from qkd_jax.data.text_set import TextSet
from qkd_jax.errors import DataError

TEXTS = ("a small dog", "Ein käse", "猫がいる 🐈", "مرحبا")


def text_set(**changes):
    fields = {
        "name": "set",
        "labels": np.array([0, 1, 1, 0], np.int32),
        "ids": np.array(["a", "b", "c", "d"]),
        "class_names": ("x", "y"),
        "texts": TEXTS,
    }
    return TextSet(**fields | changes)


def reader(num_tokens):
    """As much of a backbone as a set of texts reads: a token for each character, at most N."""
    given = []

    def tokenize(texts, count):
        given.append(list(texts))
        ids = np.zeros((len(texts), count), np.int32)
        for row, text in enumerate(texts):
            codes = [ord(character) for character in text[:count]]
            ids[row, : len(codes)] = codes
        return {"token_ids": ids, "token_mask": ids > 0}

    spec = SimpleNamespace(num_tokens=num_tokens)
    return SimpleNamespace(spec=spec, preprocessing=tokenize, given=given)


def test_the_fields_of_a_batch_are_those_it_promises():
    texts, backbone = text_set(), reader(6)
    batch = texts.load(np.array([2, 0]), backbone)
    assert tuple(batch) == texts.fields == ("token_ids", "token_mask")
    assert batch["token_ids"].shape == (2, 6) and batch["token_ids"].dtype == np.int32
    assert batch["token_mask"].tolist() == [[True] * 6, [True] * 6]
    assert backbone.given == [[TEXTS[2], TEXTS[0]]]
    assert texts.load([], backbone)["token_ids"].shape == (0, 6)


def test_a_tokenizer_gets_composed_accents_and_no_outer_spaces():
    apart = unicodedata.normalize("NFD", "\u2003käse\r\n")
    backbone = reader(8)
    texts = text_set(texts=(apart, *TEXTS[1:]))
    texts.load([0], backbone)
    assert backbone.given == [["käse"]]
    assert texts.seen(0) == "käse".encode() and texts.stored(0) == apart.encode()


def test_texts_are_not_varied():
    with pytest.raises(DataError, match=r"set: data\.augment: expected false for texts, found tr"):
        text_set().load([0], reader(4), np.zeros((1, 5)))


def test_take_and_concatenate_keep_texts_with_their_ids():
    texts = text_set()
    part = texts.take([3, 1]).take([1, 0], "part")
    assert (part.name, part.texts, part.ids.tolist()) == ("part", TEXTS[1:4:2], ["b", "d"])
    joined = concatenate([part, texts.take([0])], "both")
    assert joined.texts == (TEXTS[1], TEXTS[3], TEXTS[0]) and joined.ids.tolist() == ["b", "d", "a"]
    assert joined.labels.tolist() == [1, 0, 0] and type(joined) is TextSet
    twice = concatenate([part, part.take([0], "more")], "twice")
    assert twice.ids.tolist() == ["part: b", "part: d", "more: b"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": np.array([0, 1, 2, 0])}, r"set: expected labels in \[0, 2\), found 2 of text"),
        ({"ids": np.array(["a", "b", "a", "d"])}, "set: expected unique ids, found 'a' 2 times"),
        ({"texts": TEXTS[:3]}, "set: expected 4 texts, found 3"),
        ({"texts": (*TEXTS[:3], " \u3000\n")}, "set: d: expected a text in UTF-8"),
        ({"texts": (*TEXTS[:3], "\udce9")}, r"set: d: .* found '\\udce9'"),
        ({"texts": (*TEXTS[:3], b"bytes")}, "set: d: .* found b'bytes'"),
    ],
)
def test_a_set_that_contradicts_itself_cannot_be_made(changes, message):
    with pytest.raises(DataError, match=message) as caught:
        text_set(**changes)
    str(caught.value).encode()


def test_contents_follow_the_stored_text_and_leaks_what_is_read():
    train = text_set(name="train")
    composed_otherwise = unicodedata.normalize("NFD", TEXTS[1]) + " "
    test = text_set(name="test", texts=(composed_otherwise, "other", "more", "other"))
    found = read_contents(Split(train, test))
    assert len({*found.train.keys(), *found.test.keys()}) == 8
    moved = read_contents(Split(train.take([3, 2, 1, 0]), test))
    assert moved.sha256() == found.sha256()
    changed = text_set(name="train", texts=(*TEXTS[:3], "another"))
    assert read_contents(Split(changed, test)).sha256() != found.sha256()
    repeated = verify(Split(train, test))
    assert repeated.leaked == [["train: b", "test: a"]]
    assert repeated.copies == [["test: b", "test: d"]]
    told = told_leaks(repeated.leaked, test)
    assert told.startswith("1 text is both trained and tested on (the same words):")
    assert told_leaks(repeated.leaked * 2, test).startswith("2 texts are both")
