"""One call for every source, arrays in memory, and the doctor."""

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from qkd_jax.data.sources import (
    ImageSet,
    describe,
    fingerprint,
    from_arrays,
    load_split,
)
from qkd_jax.data.splits import split_sha256
from qkd_jax.errors import DataError


def at(side):
    """As much of a backbone as an image set reads."""
    return SimpleNamespace(spec=SimpleNamespace(input_size=side))


IMAGES = np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3), dtype=np.uint8)
LABELS = np.array([0, 0, 1, 1, 2, 2])


def test_arrays_come_back():
    split = load_split("arrays", train=(IMAGES, LABELS), test=(IMAGES[:3], LABELS[:3]))
    assert split.train.class_names == split.test.class_names == ("0", "1", "2")
    np.testing.assert_array_equal(split.train.load([4, 1], at(16))["image"], IMAGES[[4, 1]])
    np.testing.assert_array_equal(split.test.load([2], at(16))["image"], IMAGES[[2]])
    assert len(set([*split.train.ids, *split.test.ids])) == 9


def test_margin_cuts_a_border_as_published_numbers_do():
    framed = from_arrays(IMAGES, LABELS, margin=True)
    resized = Image.fromarray(IMAGES[0]).resize((256, 256), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(
        framed.load([0], at(224))["image"][0], np.asarray(resized)[16:240, 16:240]
    )


def test_take_keeps_order_and_nests():
    images = from_arrays(IMAGES, LABELS)
    part = images.take([5, 3, 0]).take([2, 0], "part")
    assert part.name == "part" and part.labels.tolist() == [0, 2]
    np.testing.assert_array_equal(part.load([1, 0], at(16))["image"], IMAGES[[5, 0]])


@pytest.mark.parametrize(
    ("images", "labels", "options", "message"),
    [
        (IMAGES.astype(np.float32), LABELS, {}, "uint8 .*found float32"),
        (IMAGES[..., :1], LABELS, {}, r"found uint8 \[6, 16, 16, 1\]"),
        (IMAGES, LABELS[:5], {}, r"expected 6 labels, found \[5\]"),
        (IMAGES, LABELS / 2, {}, "found float64"),
        (IMAGES, LABELS - 1, {}, r"labels in \[0, 2\), found -1 of image 0"),
        (IMAGES, LABELS, {"class_names": ["a", "b"]}, r"labels in \[0, 2\), found 2 of image 4"),
        (IMAGES, LABELS, {"ids": ["a"] * 6}, "expected unique ids, found 'a' 6 times"),
    ],
)
def test_bad_arrays_are_explained(images, labels, options, message):
    with pytest.raises(DataError, match=message):
        from_arrays(images, labels, **options)


def test_renditions_and_synthetic_by_name():
    assert len(load_split("renditions").train) == 600
    assert len(load_split("synthetic", num_classes=3, train_per_class=4).train) == 12


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"source": "imagenet"}, "expected one of renditions.*, found 'imagenet'"),
        ({"source": "tfds:"}, "found 'tfds:'"),
        ({"source": "folder"}, "expected the path of a folder of images"),
        ({"source": "vtab"}, "source 'vtab': expected the path"),
        ({"source": "renditions", "path": "x"}, "expected no path and no split file, found x"),
        ({"source": "synthetic", "split_file": "x"}, "expected no path and no split file, found x"),
        ({"source": "folder", "path": "x", "seed": 3}, r"found \['seed'\]"),
        ({"source": "renditions", "split_sha256": "00"}, "expected split sha256 00, found"),
    ],
)
def test_a_bad_call_is_explained(arguments, message):
    with pytest.raises(DataError, match=message):
        load_split(**arguments)


def folder(root, parts=("train", "test")):
    for part in parts:
        for name in ("a", "b"):
            for index in range(12):
                file = root / part / name / f"{index}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                seed = [len(part), ord(name), index]
                pixels = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(file)
    return root


def test_a_folder_with_a_split_file(tmp_path):
    folder(tmp_path, parts=("",))
    ids = [f"{name}/{index}.png" for name in "ab" for index in range(12)]
    file = tmp_path.parent / "split.tsv"
    file.write_text("".join(f"{name}\t{'test' if '/1' in name else 'train'}\r\n" for name in ids))
    split = load_split("folder", path=tmp_path, split_file=file)
    assert (len(split.train), len(split.test)) == (18, 6)
    expected = split_sha256(ids, np.array(["/1" in name for name in ids]))
    assert fingerprint(split) == expected and expected in describe(split)
    load_split("folder", path=tmp_path, split_file=file, split_sha256=expected)
    with pytest.raises(DataError, match="expected split sha256 1234, found"):
        load_split("folder", path=tmp_path, split_file=file, split_sha256="1234")


def test_reading_data_imports_nothing_heavy():
    heavy = "('tensorflow', 'tensorflow_datasets', 'torch', 'orbax', 'matplotlib', 'pennylane')"
    code = (
        "import sys; from qkd_jax.data.sources import load_split; load_split('renditions'); "
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert found.stdout.strip() == "[]", found.stderr


def image_set(**changes):
    fields = {
        "name": "set",
        "labels": np.array([0, 1, 1], np.int32),
        "ids": np.array(["a", "b", "c"]),
        "class_names": ("x", "y"),
        "fetch": lambda indices: [IMAGES[index] for index in indices],
    }
    return ImageSet(**fields | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"labels": np.array([0, -1, 1])},
            r"set: expected labels in \[0, 2\), found -1 of image 1",
        ),
        ({"labels": np.array([0, 1, 2])}, r"set: expected labels in \[0, 2\), found 2 of image 2"),
        ({"labels": np.array([0, 1])}, r"set: expected 2 ids as text, found <U1 \[3\]"),
        ({"labels": np.array([0.0, 1.0, 1.0])}, "set: expected labels as integers"),
        ({"ids": np.array([1, 2, 3])}, "set: expected 3 ids as text, found int64"),
        ({"ids": np.array(["b", "a", "b"])}, "set: expected unique ids, found 'b' 2 times"),
        ({"ids": np.array(["a", "b", "\udce9"])}, r"expected ids in UTF-8, found '\\udce9'"),
    ],
)
def test_a_set_that_contradicts_itself_cannot_be_made(changes, message):
    with pytest.raises(DataError, match=message) as caught:
        image_set(**changes)
    str(caught.value).encode()


