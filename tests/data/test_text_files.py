"""Files of texts as people have them: encodings, line ends, tables, and every fault at once."""

import csv
import os
import unicodedata

import numpy as np
import pytest

from qkd_jax.data.sources import describe, fingerprint, load_split
from qkd_jax.data.splits import fifth_to_test
from qkd_jax.data.text_files import open_texts
from qkd_jax.errors import DataError

LINES = {"Sport": ["ein Tor", "noch ein Tor"], "käse": ["猫がいる", "مرحبا 🐈"]}
HEADED = "text,label\n"


def write(root, files):
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def problems_of(root, **options):
    with pytest.raises(DataError) as caught:
        open_texts(root, **options)
    str(caught.value).encode()
    return str(caught.value)


@pytest.fixture
def root(tmp_path):
    files = {
        f"{part}/{name}.txt": "".join(f"{line}{end}\n" for line in lines)
        for part, end in (("train", ""), ("test", "?"))
        for name, lines in LINES.items()
    }
    return write(tmp_path / "data", files)


@pytest.fixture
def tables(tmp_path):
    train = 'text,label\n"a, ""b""\nc",2\n猫がいる,10\n\n😀,2\n'
    test = "id,label,text\n7,2,x\n8,10,y\n"
    return write(tmp_path / "data", {"train.csv": train, "test.csv": test})


def test_a_line_is_a_text_and_a_file_a_class(root):
    train, test = open_texts(root)
    assert train.class_names == test.class_names == ("Sport", "käse")
    assert train.texts == (*LINES["Sport"], *LINES["käse"])
    assert train.labels.tolist() == [0, 0, 1, 1] and train.labels.dtype == np.int32
    assert train.ids.tolist()[1:3] == ["train/Sport/2", "train/käse/1"]
    assert test.texts[3] == "مرحبا 🐈?" and (train.name, test.name) == ("data/train", "data/test")


def test_marks_line_ends_and_empty_lines_change_nothing(root):
    expected = open_texts(root)
    content = "\ufeff" + "\r\n".join(LINES["käse"])
    write(root, {"train/käse.txt": content, "train/Sport.txt": "ein Tor\n\n \t\r\nnoch ein Tor"})
    found = open_texts(root)
    assert found.train.texts == expected.train.texts
    assert found.train.ids.tolist() == ["train/Sport/1", "train/Sport/4", *expected.train.ids[2:]]


def test_only_line_feeds_end_a_line(root):
    odd = "one\u2028still one\u0085and\x0bone\rmore"
    write(root, {"train/Sport.txt": odd + "\n"})
    assert open_texts(root).train.texts[0] == odd


@pytest.mark.parametrize(
    ("train", "test"), [("TRAINING", "Validation"), ("Train", "testing"), ("train", "val")]
)
def test_parts_may_be_called_otherwise_and_ids_are_the_same(root, tables, train, test):
    (root / "train.csv").unlink()
    (root / "test.csv").unlink()
    expected = open_texts(root)
    (root / "train").rename(root / train)
    (root / "test").rename(root / test)
    for found, before in zip(open_texts(root), expected, strict=True):
        assert found.ids.tolist() == before.ids.tolist() and found.texts == before.texts


def test_accents_composed_in_two_ways_are_one_class(root):
    apart = unicodedata.normalize("NFD", "käse")
    (root / "test" / "käse.txt").rename(root / "test" / f"{apart}.txt")
    assert open_texts(root).test.class_names == ("Sport", "käse")
    write(root, {f"train/{apart}.txt": "x\n"})
    if len(list((root / "train").iterdir())) == 3:
        assert "names that differ in more than how accents are composed" in problems_of(root)


def test_a_table_has_a_header_quotes_and_labels_as_text(tables):
    train, test = open_texts(tables)
    assert train.class_names == test.class_names == ("10", "2")
    assert train.texts == ('a, "b"\nc', "猫がいる", "😀")
    assert train.ids.tolist() == ["train/row 2", "train/row 3", "train/row 5"]
    assert test.labels.tolist() == [1, 0] and test.texts == ("x", "y")


def test_labels_are_compared_without_outer_spaces_and_with_composed_accents(tables):
    apart = unicodedata.normalize("NFD", "käse")
    for name, label in (("train", f" {apart}"), ("test", "käse\u00a0")):
        write(tables, {f"{name}.csv": f" text ,label\nx,{label}\n"})
    train, test = open_texts(tables)
    assert train.class_names == test.class_names == ("käse",)


