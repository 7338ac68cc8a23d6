"""The within-class metric against NumPy float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from qkd_jax.nn.whitening import (
    identity_metric,
    isotropic_share,
    learned_metric,
    shrunk_factor,
    whiten,
)

WIDTH = 12
# Sums of 40 products of numbers near 1 and a factor with a condition below 10: some 100 eps.
EXACT = 1e-5


def test_the_learned_metric_is_the_shrunk_covariance():
    features, labels = (
        np.float64(np.random.default_rng(0).normal(size=(40, WIDTH)).astype(np.float32)),
        np.arange(40) % 3,
    )
    means = np.stack([features[labels == c].mean(0) for c in range(3)])
    centred = features - means[labels]
    scatter, covariance = centred.T @ centred, centred.T @ centred / 40
    expected = 0.4 * covariance + 0.6 * np.trace(covariance) / WIDTH * np.eye(WIDTH)
    stored = np.zeros((5, WIDTH), np.float32)
    stored[:3] = means
    moments = jnp.asarray(scatter, jnp.float32), jnp.float32(40)
    members = jnp.array([True, True, True, False, False])
    metric = learned_metric(*moments, jnp.asarray(stored), members, 0.6)
    factor = np.float64(shrunk_factor(*moments, 0.6))
    np.testing.assert_allclose(factor @ factor.T, expected, atol=EXACT)
    np.testing.assert_allclose(np.triu(factor, 1), 0)
    np.testing.assert_allclose(np.float64(metric.whitener) @ factor, np.eye(WIDTH), atol=EXACT)
    np.testing.assert_allclose(metric.centre, means.mean(0), atol=EXACT)
    white = np.float64(whiten(metric, jnp.asarray(features, jnp.float32)))
    np.testing.assert_allclose(
        white, np.linalg.solve(factor, (features - means.mean(0)).T).T, atol=EXACT * 5
    )
    one = learned_metric(*moments, jnp.asarray(stored), jnp.arange(5) == 1, 0.6)
    np.testing.assert_array_equal(one.centre, stored[1])


def test_the_isotropic_part_is_the_mean_of_the_posterior():
    """By the formula for the inverse Wishart: with nu - D - 1 = m, a prior mean P and n images the
    posterior mean is (m P + scatter) / (m + n); here m = prior D and P has the images' variance.
    """
    draws = np.random.default_rng(0).normal(size=(30, WIDTH))
    scatter, m = draws.T @ draws, 0.5 * WIDTH
    prior = np.trace(scatter) / 30 / WIDTH * np.eye(WIDTH)
    expected = (m * prior + scatter) / (m + 30)
    share = isotropic_share(0.0, 0.5, 30, WIDTH)
    assert share == 6 / 36 and isotropic_share(0.6, 0.5, 30, WIDTH) == 0.6
    factor = np.float64(shrunk_factor(jnp.asarray(scatter, jnp.float32), jnp.float32(30), share))
    np.testing.assert_allclose(factor @ factor.T, expected, atol=EXACT)
    assert isotropic_share(0.0, 0.5, jnp.float32(0), WIDTH) == 1  # without images


def test_the_metric_of_nothing_is_regular():
    metric = learned_metric(
        jnp.zeros((WIDTH, WIDTH)), jnp.float32(0), jnp.zeros((2, WIDTH)), jnp.zeros(2, bool), 0.0
    )
    assert all(np.isfinite(part).all() for part in metric)
    query = jnp.asarray(np.random.default_rng(1).normal(size=(5, WIDTH)), jnp.float32)
    same = whiten(identity_metric(WIDTH), query)
    np.testing.assert_array_equal(same, query)


@pytest.mark.parametrize("shrinkage, share", [(0.6, 0.6), (0.0, 1e-3)])
def test_the_floor_of_the_covariance(shrinkage, share):
    """Of the mean variance, 1e-6, and of the share of the isotropic part, 1e-3."""
    none = shrunk_factor(jnp.zeros((WIDTH, WIDTH)), jnp.float32(0), shrinkage)
    np.testing.assert_allclose(none, np.sqrt(share * 1e-6) * np.eye(WIDTH), rtol=EXACT)
    # Above the floor: sigma = 4 I, of which (1 - s) + share is left.
    some = shrunk_factor(12.0 * jnp.eye(WIDTH), jnp.float32(3), shrinkage)
    expected = np.sqrt(4.0 * (1 - shrinkage + share)) * np.eye(WIDTH)
    np.testing.assert_allclose(some, expected, rtol=EXACT)
