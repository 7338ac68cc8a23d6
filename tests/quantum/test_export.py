"""Drawings and OpenQASM as golden text, the program read back, counts, and PennyLane as a guest."""

import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkd_jax.errors import ConfigError
from qkd_jax.quantum import (
    Circuit,
    FeatureMap,
    Gate,
    Resources,
    apply,
    draw,
    feature_circuit,
    resources,
    to_openqasm,
    to_pennylane,
)

ALL_GATES = Circuit(
    3,
    (
        Gate("H", (0,)),
        Gate("RX", (1,), 0),
        Gate("RZZ", (2, 0), 1),
        Gate("RZ", (1,), 1),
        Gate("CNOT", (2, 0)),
        Gate("CZ", (1, 2)),
        Gate("X", (0,)),
        Gate("RY", (2,), 2),
    ),
)
ANGLES = (0.1, -0.25, 1e-9)


def test_drawing_of_the_feature_circuit():
    assert draw(feature_circuit(FeatureMap(3, 2))) == (
        "0: ─RY(p0)─RY(p3)─╭●─RY(p0)─RY(p6)────────╭●────\n"
        "1: ─RY(p1)─RY(p4)─╰X─╭●─────RY(p1)─RY(p7)─╰X─╭●─\n"
        "2: ─RY(p2)─RY(p5)────╰X─────RY(p2)─RY(p8)────╰X─"
    )


def test_drawing_of_every_gate_with_angles():
    assert draw(ALL_GATES, ANGLES) == (
        "0: ─H────────╭RZZ(-0.25)───────────╭X─X───────────\n"
        "1: ─RX(0.10)─│───────────RZ(-0.25)─│──╭●──────────\n"
        "2: ──────────╰RZZ──────────────────╰●─╰Z─RY(0.00)─"
    )


def test_drawing_aligns_wires_of_a_large_circuit():
    lines = draw(feature_circuit(FeatureMap(11, 3))).splitlines()
    assert len(lines) == 11
    assert len({len(line) for line in lines}) == 1
    assert lines[0].startswith(" 0: ") and lines[10].startswith("10: ")


def test_openqasm_text():
    assert to_openqasm(ALL_GATES, ANGLES) == (
        "OPENQASM 3.0;\n"
        'include "stdgates.inc";\n'
        "gate rzz(theta) a, b { cx a, b; rz(theta) b; cx a, b; }\n"
        "qubit[3] q;\n"
        "h q[0];\n"
        "rx(0.1) q[1];\n"
        "rzz(-0.25) q[2], q[0];\n"
        "rz(-0.25) q[1];\n"
        "cx q[2], q[0];\n"
        "cz q[1], q[2];\n"
        "x q[0];\n"
        "ry(1e-09) q[2];\n"
    )


def read_openqasm(text):
    """A reader of the statements that OpenQASM 3 calls gate calls and gate definitions.

    A defined gate is expanded into the gates of its body, so its definition is tested too.
    """
    names = {"rx": "RX", "ry": "RY", "rz": "RZ", "h": "H", "x": "X", "cx": "CNOT", "cz": "CZ"}
    assert text.startswith('OPENQASM 3.0;\ninclude "stdgates.inc";\n')
    definitions = {
        name: (variable, formal.split(", "), body)
        for name, variable, formal, body in re.findall(
            r"^gate (\w+)\((\w+)\) ([\w, ]+?) \{ (.*) \}$", text, re.MULTILINE
        )
    }
    (num_qubits,) = re.findall(r"^qubit\[(\d+)\] q;$", text, re.MULTILINE)
    gates, parameters = [], []

    def call(name, angle, wires):
        if name in definitions:
            variable, formal, body = definitions[name]
            wire_of = dict(zip(formal, wires, strict=True))
            for inner, inner_angle, operands in re.findall(r"(\w+)(?:\((\w+)\))? ([\w, ]+);", body):
                assert inner_angle in ("", variable)
                inner_wires = tuple(wire_of[operand] for operand in operands.split(", "))
                call(inner, angle if inner_angle else None, inner_wires)
            return
        if angle is not None:
            parameters.append(angle)
        gates.append(Gate(names[name], wires, None if angle is None else len(parameters) - 1))

    for line in text.splitlines():
        match = re.fullmatch(r"(\w+)(?:\(([-+.e\d]+)\))? (q\[\d+\](?:, q\[\d+\])*);", line)
        if match:
            name, angle, operands = match.groups()
            wires = tuple(int(wire) for wire in re.findall(r"\d+", operands))
            call(name, float(angle) if angle else None, wires)
    return Circuit(int(num_qubits), tuple(gates)), np.array(parameters, np.float32)


@pytest.mark.parametrize("define_gates", [True, False])
@pytest.mark.parametrize("circuit", [ALL_GATES, feature_circuit(FeatureMap(4, 2, last_axis="z"))])
def test_openqasm_read_back_gives_the_same_state(circuit, define_gates):
    values = np.random.default_rng(0).uniform(-3, 3, circuit.num_parameters).astype(np.float32)
    text = to_openqasm(circuit, values, define_gates=define_gates)
    assert ("gate rzz" in text) == (circuit is ALL_GATES and define_gates)
    read, read_values = read_openqasm(text)
    assert set(read_values) <= set(values), "an angle lost digits"
    expected = apply(circuit, jnp.asarray(values))
    # Fewer than 40 gates of error eps = 1.2e-7 each.
    np.testing.assert_allclose(
        apply(read, jnp.asarray(read_values)), expected, rtol=0, atol=40 * 1.2e-7
    )


