"""Errors as turned signs, against inserted gates; shots, against density matrices in float64."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkd_jax.errors import ConfigError
from qkd_jax.quantum import Circuit, Gate, apply, expectation_z
from qkd_jax.quantum.classifier_circuit import classifier_circuit
from qkd_jax.quantum.noise import (
    CHUNK,
    Noise,
    _estimates,
    after_readout,
    error_table,
    merged_rotations,
    noisy_expectations,
)

# Every kind of gate, each followed by others that do not commute with it.
EVERY_GATE = Circuit(
    3,
    (
        Gate("H", (0,)),
        Gate("RX", (1,), 0),
        Gate("RY", (2,), 1),
        Gate("RY", (2,), 2),
        Gate("RZZ", (2, 0), 3),
        Gate("CNOT", (2, 1)),
        Gate("RZ", (1,), 1),
        Gate("RX", (0,), 2),
        Gate("CZ", (1, 0)),
        Gate("X", (1,)),
        Gate("RY", (0,), 0),
        Gate("RX", (1,), 3),
        Gate("RY", (2,), 1),
        Gate("CNOT", (0, 2)),
    ),
)
# Those that are no Pauli rotations, or were not there before.
OTHER_GATES = Circuit(
    3,
    (
        Gate("H", (0,)),
        Gate("RY", (1,), 0),
        Gate("CRX", (0, 1), 1),
        Gate("SX", (2,)),
        Gate("T", (2,)),
        Gate("CH", (2, 0)),
        Gate("S", (1,)),
        Gate("RXX", (1, 2), 2),
        Gate("CY", (1, 0)),
        Gate("P", (2,), 3),
        Gate("SWAP", (0, 2)),
        Gate("RYY", (0, 1), 0),
        Gate("CY", (2, 1)),
        Gate("CRY", (1, 2), 2),
        Gate("SX", (0,)),
    ),
)
# Through which errors move, with rotations behind that show where they went.
CLIFFORD_GATES = Circuit(
    3,
    (
        Gate("H", (0,)),
        Gate("RY", (1,), 0),
        Gate("RX", (2,), 1),
        Gate("S", (0,)),
        Gate("CY", (0, 1)),
        Gate("RX", (1,), 2),
        Gate("RY", (0,), 3),
        Gate("SX", (2,)),
        Gate("CY", (2, 0)),
        Gate("RY", (0,), 1),
        Gate("RX", (2,), 2),
        Gate("SDG", (1,)),
        Gate("RY", (1,), 0),
        Gate("SWAP", (0, 2)),
        Gate("RY", (0,), 2),
        Gate("RX", (2,), 3),
        Gate("CY", (1, 2)),
        Gate("RX", (2,), 0),
        Gate("RY", (1,), 1),
    ),
)
ANGLES = np.array([0.7, -1.1, 0.4, 2.3], np.float32)
SHOTS = 40_000
PAULIS = [
    np.eye(2),
    np.array([[0, 1], [1, 0]]),
    np.diag([1.0, -1]),
    np.array([[0, -1j], [1j, 0]]),
]


def matrix(num_qubits, operators):
    result = np.eye(1)
    for wire in range(num_qubits):
        result = np.kron(result, operators.get(wire, np.eye(2)))
    return result


def gate_matrix(num_qubits, gate, angles):
    """From the simulator, which has tests of its own."""
    angle = [] if gate.parameter is None else [angles[gate.parameter]]
    own = Circuit(num_qubits, (Gate(gate.name, gate.wires, 0 if angle else None),))
    with jax.enable_x64(True):
        columns = whole_matrix(own, np.array(angle, np.float64))
    return np.asarray(columns).T


@functools.partial(jax.jit, static_argnums=0)
def whole_matrix(circuit, angle):
    return jax.vmap(lambda state: apply(circuit, angle, state))(jnp.eye(2**circuit.num_qubits))


def density_expectations(circuit, angles, noise):
    """The noisy <Z> [Q] by a density matrix: the error's sum over all Pauli operators."""
    n = circuit.num_qubits
    rho = np.zeros((2**n, 2**n), complex)
    rho[0, 0] = 1
    for gate in circuit.gates:
        unitary = gate_matrix(n, gate, angles)
        rho = unitary @ rho @ unitary.conj().T
        p = noise.one_qubit if len(gate.wires) == 1 else noise.two_qubit
        others = [
            matrix(n, dict(zip(gate.wires, pauli, strict=True)))
            for pauli in (
                [(a,) for a in PAULIS]
                if len(gate.wires) == 1
                else [(a, b) for a in PAULIS for b in PAULIS]
            )
        ][1:]
        rho = (1 - p) * rho + p / len(others) * sum(e @ rho @ e.conj().T for e in others)
    diagonal = np.diag(rho).real
    z = [diagonal @ np.diag(matrix(n, {j: PAULIS[2]})).real for j in range(n)]
    return (1 - 2 * noise.readout) * np.array(z)


