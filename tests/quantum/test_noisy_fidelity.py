"""Noisy fidelities against the density matrix of the literal circuit: prepare, undo, measure."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkd_jax.errors import ConfigError
from qkd_jax.quantum import (
    Circuit,
    Gate,
    Noise,
    amplitude_circuit,
    amplitude_parameters,
    apply,
    noisy_fidelities,
    prepared_state,
)

# Every kind that the table of errors moves them past, on two qubits.
CIRCUIT = Circuit(
    2,
    (
        Gate("RY", (0,), 0),
        Gate("RX", (1,), 1),
        Gate("CNOT", (0, 1)),
        Gate("T", (1,)),
        Gate("RZZ", (1, 0), 0),
        Gate("H", (0,)),
        Gate("CY", (1, 0)),
        Gate("RY", (1,), 1),
    ),
)
A = np.array([[0.7, -1.1], [0.3, 2.0]], np.float32)
B = np.array([[0.9, -0.8], [-2.0, 0.5], [0.7, -1.1]], np.float32)
PAULIS = [
    np.eye(2),
    np.array([[0, 1], [1, 0]]),
    np.array([[0, -1j], [1j, 0]]),
    np.diag([1.0, -1]),
]


def literal_probability(circuit, a, b, noise):
    """Of zeros after circuit(a) and the inverse gates of circuit(b), with errors after each."""
    dimension = 2**circuit.num_qubits
    rho = np.zeros((dimension, dimension), complex)
    rho[0, 0] = 1

    def gate_and_errors(rho, gate, angles, inverse):
        angle = [] if gate.parameter is None else [angles[gate.parameter]]
        own = Circuit(circuit.num_qubits, (Gate(gate.name, gate.wires, 0 if angle else None),))
        columns = jax.vmap(lambda state: apply(own, jnp.asarray(angle, jnp.float32), state))
        unitary = np.asarray(columns(jnp.eye(dimension)), np.complex128).T
        unitary = unitary.conj().T if inverse else unitary
        rho = unitary @ rho @ unitary.conj().T
        errors = []
        for pauli in itertools.product(range(4), repeat=len(gate.wires)):
            letters = dict(zip(gate.wires, pauli, strict=True))
            error = np.eye(1)
            for wire in range(circuit.num_qubits):
                error = np.kron(error, PAULIS[letters.get(wire, 0)])
            errors.append(error)
        p = noise.one_qubit if len(gate.wires) == 1 else noise.two_qubit
        mixed = sum(e @ rho @ e.conj().T for e in errors[1:]) / (len(errors) - 1)
        return (1 - p) * rho + p * mixed

    for gate in circuit.gates:
        rho = gate_and_errors(rho, gate, a, inverse=False)
    for gate in reversed(circuit.gates):
        rho = gate_and_errors(rho, gate, b, inverse=True)
    ones = np.array([bin(i).count("1") for i in range(dimension)])
    reads_zero = noise.readout**ones * (1 - noise.readout) ** (circuit.num_qubits - ones)
    return float(np.diag(rho).real @ reads_zero)


@pytest.mark.parametrize(
    "noise",
    [
        Noise(0.05, 0.1),
        *(pytest.param(n, marks=pytest.mark.slow) for n in (Noise(), Noise(readout=0.1))),
    ],
)
def test_equals_the_density_matrix_of_the_literal_circuit(key, noise):
    trajectories = 4000
    run = jax.jit(noisy_fidelities, static_argnums=(1, 4, 5))
    found = run(key, CIRCUIT, jnp.asarray(A), jnp.asarray(B), noise, trajectories)
    expected = [[literal_probability(CIRCUIT, a, b, noise) for b in B] for a in A]
    clean = [[literal_probability(CIRCUIT, a, b, Noise()) for b in B] for a in A]
    assert noise == Noise() or np.abs(np.subtract(expected, clean)).max() > 0.05
    # Five deviations of a mean over K values of [0, 1] on either side: at most sqrt(2) / 2 sqrt(K).
    # Without noise all trajectories are one, with rounding errors of 16 gates on both sides.
    atol = 5 * 0.71 / trajectories**0.5 if noise != Noise() else 64 * 1.2e-7
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


def test_a_faster_form_of_the_state_changes_nothing(key):
    """Of the amplitude circuit, whose rotations are its parameters."""
    vectors = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)
    parameters = jax.vmap(lambda v: amplitude_parameters(v, 3))(jnp.asarray(vectors))
    circuit, noise = amplitude_circuit(3), Noise(0.02, 0.1, 0.05)

    def run(state_of):
        return noisy_fidelities(key, circuit, parameters, parameters, noise, 50, state_of)

    fast, plain = run(lambda angles: prepared_state(angles, 3)), run(None)
    np.testing.assert_allclose(fast, plain, rtol=0, atol=100 * 1.2e-7)
    assert 0.2 < np.diag(fast).mean() < 0.8


def test_wrong_shapes_are_told(key):
    with pytest.raises(ConfigError, match=r"parameters_b: expected shape \[batch, 2\], found"):
        noisy_fidelities(key, CIRCUIT, jnp.ones((1, 2)), jnp.ones(2), Noise(), 1)
