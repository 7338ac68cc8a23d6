"""The estimate of mutual information: its floor, what raises it, and padding.

A critic of 2 x 16 units after 100 steps of Adam, on 128 pairs. Independent pairs: a perfect critic
gives the floor on new pairs; on those it was fitted to, 128 pairs let it gain a little.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qkd_jax.learners.q_tuning.retention import FLOOR, mutual_information, new_critic

ROWS = 128


def alone(rows):
    return rows


def probabilities(seed, rows=ROWS, classes=3):
    logits = 2 * np.random.default_rng(seed).normal(size=(rows, classes))
    return jnp.asarray(jax.nn.softmax(jnp.asarray(logits, jnp.float32)))


@jax.jit
def fitted(own, other, new_own, new_other):
    """The estimate on new pairs, under a critic trained on the first ones."""
    mask, optimiser = jnp.ones(len(own), bool), optax.adam(1e-2)

    def estimate(critic, a, b):
        return jnp.mean(mutual_information(critic, a, b, mask, alone))

    def step(carry, _):
        critic, state = carry
        gradient = jax.grad(lambda c: -estimate(c, own, other))(critic)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimiser.update(gradient, state)
        return (optax.apply_updates(critic, updates), state), None

    critic = new_critic(jax.random.key(0), 6, 16)
    (critic, _), _ = jax.lax.scan(step, (critic, optimiser.init(critic)), length=100)
    return estimate(critic, new_own, new_other)


def test_independent_predictions_stay_near_the_floor_and_equal_ones_do_not():
    own, other, new, new_other = (probabilities(seed) for seed in range(4))
    independent, equal = fitted(own, other, new, new_other), fitted(own, own, new, new)
    assert FLOOR - 0.3 < float(independent) < FLOOR + 0.02
    assert float(equal) > FLOOR + 0.4
    untrained = jax.tree.map(jnp.zeros_like, new_critic(jax.random.key(0), 6, 16))
    flat = mutual_information(untrained, own, own, jnp.ones(ROWS, bool), alone)
    np.testing.assert_allclose(flat, FLOOR, rtol=1e-6)


def test_a_row_meets_every_other_row_once():
    critic = new_critic(jax.random.key(1), 6, 4)
    own, other = np.asarray(probabilities(0, 5)), np.asarray(probabilities(1, 5))

    def score(a, b):
        x = np.concatenate([a, b]).astype(np.float64)
        for index in range(3):
            layer = critic[f"layer{index}"]
            x = (np.maximum(x, 0) if index else x) @ np.float64(layer["kernel"]) + layer["bias"]
        return x[0]

    def sp(z):
        return np.log1p(np.exp(z))

    mask = np.array([1, 1, 0, 1, 1], bool)
    found = mutual_information(critic, own, other, jnp.asarray(mask), alone)
    for i in np.flatnonzero(mask):
        others = [sp(score(own[i], other[j])) for j in np.flatnonzero(mask) if j != i]
        expected = -sp(-score(own[i], other[i])) - np.mean(others)
        np.testing.assert_allclose(found[i], expected, atol=1e-5)


@pytest.mark.parametrize("real", [1, 0])
def test_a_batch_with_one_row_or_none_is_finite(real):
    critic, own = new_critic(jax.random.key(1), 6, 4), probabilities(0, 4)
    found = mutual_information(critic, own, own, jnp.arange(4) < real, alone)
    assert np.isfinite(found).all()


def test_it_does_not_depend_on_how_rows_are_divided():
    critic, own, other = new_critic(jax.random.key(1), 6, 4), *(probabilities(s, 6) for s in (0, 1))
    mask = jnp.array([1, 1, 1, 0, 1, 0], bool)
    whole = mutual_information(critic, own, other, mask, alone)
    half = slice(3, 6)

    def gather(rows):
        return mask if rows.ndim == 1 else other

    found = mutual_information(critic, own[half], other[half], mask[half], gather)
    np.testing.assert_allclose(found, whole[half], atol=1e-6)
