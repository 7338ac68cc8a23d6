"""Classifier alignment: moments against NumPy float64, draws by their own moments, SGD by hand.

Error budgets. Moments: a mean of numbers near 300 is off by 300 eps = 4e-5; times gaps near 1 of
15 images that is 5e-4 in a scatter and, over n - 1, 5e-5 in a covariance. Draws: an epoch of N
samples a class estimates a mean to 1 / sqrt(N) and a covariance to sqrt(2 / N), times 5.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkd_jax.nn.alignment import (
    Gaussians,
    add_to_moments,
    align_head,
    cosine_factor,
    covariance_factors,
    empty_gaussians,
    empty_moments,
    sgd_step,
    store_gaussians,
)

WIDTH, JITTER = 5, 1e-4


def images(seed=0, size=40):
    """Features far from the origin, of classes 0, 1, 2 and one image of class 3."""
    generator = np.random.default_rng(seed)
    labels = np.concatenate([generator.integers(0, 3, size), [3]])
    features = 300.0 + generator.normal(size=(len(labels), WIDTH)) + labels[:, None]
    return features.astype(np.float32), labels


def moments_of(features, labels, kind, batches=3, garbage=np.nan):
    """Collected over padded batches."""
    moments = empty_moments(5, WIDTH, kind)
    add = jax.jit(add_to_moments)
    for rows in np.array_split(np.arange(len(labels)), batches):
        padded = np.full((20, WIDTH), garbage, np.float32)
        padded[: len(rows)] = features[rows]
        label = np.zeros(20, np.int32)
        label[: len(rows)] = labels[rows]
        moments = add(moments, padded, jnp.asarray(label), jnp.arange(20) < len(rows))
    return moments


@pytest.mark.parametrize("kind", ["covariance", "variance"])
def test_moments_and_factors_against_numpy(kind):
    features, labels = images()
    moments = moments_of(features, labels, kind)
    factors = np.asarray(covariance_factors(moments, JITTER))
    np.testing.assert_array_equal(moments.count, np.bincount(labels, minlength=5))
    for c in range(5):
        mine = np.float64(features[labels == c])
        if len(mine):
            np.testing.assert_allclose(moments.mean[c], mine.mean(0), rtol=1e-6)
        covariance = np.cov(mine.T) if len(mine) > 1 else np.zeros((WIDTH, WIDTH))
        covariance = covariance + JITTER * np.eye(WIDTH)
        if kind == "covariance":
            np.testing.assert_allclose(factors[c] @ factors[c].T, covariance, atol=5e-5)
        else:
            np.testing.assert_allclose(factors[c] ** 2, np.diag(covariance), atol=5e-5)


def test_moments_do_not_depend_on_the_batches():
    features, labels = images(1)
    one, many = (moments_of(features, labels, "covariance", batches=b) for b in (3, 11))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=5e-4), one, many)


def test_a_covariance_that_rounding_makes_indefinite_still_gives_a_factor():
    moments = empty_moments(1, 2, "covariance").replace(
        count=jnp.array([2.0]), scatter=jnp.array([[[1.0, 1.0], [1.0, 1.0 - 1e-3]]])
    )
    factor = np.asarray(covariance_factors(moments, 0.0))[0]
    np.testing.assert_allclose(factor @ factor.T, np.ones((2, 2)), atol=1e-3)


@pytest.mark.parametrize("kind", ["covariance", "variance"])
def test_stored_gaussians_drop_padding_and_keep_the_rest(kind):
    features, labels = images()
    moments = moments_of(features, labels, kind)
    before = empty_gaussians(7, WIDTH, kind)
    columns = jnp.array([6, 0, 2, 7, 7])  # 7 = out of range: padding
    after = store_gaussians(before, moments, columns, JITTER)
    np.testing.assert_array_equal(after.mean[columns[:3]], moments.mean[:3])
    factors = covariance_factors(moments, JITTER)
    np.testing.assert_array_equal(after.factor[columns[:3]], factors[:3])
    for untouched in (1, 3, 4, 5):
        assert not np.asarray(after.mean[untouched]).any()
        assert not np.asarray(after.factor[untouched]).any()


@pytest.mark.parametrize("kind", ["covariance", "variance"])
def test_an_epoch_draws_every_class_equally_often_from_its_gaussian(kind):
    """With the objective -<head, sums of a batch>, no momentum and rate 1 the head adds sums up."""
    samples, generator = 400, np.random.default_rng(2)
    mean = 3.0 * generator.normal(size=(4, 3))
    factor = np.tril(generator.normal(size=(4, 3, 3)))
    if kind == "variance":
        factor = np.stack([np.diag(np.abs(np.diag(f))) for f in factor])
    seen = np.array([True, False, True, True])
    gaussians = Gaussians(jnp.float32(mean), jnp.float32(factor))
    if kind == "variance":
        gaussians = gaussians.replace(factor=jnp.diagonal(gaussians.factor, axis1=1, axis2=2))

    def objective(head, features, labels):
        member = jax.nn.one_hot(labels, 4)
        sums = {
            "count": member.sum(0),
            "total": member.T @ features,
            "outer": jnp.einsum("nc,nd,ne->cde", member, features, features),
            "mixed": (member.sum(0) > 0).astype(jnp.float32),
        }
        return -sum(jnp.sum(head[name] * value) for name, value in sums.items())

    empty = {"count": (4,), "total": (4, 3), "outer": (4, 3, 3), "mixed": (4,)}
    head = {name: jnp.zeros(shape) for name, shape in empty.items()}
    options = {"learning_rate": 1.0, "weight_decay": 0.0, "momentum": 0.0}
    aligned = jax.jit(
        lambda key: align_head(
            key, head, objective, gaussians, jnp.asarray(seen), epochs=1, samples=samples, **options
        )
    )
    found = jax.tree.map(np.float64, aligned(jax.random.key(0)))
    np.testing.assert_array_equal(found["count"], samples * seen)
    # Three batches, and every class is in each of them: they are shuffled over the whole epoch.
    np.testing.assert_array_equal(found["mixed"], 3 * seen)
    for c in np.flatnonzero(seen):
        drawn_mean = found["total"][c] / samples
        drawn = found["outer"][c] / samples - np.outer(drawn_mean, drawn_mean)
        covariance = factor[c] @ factor[c].T
        size = np.sqrt(np.diag(covariance))
        assert (np.abs(drawn_mean - mean[c]) < 5 * size / np.sqrt(samples) + 1e-4).all()
        slack = 5 * np.sqrt(2 / samples) * np.outer(size, size) + 1e-3
        assert (np.abs(drawn - covariance) < slack).all()
    again = aligned(jax.random.key(1))
    assert not np.allclose(again["total"][0], found["total"][0])


def test_sgd_and_its_schedule_by_hand():
    """Quadratic objective |p - 1|^2 / 2 that ignores the draws: v, p by a Python loop."""
    gaussians = Gaussians(jnp.zeros((3, 2)), jnp.ones((3, 2)))
    seen = jnp.array([True, True, False])
    found = align_head(
        jax.random.key(0),
        {"rows": jnp.zeros(2), "bias": jnp.float32(3.0)},
        lambda head, features, labels: sum(jnp.sum((p - 1) ** 2) / 2 for p in head.values()),
        gaussians,
        seen,
        epochs=4,
        samples=5,
        learning_rate=0.1,
        weight_decay=0.01,
        period=3,
    )
    for start, end in ((0.0, found["rows"][0]), (3.0, found["bias"])):
        p, v = start, 0.0
        for epoch in range(4):
            rate = 0.1 * (1 + np.cos(np.pi * epoch / 3)) / 2
            for _ in range(2):  # as many steps as classes seen
                v = 0.9 * v + (p - 1) + 0.01 * p
                p = p - rate * v
        np.testing.assert_allclose(end, p, rtol=2e-6)


def test_the_cosine_rises_again_after_its_period():
    factors = [float(cosine_factor(jnp.int32(e), 5)) for e in range(11)]
    np.testing.assert_allclose(factors[::5], [1.0, 0.0, 1.0], atol=1e-6)
    np.testing.assert_allclose(factors[:6], factors[10:4:-1], atol=1e-6)


def test_one_step_with_decay():
    head, velocity = sgd_step(
        {"rows": jnp.float32(2.0)},
        {"rows": jnp.float32(1.0)},
        {"rows": jnp.float32(0.5)},
        jnp.float32(0.1),
        0.9,
        0.25,
    )
    np.testing.assert_allclose(velocity["rows"], 0.9 + 0.5 + 0.5, rtol=1e-6)
    np.testing.assert_allclose(head["rows"], 2.0 - 0.19, rtol=1e-6)
