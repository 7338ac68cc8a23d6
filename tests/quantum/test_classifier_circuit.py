"""The circuit of QD-LLM gate by gate, and its <Z> without a statevector, against sparse matrices.

Error budget of the expectations: 2 Q links of 16-term sums in float32, eps = 6e-8 each: 2e-5 at
Q = 11, and ten times that for derivatives of angles that three gates share.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import sparse

from qkd_jax.errors import ConfigError
from qkd_jax.quantum import apply, expectation_z, parameter_shift, to_openqasm
from qkd_jax.quantum.classifier_circuit import (
    angle_shapes,
    circuit_parameters,
    classifier_circuit,
    classifier_expectations,
    init_angles,
)

BUDGET = 2e-5
PAULI = {
    "X": np.array([[0, 1], [1, 0]], complex),
    "Y": np.array([[0, -1j], [1j, 0]]),
    "Z": np.diag([1.0 + 0j, -1]),
}


def drawn(num_qubits, batch=3, seed=0):
    """(data angles [B, Q], trained angles), over more than a whole turn."""
    generator = np.random.default_rng(seed)

    def draw(*shape):
        return jnp.asarray(generator.uniform(-4, 4, shape), jnp.float32)

    angles = {name: draw(*shape) for name, shape in angle_shapes(num_qubits).items()}
    return draw(batch, num_qubits) * 2.5, angles


def on_wires(num_qubits, operators):
    """The sparse matrix of {wire: 2 x 2 matrix}; wire 0 is the most significant bit."""
    result = sparse.identity(1, dtype=complex, format="csr")
    for wire in range(num_qubits):
        result = sparse.kron(result, operators.get(wire, np.eye(2)), format="csr")
    return result


def published_matrices(num_qubits, x, angles):
    """The authors' loops (`QNLP_network.py`), each gate as a matrix in float64."""
    angles = {name: np.float64(values) for name, values in angles.items()}

    def rotation(angle, **paulis):
        generator = on_wires(num_qubits, {int(w[1:]): PAULI[p] for w, p in paulis.items()})
        one = sparse.identity(2**num_qubits, format="csr")
        return np.cos(angle / 2) * one - 1j * np.sin(angle / 2) * generator

    def x_on(target, control):
        zero, one = np.diag([1.0, 0.0]), np.diag([0.0, 1.0])
        flipped = on_wires(num_qubits, {control: one, target: PAULI["X"]})
        return on_wires(num_qubits, {control: zero}) + flipped

    for j in range(num_qubits):
        yield rotation(float(x[j]), **{f"q{j}": "X"})
    for i in range(2):
        for j in range(num_qubits - 1):
            for repeat in range(3):
                yield rotation(angles["ry"][i, repeat, j], **{f"q{j}": "Y"})
            if j != num_qubits - 2:
                pair = {f"q{j + 1}": "Z", f"q{j + 2}": "Z"}
                yield rotation(angles["rzz"][i, j], **pair)
        for j in range(num_qubits):
            for repeat in range(3):
                yield rotation(angles["rz"][i, repeat, j], **{f"q{j}": "Z"})
        yield x_on(0, num_qubits - 1)
        for k in range(num_qubits - 1):
            if k != num_qubits - 2 and k != 0:
                yield x_on(k + 1, k)
                yield x_on(k - 1, k)


def exact(num_qubits, inputs, angles):
    """<Z> [B, Q] and states [B, 2**Q] in float64."""
    states = []
    for x in inputs:
        state = np.zeros(2**num_qubits, complex)
        state[0] = 1
        for matrix in published_matrices(num_qubits, x, angles):
            state = matrix @ state
        states.append(state)
    states = np.stack(states)
    signs = [on_wires(num_qubits, {j: PAULI["Z"]}).diagonal().real for j in range(num_qubits)]
    return np.abs(states) ** 2 @ np.stack(signs, 1), states


@pytest.mark.parametrize("num_qubits", [5, 6, pytest.param(11, marks=pytest.mark.slow)])
def test_both_forms_are_the_published_matrices(num_qubits):
    inputs, angles = drawn(num_qubits)
    expected, states = exact(num_qubits, inputs, angles)
    circuit = classifier_circuit(num_qubits)
    run = jax.jit(jax.vmap(lambda x: apply(circuit, circuit_parameters(x, angles))))
    found = run(inputs)
    # Fewer than 250 gates of error eps.
    np.testing.assert_allclose(found, states, rtol=0, atol=250 * 1.2e-7)
    np.testing.assert_allclose(jax.vmap(expectation_z)(found), expected, rtol=0, atol=5e-5)
    fast = jax.jit(classifier_expectations)(inputs, angles)
    np.testing.assert_allclose(fast, expected, rtol=0, atol=BUDGET)


def test_counts_of_the_paper():
    shapes = angle_shapes(11)
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == 144
    circuit = classifier_circuit(11)
    assert circuit.num_parameters == 11 + 144
    names = [gate.name for gate in circuit.gates]
    counts = {name: names.count(name) for name in set(names)}
    assert counts == {"RX": 11, "RY": 60, "RZZ": 18, "RZ": 66, "CNOT": 34}