def test_tabs_other_columns_and_marks(tables):
    for name in ("train", "test"):
        (tables / f"{name}.csv").unlink()
        text = "\ufeffreview\tstars\tnote\r\nso, so\t2\t\r\nfine\t5\t\r\n"
        write(tables, {f"{name}.TSV": text})
    train, _ = open_texts(tables, text_column="review", label_column="stars")
    assert train.texts == ("so, so", "fine") and train.class_names == ("2", "5")
    message = problems_of(tables)
    assert "2 problems" in message and "found 'review', 'stars', 'note'" in message


def test_a_long_text_is_read_and_the_limit_of_the_process_put_back(tables):
    before = csv.field_size_limit()
    write(tables, {"train.csv": f"{HEADED}{'x' * 300_000},2\ny,10\n"})
    assert len(open_texts(tables).train.texts[0]) == 300_000
    assert csv.field_size_limit() == before


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("text,label\nhé,2\nü,10\n".encode("latin-1"), "line 2 and 1 more: expected UTF-8, found"),
        ("text,label\nx,2\ny,10\n".encode("utf-16"), "expected UTF-8, found UTF-16."),
        ("text,label\nx,2\ny,10\n".encode("utf-32"), "expected UTF-8, found UTF-32."),
        (b"text,label\nx\0,2\ny,10\n", "line 2: expected text, found a NUL character"),
        (f"{HEADED}x,2\n ,10\n", "line 3: expected a text as 'text', found an empty cell"),
        (f"{HEADED}x,2\ny,\n", "line 3: expected a text as 'label', found an empty cell"),
        (f'{HEADED}"x\n\n",2\na,b,10\n', "line 5: expected 2 cells as in the header, found 3; a "),
        (f"{HEADED}x,2\ny\n", "line 3: expected 2 cells as in the header, found 1"),
        (f'{HEADED}x,2\n"y,10\nz,2\n', "line 3: expected cells with quotes in pairs"),
        ("text;label\nx;2\n", "expected one column 'text' and one 'label' "),
        ("text,text,label\nx,x,2\n", "expected one column 'text' and one 'label' "),
        (HEADED, "expected a header and rows below it, found none"),
        ("\n\n", "expected a header and rows below it, found none"),
        ("", "the file is empty (0 bytes)"),
    ],
)
def test_what_is_wrong_in_a_table_is_told_with_its_line(tables, content, told):
    write(tables, {"train.csv": content})
    message = problems_of(tables)
    assert f"1 problem:\n  {tables / 'train.csv'}: {told}" in message


def test_one_column_cannot_be_both(tables):
    with pytest.raises(DataError, match=r"data\.label_column: .* found 'label' for both"):
        open_texts(tables, text_column="label")


def test_all_problems_of_all_files_are_told_at_once(root):
    outside = write(root.parent / "outside", {"secret.txt": "x\n"})
    os.symlink(outside / "secret.txt", root / "train" / "linked.txt")
    os.symlink(root / "nowhere", root / "train" / "broken.txt")
    latin = "é\nx\nü\n".encode("latin-1")
    files = {
        "train/Sport.txt": latin,
        "train/empty.txt": b"",
        "train/blank.txt": "\n \n",
        "train/sub/one.txt": "x\n",
        "test/käse.txt": "ok\n\0\n",
        "test/notes.md": "passed over",
        "test/.hidden.txt": b"\xff",
    }
    message = problems_of(write(root, files))
    assert "9 problems" in message
    for text in (
        f"{root / 'train/Sport.txt'}: line 1 and 1 more: expected UTF-8, found other bytes",
        f"{root / 'train/empty.txt'}: the file is empty (0 bytes)",
        f"{root / 'train/blank.txt'}: expected a text, found empty lines alone",
        f"{root / 'train/sub'}: a folder where <class>.txt is expected",
        f"{root / 'train/linked.txt'}: link out of the folder",
        f"{root / 'train/broken.txt'}: link to {root / 'nowhere'}, which does not exist",
        f"{root / 'test/käse.txt'}: line 2: expected text, found a NUL character",
        "class 'empty' is in train/ but not in test/",
        "class 'blank' is in train/ but not in test/",
    ):
        assert text in message
    (root / "train/broken.txt").unlink()
    assert "link out" not in problems_of(root, follow_links=True)