def test_resources():
    assert resources(ALL_GATES) == Resources(3, 5, 5, 3, 3)
    # Each layer: 2 rotations, then a chain of Q - 1; the next layer starts while the chain runs.
    assert resources(feature_circuit(FeatureMap(9, 2))) == Resources(9, 14, 36, 16, 27)
    assert resources(Circuit(2, ())) == Resources(2, 0, 0, 0, 0)


@pytest.mark.filterwarnings("ignore")  # PennyLane's own deprecations
def test_pennylane_counts_the_same_resources():
    import pennylane as qml

    circuit = feature_circuit(FeatureMap(5, 3))
    specs = qml.specs(to_pennylane(circuit))(np.ones(circuit.num_parameters))["resources"]
    found = resources(circuit)
    assert specs.depth == found.depth
    assert specs.num_gates == found.one_qubit_gates + found.two_qubit_gates


@pytest.mark.filterwarnings("ignore")
def test_pennylane_measurement_is_a_choice():
    import pennylane as qml

    node = to_pennylane(ALL_GATES, measure=lambda: qml.probs(wires=[0, 1, 2]))
    expected = np.abs(np.asarray(apply(ALL_GATES, jnp.array(ANGLES)))) ** 2
    np.testing.assert_allclose(node(np.array(ANGLES)), expected, rtol=0, atol=1e-6)


def test_importing_the_simulator_does_not_import_pennylane():
    code = "import sys, qkd_jax.quantum; sys.exit('pennylane' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


@pytest.mark.parametrize("export", [draw, to_openqasm])
def test_a_wrong_number_of_angles_is_named(export):
    with pytest.raises(ConfigError, match=re.escape("parameters: expected shape [3], found [2]")):
        export(ALL_GATES, [0.1, 0.2])


def pennylane_state(circuit, parameters):
    return to_pennylane(circuit)(parameters)


BAD_ANGLES = [
    (np.array([0.1, np.nan, np.inf]), 1, "nan"),
    (jnp.array([0.1, 0.2, jnp.inf]), 2, "inf"),
    ([-np.inf, 0.2, 0.3], 0, "-inf"),
    (np.array([1j, 0, 0]), 0, "1j"),
    ([0.1, 0j, 0.3], 1, "0j"),
    (np.array([True, False, True]), 0, "True"),
    ([0.1, 0.2, True], 2, "True"),  # one boolean, which an array of them all would hide
    ([0.1, np.True_, 0.3], 1, ""),
    ([0.1, "0.2", 0.3], 1, "'0.2'"),
    ([0.1, 0.2, None], 2, "None"),
    ([0.1, [0.2], 0.3], 1, "[0.2]"),
    ([10**400, 0.2, 0.3], 0, "1000"),
]


@pytest.mark.filterwarnings("ignore")  # PennyLane's own deprecations
@pytest.mark.parametrize("export", [draw, to_openqasm, pennylane_state])
@pytest.mark.parametrize(("parameters", "index", "found"), BAD_ANGLES)
def test_the_first_bad_angle_is_named(export, parameters, index, found):
    message = f"parameters[{index}]: expected a finite real angle in radians, found {found}"
    with pytest.raises(ConfigError, match=re.escape(message)):
        export(ALL_GATES, parameters)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("export", [draw, to_openqasm, pennylane_state])
@pytest.mark.parametrize("parameters", [np.ones((3, 2)), np.ones(4), 0.1, "abc"])
def test_what_is_no_list_of_angles_is_refused(export, parameters):
    with pytest.raises(ConfigError, match=re.escape("parameters: expected shape [3], found [")):
        export(ALL_GATES, parameters)


@pytest.mark.parametrize("export", [draw, to_openqasm])
def test_traced_angles_cannot_be_written(export):
    with pytest.raises(ConfigError, match="expected numbers whose values are known"):
        jax.jit(lambda parameters: export(ALL_GATES, parameters) and 0)(jnp.ones(3))


def test_angles_of_every_real_type_are_written_with_every_digit():
    tenth = np.float32(0.1)
    expected = to_openqasm(ALL_GATES, [float(tenth), 2.0, -1.0])
    assert f"rx({float(tenth)!r})" in expected and "rzz(2.0)" in expected and "ry(-1.0)" in expected
    for parameters in (
        [tenth, 2, np.int8(-1)],
        [jnp.float32(0.1), jnp.array(2), np.array(-1.0)],
        np.array([tenth, 2, -1]),
        jnp.array([0.1, 2, -1], jnp.float32),
    ):
        assert to_openqasm(ALL_GATES, parameters) == expected
    whole = to_openqasm(ALL_GATES, range(3))
    assert whole == to_openqasm(ALL_GATES, jnp.arange(3))
    assert whole == to_openqasm(ALL_GATES, jnp.arange(3, dtype=jnp.bfloat16))


@pytest.mark.filterwarnings("ignore")
def test_pennylane_still_differentiates_checked_angles():
    import pennylane as qml

    circuit = Circuit(1, (Gate("RY", (0,), 0), Gate("RY", (0,), 1)))
    node = to_pennylane(circuit, measure=lambda: qml.expval(qml.Z(0)))
    angles = qml.numpy.array([0.1, 0.2], requires_grad=True)
    # <Z> = cos(a + b): both derivatives are -sin(0.3), each rounded a few times in float64.
    np.testing.assert_allclose(qml.grad(node)(angles), [-np.sin(0.3)] * 2, rtol=0, atol=1e-15)
    np.testing.assert_allclose(qml.grad(lambda a: node([a, 0.2]))(angles[0]), -np.sin(0.3))
