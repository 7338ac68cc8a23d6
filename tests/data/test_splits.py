"""The rule that splits sets without a split, and split files of users."""

import pathlib
import tempfile
import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qkd_jax.data.splits import (
    fifth_to_test,
    first_of_each_class,
    last_of_each_class,
    read_split_file,
    split_sha256,
)
from qkd_jax.errors import DataError


def as_imagenet_r(total=30_000, classes=200):
    """Ids and labels of the size of ImageNet-R: uneven classes of 51 to 249 images."""
    counts = np.random.default_rng(0).integers(51, 250, classes)
    counts = np.floor(counts * total / counts.sum()).astype(int)
    counts[: total - counts.sum()] += 1
    ids = [f"n{k:08d}/art_{i}.jpg" for k, count in enumerate(counts) for i in range(count)]
    return ids, np.repeat(np.arange(classes), counts)


def test_thirty_thousand_become_24000_and_6000_by_the_recorded_rule():
    ids, labels = as_imagenet_r()
    is_test = fifth_to_test(ids, labels)
    assert (int((~is_test).sum()), int(is_test.sum())) == (24_000, 6_000)
    # Another hash means that the rule has changed, and with it every number measured by it.
    recorded = "4d9adb021f156a7f3a7a811197ef2d7a8ae628dee75187337ce8ef5c84451927"
    assert split_sha256(ids, is_test) == recorded


@given(st.lists(st.integers(2, 40), min_size=1, max_size=12), st.randoms(use_true_random=False))
def test_every_class_gives_its_share(counts, random):
    labels = np.repeat(np.arange(len(counts)), counts)
    ids = [f"{label}/{index}" for index, label in enumerate(labels)]
    is_test = fifth_to_test(ids, labels)
    tested = np.bincount(labels, weights=is_test).astype(int)
    for count, number in zip(counts, tested, strict=True):
        assert 1 <= number < count
        assert number in (max(1, count // 5), count // 5 + 1)
    if min(counts) >= 5:
        assert is_test.sum() == len(ids) // 5
    order = list(range(len(ids)))
    random.shuffle(order)
    shuffled = fifth_to_test([ids[i] for i in order], labels[order])
    np.testing.assert_array_equal(shuffled, is_test[order])


def test_a_class_of_one_image_is_refused():
    with pytest.raises(DataError, match="class 1: expected two examples or more to split"):
        fifth_to_test(["a", "b", "c"], np.array([0, 0, 1]))


IDS = ["cat/ä b.jpg", "cat/2.jpg", "dog/1.jpg"]
GOOD = "# who, when\ncat/ä b.jpg\ttrain\n\ndog/1.jpg\ttest\ncat/2.jpg\ttrain\n"


@pytest.mark.parametrize("text", [GOOD, GOOD.replace("\n", "\r\n"), "\ufeff" + GOOD, GOOD.strip()])
def test_a_good_file_is_honoured(tmp_path, text):
    file = tmp_path / "split.tsv"
    file.write_bytes(text.encode())
    assert read_split_file(file, IDS).tolist() == [False, False, True]


def written(path, ids, is_test):
    """The split as a file of which editors have put a byte-order mark in front."""
    lines = (
        f"{name}\t{'test' if test else 'train'}\n" for name, test in zip(ids, is_test, strict=True)
    )
    path.write_bytes(("\ufeff" + "".join(lines)).encode())
    return path


ODD = [
    "#a/1.png",
    "# b/1.png",
    "a/x\ty.png",
    "a/ends in a space ",
    "a/ends in a return\r",
    "a/\r/1.png",
    "\ufeffa/1.png",
    "\t",
    " ",
    "a/\u2028\x0b\x85.png",
    unicodedata.normalize("NFD", "é/1.png"),
]


@pytest.mark.parametrize("ids", [*([name, "a/1.png"] for name in ODD), ODD])
def test_odd_names_are_read(tmp_path, ids):
    is_test = np.arange(len(ids)) % 2 == 1
    file = written(tmp_path / "split.tsv", ids, is_test)
    np.testing.assert_array_equal(read_split_file(file, ids), is_test)


@given(
    st.lists(
        st.text(st.characters(codec="utf-8", exclude_characters="\n"), max_size=6), unique=True
    )
)
def test_any_name_of_one_line_is_read(ids):
    is_test = np.arange(len(ids)) % 2 == 0
    with tempfile.TemporaryDirectory() as folder:
        file = written(pathlib.Path(folder, "split.tsv"), ids, is_test)
        np.testing.assert_array_equal(read_split_file(file, ids), is_test)


def test_a_comment_may_hold_an_id_and_an_id_may_look_like_a_comment(tmp_path):
    file = tmp_path / "split.tsv"
    file.write_text("#a/1.png\ttest\n#a/2.png\ttest\na/2.png\ttrain\n# a/2.png\ttrain\n#\n")
    assert read_split_file(file, ["#a/1.png", "a/2.png"]).tolist() == [True, False]


def test_accents_of_a_split_file_may_be_composed_otherwise(tmp_path):
    file = tmp_path / "split.tsv"
    file.write_text(unicodedata.normalize("NFD", "käse/é.png\ttest\n"), encoding="utf-8")
    assert read_split_file(file, ["käse/é.png"]).tolist() == [True]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD + "dog/1.jpg\ttest\n", "'dog/1.jpg' is named twice"),
        (GOOD + "dog/1.jpg\ttrain\n", "'dog/1.jpg' is in both train and test"),
        (GOOD + "dog/2.jpg\ttest\n", "'dog/2.jpg' is not in the set"),
        (GOOD.replace("dog/1.jpg\ttest\n", ""), "'dog/1.jpg' of the set is not named"),
        (
            GOOD + "dog/2.jpg valid\n",
            "line 6: expected 'id<TAB>train|test', found 'dog/2.jpg valid'",
        ),
    ],
)
def test_a_bad_file_is_explained(tmp_path, text, message):
    file = tmp_path / "split.tsv"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(DataError) as caught:
        read_split_file(file, IDS)
    assert message in str(caught.value) and str(file) in str(caught.value)


