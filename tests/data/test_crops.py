"""Crop geometry by law and against torchvision's rule; the view against Pillow by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from qkd_jax.data.crops import NUM_DRAWS, crop_box, crop_draws, random_view

SIDES = st.integers(1, 400)
SEEDS = st.integers(0, 2**31 - 1)
PIXELS = np.random.default_rng(3).integers(0, 256, (40, 60, 3), dtype=np.uint8)


def draws_of(seed):
    return crop_draws([5], seed=seed, task=1, epoch=2)[0]


@given(SEEDS, SIDES, SIDES)
def test_a_box_stays_inside_and_has_a_drawn_area_and_shape_or_is_central(seed, width, height):
    left, top, right, bottom = crop_box(draws_of(seed), width, height)
    assert 0 <= left < right <= width and 0 <= top < bottom <= height
    wide, tall = right - left, bottom - top
    # Sides are rounded: half a pixel each.
    smallest, largest = (wide - 0.5) * (tall - 0.5), (wide + 0.5) * (tall + 0.5)
    drawn = largest >= 0.05 * width * height and smallest <= width * height
    drawn &= (wide + 0.5) / max(tall - 0.5, 1e-9) >= 3 / 4 and (wide - 0.5) / (tall + 0.5) <= 4 / 3
    central = abs(left + right - width) <= 1 and abs(top + bottom - height) <= 1
    assert drawn or central


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        # No box of 99 % or more of an extreme image fits: the central 4:3 (or 3:4) piece.
        ((1000, 90), (440, 0, 560, 90)),
        ((90, 1000), (0, 440, 90, 560)),
        # None of the whole image's area is drawn: all of it, as its shape is in range.
        ((110, 100), (0, 0, 110, 100)),
    ],
)
def test_fallback_is_torchvisions_central_crop(size, expected):
    scale = (0.99, 1.0) if max(size) == 1000 else (1.5, 1.6)
    assert crop_box(draws_of(0), *size, scale=scale) == expected


@pytest.mark.parametrize("size", [(100, 100), (160, 100), (37, 300)])
def test_boxes_have_the_distribution_of_the_rule(size):
    (width, height), number = size, 2000
    draws = crop_draws(range(number), seed=1, task=0, epoch=0)
    boxes = np.array([crop_box(row, width, height) for row in draws], float)
    # Oracle: torchvision's rule as a loop with draws of its own.
    generator = np.random.default_rng(2)
    expected = []
    for _ in range(number):
        for _ in range(10):
            area = width * height * generator.uniform(0.05, 1.0)
            shape = np.exp(generator.uniform(np.log(3 / 4), np.log(4 / 3)))
            wide, tall = round(np.sqrt(area * shape)), round(np.sqrt(area / shape))
            if 0 < wide <= width and 0 < tall <= height:
                left = generator.integers(0, width - wide + 1)
                top = generator.integers(0, height - tall + 1)
                break
        else:
            wide = min(width, round(height * 4 / 3))
            tall = min(height, round(width / (3 / 4)))
            left, top = (width - wide) // 2, (height - tall) // 2
        expected.append([left, top, left + wide, top + tall])
    expected = np.array(expected, float)
    # Two independent means of `number` draws differ by less than five standard errors.
    error = np.sqrt(2 / number) * expected.std(axis=0)
    assert (np.abs(boxes.mean(axis=0) - expected.mean(axis=0)) <= 5 * error).all()
    # Two distributions of `number` draws each: Kolmogorov-Smirnov's distance at p = 1e-4.
    for column in range(4):
        points = np.unique(np.concatenate([boxes[:, column], expected[:, column]]))
        own, rule = (
            np.searchsorted(np.sort(drawn[:, column]), points, side="right") / number
            for drawn in (boxes, expected)
        )
        assert np.abs(own - rule).max() < 2.2 * np.sqrt(2 / number)


def test_a_view_is_pillows_crop_resize_and_mirror():
    image = Image.fromarray(PIXELS)
    mirrored = 0
    for draws in crop_draws(range(40), seed=0, task=0, epoch=0):
        box = crop_box(draws, 60, 40)
        expected = np.asarray(image.crop(box).resize((24, 24), Image.Resampling.BILINEAR))
        found = random_view(image, 24, draws)
        flipped = (found == expected[:, ::-1]).all()
        assert flipped or (found == expected).all()
        mirrored += flipped
    assert abs(int(mirrored) - 20) < 5 * 40**0.5 / 2  # five standard deviations


def test_draws_belong_to_image_task_epoch_and_seed_not_to_the_batch():
    place = {"seed": 1993, "task": 2, "epoch": 3}
    whole = crop_draws([7, 3, 9, 1], **place)
    assert whole.shape == (4, NUM_DRAWS) and (whole >= 0).all() and (whole < 1).all()
    np.testing.assert_array_equal(crop_draws([9, 7], **place), whole[[2, 0]])
    for name in place:
        other = crop_draws([7, 3, 9, 1], **{**place, name: place[name] + 1})
        assert (other != whole).all()


def test_draws_stay_the_same_in_all_versions():
    """Golden: Philox is promised not to change, and a run must be repeatable years later."""
    draws = crop_draws([0, 1], seed=1993, task=0, epoch=0)
    expected = [
        [0.8789541138393681, 0.22867967700168335, 0.2653598890490819],
        [0.16845536240667391, 0.9300884197801187, 0.6731610708624578],
    ]
    np.testing.assert_array_equal(draws[:, :3], expected)
