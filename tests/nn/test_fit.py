"""The training loop on statistics against the same updates in NumPy float64.

Error budget: 12 steps on numbers of order 1 round to 12 * 10 eps = 2e-5.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qkd_jax.nn.fit import cosine_factor, fit, sgd

STEPS, BUDGET = 12, 2e-5
START = {"rows": np.array([[0.5, -1.0], [2.0, 0.1]], np.float32), "bias": np.float32(3.0)}


def batches():
    generator = np.random.default_rng(0)
    return {
        "rows": generator.normal(size=(STEPS, 2, 2)).astype(np.float32),
        "bias": generator.normal(size=STEPS).astype(np.float32),
    }


def loss(params, target):
    """Sum of (p - b)^2 / 2: the gradient is p - b."""
    return sum(jnp.sum((params[name] - target[name]) ** 2) / 2 for name in params)


def rate(step):
    return 0.1 * cosine_factor(step // 2, 4)


OPTIMISERS = {"sgd": sgd(rate, 0.9, 0.05), "adam": optax.adam(0.03)}


def fitted(kind, steps, start=None):
    data, optimiser = jax.tree.map(jnp.asarray, batches()), OPTIMISERS[kind]
    params, opt_state = start or (START, optimiser.init(START))

    def batch(i):
        return jax.tree.map(lambda a: a[i], data)

    return fit(params, opt_state, loss, batch, optimiser, steps)


def by_numpy(kind, name, steps):
    p, targets = np.float64(START[name]), np.float64(batches()[name])
    v = second = np.zeros_like(p)
    for step in range(steps):
        g = p - targets[step]
        if kind == "sgd":
            v = 0.9 * v + g + 0.05 * p
            p = p - 0.1 * (1 + np.cos(np.pi * (step // 2) / 4)) / 2 * v
        else:
            v, second = 0.9 * v + 0.1 * g, 0.999 * second + 0.001 * g * g
            corrected = v / (1 - 0.9 ** (step + 1)), second / (1 - 0.999 ** (step + 1))
            p = p - 0.03 * corrected[0] / (np.sqrt(corrected[1]) + 1e-8)
    return p


@pytest.mark.parametrize("kind", OPTIMISERS)
def test_updates_against_numpy(kind):
    found, _ = jax.jit(lambda: fitted(kind, STEPS))()
    for name in START:
        np.testing.assert_allclose(found[name], by_numpy(kind, name, STEPS), atol=BUDGET)


@pytest.mark.parametrize("kind", OPTIMISERS)
def test_the_number_of_steps_may_be_traced(kind):
    run = jax.jit(lambda steps: fitted(kind, steps)[0])
    for steps in (0, 1, 7):
        found = run(jnp.int32(steps))
        for name in START:
            np.testing.assert_allclose(found[name], by_numpy(kind, name, steps), atol=BUDGET)
    assert run._cache_size() == 1


@pytest.mark.parametrize("kind", OPTIMISERS)
def test_the_same_call_gives_the_same_bits(kind):
    run = jax.jit(lambda: fitted(kind, STEPS))
    jax.tree.map(np.testing.assert_array_equal, run(), run())


def test_velocity_and_schedule_go_on_in_a_second_call():
    """Both calls read the first batches, so the loop restarts its steps but not its schedule."""
    found, _ = jax.jit(lambda: fitted("sgd", 3, fitted("sgd", 3)))()
    p, v, targets = 3.0, 0.0, np.float64(batches()["bias"])
    for step in range(6):
        v = 0.9 * v + p - targets[step % 3] + 0.05 * p
        p = p - 0.1 * (1 + np.cos(np.pi * (step // 2) / 4)) / 2 * v
    np.testing.assert_allclose(found["bias"], p, atol=BUDGET)


def test_the_cosine_rises_again_after_its_period():
    factors = [float(cosine_factor(jnp.int32(e), 5)) for e in range(11)]
    np.testing.assert_allclose(factors[::5], [1.0, 0.0, 1.0], atol=1e-6)
    np.testing.assert_allclose(factors[:6], factors[10:4:-1], atol=1e-6)
