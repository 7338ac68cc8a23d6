"""The head that is trained on draws: which features it gets, and its SGD by hand.

Error budget of draws: N samples of a class estimate a mean to 1 / sqrt(N) and a covariance to
sqrt(2 / N), times 5.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkd_jax.generators.gaussian import Gaussians, gaussian
from qkd_jax.learners.task_heads import align_head


@pytest.mark.parametrize("kind", ["covariance", "variance"])
def test_an_epoch_draws_every_class_equally_often_from_its_gaussian(kind):
    """With the objective -<head, sums of a batch>, no momentum and rate 1 the head adds sums up."""
    samples, generator = 400, np.random.default_rng(2)
    mean = 3.0 * generator.normal(size=(4, 3))
    factor = np.tril(generator.normal(size=(4, 3, 3)))
    if kind == "variance":
        factor = np.stack([np.diag(np.abs(np.diag(f))) for f in factor])
    seen = np.array([True, False, True, True])
    gaussians, drawer = Gaussians(jnp.float32(mean), jnp.float32(factor)), gaussian(kind, 1e-4)
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
            key,
            head,
            objective,
            drawer,
            gaussians,
            jnp.asarray(seen),
            epochs=1,
            samples=samples,
            **options,
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
        gaussian("variance", 1e-4),
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
