"""Crop geometry by law and by closed form, resampling against Pillow."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from qkd_jax.data import transforms

ASPECTS = st.floats(0.05, 20.0)
SEEDS = st.integers(0, 2**31 - 1)

sample_crop = jax.jit(transforms.sample_crop)
sample_crops = jax.jit(jax.vmap(transforms.sample_crop, in_axes=(0, None)))
crop_and_resize = jax.jit(transforms.crop_and_resize, static_argnames=("size", "method"))
augment = jax.jit(transforms.augment, static_argnames="size")


@given(SEEDS, ASPECTS)
def test_box_stays_inside_the_image(seed, aspect):
    top, left, height, width = np.asarray(
        sample_crop(jax.random.key(seed), jnp.float32(aspect)), np.float64
    )
    rounding = 1e-6
    assert top >= 0 and left >= 0
    assert top + height <= 1 + rounding and left + width <= 1 + rounding


@given(SEEDS, ASPECTS)
def test_box_has_the_drawn_area_and_ratio_or_is_the_central_fallback(seed, aspect):
    top, left, height, width = np.asarray(
        sample_crop(jax.random.key(seed), jnp.float32(aspect)), np.float64
    )
    area, shape = height * width, width * aspect / height
    # exp, log and sqrt in float32: a few units in the last place of numbers near 1.
    rounding = 1e-5
    drawn = 0.05 - rounding <= area <= 1 + rounding
    assert 3 / 4 - rounding <= shape <= 4 / 3 + rounding or abs(shape - aspect) < rounding
    central = abs(top + height / 2 - 0.5) < 1e-6 and abs(left + width / 2 - 0.5) < 1e-6
    assert drawn or central


@pytest.mark.parametrize(
    ("aspect", "expected"),
    [
        # No box of 99 % or more of an extreme image fits: the central 4:3 (or 3:4) piece.
        (10.0, [0.0, 0.5 - 0.5 * 4 / 30, 1.0, 4 / 30]),
        (0.1, [0.5 - 0.5 * 4 / 30, 0.0, 4 / 30, 1.0]),
    ],
)
def test_fallback_is_torchvisions_central_crop(key, aspect, expected):
    box = transforms.sample_crop(key, jnp.float32(aspect), scale=(0.99, 1.0))
    np.testing.assert_allclose(box, expected, atol=1e-6)


def test_fallback_takes_all_of_an_image_whose_shape_is_in_range(key):
    box = transforms.sample_crop(key, jnp.float32(1.2), scale=(1.5, 1.6))
    np.testing.assert_allclose(box, [0.0, 0.0, 1.0, 1.0], atol=1e-6)


@pytest.mark.parametrize("aspect", [1.0, 1.6])
def test_area_and_place_have_the_distribution_of_the_rule(aspect):
    number = 2000
    boxes = sample_crops(jax.random.split(jax.random.key(1), number), jnp.float32(aspect))
    # Oracle: the rule as a loop in NumPy.
    generator = np.random.default_rng(2)
    expected = []
    for _ in range(number):
        for _ in range(10):
            area = aspect * generator.uniform(0.05, 1.0)
            shape = np.exp(generator.uniform(np.log(3 / 4), np.log(4 / 3)))
            height, width = np.sqrt(area / shape), np.sqrt(area * shape) / aspect
            if height <= 1 and width <= 1:
                top = generator.uniform(0, 1 - height)
                left = generator.uniform(0, 1 - width)
                break
        else:
            height, width = min(1.0, aspect / (3 / 4)), min(1.0, (4 / 3) / aspect)
            top, left = (1 - height) / 2, (1 - width) / 2
        expected.append([top, left, height, width])
    expected = np.array(expected)
    # Two independent means of `number` draws differ by less than five standard errors.
    error = np.sqrt(2 / number) * expected.std(axis=0)
    assert (np.abs(np.asarray(boxes).mean(axis=0) - expected.mean(axis=0)) < 5 * error).all()
    quantiles = [0.1, 0.5, 0.9]
    np.testing.assert_allclose(
        np.quantile(np.asarray(boxes), quantiles, axis=0),
        np.quantile(expected, quantiles, axis=0),
        atol=0.05,
    )


@pytest.mark.parametrize(("method", "filter"), [("linear", "BILINEAR"), ("cubic", "BICUBIC")])
@pytest.mark.parametrize("box", [(0.0, 0.0, 1.0, 1.0), (0.13, 0.41, 0.52, 0.37), (0.3, 0, 0.1, 1)])
def test_resampling_is_pillows(method, filter, box):
    pixels = np.random.default_rng(3).integers(64, 192, (50, 50, 3), dtype=np.uint8)
    top, left, height, width = box
    sides = (left * 50, top * 50, (left + width) * 50, (top + height) * 50)
    expected = Image.fromarray(pixels).resize((24, 24), Image.Resampling[filter], box=sides)
    found = crop_and_resize(jnp.asarray(pixels), jnp.asarray(box, jnp.float32), 24, method)
    # Pillow rounds to whole levels after each of two passes; the second pass weighs the first
    # rounding by at most 1.3 (cubic): 0.5 + 0.65 levels, and a little for float32.
    difference = np.abs(np.asarray(found) * 255 - np.asarray(expected, np.float64))
    assert difference.max() < 1.2


def test_crop_of_a_squashed_canvas_is_the_crop_of_the_original():
    """The reason for `aspect`: cutting from the canvas equals cutting from the original."""
    y, x = np.meshgrid(np.linspace(0, 3, 90), np.linspace(0, 5, 150), indexing="ij")
    smooth = 128 + 100 * np.sin(x + y)[..., None] * np.array([1.0, 0.5, -0.7])
    original = Image.fromarray(smooth.astype(np.uint8))
    canvas = np.asarray(original.resize((120, 120), Image.Resampling.BICUBIC))
    box = jnp.asarray([0.2, 0.1, 0.6, 0.45])
    found = crop_and_resize(jnp.asarray(canvas), box, 48)
    sides = (0.1 * 150, 0.2 * 90, 0.55 * 150, 0.8 * 90)
    expected = np.asarray(original.resize((48, 48), Image.Resampling.BILINEAR, box=sides))
    # Rounding as above, twice, and the smoothing of a wave of 30 pixels by two filters.
    assert np.abs(np.asarray(found) * 255 - expected).max() < 3.0


def test_flip_mirrors_about_half_of_the_images():
    image = jnp.arange(4 * 5 * 3, dtype=jnp.float32).reshape(4, 5, 3)
    keys = jax.random.split(jax.random.key(0), 400)
    out = np.asarray(jax.vmap(transforms.random_flip, in_axes=(0, None))(keys, image))
    same = (out == np.asarray(image)).all(axis=(1, 2, 3))
    mirrored = (out == np.asarray(image)[:, ::-1]).all(axis=(1, 2, 3))
    assert (same ^ mirrored).all()
    assert abs(int(mirrored.sum()) - 200) < 5 * 10  # five standard deviations


def test_augment_does_not_depend_on_the_batch(key):
    images = jnp.asarray(np.random.default_rng(0).integers(0, 256, (6, 20, 20, 3), dtype=np.uint8))
    aspect = jnp.linspace(0.5, 2.0, 6, dtype=jnp.float32)
    indices = jnp.asarray([7, 3, 9, 1, 0, 4])
    whole = augment(transforms.image_keys(key, indices), images, aspect, size=16)
    assert whole.shape == (6, 16, 16, 3) and whole.dtype == jnp.float32
    assert float(whole.min()) >= 0.0 and float(whole.max()) <= 1.0
    order = jnp.asarray([4, 1, 5])
    part = augment(
        transforms.image_keys(key, indices[order]), images[order], aspect[order], size=16
    )
    # Same arithmetic per image; XLA may order sums differently for another batch size.
    np.testing.assert_allclose(part, whole[order], atol=1e-6)
    again = augment(transforms.image_keys(key, indices), images, aspect, size=16)
    np.testing.assert_array_equal(again, whole)
    other = augment(transforms.image_keys(key, indices + 10), images, aspect, size=16)
    assert (np.abs(np.asarray(other - whole)).max(axis=(1, 2, 3)) > 0.01).all()


def test_augment_on_eight_devices_is_augment_on_one(key):
    images = jnp.asarray(np.random.default_rng(0).integers(0, 256, (8, 12, 12, 3), dtype=np.uint8))
    aspect = jnp.ones(8, jnp.float32)
    keys = transforms.image_keys(key, jnp.arange(8))
    one = augment(keys, images, aspect, size=8)
    split = jax.pmap(lambda k, i, a: transforms.augment(k, i, a, 8))(
        keys.reshape(8, 1), images[:, None], aspect[:, None]
    )
    np.testing.assert_allclose(split[:, 0], one, atol=1e-6)
