"""The general simulator against dense Kronecker products in NumPy, and against PennyLane."""

import functools
import itertools
import re

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from scipy.linalg import expm, sqrtm

from qkd_jax.errors import ConfigError
from qkd_jax.quantum import (
    Circuit,
    Gate,
    apply,
    expectation_z,
    separate_parameters,
    to_pennylane,
    zero_state,
)
from qkd_jax.quantum.gates import GATE_KINDS

pytestmark = pytest.mark.floor

# A gate rounds each amplitude a few times, and states have norm 1: the error of a circuit of up to
# 12 gates stays below 12 * 4 * eps, eps = 2.2e-16 or 1.2e-7. Angles below 7 add 7 eps / 2 a gate.
TOLERANCE_64 = 12 * 8 * 2.2e-16
TOLERANCE_32 = 12 * 8 * 1.2e-7

# Every gate of an example compiles for itself; the test of every gate has them all.
few = settings(max_examples=8)
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

PAULI = {
    "I": np.eye(2),
    "X": np.array([[0, 1], [1, 0]]),
    "Y": np.array([[0, -1j], [1j, 0]]),
    "Z": np.diag([1, -1]),
}
REAL_GATES = [name for name, kind in GATE_KINDS.items() if kind.is_real]


def pauli_string(num_qubits, letters):
    """The Kronecker product of Pauli letters {wire: letter}, wire 0 first."""
    matrix = np.eye(1)
    for wire in range(num_qubits):
        matrix = np.kron(matrix, PAULI[letters.get(wire, "I")])
    return matrix


def dense_gate(num_qubits, gate, angle):
    """The whole matrix, from the gate's textbook definition in Pauli strings."""

    def p(*letters):
        return pauli_string(num_qubits, dict(zip(gate.wires, letters, strict=True)))

    if gate.name == "SWAP":
        return (p("I", "I") + p("X", "X") + p("Y", "Y") + p("Z", "Z")) / 2
    if gate.name in ("RXX", "RYY", "RZZ"):
        return expm(-0.5j * angle * p(*gate.name[1:]))
    *control, target = gate.wires
    base = {"CNOT": "X"}.get(gate.name, gate.name.removeprefix("C"))
    acted = on_wire(num_qubits, target, one_qubit_matrix(base, angle))
    if not control:
        return acted
    is_one = on_wire(num_qubits, control[0], np.diag([0, 1]))
    return is_one @ acted + (np.eye(2**num_qubits) - is_one)


def on_wire(num_qubits, wire, matrix):
    return np.kron(np.kron(np.eye(2**wire), matrix), np.eye(2 ** (num_qubits - wire - 1)))


def one_qubit_matrix(name, angle):
    """From exponentials, powers and roots, as the gates are defined."""
    z_power = {"Z": 1, "S": 1 / 2, "SDG": -1 / 2, "T": 1 / 4, "TDG": -1 / 4}
    if name in z_power:
        return np.diag([1, np.exp(1j * np.pi * z_power[name])])
    if name == "P":
        return np.diag([1, np.exp(1j * angle)])
    if name == "H":
        return (PAULI["X"] + PAULI["Z"]) / np.sqrt(2)
    if name == "SX":
        return sqrtm(PAULI["X"])
    if name in PAULI:
        return PAULI[name]
    return expm(-0.5j * angle * PAULI[name[1]])


def dense_state(circuit, parameters, state=None):
    vector = np.eye(2**circuit.num_qubits)[0] if state is None else state
    for gate in circuit.gates:
        angle = None if gate.parameter is None else float(parameters[gate.parameter])
        vector = dense_gate(circuit.num_qubits, gate, angle) @ vector
    return vector


@st.composite
def circuits(draw, names=tuple(GATE_KINDS)):
    """A circuit of 1 to 4 qubits and up to 12 gates that share 3 parameters."""
    num_qubits = draw(st.integers(1, 4))
    names = [name for name in names if GATE_KINDS[name].num_wires <= num_qubits]
    gates = []
    for _ in range(draw(st.integers(0, 12))):
        name = draw(st.sampled_from(names))
        wires = draw(st.permutations(range(num_qubits)))[: GATE_KINDS[name].num_wires]
        parameter = draw(st.integers(0, 2)) if GATE_KINDS[name].has_parameter else None
        gates.append(Gate(name, tuple(wires), parameter))
    return Circuit(num_qubits, tuple(gates))


def parameters_of(circuit, dtype=np.float64):
    return np.random.default_rng(0).uniform(-7, 7, circuit.num_parameters).astype(dtype)


def test_every_gate_on_every_wire_equals_its_dense_matrix():
    """From a random complex state, so that no phase is lost."""
    gates = [
        Gate(name, wires, 0 if kind.has_parameter else None)
        for name, kind in GATE_KINDS.items()
        for wires in itertools.permutations(range(3), kind.num_wires)
    ]
    angle, generator = np.array([0.7]), np.random.default_rng(2)
    start = generator.normal(size=(8, 2)) @ [1, 1j]
    start /= np.linalg.norm(start)

    def all_of_them(angle, start):
        return [
            apply(Circuit(3, (gate,)), angle[: gate.parameter is not None], start) for gate in gates
        ]

    with jax.enable_x64(True):
        found = quick_jit(all_of_them)(jnp.asarray(angle), jnp.asarray(start))
    for gate, state in zip(gates, found, strict=True):
        expected = dense_gate(3, gate, angle[0]) @ start
        np.testing.assert_allclose(state, expected, rtol=0, atol=1e-14, err_msg=str(gate))


