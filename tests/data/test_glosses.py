"""The packaged definitions are what their page says, and the rule of their choice is kept."""

import hashlib

import numpy as np
import pytest

from qkd_jax.data import build_glosses, packaged
from qkd_jax.data.build_glosses import Gloss, choose, licence, read, table
from qkd_jax.data.contents import verify
from qkd_jax.data.sources import load_split
from qkd_jax.errors import DataError

PAGE = packaged.GLOSSES.with_name("GLOSSES_LICENCE.txt")


@pytest.fixture(scope="module")
def split():
    return load_split("glosses")


def test_file_is_the_one_of_the_page_and_small():
    content = packaged.GLOSSES.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    page = PAGE.read_text()
    assert digest == packaged.GLOSSES_SHA256 and f"sha256 {digest})" in page
    assert f"({len(content):,} bytes" in page and len(content) < 1_500_000
    assert build_glosses.PACKAGE in page and build_glosses.PACKAGE_SHA256 in page
    assert "WordNet 3.1 Copyright 2011 by Princeton University." in page
    assert "distribute this software and\ndatabase and its documentation for any purpose" in page
    # The page is the one that the build script writes, given the licence that it ends with.
    head = [f"  {n} {line}  " for n, line in enumerate(page.split("files:\n\n")[1].split("\n"), 1)]
    assert licence(head, content, 38) == page


def test_a_hundred_and_fifty_of_each_class(split):
    assert split.train.class_names == split.test.class_names
    names = split.train.class_names
    assert len(names) == 38 and list(names) == sorted(names)
    assert set(names) < set(build_glosses.CLASSES.values())
    assert {"noun.animal", "verb.motion"} < set(names) and "noun.Tops" not in names
    for texts, count in zip(split, (100, 50), strict=True):
        assert np.bincount(texts.labels).tolist() == [count] * 38
        places = [name.split("/") for name in texts.ids.tolist()]
        assert [names[label] for label in texts.labels] == [name for name, _ in places]
        assert all(len(synset) == 8 and synset.isdigit() for _, synset in places)


def test_no_text_is_there_twice_or_cut_wrongly(split):
    assert verify(split) == ([], [])
    texts = [*split.train.texts, *split.test.texts]
    assert len({text.casefold() for text in texts}) == 5700
    for text in texts:
        assert len(text.split()) >= 3 and '"' not in text and text == " ".join(text.split())
        assert text[-1] not in ";:," and text.isprintable()


def test_the_kept_ones_come_first_in_the_order_of_the_rule(split):
    for texts in split:
        glosses = [Gloss(*name.split("/"), "") for name in texts.ids.tolist()]
        for label in range(38):
            order = [g.order for g, k in zip(glosses, texts.labels, strict=True) if k == label]
            assert order == sorted(order)
    assert Gloss("noun.animal", "02084071", "").order == hashlib.sha256(b"02084071n").hexdigest()


def data_line(offset, file_number, gloss):
    return f"{offset:08d} {file_number:02d} n 01 word 0 000 | {gloss}  "


def test_a_definition_ends_where_examples_begin():
    lines = [
        "  1 This is the licence of | nothing",
        data_line(7, 5, 'a kind of dog; a good one; "the dog barked"; "good dog"'),
        data_line(8, 38, "move  along ; "),
        data_line(9, 3, 'what is called "being" here'),
    ]
    assert read(lines) == [
        ("noun.animal", "00000007", "a kind of dog; a good one"),
        ("verb.motion", "00000008", "move along"),
        ("noun.Tops", "00000009", 'what is called "being" here'),
    ]


def test_the_rule_of_the_choice(monkeypatch):
    monkeypatch.setattr(build_glosses, "TRAIN", 2)
    monkeypatch.setattr(build_glosses, "TEST", 1)
    good = [Gloss("noun.act", f"{n:08d}", f"number {n} of acts") for n in range(5)]
    twins = [Gloss("noun.act", "00000012", "one in two"), Gloss("verb.body", "1", "One in two")]
    for bad in (
        [Gloss("noun.act", "00000010", "too short")],
        [Gloss("noun.act", "00000011", 'a "quoted" word in it')],
        twins,
    ):
        assert choose([*good[:2], *bad]) == {}  # two usable ones are too few
    few = [Gloss("noun.motive", f"{n:08d}", f"number {n} of motives") for n in range(2)]
    tops = [Gloss("noun.Tops", f"{n:08d}", f"number {n} of roots") for n in range(5)]
    chosen = choose([*twins, *tops, *few, *good])
    expected = sorted(good, key=lambda g: hashlib.sha256(f"{g.synset}n".encode()).hexdigest())[:3]
    assert chosen == {"noun.act": expected}
    sides = [line.split("\t")[0] for line in table(chosen).decode().splitlines()]
    assert sides == ["train", "train", "test"]


def test_a_damaged_or_missing_file_is_named(tmp_path):
    damaged = tmp_path / "glosses.tsv"
    damaged.write_bytes(packaged.GLOSSES.read_bytes().replace(b"dog", b"cat", 1))
    with pytest.raises(DataError, match=r"glosses.tsv: damaged: expected sha256"):
        packaged.glosses(damaged)
    with pytest.raises(DataError, match="expected a file of the package, found none"):
        packaged.glosses(tmp_path / "gone.tsv")
