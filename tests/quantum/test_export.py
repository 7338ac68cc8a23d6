"""Drawings as golden text, counts, and PennyLane as a guest."""

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
from tests.quantum.example_circuits import ALL_GATES, ANGLES


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


def test_drawing_of_controlled_gates():
    circuit = Circuit(2, (Gate("CRX", (1, 0), 0), Gate("SWAP", (0, 1)), Gate("CH", (0, 1))))
    assert draw(circuit) == "0: ─╭RX(p0)─╭SWAP─╭●─\n1: ─╰●──────╰SWAP─╰H─"


def test_drawing_aligns_wires_of_a_large_circuit():
    lines = draw(feature_circuit(FeatureMap(11, 3))).splitlines()
    assert len(lines) == 11
    assert len({len(line) for line in lines}) == 1
    assert lines[0].startswith(" 0: ") and lines[10].startswith("10: ")


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


@pytest.mark.filterwarnings("ignore")
def test_pennylane_still_differentiates_checked_angles():
    import pennylane as qml

    circuit = Circuit(1, (Gate("RY", (0,), 0), Gate("RY", (0,), 1)))
    node = to_pennylane(circuit, measure=lambda: qml.expval(qml.Z(0)))
    angles = qml.numpy.array([0.1, 0.2], requires_grad=True)
    # <Z> = cos(a + b): both derivatives are -sin(0.3), each rounded a few times in float64.
    np.testing.assert_allclose(qml.grad(node)(angles), [-np.sin(0.3)] * 2, rtol=0, atol=1e-15)
    np.testing.assert_allclose(qml.grad(lambda a: node([a, 0.2]))(angles[0]), -np.sin(0.3))
