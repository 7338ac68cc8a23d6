"""The pretty good measurement against its definition by density matrices, in NumPy float64.

Error budget, eps = 1.2e-7: an overlap of D = 5 products is off by 5 eps and its k-th power by 5 k
eps; G^(-1/2) multiplies errors by at most (1 / smallest eigenvalue)^(1/2), below 5 for the states
drawn here, on both sides, and C = 4 terms add up: 2000 eps = 2e-4.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkd_jax import quantum
from qkd_jax.errors import ConfigError
from qkd_jax.learners.qkd import gate, measurement
from qkd_jax.learners.qkd.gate import GateSettings

BUDGET = 2e-4
WIDTH, CLASSES, TASKS = 5, 4, 3
OWNER = np.array([0, 1, 1, -1, 0])  # the class 3 is not seen
SEEN = np.flatnonzero(OWNER >= 0)
NO_RIDGE = 1e-9


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


ANCHORS = draw(len(OWNER), WIDTH)
QUERY = ANCHORS[[0, 1, 2, 4, 0, 1]] + draw(6, WIDTH, seed=1) / 2
root_of = jax.jit(measurement.root, static_argnums=(2, 3))
outcomes_of = jax.jit(measurement.outcomes, static_argnums=3)


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def copied(vector, copies):
    """The state of k copies, by Kronecker products."""
    state = np.ones(1)
    for _ in range(copies):
        state = np.kron(state, unit(vector))
    return state


def inverse_root(matrix):
    """(matrix)^(-1/2) on its own support."""
    values, vectors = np.linalg.eigh(matrix)
    inverse = np.where(values > 1e-9, np.maximum(values, 1e-9) ** -0.5, 0.0)
    return (vectors * inverse) @ vectors.T


def by_definition(copies):
    """p [6, C] with E_c = S^(-1/2) |phi_c><phi_c| S^(-1/2), S the sum over the classes seen."""
    states = {c: copied(ANCHORS[c], copies) for c in SEEN}
    half = inverse_root(sum(np.outer(s, s) for s in states.values()))
    p = np.zeros((len(QUERY), len(OWNER)))
    for b, vector in enumerate(QUERY):
        psi = copied(vector, copies)
        for c, state in states.items():
            p[b, c] = psi @ half @ np.outer(state, state) @ half @ psi
    return p


@pytest.mark.parametrize("copies", [1, 2, 3])
def test_outcomes_are_those_of_the_density_matrices(copies):
    root = root_of(jnp.float32(ANCHORS), jnp.asarray(OWNER >= 0), copies, NO_RIDGE)
    found = outcomes_of(root, jnp.float32(QUERY), jnp.float32(ANCHORS), copies)
    expected = by_definition(copies)
    np.testing.assert_allclose(found, expected, atol=BUDGET)
    assert (expected.sum(1) < 1).all() and expected.sum(1).max() > 0.5
    assert (np.asarray(found)[:, 3] == 0).all()


def test_states_at_right_angles_are_told_apart_with_certainty():
    anchors = jnp.eye(WIDTH)
    root = root_of(anchors, jnp.ones(WIDTH, bool), 3, NO_RIDGE)
    np.testing.assert_allclose(outcomes_of(root, -2 * anchors, anchors, 3), np.eye(5), atol=1e-6)


def test_equal_states_share_their_evidence():
    """Two classes with one state: without a ridge their difference would be divided by zero."""
    anchors = jnp.stack([jnp.ones(WIDTH), jnp.ones(WIDTH), jnp.eye(WIDTH)[0]])
    root = root_of(anchors, jnp.ones(3, bool), 1, 1e-3)
    found = np.asarray(outcomes_of(root, anchors, anchors, 1))
    assert np.isfinite(root).all()
    # The larger eigenvalue of their Gram matrix is 2: p = (1 / sqrt(2))^2 for each, but for what
    # the third state and the ridge take away.
    np.testing.assert_allclose(found[0, :2], 0.5, atol=0.1)
    np.testing.assert_allclose(found[0, 0], found[0, 1], atol=BUDGET)


def test_a_task_has_the_sum_over_its_classes():
    root = root_of(jnp.float32(ANCHORS), jnp.asarray(OWNER >= 0), 3, NO_RIDGE)

    def relevance(open_tasks):
        return measurement.relevance(
            root,
            GateSettings(kind="measurement", copies=3),
            jnp.float32(QUERY),
            jnp.float32(ANCHORS),
            jnp.asarray(OWNER),
            jnp.asarray(open_tasks),
        )

    p = by_definition(3)
    sums = np.stack([p[:, [0, 4]].sum(1), p[:, [1, 2]].sum(1)], axis=1)
    both = relevance([True, True, False])
    np.testing.assert_allclose(both.scores[:, :2], sums, atol=BUDGET)
    shares = sums / sums.sum(1, keepdims=True)
    # A share of a sum above 0.05 has 20 times the error of the sum.
    assert sums.sum(1).min() > 0.05
    np.testing.assert_allclose(both.weights[:, :2], shares, atol=20 * BUDGET)
    np.testing.assert_array_equal(both.weights[:, 2], 0)
    np.testing.assert_allclose(np.exp(both.log_weights[:, :2]), both.weights[:, :2], rtol=1e-5)
    one = relevance([False, True, False])
    np.testing.assert_allclose(one.weights, [[0, 1, 0]] * 6, atol=1e-6)
    none = relevance([False] * 3)
    assert (np.asarray(none.weights) == 0).all() and np.isfinite(none.log_weights).all()


def test_all_outcomes_are_one_measurement_of_one_more_qubit():
    """The circuit: the states chi_c of n + 1 qubits are at right angles, so one basis has them all,
    and the probability of chi_c, found by undoing its preparation, is p_c (Naimark's theorem).
    """
    copies, width = 2, 4
    anchors, psi = draw(3, width, seed=3), copied(draw(width, seed=4), copies)
    states = np.stack([copied(a, copies) for a in anchors])
    half = inverse_root(states.T @ states)
    effects = states @ half  # rows <phi_c| S^(-1/2)
    # What the effects lack to an isometry stands in the half where the added qubit is 1.
    rest = np.eye(len(effects)) - effects @ effects.T
    values, vectors = np.linalg.eigh(rest)
    completion = np.zeros_like(effects)
    completion[:, : len(effects)] = vectors * np.sqrt(np.maximum(values, 0))
    chi = np.concatenate([effects, completion], axis=1)
    np.testing.assert_allclose(chi @ chi.T, np.eye(3), atol=1e-12)

    qubits = 5  # two for each copy, and the added one
    image = quantum.amplitude_state(jnp.float32(np.concatenate([psi, 0 * psi])), qubits)
    prepared = quantum.amplitude_state(jnp.float32(chi), qubits)
    root = root_of(jnp.float32(anchors), jnp.ones(3, bool), copies, NO_RIDGE)
    query = jnp.float32(draw(width, seed=4))[None]
    found = outcomes_of(root, query, jnp.float32(anchors), copies)[0]
    np.testing.assert_allclose((prepared @ image) ** 2, found, atol=BUDGET)


def test_only_classes_can_be_told_apart():
    with pytest.raises(ConfigError, match=r"gate\.states: expected class"):
        gate.init_gate(
            jax.random.key(0), GateSettings(kind="measurement", states="weights"), WIDTH, TASKS
        )
