"""Image folders as people have them."""

import os
import unicodedata

import numpy as np
import pytest
from PIL import Image

from qkd_jax.data.crops import crop_draws
from qkd_jax.data.folder import open_folder
from qkd_jax.data.splits import fifth_to_test
from qkd_jax.errors import DataError


def draw(file, colour=(200, 30, 60), size=(12, 9)):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(file)


@pytest.fixture
def root(tmp_path):
    for part, number in (("train", 3), ("test", 2)):
        for k, name in enumerate(("Hund", "käse", "猫")):
            for index in range(number):
                draw(tmp_path / part / name / f"{index}.png", (60 * k, 10 * index, 90))
    return tmp_path


def test_a_good_folder(root):
    (root / "train" / "Hund" / ".hidden").touch()
    (root / "train" / "Hund" / "Thumbs.db").touch()
    (root / "train" / "notes.txt").write_text("not a class")
    train, test = open_folder(root)
    assert train.class_names == test.class_names == ("Hund", "käse", "猫")
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2] and train.labels.dtype == np.int32
    assert test.ids.tolist()[2] == "test/käse/0.png" and len(test) == 6
    loaded = train.load([8, 0], 8, crop_draws([8, 0], seed=0, task=0, epoch=0))
    assert loaded.shape == (2, 8, 8, 3) and loaded.dtype == np.uint8
    assert loaded[:, 0, 0].tolist() == [[120, 20, 90], [0, 0, 90]]
    np.testing.assert_array_equal(loaded, train.load([8, 0], 8))  # of one colour
    assert train.load([], 8).shape == (0, 8, 8, 3)


def test_accents_composed_in_two_ways_are_one_class(root):
    decomposed = unicodedata.normalize("NFD", "käse")
    assert decomposed != "käse"
    (root / "test" / "käse").rename(root / "test" / decomposed)
    assert open_folder(root).test.class_names == ("Hund", "käse", "猫")


@pytest.mark.parametrize(("part", "missing"), [("train", "train/"), ("test", "test/")])
def test_a_missing_half_is_named(root, part, missing):
    (root / part).rename(root / "elsewhere")
    with pytest.raises(DataError, match=f"{missing} missing; expected train/<class>"):
        open_folder(root)


def test_nothing_there(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        open_folder(tmp_path / "gone")
    with pytest.raises(DataError, match="train/ and test/ missing"):
        open_folder(tmp_path)
    (tmp_path / "train").mkdir()
    (tmp_path / "test").mkdir()
    with pytest.raises(DataError, match=r"2 problems:(.|\n)*train: no class folder"):
        open_folder(tmp_path)


def test_all_problems_are_told_at_once(root):
    (root / "train" / "leer").mkdir()
    (root / "test" / "Hund" / "9.png").touch()
    (root / "test" / "Hund" / "sub").mkdir()
    draw(root.parent / "outside" / "secret.png")
    os.symlink(root.parent / "outside" / "secret.png", root / "train" / "Hund" / "link.png")
    os.symlink(root.parent / "outside", root / "train" / "linked")
    os.symlink(root / "nowhere", root / "train" / "Hund" / "dangling.png")
    with pytest.raises(DataError) as caught:
        open_folder(root)
    message = str(caught.value)
    assert "7 problems" in message
    for text in (
        f"{root / 'train' / 'leer'}: class folder without an image",
        "class 'leer' is in train/ but not in test/",
        f"{root / 'test' / 'Hund' / '9.png'}: the file is empty (0 bytes)",
        f"{root / 'test' / 'Hund' / 'sub'}: a folder where an image is expected",
        f"{root / 'train' / 'Hund' / 'link.png'}: link out of the folder",
        f"{root / 'train' / 'linked'}: link out of the folder",
        "which does not exist",
    ):
        assert text in message


def test_a_link_inside_is_followed(root):
    os.symlink(root / "train" / "Hund" / "0.png", root / "train" / "Hund" / "again.png")
    assert len(open_folder(root).train) == 10


def test_classes_must_agree(root):
    (root / "test" / "Hund").rename(root / "test" / "Hunde")
    with pytest.raises(DataError) as caught:
        open_folder(root)
    assert "class 'Hund' is in train/ but not in test/" in str(caught.value)
    assert "class 'Hunde' is in test/ but not in train/" in str(caught.value)


def test_a_flat_folder_is_split_by_rule(tmp_path):
    for name in ("a", "b"):
        for index in range(10):
            draw(tmp_path / name / f"{index}.png")
    train, test = open_folder(tmp_path, fifth_to_test)
    assert (len(train), len(test)) == (16, 4)
    assert np.bincount(test.labels).tolist() == [2, 2]
    assert sorted([*train.ids, *test.ids]) == sorted(
        f"{k}/{i}.png" for k in "ab" for i in range(10)
    )
    with pytest.raises(DataError, match="train/ and test/ missing"):
        open_folder(tmp_path)


def test_a_split_folder_takes_no_rule(root):
    with pytest.raises(DataError, match="already split"):
        open_folder(root, fifth_to_test)


def test_a_bad_image_is_named_when_it_is_loaded(root):
    (root / "train" / "Hund" / "1.png").write_bytes(b"no image")
    train = open_folder(root).train
    with pytest.raises(DataError, match=r"train/Hund/1\.png: not an image"):
        train.load([0, 1, 2], 8)