def test_classes_must_agree(tmp_path):
    files = {"train.csv": HEADED + "x,a\n", "test.csv": HEADED + "x,b\n"}
    message = problems_of(write(tmp_path, files))
    assert "class 'a' is in train.csv but not in test.csv" in message
    assert "class 'b' is in test.csv but not in train.csv" in message


@pytest.mark.parametrize("part", ["train", "train.csv"])
def test_a_part_may_be_a_link_that_is_followed_if_asked_for(tmp_path, part):
    tables = {"train.csv": HEADED + "x,a\n", "test.csv": HEADED + "y,a\n"}
    folders = {"train/a.txt": "x\n", "test/a.txt": "y\n"}
    root = write(tmp_path / "data", tables if part == "train.csv" else folders)
    (root / part).rename(tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", root / part)
    assert f"{root / part}: link out of the folder" in problems_of(root)
    assert open_texts(root, follow_links=True).train.texts == ("x",)


def test_nothing_there(tmp_path):
    assert "expected a folder of texts, found nothing" in problems_of(tmp_path / "gone")
    write(tmp_path, {"file": "x"})
    assert "expected a folder of texts, found a file" in problems_of(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    assert "found an empty folder" in problems_of(tmp_path / "empty")
    (tmp_path / "empty/train").mkdir()
    assert f"give {tmp_path / 'empty/train'} as the path" in problems_of(tmp_path / "empty")
    (tmp_path / "empty/test").mkdir()
    message = problems_of(tmp_path / "empty")
    assert message.count("expected <class>.txt, one for each class, found none") == 2
    write(tmp_path / "half", {"train.csv": HEADED + "x,a\n"})
    assert "found train.csv alone. A split file" in problems_of(tmp_path / "half")


def test_both_forms_and_two_tables_for_one_part_are_refused(root, tables):
    assert "found both: train/, test/, train.csv, test.csv" in problems_of(root)
    (root / "test.csv").rename(root / "train.tsv")
    message = problems_of(root)
    assert "expected one file of train, training, found train.csv and train.tsv" in message


def test_what_is_not_divided_is_split_by_a_rule(tmp_path):
    lines = [f"{n}\n" for n in range(10)]
    flat = write(tmp_path / "flat", {f"{name}.txt": "".join(lines) for name in ("a", "train")})
    train, test = open_texts(flat, fifth_to_test)
    assert (len(train), len(test)) == (16, 4) and np.bincount(test.labels).tolist() == [2, 2]
    assert {*train.ids.tolist(), *test.ids.tolist()} == {
        f"{name}/{n}" for name in ("a", "train") for n in range(1, 11)
    }
    rows = "".join(f"{n},{'ab'[n % 2]}\n" for n in range(10))
    table = write(tmp_path / "table", {"all.csv": HEADED + rows})
    train, test = open_texts(table, fifth_to_test)
    assert {*train.ids.tolist(), *test.ids.tolist()} == {f"row {n}" for n in range(2, 12)}
    assert len(test) == 2
    write(table, {"more.csv": HEADED})
    assert "expected one table, or" in problems_of(table, splitter=fifth_to_test)
    assert "found other files" in problems_of(table)


def test_what_is_divided_takes_no_rule(root, tables):
    for name in ("train", "test"):
        (tables / f"{name}.csv").rename(tables / f"{name}.old")
    assert "leave the split file out" in problems_of(root, splitter=fifth_to_test)


def test_the_same_division_has_the_same_fingerprint(tmp_path):
    parts = {"train": "1\n2\n", "test": "\n\n3\n4\n"}
    files = {f"{part}/{name}.txt": lines for part, lines in parts.items() for name in "ab"}
    expected = fingerprint(load_split("texts", path=write(tmp_path / "parts", files)))
    flat = write(tmp_path / "flat", {f"{name}.txt": "1\n2\n3\n4\n" for name in "ab"})
    lines = [f"{k}/{n}\t{'train' if n < 3 else 'test'}\n" for k in "ab" for n in range(1, 5)]
    write(tmp_path, {"split.tsv": "".join(lines)})
    divided = load_split("texts", path=flat, split_file=tmp_path / "split.tsv")
    assert fingerprint(divided) == expected
    assert "4 train and 4 test texts of 2 classes" in describe(divided)
