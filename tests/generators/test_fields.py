"""Fields of drifting models and gradient flows: closed forms, symmetries, the authors' code.

In float64 sums of some twenty terms near 1 are off by 1e-14; what must be equal is to 1e-10.
Against the authors' code, in float32: a distance s is off by 1e-7 s, its kernel at the sharpest
temperature by 1e-7 / 0.02 = 5e-6 relative, and forces of unit size, sums of differences of such
numbers, by 1e-4.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.special import logsumexp

from qkd_jax.generators.fields import (
    TEMPERATURES,
    WEIGHTS,
    drifting_goal,
    drifting_loss,
    drifting_velocity,
    gradient_flow_loss,
    gradient_flow_velocity,
)

GOLDEN = Path(__file__).parent / "golden" / "drifting.npz"
# f of D_f(q || p) = E_p f(q / p).
DIVERGENCES = {
    "kl_qp": lambda r: r * jnp.log(r),
    "kl_pq": lambda r: -jnp.log(r),
    "chi2_qp": lambda r: (r - 1) ** 2 / 2,
    "mixed": lambda r: -jnp.log(r) + (r - 1) ** 2 / 2,
}


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def samples(seed=0, shape=()):
    """x [6, 3], data [9, 3] and generated [8, 3], in float64."""
    draws = np.random.default_rng(seed)
    return tuple(jnp.asarray(draws.normal(size=(*shape, n, 3))) for n in (6, 9, 8))


def flow(divergence):
    return lambda x, data, generated: gradient_flow_velocity(x, data, generated, 0.8, divergence)


FIELDS = {"drifting": lambda *sets: drifting_velocity(*sets, 0.7)} | {
    name: flow(name) for name in (*WEIGHTS, "mmd")
}
# The same field with the parts of data and samples exchanged, which turns it around.
EXCHANGED = {"kl_pq": "chi2_qp", "chi2_qp": "kl_pq"}


@pytest.mark.parametrize("name", FIELDS)
def test_exchanging_data_and_samples_turns_the_field_around(name):
    x, data, generated = samples()
    there = FIELDS[name](x, data, generated)
    back = FIELDS[EXCHANGED.get(name, name)](x, generated, data)
    assert np.abs(there).max() > 0.01
    np.testing.assert_allclose(there, -back, atol=1e-10)
    np.testing.assert_allclose(FIELDS[name](x, data, data), 0, atol=1e-10)


@pytest.mark.parametrize("name", FIELDS)
def test_the_order_of_samples_does_not_matter(name):
    x, data, generated = samples()
    order = np.random.default_rng(1).permutation
    found = FIELDS[name](x, data[order(9)], generated[order(8)])
    np.testing.assert_allclose(found, FIELDS[name](x, data, generated), atol=1e-10)


def log_density(x, y, bandwidth, leave_out=None):
    """log of the mean of exp(-|x - y|^2 / 2h^2), without the sample `leave_out`."""
    logits = -jnp.sum((x[None] - y) ** 2, -1) / (2 * bandwidth**2)
    if leave_out is not None:
        logits = jnp.delete(logits, leave_out)
    return logsumexp(logits) - jnp.log(len(logits))


def test_the_plain_flow_is_the_gradient_of_log_densities():
    x, data, generated = samples()
    found = FIELDS["kl_qp"](x, data, generated)
    for row, point in zip(found, x, strict=True):
        p, q = (jax.grad(log_density)(point, y, 0.8) for y in (data, generated))
        np.testing.assert_allclose(row, 0.8**2 * (p - q), atol=1e-10)


def test_samples_do_not_repel_themselves():
    _, data, x = samples()
    found = gradient_flow_velocity(x, data, x, 0.8, "kl_qp", own=True)
    laplace = drifting_velocity(x, data, x, 0.7, own=True)
    for i, point in enumerate(x):
        p = jax.grad(log_density)(point, data, 0.8)
        q = jax.grad(log_density)(point, x, 0.8, i)
        np.testing.assert_allclose(found[i], 0.8**2 * (p - q), atol=1e-10)
        others = jnp.delete(x, i, axis=0)
        alone = drifting_velocity(point[None], data, others, 0.7)
        np.testing.assert_allclose(laplace[i], alone[0], atol=1e-10)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_weights_follow_from_the_divergence(name):
    """-grad f'(r) = r f''(r) (grad log p - grad log q), all of it by automatic differentiation."""
    f, (x, data, generated) = DIVERGENCES[name], samples()

    def descent(point):
        def slope(point):
            log_ratio = log_density(point, generated, 0.8) - log_density(point, data, 0.8)
            return jax.grad(f)(jnp.exp(log_ratio))

        return -(0.8**2) * jax.grad(slope)(point)

    np.testing.assert_allclose(FIELDS[name](x, data, generated), jax.vmap(descent)(x), atol=1e-9)


def test_maximum_mean_discrepancy_flows_down_its_witness():
    x, data, generated = samples()

    def witness(point):
        return jnp.exp(log_density(point, data, 0.8)) - jnp.exp(log_density(point, generated, 0.8))

    expected = 0.8**2 * jax.vmap(jax.grad(witness))(x)
    np.testing.assert_allclose(FIELDS["mmd"](x, data, generated), expected, atol=1e-10)


def test_a_collapsed_generator_stays_between_two_points_of_data():
    """A known failure: zero on all samples although p and q differ; beside, a tanh(a x / h^2)."""
    a, h, data = 1.3, 0.9, jnp.array([[-1.3], [1.3]])
    collapsed = jnp.zeros((5, 1))
    for name in (*WEIGHTS, "mmd"):
        found = gradient_flow_velocity(collapsed, data, collapsed, h, name)
        np.testing.assert_allclose(found, 0, atol=1e-10)
    x = jnp.linspace(-2, 2, 9)[:, None]
    found = gradient_flow_velocity(x, data, collapsed, h, "kl_qp")
    np.testing.assert_allclose(found, a * jnp.tanh(a * x / h**2), atol=1e-10)