@few
@given(circuits())
def test_equals_dense_kronecker_products(circuit):
    parameters = parameters_of(circuit)
    with jax.enable_x64(True):
        state = np.asarray(apply(circuit, jnp.asarray(parameters)))
    assert state.dtype == (np.float64 if circuit.is_real else np.complex128)
    np.testing.assert_allclose(state, dense_state(circuit, parameters), rtol=0, atol=TOLERANCE_64)


@few
@given(circuits(), st.booleans())
def test_single_precision_from_any_state(circuit, complex_start):
    parameters = parameters_of(circuit, np.float32)
    generator = np.random.default_rng(1)
    start = generator.normal(size=2**circuit.num_qubits)
    if complex_start:
        start = start + 1j * generator.normal(size=start.shape)
    start = (start / np.linalg.norm(start)).astype(np.complex64 if complex_start else np.float32)
    state = np.asarray(apply(circuit, jnp.asarray(parameters), jnp.asarray(start)))
    is_real = circuit.is_real and not complex_start
    assert state.dtype == (np.float32 if is_real else np.complex64)
    expected = dense_state(circuit, parameters, start.astype(np.complex128))
    np.testing.assert_allclose(state, expected, rtol=0, atol=TOLERANCE_32)
    assert abs(np.linalg.norm(state) - 1) < TOLERANCE_32


@few
@given(circuits(names=tuple(REAL_GATES)))
def test_a_real_circuit_stays_real(circuit):
    assert circuit.is_real
    state = apply(circuit, jnp.asarray(parameters_of(circuit, np.float32)))
    assert state.dtype == jnp.float32


@pytest.mark.filterwarnings("ignore")  # PennyLane's own deprecations
@few
@given(circuits())
def test_equals_pennylane(circuit):
    parameters = parameters_of(circuit)
    with jax.enable_x64(True):
        state = np.asarray(apply(circuit, jnp.asarray(parameters)))
    expected = to_pennylane(circuit)(parameters)
    np.testing.assert_allclose(state, expected, rtol=0, atol=TOLERANCE_64)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(2))
def test_gradient_equals_pennylane(seed):
    """d <Z_0 - 2 Z_1> / d parameters of a random circuit with every gate, against autograd."""
    import pennylane as qml

    generator = np.random.default_rng(seed)
    gates = []
    for name, kind in [*GATE_KINDS.items()] * 2:
        wires = tuple(int(w) for w in generator.permutation(4)[: kind.num_wires])
        parameter = int(generator.integers(0, 4)) if kind.has_parameter else None
        gates.append(Gate(name, wires, parameter))
    circuit = Circuit(4, tuple(gates[i] for i in generator.permutation(len(gates))))
    parameters = generator.uniform(-3, 3, circuit.num_parameters)

    def expectation(p):
        z = expectation_z(apply(circuit, p))
        return z[0] - 2 * z[1]

    with jax.enable_x64(True):
        value, gradient = quick_jit(jax.value_and_grad(expectation))(jnp.asarray(parameters))
    node = to_pennylane(circuit, measure=lambda: qml.expval(qml.Z(0) - 2 * qml.Z(1)))
    trainable = qml.numpy.array(parameters, requires_grad=True)
    np.testing.assert_allclose(value, node(trainable), rtol=0, atol=1e-13)
    np.testing.assert_allclose(gradient, qml.grad(node)(trainable), rtol=0, atol=1e-13)
    assert np.abs(gradient).max() > 1e-3


def test_cnot_twice_is_the_identity(key):
    twice = Circuit(3, (Gate("CNOT", (2, 0)),) * 2)
    state = jax.random.normal(key, (8,))
    np.testing.assert_array_equal(apply(twice, jnp.zeros(0), state), state)


def test_wire_0_is_the_most_significant_bit():
    state = apply(Circuit(3, (Gate("X", (0,)),)), jnp.zeros(0))
    assert int(jnp.argmax(state)) == 0b100


def test_jit_and_vmap_equal_the_plain_call(key):
    gates = (Gate("H", (0,)), Gate("RX", (1,), 0), Gate("RZZ", (2, 0), 1), Gate("CZ", (1, 2)))
    circuit = Circuit(3, (*gates, Gate("RY", (2,), 0)))
    parameters = jax.random.normal(key, (5, 2))
    plain = jnp.stack([apply(circuit, row) for row in parameters])
    batched = jax.vmap(lambda p: apply(circuit, p))(parameters)
    jitted = jnp.stack([jax.jit(apply, static_argnums=0)(circuit, row) for row in parameters])
    np.testing.assert_allclose(batched, plain, rtol=0, atol=TOLERANCE_32)
    np.testing.assert_allclose(jitted, plain, rtol=0, atol=TOLERANCE_32)


