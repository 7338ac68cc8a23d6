"""Similarities of the gate, with and without circuits, against NumPy, PennyLane, closed forms."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkd_jax import quantum
from qkd_jax.learners.qkd import gate
from tests.learners.qkd.gate_cases import (
    ANCHORS,
    BUDGET,
    EXACT,
    QUBITS,
    QUERY,
    TASKS,
    WIDTH,
    draw,
    params_of,
    settings,
    similarity,
)

feature_states = jax.jit(jax.vmap(quantum.feature_state, in_axes=(None, 0, None)), static_argnums=0)


def numpy_angles(params, vectors, name="map"):
    unit = np.float64(vectors) / np.linalg.norm(np.float64(vectors), axis=1, keepdims=True)
    return np.pi * np.tanh(np.sqrt(WIDTH) * unit @ np.float64(params[name]))


@pytest.mark.parametrize(
    "changes", [{}, {"num_layers": 1}, {"reupload": False}, {"angle_map": "separate"}]
)
def test_fidelities_equal_pennylane(changes):
    """The whole chain: features -> angles in float64 NumPy -> states by PennyLane -> |<.|.>|^2."""
    config = settings(**changes)
    params, query, anchors = params_of(config), draw(2, WIDTH), draw(2, WIDTH, seed=1)
    _, p = similarity(params, config, query, anchors)
    circuit = quantum.feature_circuit(gate.feature_map(config))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = quantum.to_pennylane(circuit)
        theta = np.float64(params["theta"]).ravel()
        states = [
            [np.asarray(run(np.concatenate([a, theta]))) for a in numpy_angles(params, v, name)]
            for v, name in (
                (query, "map"),
                (anchors, "anchor_map" if "angle_map" in changes else "map"),
            )
        ]
    expected = [[abs(np.vdot(a, b)) ** 2 for b in states[1]] for a in states[0]]
    np.testing.assert_allclose(p, expected, atol=BUDGET)


def test_theta_on_the_query_side_only():
    config = settings(theta_side="query")
    params = params_of(config)
    _, p = similarity(params, config, QUERY, ANCHORS)
    a, b = numpy_angles(params, QUERY), numpy_angles(params, ANCHORS)
    psi = feature_states(gate.feature_map(config), jnp.asarray(a, jnp.float32), params["theta"])
    phi = feature_states(gate.feature_map(config), jnp.asarray(b, jnp.float32), 0 * params["theta"])
    expected = np.abs(np.float64(psi) @ np.float64(phi).T) ** 2
    np.testing.assert_allclose(p, expected, atol=BUDGET)


def test_log_fidelity_is_the_log_of_the_fidelity():
    params = params_of(settings())
    raw, p = similarity(params, settings(score="log_fidelity"), QUERY, ANCHORS)
    np.testing.assert_allclose(raw, np.log(np.float64(p) + 1e-6), atol=EXACT)


def test_angles_lie_in_their_range_and_spread():
    """Without the factor sqrt(D) all angles would be near 0 and every fidelity near 1."""
    config = settings(angle_range=1.5)
    width, params = 768, gate.init_gate(jax.random.key(0), config, 768, TASKS)
    vectors = draw(64, width)
    found = np.asarray(gate.angles(params, config, vectors, "query"))
    assert found.shape == (64, QUBITS) and np.abs(found).max() <= 1.5
    # Each input of tanh has about unit variance: tanh of it has a standard deviation of 0.63.
    assert 0.8 < found.std() < 1.1
    np.testing.assert_allclose(
        found, gate.angles(params, config, 1000.0 * vectors, "query"), atol=EXACT
    )
    fidelities = np.asarray(similarity(params, config, vectors, vectors)[1])
    assert fidelities[~np.eye(64, dtype=bool)].mean() < 0.9


def test_angle_maps_without_parameters():
    vectors = draw(2, 14)
    scaled = np.sqrt(14) * np.float64(vectors)
    scaled /= np.linalg.norm(np.float64(vectors), axis=1, keepdims=True)
    first = gate.angles({}, settings(angle_map="first_q"), vectors, "query")
    np.testing.assert_allclose(first, np.pi * np.tanh(scaled[:, :3]), atol=EXACT)
    pool = gate.angles({}, settings(angle_map="pool"), vectors, "query")
    means = scaled[:, :12].reshape(2, 3, 4).mean(2) * 2  # sqrt(4) keeps the variance
    np.testing.assert_allclose(pool, np.pi * np.tanh(means), atol=EXACT)
    for angle_map in ("first_q", "pool"):
        assert "map" not in params_of(settings(angle_map=angle_map))


def test_separate_maps_tell_the_sides_apart():
    config = settings(angle_map="separate")
    params = params_of(config)
    for side, name in (("query", "map"), ("anchor", "anchor_map")):
        found = gate.angles(params, config, QUERY, side)
        np.testing.assert_allclose(found, numpy_angles(params, QUERY, name), atol=EXACT)


def numpy_cosine(a, b):
    a, b = np.float64(a), np.float64(b)
    return a @ b.T / np.linalg.norm(a, axis=1)[:, None] / np.linalg.norm(b, axis=1)


def test_amplitude_fidelity_is_the_squared_cosine():
    config = settings(encoding="amplitude", num_qubits=4)
    _, p = similarity({}, config, QUERY, ANCHORS)
    np.testing.assert_allclose(p, numpy_cosine(QUERY, ANCHORS) ** 2, atol=EXACT)


def test_cosine_gate():
    raw, p = similarity({}, settings(kind="cosine", encoding="amplitude"), QUERY, ANCHORS)
    np.testing.assert_allclose(raw, numpy_cosine(QUERY, ANCHORS), atol=EXACT)
    np.testing.assert_allclose(p, (1 + numpy_cosine(QUERY, ANCHORS)) / 2, atol=EXACT)
    params = params_of(settings(kind="cosine"))
    raw, _ = similarity(params, settings(kind="cosine"), QUERY, ANCHORS)
    expected = numpy_cosine(numpy_angles(params, QUERY), numpy_angles(params, ANCHORS))
    np.testing.assert_allclose(raw, expected, atol=BUDGET)


def test_gaussian_kernel_gate():
    """exp(-gamma |a - b|^2), of the angles or of unit vectors."""
    config = settings(kind="rbf", kernel_width=0.7, score="log_fidelity")
    params = params_of(config)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(
        jnp.shape, params_of(settings(kind="cosine"))
    )

    def kernel(a, b):
        return np.exp(-0.7 * ((a[:, None] - b[None]) ** 2).sum(-1))

    evidence, p = similarity(params, config, QUERY, ANCHORS)
    expected = kernel(numpy_angles(params, QUERY), numpy_angles(params, ANCHORS))
    np.testing.assert_allclose(p, expected, atol=BUDGET)
    np.testing.assert_allclose(evidence, np.log(expected + gate.FIDELITY_FLOOR), rtol=1e-4)
    _, p = similarity(
        {}, settings(kind="rbf", encoding="amplitude", kernel_width=0.7), QUERY, ANCHORS
    )
    expected = np.exp(-1.4 * (1 - numpy_cosine(QUERY, ANCHORS)))
    np.testing.assert_allclose(p, expected, atol=EXACT)


def test_projected_kernel_gate_against_reduced_density_matrices():
    """exp(-gamma sum_j |rho_j(a) - rho_j(b)|_F^2) with rho_j the 2 x 2 state of qubit j."""
    config = settings(kind="pqk", kernel_width=0.7)
    params = params_of(config)
    _, p = similarity(params, config, QUERY, ANCHORS)

    def reduced(vectors):
        states = feature_states(
            gate.feature_map(config),
            jnp.asarray(numpy_angles(params, vectors), jnp.float32),
            params["theta"],
        )
        states = np.complex128(states).reshape(-1, *[2] * QUBITS)
        return np.stack(
            [
                np.einsum("niab,njab->nij", moved, moved.conj())
                for moved in (np.moveaxis(states, 1 + j, 1) for j in range(QUBITS))
            ],
            axis=1,
        )

    a, b = reduced(QUERY), reduced(ANCHORS)
    distance = (np.abs(a[:, None] - b[None]) ** 2).sum((2, 3, 4))
    np.testing.assert_allclose(p, np.exp(-0.7 * distance), atol=BUDGET)


def test_mlp_and_attention_against_numpy():
    scaled = [
        np.sqrt(WIDTH) * np.float64(v) / np.linalg.norm(np.float64(v), axis=1, keepdims=True)
        for v in (QUERY, ANCHORS)
    ]
    params = params_of(settings(kind="mlp"))
    a, b = (np.tanh(v @ np.float64(params["map"])) for v in scaled)
    raw, p = similarity(params, settings(kind="mlp"), QUERY, ANCHORS)
    np.testing.assert_allclose(raw, (a * np.float64(params["out"])) @ b.T, atol=BUDGET)
    np.testing.assert_allclose(p, 1 / (1 + np.exp(-np.float64(raw))), atol=EXACT)
    config = settings(kind="attention", num_qubits=8)
    params = params_of(config)
    a, b = scaled[0] @ np.float64(params["map"]), scaled[1] @ np.float64(params["anchor_map"])
    raw, _ = similarity(params, config, QUERY, ANCHORS)
    assert params["map"].shape == (WIDTH, 4)
    np.testing.assert_allclose(raw, a @ b.T / 2, atol=BUDGET)