def test_sets_in_any_order_and_empty_ones_can_be_made():
    assert len(image_set(ids=np.array(["c", "a", "b"])).take([2, 0])) == 2
    assert len(image_set().take([])) == 0
    with pytest.raises(DataError, match="found 'a' 2 times"):
        image_set().take([0, 0])


@pytest.mark.parametrize("source", ["folder", "vtab", "imagenet_r", "cifar100"])
def test_a_path_that_is_no_image_folder_is_explained(tmp_path, source):
    with pytest.raises(DataError, match="gone: expected a folder of images, found nothing"):
        load_split(source, path=tmp_path / "gone")
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="file: expected a folder of images, found a file"):
        load_split(source, path=tmp_path / "file")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"expected train/<class>.*found an empty folder"):
        load_split(source, path=tmp_path / "empty")


def test_an_empty_folder_for_a_benchmark_tells_both_ways_to_fill_it(tmp_path):
    with pytest.raises(DataError) as caught:
        load_split("cub200", path=tmp_path)
    assert "train/<class>/* and test/<class>/*, or caltech_birds2011/ of" in str(caught.value)
    assert f"python -m qkd_jax data prepare cub200 --path {tmp_path}" in str(caught.value)


def test_a_file_as_data_folder_of_tensorflow_datasets_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="file: expected a data folder, found a file"):
        load_split("tfds:cifar100", path=tmp_path / "file")


@pytest.mark.parametrize("source", ["folder", "vtab", "cifar100"])
def test_the_home_folder_may_be_a_tilde(tmp_path, monkeypatch, source):
    monkeypatch.setenv("HOME", str(tmp_path))
    folder(tmp_path / "pictures", parts=("",))
    ids = [f"{name}/{index}.png" for name in "ab" for index in range(12)]
    lines = "".join(f"{name}\t{('train', 'test')[i % 2]}\n" for i, name in enumerate(ids))
    (tmp_path / "split.tsv").write_text(lines)
    found = load_split(source, path="~/pictures", split_file="~/split.tsv")
    assert (len(found.train), len(found.test)) == (12, 12)
    found.train.load([0], at(8))["image"]


def test_parts_by_another_name_have_the_same_fingerprint(tmp_path):
    folder(tmp_path)
    expected = fingerprint(load_split("folder", path=tmp_path))
    (tmp_path / "test").rename(tmp_path / "val")
    assert fingerprint(load_split("imagenet_r", path=tmp_path)) == expected


def test_links_are_followed_if_asked_for(tmp_path):
    folder(tmp_path / "here")
    (tmp_path / "here" / "train").rename(tmp_path / "elsewhere")
    (tmp_path / "here" / "train").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=r"data\.follow_links=true"):
        load_split("folder", path=tmp_path / "here")
    assert len(load_split("folder", path=tmp_path / "here", follow_links=True).train) == 24


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("renditions", {"seed": 1}, "source 'renditions': expected options of path, found got"),
        ("synthetic", {"classes": 3}, "source 'synthetic': expected options of num_classes"),
        ("arrays", {}, "source 'arrays': expected options of train, test, class_names"),
        ("arrays", {"train": IMAGES, "test": (IMAGES, LABELS)}, "arrays/train: expected a pair"),
    ],
)
def test_wrong_options_are_explained(source, options, message):
    with pytest.raises(DataError, match=message):
        load_split(source, **options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"source": "texts"}, "source 'texts': expected the path of a folder of texts, found none"),
        ({"source": "texts", "path": "gone"}, "gone: expected a folder of texts, found nothing"),
        ({"source": "ag_news", "path": "gone"}, "gone: expected a folder of texts, found nothing"),
        ({"source": "glosses", "path": "x"}, "expected no path and no split file, found x"),
        ({"source": "glosses", "seed": 1}, "source 'glosses': expected options of path, found"),
        ({"source": "glosses", "splitter": max}, "no split file, found a splitter"),
        ({"source": "texts", "split_file": "x", "splitter": max}, "or splitter, found both"),
    ],
)
def test_a_bad_call_for_texts_is_explained(arguments, message):
    with pytest.raises(DataError, match=message):
        load_split(**arguments)


@pytest.mark.parametrize("source", ["texts", "ag_news"])
def test_texts_by_name_with_columns_of_other_names(tmp_path, source):
    for part in ("train", "test"):
        (tmp_path / f"{part}.csv").write_text("kind,body\nx,one\ny,two\n")
    columns = {"text_column": "body", "label_column": "kind"}
    split = load_split(source, path=tmp_path, **columns)
    assert split.train.texts == ("one", "two") and split.train.class_names == ("x", "y")
    assert load_split("glosses", **columns).train.noun == "text"


def test_an_empty_folder_for_a_benchmark_of_texts_tells_both_ways_to_fill_it(tmp_path):
    with pytest.raises(DataError) as caught:
        load_split("ag_news", path=tmp_path)
    assert "train/<class>.txt and test/<class>.txt, or ag_news_subset/ of" in str(caught.value)
    assert f"python -m qkd_jax data prepare ag_news --path {tmp_path}" in str(caught.value)
