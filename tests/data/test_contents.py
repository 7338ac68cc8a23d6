"""Content: what makes two sets the same data, and what is told of images before they are used."""

import dataclasses
import shutil
import time

import numpy as np
import pytest
from PIL import Image

from qkd_jax.data.contents import (
    Contents,
    arrays_of,
    contents_of,
    read_contents,
    rows_of,
    told_leaks,
    verify,
)
from qkd_jax.data.examples import Split
from qkd_jax.data.image_set import from_arrays
from qkd_jax.data.sources import load_split
from qkd_jax.errors import DataError


def folder(root, per_class=12):
    """Two classes; every image has pixels of its own."""
    for part in ("train", "test"):
        for label in ("a", "b"):
            (root / part / label).mkdir(parents=True)
            for n in range(per_class):
                pixels = np.random.default_rng([ord(label), n, part == "test"])
                image = pixels.integers(0, 256, (6, 6, 3), np.uint8)
                Image.fromarray(image).save(root / part / label / f"{n}.png")
    return root


@pytest.fixture
def data(tmp_path):
    return folder(tmp_path / "data")


def contents(path):
    return read_contents(load_split("folder", path=path))


def test_the_fingerprint_is_of_contents_labels_and_sides_alone(data, tmp_path):
    before = contents(data)
    moved = shutil.copytree(data, tmp_path / "other")
    for number, path in enumerate(sorted(moved.rglob("*.png"), reverse=True)):
        path.rename(path.with_name(f"{number:03d}.png"))
    assert contents(moved).sha256() == before.sha256()
    first, second = (data / "train/a/0.png", data / "train/b/0.png")
    changes = {
        "one pixel": lambda root: Image.new("RGB", (6, 6)).save(root / "train/a/0.png"),
        "one more": lambda root: Image.new("RGB", (6, 6)).save(root / "train/a/99.png"),
        "one less": lambda root: (root / "train/a/0.png").unlink(),
        "two change their labels": lambda root: (
            shutil.copy(first, root / "train/b/0.png"),
            shutil.copy(second, root / "train/a/0.png"),
        ),
        "two change sides": lambda root: (
            shutil.copy(first, root / "test/a/0.png"),
            shutil.copy(data / "test/a/0.png", root / "train/a/0.png"),
        ),
        "a class is renamed": lambda root: [
            (root / part / "b").rename(root / part / "c") for part in ("train", "test")
        ],
    }
    found = {before.sha256()}
    for number, change in enumerate(changes.values()):
        root = shutil.copytree(data, tmp_path / str(number))
        change(root)
        found.add(contents(root).sha256())
    assert len(found) == 1 + len(changes)


def test_arrays_and_bytes_are_contents_too():
    images = np.random.default_rng(0).integers(0, 256, (4, 6, 6, 3), np.uint8)
    train = from_arrays(images, [0, 1, 0, 1], name="train")
    test = from_arrays(images[:2], [0, 1], name="test")
    found = read_contents(Split(train, test))
    assert found.train.digests.shape == (4, 16) and len(set(found.train.keys())) == 4
    np.testing.assert_array_equal(found.train.digests[:2], found.test.digests)
    # The same bytes in another shape are another image.
    wide = from_arrays(images.reshape(4, 3, 12, 3), [0, 1, 0, 1], name="train")
    assert read_contents(Split(wide, test)).sha256() != found.sha256()


def test_stored_and_read_again_they_are_the_same(data, tmp_path):
    found = contents(data)
    np.savez(tmp_path / "images.npz", **arrays_of(found))
    with np.load(tmp_path / "images.npz", allow_pickle=False) as stored:
        again = contents_of(stored)
    assert again.sha256() == found.sha256() and again.class_names == found.class_names
    for side in ("train", "test"):
        for a, b in zip(getattr(again, side), getattr(found, side), strict=True):
            np.testing.assert_array_equal(a, b)


def made_up(labels, digests, prefix="x"):
    return Contents(
        np.array([f"{prefix}{n}" for n in range(len(labels))]),
        np.array(labels, np.int32),
        np.array([[d] * 16 for d in digests], np.uint8),
    )


def test_images_are_found_again_by_label_and_content():
    then = made_up([0, 0, 1, 1], [7, 8, 7, 9])
    now = made_up([1, 1, 0, 0], [9, 7, 8, 7], "y")
    rows, new = rows_of(then, now)
    assert rows.tolist() == [3, 2, 1, 0] and new == []
    # Copies keep their number; one of them may go, and the others stay.
    copies, fewer = made_up([0, 0, 0], [5, 5, 5]), made_up([0, 0], [5, 5], "y")
    rows, new = rows_of(copies, fewer)
    assert rows.tolist() == [0, 1, -1] and new == []
    rows, new = rows_of(fewer, copies)
    assert rows.tolist() == [0, 1] and new == ["x2"]
    # Of copies the one of the same name is the same.
    left = copies.take(np.array([1, 2]))
    rows, new = rows_of(copies, left)
    assert rows.tolist() == [-1, 0, 1] and new == []


def test_good_images_pass_and_repeated_ones_are_named(data):
    assert verify(load_split("folder", path=data)) == ([], [])
    with Image.open(data / "train/a/3.png") as image:  # the same pixels in another file
        image.save(data / "test/a/leak.bmp")
    shutil.copy(data / "train/b/1.png", data / "train/b/copy.png")
    split = load_split("folder", path=data)
    found = verify(split)
    [leak], [copies] = found
    assert len(leak) == 2 and "train/a/3.png" in leak[0] and "test/a/leak.bmp" in leak[1]
    assert len(copies) == 2 and "train/b/1.png" in copies[0]
    told = told_leaks(found.leaked, split.test)
    assert told.startswith("1 image is both trained and tested on (the same pixels)")


def test_all_broken_images_are_counted_and_ten_are_shown(data):
    for n in range(12):
        file = data / f"train/b/{n}.png"
        file.write_bytes(file.read_bytes()[:40])
    (data / "test/a/0.png").write_text("no image")
    with pytest.raises(DataError, match="13 images cannot be read") as caught:
        verify(load_split("folder", path=data))
    assert str(caught.value).count("train/b/") == 10 and "and 3 more" in str(caught.value)


def test_a_file_that_vanishes_while_it_is_read_is_named(data):
    split = load_split("folder", path=data)
    (data / "train/b/4.png").unlink()
    with pytest.raises(DataError, match=r"1 image cannot be read:\n.*train/b/4.png"):
        read_contents(split)


def test_progress_is_told_of_every_image(data):
    told = []
    split = load_split("folder", path=data)
    verify(split, told.append)
    assert sum(told) == len(split.train) + len(split.test) == 48


def test_a_stop_does_not_wait_for_the_images_that_are_left():
    """Ctrl-C comes in the thread that counts; thousands may be waiting."""
    images = np.zeros((500, 4, 4, 3), np.uint8)
    fetched = []
    train = from_arrays(images, np.zeros(500, int), name="many")

    def fetch(indices):
        time.sleep(0.002)  # so that images are left when the first one is counted
        fetched.extend(indices)
        return [images[index] for index in indices]

    train = dataclasses.replace(train, fetch=fetch)

    def stop(count):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        read_contents(Split(train, train), stop)
    assert len(fetched) < 250
