"""Calibration against loops in float64, and against laws of the temperature.

Budgets: sums of N <= 400 float64 terms of order 1 to 10, in another order: 1e-12 relative.
"""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qkd_jax.protocol.calibration import (
    calibration,
    calibration_error,
    fitted_temperature,
)

CLOSE = 1e-12


def drawn(seed, size=400, classes=6, sharpness=1.0, honest=2.0):
    """Scores [N, C], one class never seen, and labels drawn from softmax(honest * scores)."""
    draw = np.random.default_rng(seed)
    scores = draw.normal(size=(size, classes))
    scores[:, 2] = -np.inf
    chances = np.exp(honest * scores)
    chances /= chances.sum(axis=1, keepdims=True)
    labels = np.array([draw.choice(classes, p=row) for row in chances])
    return sharpness * scores, labels


def likelihood_of(scores, labels):
    """Mean -log p, one image and one class at a time."""
    total = 0.0
    for row, label in zip(scores.tolist(), labels.tolist(), strict=True):
        total += math.log(math.fsum(math.exp(value - row[label]) for value in row))
    return total / len(labels)


def error_of(scores, labels):
    """Bin by bin, from the definition."""
    confidences, hits = [], []
    for row, label in zip(scores.tolist(), labels.tolist(), strict=True):
        best = max(row)
        confidences.append(1 / math.fsum(math.exp(value - best) for value in row))
        hits.append(row.index(best) == label)
    total = 0.0
    for b in range(15):
        inside = [i for i, c in enumerate(confidences) if b / 15 < c <= (b + 1) / 15]
        if inside:
            accuracy = sum(hits[i] for i in inside) / len(inside)
            mean = math.fsum(confidences[i] for i in inside) / len(inside)
            total += len(inside) / len(labels) * abs(accuracy - mean)
    return 100 * total


def test_as_is_it_equals_the_definitions():
    scores, labels = drawn(0)
    found = calibration(np.float32(scores), labels, np.arange(400) < 200)
    scores = np.float64(np.float32(scores))
    assert found["nll"] == pytest.approx(likelihood_of(scores, labels), rel=CLOSE)
    assert found["ece"] == pytest.approx(error_of(scores, labels), rel=CLOSE)


def test_error_by_hand():
    """Two bins: 0.6 and 0.64 with one right, 0.9 (above 13/15) wrong; the edge 1 is in the last."""
    found = calibration_error(np.array([0.61, 0.64, 0.9, 1.0]), np.array([1, 0, 0, 1], bool))
    assert found == pytest.approx(100 * (abs(1 - 1.25) + 0.9 + 0) / 4, rel=CLOSE)
    edge = calibration_error(np.array([3 / 15, 2.5 / 15]), np.array([True, False]))
    assert edge == pytest.approx(100 * abs(1 - 5.5 / 15) / 2, rel=CLOSE)  # both in the third bin


@given(st.integers(0, 2**32 - 1), st.floats(0.02, 50))
def test_a_temperature_undoes_a_scale_and_nothing_near_it_is_better(seed, sharpness):
    scores, labels = drawn(seed, size=60, sharpness=1.0)
    plain = fitted_temperature(scores, labels)
    scaled = fitted_temperature(sharpness * scores, labels)
    # The slope is 0 within rounding, 1e-14, over a curvature of order 0.1.
    assert scaled == pytest.approx(sharpness * plain, rel=1e-9)
    best = likelihood_of(scores / plain, labels)
    for factor in (0.9, 1.1):
        assert likelihood_of(scores / (factor * plain), labels) > best


def test_without_an_error_it_is_cold_and_below_chance_the_hottest():
    """Where all is right, all probabilities round to 1: e^(-1/t) < 2^-54 or so."""
    scores = np.eye(4)
    coldest = fitted_temperature(scores, np.arange(4))
    assert 1 / 45 < coldest < 1 / 30 and likelihood_of(scores / coldest, np.arange(4)) < 1e-14
    assert fitted_temperature(-scores, np.arange(4)) == pytest.approx(1e4, rel=1e-9)


def test_each_half_is_measured_with_the_temperature_of_the_other():
    scores, labels = drawn(3)
    halves = np.random.default_rng(4).random(400) < 0.4
    scores[halves] *= 8  # so that the temperatures differ
    found = calibration(scores, labels, halves)
    inside, outside = found["temperatures"]
    assert inside == fitted_temperature(scores[~halves], labels[~halves])
    assert outside == fitted_temperature(scores[halves], labels[halves])
    assert outside > 4 * inside
    divided = scores / np.where(halves, inside, outside)[:, None]
    assert found["nll_tempered"] == pytest.approx(likelihood_of(divided, labels), rel=CLOSE)
    assert found["ece_tempered"] == pytest.approx(error_of(divided, labels), rel=CLOSE)


def test_a_temperature_calibrates_what_only_lacks_one():
    scores, labels = drawn(5, size=400, sharpness=20.0)
    found = calibration(scores, labels, np.arange(400) % 2 == 0)
    assert found["nll_tempered"] < 0.25 * found["nll"]
    assert found["ece_tempered"] < 0.4 * found["ece"]


def test_one_image_has_no_temperature():
    found = calibration(np.array([[0.0, 1.0]]), np.array([1]), np.array([True]))
    assert found["nll"] == pytest.approx(math.log1p(math.exp(-1)), rel=CLOSE)
    assert found["nll_tempered"] is found["ece_tempered"] is found["temperatures"] is None