def test_all_problems_are_counted_and_ten_are_shown(tmp_path):
    file = tmp_path / "split.tsv"
    file.write_text("".join(f"x/{i}\ttest\n" for i in range(30)))
    with pytest.raises(DataError, match=r"30 problems") as caught:
        read_split_file(file, [])
    assert str(caught.value).count("not in the set") == 10
    assert "and 20 more" in str(caught.value)


def test_a_missing_or_binary_file_is_named(tmp_path):
    with pytest.raises(DataError, match="expected a split file, found"):
        read_split_file(tmp_path, IDS)
    with pytest.raises(DataError, match="expected a split file, found no such file"):
        read_split_file(tmp_path / "gone.tsv", IDS)
    (tmp_path / "binary.tsv").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(DataError, match="expected UTF-8 text"):
        read_split_file(tmp_path / "binary.tsv", IDS)


def test_the_first_images_of_each_class_are_kept():
    """In the order of ids, not of rows; all where there are fewer."""
    ids = ["b/1", "a/1", "c/1", "a/2", "b/2", "b/3"]
    labels = np.array([1, 1, 1, 2, 2, 3])
    kept = first_of_each_class(ids, labels, 2)
    assert [name for name, kept in zip(ids, kept, strict=True) if kept] == [
        *("b/1", "a/1", "a/2", "b/2", "b/3")
    ]
    assert first_of_each_class(ids, labels, 3).all()


def test_the_last_images_of_each_class_are_held_out():
    """In the order of ids, not of rows; whole styles where ids start with one."""
    ids = ["b/1", "a/1", "c/1", "a/2", "b/2", "c/2", "d/2", "a/3", "b/3"]
    labels = np.array([1, 1, 1, 2, 2, 2, 2, 3, 3])
    held_out = last_of_each_class(ids, labels, 1 / 3)
    assert [name for name, out in zip(ids, held_out, strict=True) if out] == ["c/1", "d/2", "b/3"]
    # Never all of a class, never none.
    for fraction, counts in ((0.01, [1, 1, 1]), (0.99, [2, 3, 1])):
        held_out = last_of_each_class(ids, labels, fraction)
        assert np.bincount(labels[held_out])[1:].tolist() == counts
    with pytest.raises(DataError, match="class 5: expected two examples or more"):
        last_of_each_class(["x"], np.array([5]), 0.5)
