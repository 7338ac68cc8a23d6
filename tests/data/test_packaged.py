"""The packaged images are what their page says, the synthetic ones are learnable."""

import hashlib
import re
from types import SimpleNamespace

import numpy as np
import pytest

from qkd_jax.data import build_renditions, packaged
from qkd_jax.errors import DataError


def at(side):
    """As much of a backbone as an image set reads."""
    return SimpleNamespace(spec=SimpleNamespace(input_size=side))


PAGE = packaged.RENDITIONS.with_name("RENDITIONS_ATTRIBUTION.md")


@pytest.fixture(scope="module")
def split():
    return packaged.renditions()


@pytest.fixture(scope="module")
def pixels(split):
    return {
        part: images.load(range(len(images)), at(128))["image"]
        for part, images in zip(("train", "test"), split, strict=True)
    }


def test_file_is_the_attributed_one_and_small():
    content = packaged.RENDITIONS.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    assert digest == packaged.RENDITIONS_SHA256
    assert f"`{digest}`" in PAGE.read_text() and f"({len(content):,} bytes" in PAGE.read_text()
    assert len(content) < 6_000_000


def test_one_image_a_class_and_style(split):
    assert split.train.class_names == split.test.class_names
    assert len(split.train.class_names) == len(set(split.train.class_names)) == 100
    for images, styles in ((split.train, 6), (split.test, 3)):
        assert np.bincount(images.labels).tolist() == [styles] * 100
        drawn = [name.split("/") for name in images.ids.tolist()]
        assert all(
            images.class_names[k] == c for k, (_, c) in zip(images.labels, drawn, strict=True)
        )
        counts = np.unique([style for style, _ in drawn], return_counts=True)[1]
        assert counts.tolist() == [100] * styles


def test_no_artist_is_on_both_sides(split):
    sides = [
        {build_renditions.SETS[name.split("/")[0]].artist for name in images.ids.tolist()}
        for images in split
    ]
    assert len(sides[0]) == 3 and len(sides[1]) == 2
    assert not sides[0] & sides[1]


def test_no_two_images_are_alike_and_none_is_blank(pixels):
    everything = np.concatenate([pixels["train"], pixels["test"]])
    assert everything.shape == (900, 128, 128, 3)
    assert len({image.tobytes() for image in everything}) == 900
    assert everything.std(axis=(1, 2, 3)).min() > 10  # the build's own bound
    ink = (everything.min(axis=3) < 240).mean(axis=(1, 2))
    assert ink.min() > 0.1  # nothing is a speck, no white glyph on white


def test_there_are_colour_and_monochrome_styles_on_both_sides(split, pixels):
    for part, images in zip(("train", "test"), split, strict=True):
        chroma = pixels[part].astype(int).max(axis=3) - pixels[part].astype(int).min(axis=3)
        style = np.array([name.split("/")[0] for name in images.ids.tolist()])
        mean = {name: chroma[style == name].mean() for name in np.unique(style)}
        assert sorted(value < 1 for value in mean.values()).count(True) == 1
        assert sorted(mean.values())[1] > 10


def test_attribution_names_every_set_and_no_share_alike_licence():
    page = PAGE.read_text()
    for name, source in build_renditions.SETS.items():
        row = next(line for line in page.splitlines() if line.startswith(f"| {name} |"))
        for part in (source.split, source.artist, source.origin, source.licence, source.sha256):
            assert part in row
        assert f"@iconify-json/{name}@{source.version}" in row
        assert source.licence in {"Apache-2.0", "MIT", "CC-BY-4.0"}
    assert not re.search(r"BY-SA|openmoji|emojione-v1", page)
    assert sorted(packaged.renditions().train.class_names) == sorted(
        page.rpartition("Classes: ")[2].strip().rstrip(".").split(", ")
    )


def test_the_page_is_the_one_the_build_script_writes(split):
    size = packaged.RENDITIONS.stat().st_size
    expected = build_renditions.attribution(
        packaged.RENDITIONS_SHA256, size, list(split.train.class_names)
    )
    assert PAGE.read_text() == expected


def test_a_damaged_or_missing_file_is_named(tmp_path):
    content = bytearray(packaged.RENDITIONS.read_bytes())
    content[len(content) // 2] ^= 1
    damaged = tmp_path / "renditions.npz"
    damaged.write_bytes(content)
    with pytest.raises(DataError, match=r"renditions.npz: damaged: expected sha256"):
        packaged.renditions(damaged)
    with pytest.raises(DataError, match="expected a file of the package, found none"):
        packaged.renditions(tmp_path / "gone.npz")


def test_synthetic_is_deterministic_and_keyed():
    first, again = packaged.synthetic(seed=3), packaged.synthetic(seed=3)
    other = packaged.synthetic(seed=4)
    for one, same, another in zip(first, again, other, strict=True):
        indices = range(len(one))
        images = one.load(indices, at(32))["image"]
        np.testing.assert_array_equal(images, same.load(indices, at(32))["image"])
        assert (images != another.load(indices, at(32))["image"]).any()
        assert len({image.tobytes() for image in images}) == len(images)
    assert (len(first.train), len(first.test)) == (200, 50)
    assert not set(first.train.ids.tolist()) & set(first.test.ids.tolist())


@pytest.mark.parametrize("num_classes", [1, 6, 13])
def test_a_synthetic_class_is_the_same_however_many_there_are(num_classes):
    for some, ten in zip(packaged.synthetic(num_classes), packaged.synthetic(10), strict=True):
        shared = np.flatnonzero(ten.labels < num_classes)
        assert some.labels[: len(shared)].tolist() == ten.labels[shared].tolist()
        np.testing.assert_array_equal(
            some.load(np.arange(len(shared)), at(32))["image"], ten.load(shared, at(32))["image"]
        )


@pytest.mark.parametrize("name", ["num_classes", "train_per_class", "test_per_class", "side"])
def test_synthetic_of_nothing_is_refused(name):
    with pytest.raises(DataError, match=f"{name}: expected at least 1, found 0"):
        packaged.synthetic(**{name: 0})


@pytest.mark.parametrize("num_classes", [6, 10])
def test_synthetic_is_learnable(num_classes):
    train, test = packaged.synthetic(num_classes, train_per_class=30, test_per_class=20)

    def features(images):
        pixels = images.load(range(len(images)), at(32))["image"] / 255.0
        spectrum = np.abs(np.fft.fft2(pixels.mean(axis=3)))[:, :6, :6].reshape(len(pixels), -1)
        return np.concatenate([pixels.mean(axis=(1, 2)) * 20, spectrum / 30], axis=1)

    means = np.stack([features(train)[train.labels == k].mean(axis=0) for k in range(num_classes)])
    distance = ((features(test)[:, None] - means) ** 2).sum(axis=2)
    assert (distance.argmin(axis=1) == test.labels).mean() > 0.9
