"""Image folders as people have them."""

import os
import shutil
import unicodedata
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from qkd_jax.data.crops import crop_draws
from qkd_jax.data.folder import open_folder
from qkd_jax.data.splits import fifth_to_test
from qkd_jax.errors import DataError


def at(side):
    """As much of a backbone as an image set reads."""
    return SimpleNamespace(spec=SimpleNamespace(input_size=side))


def draw(file, colour=(200, 30, 60), size=(12, 9)):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(file, "PNG")


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
    loaded = train.load([8, 0], at(8), crop_draws([8, 0], seed=0, task=0, epoch=0))["image"]
    assert loaded.shape == (2, 8, 8, 3) and loaded.dtype == np.uint8
    assert loaded[:, 0, 0].tolist() == [[120, 20, 90], [0, 0, 90]]
    np.testing.assert_array_equal(loaded, train.load([8, 0], at(8))["image"])  # of one colour
    assert train.load([], at(8))["image"].shape == (0, 8, 8, 3)


def test_accents_composed_in_two_ways_are_one_class(root):
    decomposed = unicodedata.normalize("NFD", "käse")
    assert decomposed != "käse"
    (root / "test" / "käse").rename(root / "test" / decomposed)
    assert open_folder(root).test.class_names == ("Hund", "käse", "猫")


@pytest.mark.parametrize(
    ("part", "found"), [("train", "found test/ alone"), ("test", "found train/ alone")]
)
def test_a_missing_half_is_named(root, part, found):
    (root / part).rename(root / "elsewhere")
    with pytest.raises(DataError, match=found):
        open_folder(root)


def test_nothing_there(tmp_path):
    with pytest.raises(DataError, match="expected a folder of images, found nothing"):
        open_folder(tmp_path / "gone")
    with pytest.raises(DataError, match=r"expected train/<class>/.*found an empty folder"):
        open_folder(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="expected a folder of images, found a file"):
        open_folder(tmp_path / "file")
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
    with pytest.raises(DataError, match=r"together with a split file \(data.split_file\)"):
        open_folder(tmp_path)


def test_a_split_folder_takes_no_rule(root):
    with pytest.raises(DataError, match="already split; leave the split file out"):
        open_folder(root, fifth_to_test)


def test_a_bad_image_is_named_when_it_is_loaded(root):
    (root / "train" / "Hund" / "1.png").write_bytes(b"no image")
    train = open_folder(root).train
    with pytest.raises(DataError, match=r"train/Hund/1\.png: expected an image"):
        train.load([0, 1, 2], at(8))["image"]


@pytest.mark.parametrize("train", ["train", "Train", "TRAINING"])
@pytest.mark.parametrize("test", ["test", "Testing", "val", "VALIDATION", "valid"])
def test_parts_may_be_called_otherwise_and_ids_are_the_same(root, train, test):
    expected = open_folder(root)
    loaded = [part.load([0, 4], at(8))["image"] for part in expected]
    (root / "train").rename(root / train)
    (root / "test").rename(root / test)
    found = open_folder(root)
    for one, two, images in zip(found, expected, loaded, strict=True):
        assert one.ids.tolist() == two.ids.tolist() and one.class_names == two.class_names
        np.testing.assert_array_equal(one.load([0, 4], at(8))["image"], images)
    assert found.test.name == f"{root.name}/{test}"  # so that an error leads to the file


def test_a_validation_part_beside_a_test_part_is_left_alone(root):
    draw(root / "val" / "other" / "0.png")
    assert open_folder(root).test.class_names == ("Hund", "käse", "猫")


@pytest.mark.parametrize(
    ("one", "two"), [("train", "Train"), ("train", "training"), ("test", "TEST"), ("val", "valid")]
)
def test_two_folders_for_one_part_are_refused(root, one, two):
    if one == "val":
        (root / "test").rename(root / "val")
    draw(root / two / "Hund" / "0.png")
    if len(list(root.iterdir())) == 2:
        pytest.skip("this file system takes no names that differ in case alone")
    first, second = sorted((one, two))
    with pytest.raises(DataError, match=f"found {first}/ and {second}/. Rename or move one"):
        open_folder(root)


def test_train_alone_says_what_to_do(root):
    shutil.rmtree(root / "test")
    for splitter in (None, fifth_to_test):
        with pytest.raises(DataError) as caught:
            open_folder(root, splitter)
        assert f"give {root / 'train'} as the path, together with a split file" in str(caught.value)
    assert len(open_folder(root / "train", fifth_to_test).train) == 6


def test_classes_may_be_called_as_parts_are(tmp_path):
    for name in ("train", "val", "bus"):
        for index in range(5):
            draw(tmp_path / name / f"{index}.png")
    found = open_folder(tmp_path, fifth_to_test)
    assert found.train.class_names == ("bus", "train", "val")
    assert set(found.test.ids.tolist()) < {
        f"{k}/{i}.png" for k in ("bus", "train", "val") for i in range(5)
    }


