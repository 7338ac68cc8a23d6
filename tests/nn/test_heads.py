"""Heads and class statistics against direct NumPy in float64.

Error budget: D = 12 products of numbers near 1 and a division by a length, each rounded once: a
cosine is within (D + 4) eps of float64 (2e-6); sums over n images of numbers below 4 within
n * 16 * eps.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkd_jax.nn.heads import (
    add_to_statistics,
    class_means,
    empty_statistics,
    head_logits,
    init_rows,
    unit,
    within_class_scatter,
)

EPS = float(np.finfo(np.float32).eps)
COSINE_BUDGET = 16 * EPS


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_unit_is_the_direction():
    vectors = draw(5, 12)
    expected = np.float64(vectors) / np.linalg.norm(np.float64(vectors), axis=1, keepdims=True)
    np.testing.assert_allclose(unit(jnp.asarray(vectors)), expected, atol=COSINE_BUDGET)


@pytest.mark.parametrize("scale", [1e-8, 1e-3, 1e3, 1e8])
def test_unit_at_extreme_lengths(scale):
    vectors = draw(5, 12)
    found = unit(jnp.asarray(vectors * np.float32(scale)))
    np.testing.assert_allclose(found, unit(jnp.asarray(vectors)), atol=COSINE_BUDGET)


def test_zero_vector_stays_zero_with_zero_gradient():
    vectors = jnp.zeros((2, 12)).at[1, 0].set(2.0)
    np.testing.assert_array_equal(unit(vectors), np.eye(12)[None, 0] * np.array([[0], [1]]))
    target = jnp.asarray(draw(2, 12))
    gradient = jax.grad(lambda v: jnp.sum(unit(v) * target))(jnp.zeros((2, 12)))
    assert np.isfinite(gradient).all()


def test_cosine_head():
    features, rows = draw(5, 12), draw(3, 12, seed=1)
    f, r = np.float64(features), np.float64(rows)
    cosine = f @ r.T / np.linalg.norm(f, axis=1)[:, None] / np.linalg.norm(r, axis=1)
    found = head_logits(jnp.asarray(features), jnp.asarray(rows), jnp.float32(20.0), "cosine")
    np.testing.assert_allclose(found, 20 * cosine, atol=20 * COSINE_BUDGET)


def test_linear_head_has_no_scale_and_no_bias():
    features, rows = draw(2, 5, 12), draw(3, 12, seed=1)
    found = head_logits(jnp.asarray(features), jnp.asarray(rows), jnp.float32(20.0), "linear")
    expected = np.float64(features) @ np.float64(rows).T
    np.testing.assert_allclose(found, expected, atol=12 * 16 * EPS)


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_zero_features_and_zero_rows_are_safe(kind):
    features, rows = jnp.zeros((2, 12)), jnp.zeros((3, 12)).at[0].set(1.0)
    value, gradients = jax.value_and_grad(
        lambda f, r: head_logits(f, r, jnp.float32(20.0), kind).sum(), argnums=(0, 1)
    )(features, rows)
    assert float(value) == 0.0
    assert all(np.isfinite(g).all() for g in gradients)


def test_rows_start_at_length_one(key):
    rows = init_rows(key, 200, 64)
    # |row|^2 has mean 1 and standard deviation sqrt(2 / 64); 200 rows: 5 sigma is 0.0625.
    assert abs(float((rows**2).sum(1).mean()) - 1) < 0.0625


SLOTS, OUTER, CLASSES, WIDTH, IMAGES = 3, 2, 4, 12, 23
SUM_BUDGET = IMAGES * 16 * EPS


@pytest.fixture(scope="module")
def images():
    """features [n, S, D] with an offset, positions [n]; the last class has no image."""
    features = draw(IMAGES, SLOTS, WIDTH) + np.float32(0.5)
    return features, np.random.default_rng(1).integers(0, CLASSES - 1, IMAGES)


def collect(features, positions, sizes, pad=0):
    """Statistics in batches of the given sizes, each with `pad` padded rows that hold numbers."""
    statistics, first = empty_statistics(SLOTS, CLASSES, WIDTH, OUTER), 0
    for size in sizes:
        f, p = features[first : first + size], positions[first : first + size]
        f = np.concatenate([f, np.full((pad, SLOTS, WIDTH), 7.0, np.float32)])
        p, mask = np.concatenate([p, np.ones(pad, int)]), np.arange(size + pad) < size
        statistics = add_to_statistics(statistics, *map(jnp.asarray, (f, p, mask)))
        first += size
    assert first == len(features)
    return statistics


def test_means_and_pooled_scatter_equal_the_direct_ones(images):
    features, positions = images
    statistics = collect(features, positions, [IMAGES])
    wide = np.float64(features)
    scatter = np.zeros((OUTER, WIDTH, WIDTH))
    for c in range(CLASSES):
        mine = wide[positions == c]
        assert float(statistics.count[c]) == len(mine)
        expected = mine.mean(0) if len(mine) else np.zeros((SLOTS, WIDTH))
        np.testing.assert_allclose(class_means(statistics)[:, c], expected, atol=SUM_BUDGET)
        if len(mine):
            centred = mine[:, :OUTER] - mine[:, :OUTER].mean(0)
            scatter += np.einsum("nkd,nke->kde", centred, centred)
    # The subtraction of sums of squares cancels at most |sum h h^T| ~ 40, in units of eps.
    np.testing.assert_allclose(within_class_scatter(statistics), scatter, atol=4 * SUM_BUDGET)


def test_one_image_of_each_class_has_no_scatter(images):
    """Both sums are the same up to rounding, which may be negative: no covariance at all."""
    features, _ = images
    few = collect(features[:3], np.arange(3), [3])
    assert not np.asarray(within_class_scatter(few)).any()
    for share, counts in ((4e-6, False), (4e-5, True)):  # of the whole that is left
        left = dataclasses.replace(few, outer=few.outer * (1 + share))
        assert np.asarray(within_class_scatter(left)).any() == counts


def test_batches_order_and_padding_do_not_matter(images):
    features, positions = images
    whole = collect(features, positions, [IMAGES])
    order = np.random.default_rng(5).permutation(IMAGES)
    others = [
        collect(features, positions, [5, 9, 9]),
        collect(features[order], positions[order], [IMAGES]),
        collect(features, positions, [8, 15], pad=3),
    ]
    for other in others:
        for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(a, b, atol=4 * SUM_BUDGET)
        np.testing.assert_array_equal(whole.count, other.count)


def test_one_batch_of_padding_only_adds_nothing(images):
    features, positions = images
    whole = collect(features, positions, [IMAGES])
    nothing = jnp.zeros(IMAGES, bool)
    again = add_to_statistics(whole, jnp.asarray(features), jnp.asarray(positions), nothing)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)