@pytest.mark.parametrize("name", ["plain", "guided"])
def test_drifting_against_the_authors_code(name):
    golden = np.load(GOLDEN)
    more = () if name == "plain" else (golden["negatives"], golden["negative_weight"])

    def losses(generated):
        return drifting_loss(generated, jnp.asarray(golden["positives"]), *map(jnp.asarray, more))

    generated = jnp.asarray(golden["generated"])
    assert generated.dtype == jnp.float32
    np.testing.assert_allclose(losses(generated), golden[f"{name}/loss"], rtol=1e-4)
    gradient = jax.grad(lambda x: losses(x).sum())(generated)
    expected = golden[f"{name}/gradient"]
    np.testing.assert_allclose(gradient, expected, atol=1e-4 * np.abs(expected).max())


def test_the_drifting_goal_by_loops():
    """Section 3 of the authors' code in float64, sample by sample."""
    x, data, _ = samples(shape=(2,))
    weights = np.random.default_rng(3).uniform(0.5, 2, (2, 8))
    _, _, negatives = samples(seed=4, shape=(2,))
    goal, scale = drifting_goal(x, data, negatives, jnp.asarray(weights), TEMPERATURES)
    labels, count, width = x.shape
    everything = [np.concatenate([x[k], negatives[k], data[k]]) for k in range(labels)]
    weight = [np.concatenate([np.ones(count), weights[k], np.ones(9)]) for k in range(labels)]
    distance = np.array(
        [
            [[max(np.linalg.norm(i - j), 1e-4) for j in everything[k]] for i in np.asarray(x[k])]
            for k in range(labels)
        ]
    )
    mean = np.mean(distance * np.array(weight)[:, None]) / np.mean(weight)
    np.testing.assert_allclose(scale, mean / width**0.5, rtol=1e-10)
    force = np.zeros(x.shape)
    for temperature in TEMPERATURES:
        one = np.zeros(x.shape)
        for k in range(labels):
            far = distance[k] / mean + 100 * np.eye(count, len(everything[k]))
            kernel = np.exp(-far / temperature)
            affinity = kernel / np.sqrt(kernel.sum(1, keepdims=True) * kernel.sum(0))
            affinity = np.maximum(affinity, 1e-3) * weight[k]
            for i in range(count):
                pull, push = affinity[i, count + 8 :].sum(), affinity[i, : count + 8].sum()
                for j, target in enumerate(everything[k]):
                    factor = -affinity[i, j] * pull if j < count + 8 else affinity[i, j] * push
                    one[k, i] += factor * (target - np.asarray(x[k, i])) / scale
        force += one / np.sqrt(np.mean(one**2))
    np.testing.assert_allclose(goal, np.asarray(x) / scale + force, atol=1e-9)


def losses():
    """name -> (generated, data) -> [L]."""
    found = {"drifting": drifting_loss}
    for name in (*WEIGHTS, "mmd"):
        found[name] = lambda x, y, name=name: gradient_flow_loss(x, y, (0.5, 1.0), name)
    return found


@pytest.mark.parametrize("name", losses())
def test_no_gradient_passes_through_the_field(name):
    """Only through the sample itself: the gradient is -2 / size times the force, and none reaches
    the data.
    """
    x, data, _ = samples(shape=(2,))
    loss = losses()[name]
    total, (to_x, to_data) = jax.value_and_grad(lambda *s: loss(*s).mean(), (0, 1))(x, data)
    np.testing.assert_array_equal(to_data, 0)
    assert total > 0.1
    # The unit does not matter, but for the least distance 1e-4 of the authors' code.
    np.testing.assert_allclose(loss(3 * x, 3 * data).mean(), total, rtol=1e-6)
    # |gap|^2 mean = total, and gradient = 2 gap / (size scale).
    scale = np.sqrt(total / x.size) * 2 / np.sqrt(np.sum(to_x**2))
    if name == "drifting":
        expected = drifting_goal(x, data, None, 1.0, TEMPERATURES)[1]
    else:
        distances = np.linalg.norm(np.asarray(x)[:, :, None] - np.asarray(data)[:, None], axis=-1)
        expected = np.median(distances) / 3**0.5
    np.testing.assert_allclose(scale, expected, rtol=1e-9)


def test_on_the_sphere_velocities_are_tangent_and_end_on_it():
    x, data, _ = (s / jnp.linalg.norm(s, axis=-1, keepdims=True) for s in samples(shape=(2,)))
    gradient = jax.grad(lambda x: gradient_flow_loss(x, data, (0.5,), "kl_qp", sphere=True).sum())(
        x
    )
    # gap = x - goal with |goal| = 1: |x - c gradient| = 1 for the factor c of the regression.
    median = jnp.median(jnp.linalg.norm(x[:, :, None] - data[:, None], axis=-1))
    factor = (median**2 / 3) * (6 * 3) / 2
    goal = x - factor * gradient
    np.testing.assert_allclose(jnp.linalg.norm(goal, axis=-1), 1, atol=1e-9)
    velocity = gradient_flow_velocity(x, data, x, 0.5 * median, "kl_qp", own=True)
    tangent = velocity - jnp.sum(velocity * x, -1, keepdims=True) * x
    tangent = tangent / jnp.sqrt(jnp.mean(tangent**2)) * median / 3**0.5
    retracted = (x + tangent) / jnp.linalg.norm(x + tangent, axis=-1, keepdims=True)
    np.testing.assert_allclose(goal, retracted, atol=1e-9)