@pytest.mark.slow
def test_gradients_are_those_of_the_statevector():
    inputs, angles = drawn(7, batch=2)
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(2, 7)), jnp.float32)
    circuit = classifier_circuit(7)

    def slow(inputs, angles):
        def one(x):
            return expectation_z(apply(circuit, circuit_parameters(x, angles)))

        return jax.vmap(one)(inputs)

    gradient = {
        form: jax.jit(jax.grad(lambda x, a, f=form: jnp.sum(weights * f(x, a)), argnums=(0, 1)))
        for form in (slow, classifier_expectations)
    }
    expected, found = (gradient[form](inputs, angles) for form in gradient)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=10 * BUDGET)


def test_gates_before_which_nothing_but_cnots_follow_are_dead():
    """The second layer's R_Z, and the first one's on the last qubit, which is never rotated."""
    inputs, angles = drawn(11)
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(3, 11)), jnp.float32)
    gradient = jax.jit(jax.grad(lambda a: jnp.sum(weights * classifier_expectations(inputs, a))))(
        angles
    )
    assert not np.any(gradient["rz"][1]) and not np.any(gradient["rz"][0, :, -1])
    alive = np.concatenate(
        [np.asarray(gradient[name]).ravel() for name in ("ry", "rzz")]
        + [np.asarray(gradient["rz"][0, :, :-1]).ravel()]
    )
    assert np.min(np.abs(alive)) > 1e-4
    turned = {**angles, "rz": angles["rz"].at[1].add(1.0).at[0, :, -1].add(1.0)}
    expected, found = (exact(11, inputs[:1], a)[0] for a in (angles, turned))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def test_the_last_qubit_only_sees_its_own_angle():
    inputs, angles = drawn(6)
    found = jax.jit(classifier_expectations)(inputs, angles)
    np.testing.assert_allclose(found[:, -1], np.cos(np.float64(inputs[:, -1])), atol=1e-6)


def test_only_the_sum_of_successive_rotations_matters():
    inputs, angles = drawn(6)
    permuted = {**angles, "ry": angles["ry"][:, [2, 0, 1]], "rz": angles["rz"][:, [1, 2, 0]]}
    fast = jax.jit(classifier_expectations)
    found, expected = (fast(inputs, a) for a in (permuted, angles))
    # The sum of three angles up to 4 is rounded in another order.
    np.testing.assert_allclose(found, expected, rtol=0, atol=BUDGET)
    circuit = classifier_circuit(6)
    state = jax.jit(lambda a: apply(circuit, circuit_parameters(inputs[0], a)))
    states = [state(a) for a in (permuted, angles)]
    np.testing.assert_allclose(*states, rtol=0, atol=BUDGET)


def test_parameter_shift_equals_autodiff():
    inputs, angles = drawn(5, batch=1)
    shapes = angle_shapes(5)

    def function(parameters):
        parts, position = {}, 5
        for name, shape in shapes.items():
            size = int(np.prod(shape))
            parts[name] = parameters[position : position + size].reshape(shape)
            position += size
        return classifier_expectations(parameters[None, :5], parts)[0]

    parameters = circuit_parameters(inputs[0], angles)
    shifted = jax.jit(lambda p: parameter_shift(function, p))(parameters)
    found = jax.jit(jax.jacobian(function))(parameters)
    np.testing.assert_allclose(found.T, shifted, rtol=0, atol=10 * BUDGET)
    assert np.max(np.abs(shifted)) > 0.1


@pytest.mark.filterwarnings("ignore")  # PennyLane's own deprecations
def test_openqasm_read_by_pennylane_gives_the_same_expectations():
    pytest.importorskip("openqasm3", reason="what PennyLane reads OpenQASM 3 with")
    import pennylane as qml

    inputs, angles = drawn(11, batch=1)
    parameters = circuit_parameters(inputs[0], angles)
    text = to_openqasm(classifier_circuit(11), parameters, define_gates=False)
    # PennyLane knows the standard gates, but no line that includes them.
    read = qml.from_qasm3(text.replace('include "stdgates.inc";\n', ""))
    wires = [f"q[{j}]" for j in range(11)]

    @qml.qnode(qml.device("default.qubit", wires=wires))
    def run():
        read()
        return qml.state(), [qml.expval(qml.Z(wire)) for wire in wires]

    state, found = run()
    expected, states = exact(11, inputs, angles)
    np.testing.assert_allclose(np.abs(np.vdot(state, states[0])), 1.0, rtol=0, atol=1e-6)
    np.testing.assert_allclose(found, expected[0], rtol=0, atol=1e-6)


@pytest.mark.slow
def test_double_precision():
    with jax.enable_x64():
        inputs, angles = drawn(6)
        inputs, angles = jax.tree.map(lambda a: a.astype(jnp.float64), (inputs, angles))
        found = classifier_expectations(inputs, angles)
        assert found.dtype == jnp.float64
        np.testing.assert_allclose(found, exact(6, inputs, angles)[0], rtol=0, atol=1e-13)


def test_initial_angles_are_small_and_differ(key):
    angles = init_angles(key, 11)
    every = np.concatenate([np.asarray(values).ravel() for values in angles.values()])
    assert len(set(every.tolist())) == 144 and 0.008 < every.std() < 0.012


def test_wrong_shapes_are_refused():
    inputs, angles = drawn(6)
    with pytest.raises(ConfigError, match="num_qubits: expected an integer >= 5, found 4"):
        classifier_circuit(4)
    with pytest.raises(ConfigError, match=r"inputs: expected shape \[batch, Q\], found \[6\]"):
        classifier_expectations(inputs[0], angles)
    with pytest.raises(ConfigError, match=r"angles\['ry'\]: expected shape \[2, 3, 6\]"):
        classifier_expectations(drawn(7)[0], angles)