@pytest.mark.parametrize("litter", [".DS_Store", "Thumbs.db", "desktop.ini", "__MACOSX", "@eaDir"])
def test_litter_is_passed_over_anywhere(root, litter):
    for place in (root, root / "train", root / "test" / "Hund"):
        if "." in litter:
            (place / litter).write_bytes(b"x")
        else:
            draw(place / litter / "Hund" / "._0.png")
    for name in ("README.txt", "LICENSE", "checksums.sha256"):
        (root / "train" / name).write_text("no class")
        (root / name).write_text("no part")
    train, test = open_folder(root)
    assert (len(train), len(test)) == (9, 6) and len(train.class_names) == 3


def twins(folder):
    composed, decomposed = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))
    return folder / composed, folder / decomposed


def need_two_names(tmp_path):
    for name in twins(tmp_path / "probe"):
        name.parent.mkdir(exist_ok=True)
        name.touch()
    if len(list((tmp_path / "probe").iterdir())) < 2:
        pytest.skip("this file system composes accents")
    shutil.rmtree(tmp_path / "probe")


@pytest.mark.parametrize("level", ["class", "file"])
@pytest.mark.parametrize("flat", [False, True])
def test_names_that_differ_only_in_composed_accents_are_refused(tmp_path, level, flat):
    need_two_names(tmp_path)
    for part in ("",) if flat else ("train", "test"):
        for index, name in enumerate(twins(tmp_path / part)):
            for k in range(2 + index):
                file = name / f"{k}.png" if level == "class" else tmp_path / part / "c" / name.name
                draw(file)
        draw(tmp_path / part / "z" / "0.png")
        draw(tmp_path / part / "z" / "1.png")
    with pytest.raises(DataError) as caught:
        open_folder(tmp_path, fifth_to_test if flat else None)
    message = str(caught.value)
    assert ("1 problem:" if flat else "2 problems") in message
    assert r"'e\u0301" in message and r"'\xe9" in message and "Rename one" in message


def test_names_that_are_no_utf8_are_refused_and_can_be_printed(root):
    bad = os.fsdecode(b"caf\xe9")
    try:
        draw(root / "train" / bad / "0.png")
        draw(root / "train" / "Hund" / f"{bad}.png")
    except OSError:
        pytest.skip("this file system takes only UTF-8")
    with pytest.raises(DataError) as caught:
        open_folder(root)
    str(caught.value).encode()
    assert str(caught.value).count("expected a name in UTF-8, found other bytes") == 2
    # The folder above may be called so.
    shutil.rmtree(root / "train" / bad)
    (root / "train" / "Hund" / f"{bad}.png").unlink()
    above = root.parent / f"{bad}-above"
    root.rename(above)
    assert len(open_folder(above).train) == 9
    (above / "test").rename(above / "elsewhere")
    with pytest.raises(DataError) as caught:
        open_folder(above)
    str(caught.value).encode()


def test_odd_names_are_images_as_others(root):
    for name in (
        "tab\t.png",
        "#hash.png",
        "line\nbreak.png",
        "ends in a space .png ",
        "\ufeffmark.png",
    ):
        draw(root / "train" / "Hund" / name)
    for part in ("train", "test"):
        draw(root / part / "hunD" / "0.png")
    train = open_folder(root).train
    assert len(train) == 15 and len(set(train.ids.tolist())) == 15
    assert train.load(range(15), at(8))["image"].shape == (15, 8, 8, 3)


@pytest.mark.parametrize("place", ["train", "train/linked", "train/Hund/linked.png"])
def test_links_out_are_followed_only_where_that_is_asked_for(root, place):
    link, outside = root / place, root.parent / f"{root.name}-outside"
    if link.is_dir():
        link.rename(outside)
    else:
        draw(outside if link.suffix else outside / "0.png")
        if not link.suffix:
            draw(root / "test" / "linked" / "0.png")
    os.symlink(outside, link, target_is_directory=not link.suffix)
    with pytest.raises(DataError) as caught:
        open_folder(root)
    assert f"{link}: link out of the folder, to {outside}" in str(caught.value)
    assert "data.follow_links=true follows it" in str(caught.value)
    assert len(open_folder(root, follow_links=True).train) == 9 + (place != "train")


@pytest.mark.parametrize("follow_links", [False, True])
def test_broken_links_and_loops_are_refused(root, follow_links):
    os.symlink(root / "nowhere", root / "train" / "Hund" / "broken.png")
    os.symlink(root / "train" / "b", root / "train" / "a")
    os.symlink(root / "train" / "a", root / "train" / "b")
    os.symlink("self.png", root / "train" / "Hund" / "self.png")
    os.symlink(root / "train", root / "train" / "Hund" / "up")
    with pytest.raises(DataError, match="5 problems") as caught:
        open_folder(root, follow_links=follow_links)
    assert str(caught.value).count("which does not exist") == 4
    assert "up: a folder where an image is expected" in str(caught.value)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_is_not_waited_for(root):
    os.mkfifo(root / "train" / "Hund" / "pipe.png")
    with pytest.raises(DataError, match=r"pipe\.png: expected a file, found a pipe or device"):
        open_folder(root)