@few
@given(circuits())
def test_separate_parameters_keeps_the_state(circuit):
    separate, index = separate_parameters(circuit)
    assert separate.num_parameters == len(index)
    assert len({g.parameter for g in separate.gates if g.parameter is not None}) == len(index)
    parameters = jnp.asarray(parameters_of(circuit, np.float32))
    copies = parameters[jnp.array(index, int)]
    np.testing.assert_array_equal(apply(separate, copies), apply(circuit, parameters))


def test_low_precision_angles_are_simulated_in_single_precision():
    state = apply(Circuit(1, (Gate("RY", (0,), 0),)), jnp.ones(1, jnp.bfloat16))
    assert state.dtype == jnp.float32


@pytest.mark.parametrize("integer", [np.int64, np.uint8, np.array, jnp.array])
def test_a_circuit_of_other_integers_equals_its_plain_twin(integer):
    plain = Circuit(2, (Gate("RZZ", (1, 0), 1), Gate("H", (0,))))
    gates = (Gate("RZZ", (integer(1), integer(0)), integer(1)), Gate("H", (integer(0),)))
    found = Circuit(integer(2), gates)
    assert found == plain and hash(found) == hash(plain) and repr(found) == repr(plain)
    assert Gate(np.str_("CNOT"), np.arange(2)) == Gate("CNOT", (0, 1))
    assert repr(Gate(np.str_("H"), [0])) == repr(Gate("H", (0,)))
    np.testing.assert_array_equal(zero_state(integer(2)), [1, 0, 0, 0])


def test_a_traced_wire_is_refused():
    with pytest.raises(ConfigError, match=re.escape("wires[0]: expected an integer >= 0")):
        jax.jit(lambda wire: apply(Circuit(1, (Gate("H", (wire,)),)), jnp.zeros(0)))(0)


def test_unlike_low_precisions_meet_in_single_precision():
    circuit = Circuit(1, (Gate("RY", (0,), 0),))
    state = apply(circuit, jnp.ones(1, jnp.bfloat16), jnp.array([1, 0], jnp.float16))
    assert state.dtype == jnp.float32


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Gate("RYX", (0, 1), 0), "gate name: expected one of RX, RY"),
        (lambda: Gate(["H"], (0,)), "RZZ, found ['H']"),
        (lambda: Gate("CNOT", (0,)), "gate CNOT: expected 2 wire(s), found (0,)"),
        (lambda: Gate("CNOT", (1, 1)), "gate CNOT: expected distinct wires, found (1, 1)"),
        (lambda: Gate("H", 0), "gate H: wires: expected a sequence, found 0"),
        (lambda: Gate("H", (-1,)), "gate H: wires[0]: expected an integer >= 0, found -1"),
        (lambda: Gate("CNOT", (0, True)), "wires[1]: expected an integer >= 0, found True"),
        (lambda: Gate("H", (np.True_,)), "found np.True_"),
        (lambda: Gate("H", (np.float64(2),)), "found np.float64(2.0)"),
        (lambda: Gate("H", (jnp.array(True),)), "found Array(True"),
        (lambda: Gate("RY", (0,), np.array(True)), "found array(True)"),
        (
            lambda: Gate("RY", (0,)),
            "gate RY: index of its angle (parameter): expected an integer >= 0, found None",
        ),
        (lambda: Gate("RY", (0,), 0.5), "found 0.5"),
        (lambda: Gate("H", (0,), 1), "gate H: expected no parameter, found 1"),
        (lambda: Circuit(0, ()), "Circuit.num_qubits: expected an integer >= 1, found 0"),
        (lambda: Circuit(2.0, ()), "found 2.0"),
        (lambda: Circuit(2, None), "Circuit.gates: expected a sequence, found None"),
        (lambda: Circuit(2, ("H",)), "gates[0]: expected a Gate, found 'H'"),
        (
            lambda: Circuit(2, (Gate("H", (2,)),)),
            "wires from 0 to 1, as the circuit has 2 qubit(s)",
        ),
        (lambda: zero_state(31), "num_qubits: expected an integer from 1 to 30, found 31"),
        (lambda: zero_state(True), "num_qubits: expected an integer from 1 to 30, found True"),
        (lambda: zero_state(1, int), "dtype: expected floating or complex, found int"),
        (lambda: apply(Circuit(1, ()), jnp.zeros(1)), "parameters: expected shape [0], found [1]"),
        (lambda: apply(Circuit(1, ()), jnp.zeros(0, int)), "real angles in radians, found int32"),
        (
            lambda: apply(Circuit(1, ()), ["a"]),
            "parameters: expected an array of numbers, found ['a'",
        ),
        (lambda: apply(Circuit(1, ()), jnp.zeros(0), jnp.ones(4)), "expected shape [2], found [4]"),
        (lambda: apply(Circuit(1, ()), jnp.zeros(0), jnp.ones(2, int)), "floating or complex"),
    ],
)
def test_errors_say_what_is_wrong(make, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        make()
