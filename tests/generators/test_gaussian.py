"""Gaussians of classes: moments against NumPy float64, draws by their own moments.

Error budgets. Moments: a mean of numbers near 300 is off by 300 eps = 4e-5; times gaps near 1 of
15 images that is 5e-4 in a scatter and, over n - 1, 5e-5 in a covariance. Draws: N samples of a
class estimate a mean to 1 / sqrt(N) and a covariance to sqrt(2 / N), times 5.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkd_jax.generators.gaussian import (
    Gaussians,
    add_to_moments,
    covariance_factors,
    empty_moments,
    gaussian,
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
    generator = gaussian(kind, JITTER)
    before = generator.empty(7, WIDTH)
    columns = jnp.array([6, 0, 2, 7, 7])  # 7 = out of range: padding
    after = generator.fit(before, moments, columns, jax.random.key(0))
    np.testing.assert_array_equal(after.mean[columns[:3]], moments.mean[:3])
    factors = covariance_factors(moments, JITTER)
    np.testing.assert_array_equal(after.factor[columns[:3]], factors[:3])
    for untouched in (1, 3, 4, 5):
        assert not np.asarray(after.mean[untouched]).any()
        assert not np.asarray(after.factor[untouched]).any()


def some_gaussians(kind):
    """(Gaussians of four classes of width 3, their covariances in float64)."""
    generator = np.random.default_rng(2)
    mean, factor = 3.0 * generator.normal(size=(4, 3)), generator.normal(size=(4, 3, 3))
    if kind == "covariance":
        factor = np.tril(factor)
        return Gaussians(jnp.float32(mean), jnp.float32(factor)), factor @ factor.mT
    deviation = np.abs(factor[:, 0])
    covariance = np.stack([np.diag(d * d) for d in deviation])
    return Gaussians(jnp.float32(mean), jnp.float32(deviation)), covariance


@pytest.mark.parametrize("kind", ["covariance", "variance"])
def test_draws_have_the_moments_of_their_class(kind):
    samples, (gaussians, covariances) = 4000, some_gaussians(kind)
    generator = gaussian(kind, JITTER)
    assert generator.one_class == (kind == "covariance")
    labels = np.full(samples, 2) if generator.one_class else np.resize([0, 1, 2, 3], 4 * samples)
    draw = jax.jit(generator.draw)
    drawn = np.float64(draw(gaussians, jax.random.key(0), jnp.asarray(labels)))
    for c in np.unique(labels):
        mine, size = drawn[labels == c], np.sqrt(np.diag(covariances[c]))
        gap = np.abs(mine.mean(0) - np.asarray(gaussians.mean[c]))
        assert (gap < 5 * size / np.sqrt(samples)).all()
        slack = 5 * np.sqrt(2 / samples) * np.outer(size, size)
        assert (np.abs(np.cov(mine.T) - covariances[c]) < slack).all()
    again = draw(gaussians, jax.random.key(1), jnp.asarray(labels))
    assert not np.allclose(again, drawn)


def test_full_covariances_draw_one_class_at_a_time():
    gaussians, _ = some_gaussians("covariance")
    draw = gaussian("covariance", JITTER).draw
    drawn = np.asarray(draw(gaussians, jax.random.key(0), jnp.array([1, 1, 0, 1])))
    assert np.isnan(drawn).all(axis=1).tolist() == [False, False, True, False]


def test_a_shared_covariance_is_that_within_all_classes_of_all_tasks():
    generator, features, labels = gaussian("shared", JITTER), *images()
    memory = generator.empty(8, WIDTH)
    for task, own in enumerate(((0, 1), (2, 3))):
        rows = np.isin(labels, own)
        positions = labels[rows] - own[0]
        moments = moments_of(features[rows], positions, "shared")
        columns = jnp.array([4 * task, 4 * task + 1, 8, 8, 8])
        memory = generator.fit(memory, moments, columns, jax.random.key(0))
    means = np.stack([np.float64(features[labels == c]).mean(0) for c in range(4)])
    np.testing.assert_allclose(memory.mean[jnp.array([0, 1, 4, 5])], means, rtol=1e-6)
    centred = np.float64(features) - means[labels]
    # Class 3 has one image, which says nothing of the covariance.
    covariance = centred.T @ centred / (len(labels) - 4) + JITTER * np.eye(WIDTH)
    np.testing.assert_allclose(memory.factor @ memory.factor.T, covariance, atol=5e-5)

    count = 4000
    asked = jnp.asarray(np.resize([0, 5], 2 * count))
    drawn = np.float64(jax.jit(generator.draw)(memory, jax.random.key(1), asked))
    for c, mean in ((0, means[0]), (5, means[3])):
        mine, size = drawn[np.asarray(asked) == c], np.sqrt(np.diag(covariance))
        assert (np.abs(mine.mean(0) - mean) < 5 * size / np.sqrt(count) + 1e-4).all()
        slack = 5 * np.sqrt(2 / count) * np.outer(size, size)
        assert (np.abs(np.cov(mine.T) - covariance) < slack).all()


def test_means_alone_are_drawn_as_they_are():
    generator, (features, labels) = gaussian("mean", JITTER), images()
    moments = moments_of(features, labels, "mean")
    columns = jnp.array([6, 0, 2, 7, 7])
    memory = generator.fit(generator.empty(7, WIDTH), moments, columns, jax.random.key(0))
    drawn = generator.draw(memory, jax.random.key(1), jnp.array([2, 6, 6, 1]))
    np.testing.assert_array_equal(drawn[:3], moments.mean[jnp.array([2, 0, 0])])
    np.testing.assert_array_equal(drawn[3], 0)
