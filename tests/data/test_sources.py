"""One call for every source, arrays in memory, and the doctor."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from qkd_jax.data.sources import describe, fingerprint, from_arrays, load_split, verify
from qkd_jax.data.splits import split_sha256
from qkd_jax.errors import DataError

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3), dtype=np.uint8)
LABELS = np.array([0, 0, 1, 1, 2, 2])


def test_arrays_come_back():
    split = load_split("arrays", train=(IMAGES, LABELS), test=(IMAGES[:3], LABELS[:3]))
    assert split.train.class_names == split.test.class_names == ("0", "1", "2")
    np.testing.assert_array_equal(split.train.load([4, 1], 16), IMAGES[[4, 1]])
    np.testing.assert_array_equal(split.test.load([2], 16), IMAGES[[2]])
    assert len(set([*split.train.ids, *split.test.ids])) == 9


def test_margin_cuts_a_border_as_published_numbers_do():
    framed = from_arrays(IMAGES, LABELS, margin=True)
    resized = Image.fromarray(IMAGES[0]).resize((256, 256), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(framed.load([0], 224)[0], np.asarray(resized)[16:240, 16:240])


def test_take_keeps_order_and_nests():
    images = from_arrays(IMAGES, LABELS)
    part = images.take([5, 3, 0]).take([2, 0], "part")
    assert part.name == "part" and part.labels.tolist() == [0, 2]
    np.testing.assert_array_equal(part.load([1, 0], 16), IMAGES[[5, 0]])


@pytest.mark.parametrize(
    ("images", "labels", "options", "message"),
    [
        (IMAGES.astype(np.float32), LABELS, {}, "uint8 .*found float32"),
        (IMAGES[..., :1], LABELS, {}, r"found uint8 \[6, 16, 16, 1\]"),
        (IMAGES, LABELS[:5], {}, r"integers \[6\], found int64 \[5\]"),
        (IMAGES, LABELS / 2, {}, "found float64"),
        (IMAGES, LABELS - 1, {}, "label -1 of image 0 is outside"),
        (IMAGES, LABELS, {"class_names": ["a", "b"]}, r"label 2 of image 4 is outside \[0, 2\)"),
        (IMAGES, LABELS, {"ids": ["a"] * 6}, "6 unique ids, found 1"),
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
        ({"source": "imagenet"}, "unknown source 'imagenet'; known: renditions"),
        ({"source": "tfds:"}, "unknown source"),
        ({"source": "folder"}, "give its path"),
        ({"source": "vtab"}, "source 'vtab' is an image folder: give its path"),
        ({"source": "renditions", "path": "x"}, "takes no path"),
        ({"source": "synthetic", "split_file": "x"}, "takes no path and no split file"),
        ({"source": "folder", "path": "x", "seed": 3}, r"does not know \['seed'\]"),
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


def test_verify_passes_good_images_and_remarks_on_twins(tmp_path):
    folder(tmp_path)
    assert verify(load_split("folder", path=tmp_path)) == []
    twin = (tmp_path / "train" / "a" / "3.png").read_bytes()
    (tmp_path / "test" / "a" / "5.png").write_bytes(twin)
    (remark,) = verify(load_split("folder", path=tmp_path))
    assert "train/a/3.png" in remark and "test/a/5.png" in remark


def test_verify_counts_all_broken_images_and_shows_ten(tmp_path):
    folder(tmp_path)
    for index in range(12):
        file = tmp_path / "train" / "b" / f"{index}.png"
        file.write_bytes(file.read_bytes()[:40])
    (tmp_path / "test" / "a" / "0.png").write_text("no image")
    with pytest.raises(DataError, match="13 images cannot be read") as caught:
        verify(load_split("folder", path=tmp_path))
    assert str(caught.value).count("train/b/") == 10 and "and 3 more" in str(caught.value)


def test_reading_data_imports_nothing_heavy():
    heavy = "('tensorflow', 'tensorflow_datasets', 'torch', 'orbax', 'matplotlib', 'pennylane')"
    code = (
        "import sys; from qkd_jax.data.sources import load_split; load_split('renditions'); "
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert found.stdout.strip() == "[]", found.stderr