@pytest.mark.parametrize("circuit", [EVERY_GATE, CLIFFORD_GATES], ids=["every", "Clifford"])
def test_every_error_is_what_its_row_of_the_table_says(circuit):
    table = error_table(circuit)
    assert len(table.effects) == 2 * sum(len(gate.wires) for gate in circuit.gates)
    parametrised = [gate for gate in circuit.gates if gate.parameter is not None]
    values = ANGLES[[gate.parameter for gate in parametrised]]
    assert table.effects.shape[1] == len(values) + 2 * 3
    for effect, owner, bit in zip(table.effects, table.gate, table.bit, strict=True):
        wire = circuit.gates[owner].wires[bit // 2]
        error = {wire: PAULIS[1 + bit % 2]}
        state = np.eye(8)[0]
        for position, gate in enumerate(circuit.gates):
            state = gate_matrix(3, gate, ANGLES) @ state
            if position == owner:
                state = matrix(3, error) @ state
        turned, turned_state, index = values * (1 - 2 * effect[: len(values)]), np.eye(8)[0], 0
        for gate in circuit.gates:
            own = gate
            if gate.parameter is not None:
                own, index = Gate(gate.name, gate.wires, index), index + 1
            turned_state = gate_matrix(3, own, turned) @ turned_state
        # A Z at the end changes no probability.
        flips = matrix(3, {j: PAULIS[1] for j in range(3) if effect[len(values) + j]})
        found = np.abs(flips @ turned_state) ** 2
        np.testing.assert_allclose(found, np.abs(state) ** 2, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "noise",
    [
        Noise(),
        Noise(one_qubit=0.1),
        Noise(two_qubit=0.3),
        Noise(readout=0.2),
        Noise(0.05, 0.1, 0.05),
        Noise(one_qubit=0.75),  # the state forgets everything
    ],
)
def test_the_mean_over_shots_is_that_of_the_density_matrix(key, noise):
    expected = density_expectations(EVERY_GATE, ANGLES, noise)
    found = noisy_expectations(key, EVERY_GATE, jnp.asarray(ANGLES)[None], noise, SHOTS)
    # Five standard deviations.
    np.testing.assert_allclose(found[0], expected, rtol=0, atol=5 / SHOTS**0.5)


def test_any_gate_may_be_followed_by_errors(key):
    """Errors come after a whole gate, and not between those that it is taken apart into."""
    noise = Noise(0.05, 0.2)
    expected = density_expectations(OTHER_GATES, ANGLES, noise)
    clean = density_expectations(OTHER_GATES, ANGLES, Noise())
    assert np.all(np.abs(expected - clean) > 10 / SHOTS**0.5)
    found = noisy_expectations(key, OTHER_GATES, jnp.asarray(ANGLES)[None], noise, SHOTS)
    np.testing.assert_allclose(found[0], expected, rtol=0, atol=5 / SHOTS**0.5)


def test_errors_change_what_is_measured():
    clean = density_expectations(EVERY_GATE, ANGLES, Noise())
    for noise in (Noise(one_qubit=0.1), Noise(two_qubit=0.3), Noise(readout=0.2)):
        gap = np.abs(density_expectations(EVERY_GATE, ANGLES, noise) - clean)
        assert gap.max() > 10 / SHOTS**0.5, noise


def test_rows_and_keys_have_numbers_of_their_own(key):
    parameters = jnp.asarray(np.stack([ANGLES, ANGLES, ANGLES + 1]))

    def draw(key, shots=301):
        return np.asarray(noisy_expectations(key, EVERY_GATE, parameters, Noise(0.1), shots))

    found = draw(key)
    assert found.shape == (3, 3) and not np.array_equal(found[0], found[1])
    np.testing.assert_array_equal(draw(key), found)
    assert not np.array_equal(draw(jax.random.key(1)), found)
    # 301 is more than a chunk of trajectories and no multiple of it: the rest must not be counted.
    assert np.all(np.abs(found) <= 1)
    np.testing.assert_array_equal(np.rint(found * 301) % 2, 1)  # as many signs as there are shots


def test_other_probabilities_and_more_shots_compile_nothing(key):
    parameters = jnp.asarray(ANGLES)[None]
    found = [
        (noisy_expectations(key, EVERY_GATE, parameters, noise, shots), _estimates._cache_size())
        for noise, shots in (
            (Noise(0.1, 0.3, 0.1), CHUNK),
            (Noise(0.2, 0.3, 0.1), CHUNK),
            (Noise(0.1, 0.9, 0.2), 4 * CHUNK),
        )
    ]
    assert len({size for _, size in found}) == 1
    assert len({float(values[0, 0]) for values, _ in found}) == 3


def test_readout_in_closed_form():
    np.testing.assert_allclose(after_readout(jnp.array([1.0, -0.5]), 0.1), [0.8, -0.4])


def test_merged_rotations_give_the_same_state():
    circuit = classifier_circuit(5)
    merged = merged_rotations(circuit)
    names = [gate.name for gate in merged.circuit.gates]
    # Two layers, each R_Y and R_Z once for each qubit that has them.
    assert (names.count("RY"), names.count("RZ"), names.count("RX")) == (8, 10, 5)
    values = np.random.default_rng(0).uniform(-3, 3, circuit.num_parameters).astype(np.float32)
    rotations = [gate.parameter for gate in circuit.gates if gate.parameter is not None]
    found = apply(merged.circuit, jnp.asarray(values[rotations] @ merged.sums, jnp.float32))
    expected = apply(circuit, jnp.asarray(values))
    np.testing.assert_allclose(found, expected, rtol=0, atol=100 * 1.2e-7)
    assert merged_rotations(EVERY_GATE).sums.shape == (9, 8)
    pair = Gate("RZZ", (0, 1), 0)
    between = Circuit(2, (pair, Gate("RY", (1,), 1), pair))
    assert merged_rotations(between).sums.shape == (3, 3)
    assert merged_rotations(Circuit(2, (pair, Gate("RZZ", (1, 0), 0)))).sums.shape == (2, 1)
    assert np.ptp(np.asarray(expectation_z(expected))) > 0.1


@pytest.mark.parametrize("value", [-0.1, 1.1, np.nan, "much"])
def test_probabilities_are_checked(value):
    message = f"Noise.readout: expected a number from 0 to 1, found {value!r}"
    with pytest.raises(ConfigError, match=re.escape(message)):
        Noise(readout=value)


def test_a_single_row_is_refused(key):
    with pytest.raises(ConfigError, match=r"parameters: expected shape \[batch, 4\], found \[4\]"):
        noisy_expectations(key, EVERY_GATE, jnp.asarray(ANGLES), Noise(), 10)
