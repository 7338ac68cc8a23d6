"""Measurements against dense Pauli operators in NumPy, and shots against their own variance."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkd_jax.errors import ConfigError
from qkd_jax.quantum import (
    amplitude_state,
    bloch_vectors,
    expectation_z,
    fidelity,
    parameter_shift,
    projected_kernel,
    sample,
    sample_expectation_z,
    sample_fidelity,
)

PAULI = np.array([[[0, 1], [1, 0]], [[0, -1j], [1j, 0]], [[1, 0], [0, -1]]])

# Sums of at most 2**5 rounded squares of a unit vector: 32 eps.
TOLERANCE = 32 * 1.2e-7


def random_state(num_qubits, is_complex, seed=0):
    generator = np.random.default_rng(seed)
    state = generator.normal(size=2**num_qubits)
    if is_complex:
        state = state + 1j * generator.normal(size=state.shape)
    return (state / np.linalg.norm(state)).astype(np.complex64 if is_complex else np.float32)


@pytest.mark.parametrize("is_complex", [False, True])
@pytest.mark.parametrize("num_qubits", [1, 2, 5])
def test_bloch_vectors_equal_dense_expectations(num_qubits, is_complex):
    state = random_state(num_qubits, is_complex)
    wide = state.astype(np.complex128)
    expected = np.zeros((num_qubits, 3))
    for j, axis in np.ndindex(num_qubits, 3):
        operator = np.kron(np.eye(2**j), np.kron(PAULI[axis], np.eye(2 ** (num_qubits - j - 1))))
        expected[j, axis] = (wide.conj() @ operator @ wide).real
    found = jax.jit(bloch_vectors)(jnp.asarray(state))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(expectation_z(jnp.asarray(state)), expected[:, 2], atol=TOLERANCE)
    assert is_complex or not found[:, 1].any()


def test_fidelity_of_real_and_complex_states():
    psi, phi = random_state(4, False), random_state(4, True, 1)
    expected = np.abs(np.vdot(psi, phi)) ** 2
    found = fidelity(jnp.asarray(psi), jnp.asarray(phi))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(fidelity(jnp.asarray(phi), jnp.asarray(phi)), 1, atol=TOLERANCE)
    gradient = jax.grad(lambda p: fidelity(p, jnp.array([0.0, 1.0])))(jnp.array([1.0, 0.0]))
    np.testing.assert_array_equal(gradient, 0)  # finite at fidelity 0


def test_projected_kernel_is_a_gaussian_of_reduced_density_matrices():
    states_a = [random_state(3, True, seed) for seed in range(4)]
    states_b = [random_state(3, True, seed) for seed in range(3, 6)]

    def reduced(state):  # [Q, 2, 2] by partial traces
        t = state.astype(np.complex128).reshape(2, 2, 2)
        traces = ("aij,bij->ab", "iaj,ibj->ab", "ija,ijb->ab")
        return np.stack([np.einsum(trace, t, t.conj()) for trace in traces])

    expected = [
        [np.exp(-0.7 * np.sum(np.abs(reduced(a) - reduced(b)) ** 2)) for b in states_b]
        for a in states_a
    ]
    bloch_a, bloch_b = (
        jnp.stack([bloch_vectors(jnp.asarray(s)) for s in x]) for x in (states_a, states_b)
    )
    found = projected_kernel(bloch_a, bloch_b, 0.7)
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)
    assert float(found[3, 0]) == 1.0  # the state that is in both


@pytest.mark.parametrize("size", [3, 8, 11])
def test_amplitude_state_cuts_or_pads_and_normalises(size):
    vectors = np.random.default_rng(0).normal(size=(2, 4, size)).astype(np.float32)
    expected = np.zeros((2, 4, 8))
    expected[..., : min(size, 8)] = vectors[..., :8]
    expected /= np.linalg.norm(expected, axis=-1, keepdims=True)
    found = amplitude_state(jnp.asarray(vectors), 3)
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_amplitude_state_of_extreme_vectors(scale):
    found = amplitude_state(jnp.array([3.0, 4.0], jnp.float32) * scale, 1)
    np.testing.assert_allclose(found, [0.6, 0.8], rtol=0, atol=1e-6)


def test_amplitude_state_gradients():
    def entry(v):
        return amplitude_state(v, 2)[0]

    # d (v_0 / |v|) / dv = e_0 / |v| - v_0 v / |v|^3
    gradient = jax.grad(entry)(jnp.array([3.0, 4.0, 0.0, 0.0]))
    np.testing.assert_allclose(gradient, [16 / 125, -12 / 125, 0, 0], rtol=0, atol=1e-6)
    zero = jnp.zeros(4)
    np.testing.assert_array_equal(amplitude_state(zero, 2), 0)
    assert bool(jnp.all(jnp.isfinite(jax.grad(entry)(zero))))


def test_samples_follow_the_probabilities(key):
    """Every count within five standard deviations; outcomes of probability zero never occur."""
    shots = 20_000
    state = np.array(random_state(3, True))
    state[[0, 3, 7]] = 0
    state /= np.linalg.norm(state)
    probability = np.abs(state) ** 2
    outcomes = jax.jit(sample, static_argnums=2)(key, jnp.asarray(state), shots)
    assert outcomes.shape == (shots,) and jnp.issubdtype(outcomes.dtype, jnp.integer)
    counts = np.bincount(np.asarray(outcomes), minlength=8)
    deviation = np.sqrt(shots * probability * (1 - probability))
    assert np.all(np.abs(counts - shots * probability) <= 5 * deviation)
    assert counts[[0, 3, 7]].sum() == 0
    np.testing.assert_array_equal(outcomes, sample(key, jnp.asarray(state), shots))


def test_sampled_expectation_is_unbiased(key):
    shots, repeats = 50, 400
    state = jnp.asarray(random_state(3, False))
    keys = jax.random.split(key, repeats)
    estimates = jax.jit(jax.vmap(lambda k: sample_expectation_z(k, state, shots)))(keys)
    expected = expectation_z(state)
    deviation = np.sqrt((1 - np.square(expected)) / shots)
    assert np.all(np.abs(estimates.mean(0) - expected) < 5 * deviation / np.sqrt(repeats))
    # The relative deviation of a variance from n samples is about sqrt(2 / n).
    np.testing.assert_allclose(estimates.std(0), deviation, rtol=5 * np.sqrt(0.5 / repeats))


def test_sampled_fidelity_is_unbiased(key):
    shots, repeats = 40, 500
    p = jnp.array([[0.0, 0.02, 0.5], [0.9, 1.0, 1.0 + 1e-6]])
    draw = jax.jit(jax.vmap(lambda k: sample_fidelity(k, p, shots)))
    estimates = np.asarray(draw(jax.random.split(key, repeats)))
    exact = np.clip(p, 0, 1)
    deviation = np.sqrt(exact * (1 - exact) / shots)
    assert np.all(np.abs(estimates.mean(0) - exact) <= 5 * deviation / np.sqrt(repeats) + 1e-6)
    np.testing.assert_allclose(
        estimates.std(0), deviation, rtol=5 * np.sqrt(1 / repeats), atol=1e-6
    )
    assert np.all(estimates[:, 0, 0] == 0) and np.all(estimates[:, 1, 1:] == 1)


def test_parameter_shift_of_a_product_of_cosines():
    p = jnp.array([0.3, -1.2, 2.0])
    found = parameter_shift(lambda x: jnp.stack([jnp.prod(jnp.cos(x)), jnp.sin(x[0])]), p)
    expected = jax.jacobian(lambda x: jnp.stack([jnp.prod(jnp.cos(x)), jnp.sin(x[0])]))(p).T
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fidelity(jnp.ones(2), jnp.ones(4)), "states of one size, found (2,), (4,)"),
        (lambda: expectation_z(jnp.ones(3)), "a state has shape [2**Q], found [3]"),
        (lambda: bloch_vectors(jnp.ones((2, 4))), "found [2, 4]; batch with jax.vmap"),
        (lambda: sample(jax.random.key(0), jnp.ones(2), 0), "shots must be >= 1, found 0"),
        (lambda: amplitude_state(jnp.ones(2), 0), "num_qubits >= 1, found 0"),
        (
            lambda: projected_kernel(jnp.ones((2, 3)), jnp.ones((2, 3)), 1.0),
            "Bloch vectors [B, Q, 3] and [T, Q, 3], found [2, 3] and [2, 3]",
        ),
    ],
)
def test_errors_say_what_is_wrong(make, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        make()
