"""Circuits for readers and other tools: drawing, PennyLane, gate counts, checked angles."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from qkd_jax.errors import ConfigError
from qkd_jax.quantum.checks import check_shape, real_number
from qkd_jax.quantum.gates import GATE_KINDS
from qkd_jax.quantum.statevector import Circuit, Gate


class Resources(NamedTuple):
    """What a circuit costs; depth = the longest chain of gates that wait for one another."""

    num_qubits: int
    depth: int
    one_qubit_gates: int
    two_qubit_gates: int
    num_parameters: int


def resources(circuit: Circuit) -> Resources:
    """Qubits, depth, gates and parameters of a circuit."""
    ready = [0] * circuit.num_qubits
    for gate in circuit.gates:
        depth = 1 + max(ready[wire] for wire in gate.wires)
        for wire in gate.wires:
            ready[wire] = depth
    two_qubit_gates = sum(len(gate.wires) == 2 for gate in circuit.gates)
    return Resources(
        num_qubits=circuit.num_qubits,
        depth=max(ready),
        one_qubit_gates=len(circuit.gates) - two_qubit_gates,
        two_qubit_gates=two_qubit_gates,
        num_parameters=circuit.num_parameters,
    )


def draw(circuit: Circuit, parameters: Sequence[float] | None = None) -> str:
    """The circuit as text, one line for each wire; angles are p0, p1, ... unless they are given.

    Args:
      circuit: the gates.
      parameters: [P] finite real angles in radians.

    Raises:
      ConfigError: on a wrong number of parameters, or one that is not a finite real number.
    """
    angles = None if parameters is None else finite_angles(circuit, parameters)
    columns: list[dict[int, str]] = []
    ready = [0] * circuit.num_qubits  # the first column in which each wire is free
    for gate in circuit.gates:
        top, bottom = min(gate.wires), max(gate.wires)
        column = max(ready[top : bottom + 1])
        if column == len(columns):
            columns.append({})
        columns[column] |= _cells(gate, angles)
        ready[top : bottom + 1] = [column + 1] * (bottom + 1 - top)
    label_width = len(str(circuit.num_qubits - 1))
    lines = [f"{wire:>{label_width}}: " for wire in range(circuit.num_qubits)]
    for column in columns:
        width = max(len(cell) for cell in column.values())
        for wire in range(circuit.num_qubits):
            lines[wire] += "─" + column.get(wire, "").ljust(width, "─")
    return "\n".join(line + "─" for line in lines)


def _cells(gate: Gate, angles: list[float] | None) -> dict[int, str]:
    """What a gate puts on each wire it touches or crosses."""
    angle = ""
    if gate.parameter is not None:
        angle = f"(p{gate.parameter})" if angles is None else f"({angles[gate.parameter]:.2f})"
    if len(gate.wires) == 1:
        return {gate.wires[0]: gate.name + angle}
    controlled = GATE_KINDS[gate.name].controlled
    symbols = ("●", controlled + angle) if controlled else (gate.name, gate.name + angle)
    top, bottom = min(gate.wires), max(gate.wires)
    cells = {wire: "│" for wire in range(top + 1, bottom)}
    for wire, symbol in zip(gate.wires, symbols, strict=True):
        cells[wire] = ("╭" if wire == top else "╰") + symbol
    return cells


def to_pennylane(
    circuit: Circuit,
    measure: Callable[[], Any] | None = None,
    device: str = "default.qubit",
    **qnode_options,
) -> Callable[[Any], Any]:
    """The same circuit as a PennyLane QNode, parameters [P] -> measurement.

    Args:
      circuit: the gates.
      measure: gives the measurement, such as `lambda: qml.expval(qml.Z(0))`; the state [2**Q] when
        left out.
      device: the name of a PennyLane device.
      **qnode_options: passed on to `qml.QNode`, such as `diff_method`.

    Returns:
      A QNode of the numpy/autograd interface, which works beside every version of JAX. It raises
      ConfigError on parameters that `to_openqasm` would refuse, as far as their values are known:
      not while JAX or TensorFlow traces it.
    """
    import pennylane as qml

    renamed = {
        "P": qml.PhaseShift,
        "H": qml.Hadamard,
        "CP": qml.ControlledPhaseShift,
        "SDG": lambda wires: qml.adjoint(qml.S(wires)),
        "TDG": lambda wires: qml.adjoint(qml.T(wires)),
        "RXX": qml.IsingXX,
        "RYY": qml.IsingYY,
        "RZZ": qml.IsingZZ,
    }
    gates = {name: renamed.get(name) or getattr(qml, name) for name in GATE_KINDS}

    def is_known(value):
        return not (isinstance(value, jax.core.Tracer) or qml.math.is_abstract(value))

    def run(parameters):
        is_list = isinstance(parameters, list | tuple)  # perhaps ragged
        shape = (len(parameters),) if is_list else qml.math.shape(parameters)
        check_shape("parameters", shape, (circuit.num_parameters,), _ONE_PER_PARAMETER)
        for index, value in enumerate(parameters):
            if is_known(value):
                finite_angle(index, qml.math.unwrap([value])[0])
        for gate in circuit.gates:
            arguments = [] if gate.parameter is None else [parameters[gate.parameter]]
            gates[gate.name](*arguments, wires=gate.wires)
        return qml.state() if measure is None else measure()

    options = {"interface": "autograd"} | qnode_options
    return qml.QNode(run, qml.device(device, wires=circuit.num_qubits), **options)


_ONE_PER_PARAMETER = "give one angle for each parameter of the circuit"


def finite_angles(circuit: Circuit, parameters: Sequence[float]) -> list[float]:
    """The values of all parameters; raises ConfigError unless they are finite real numbers."""
    try:
        values = np.asarray(parameters, dtype=object)  # without a common dtype
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"parameters: expected numbers whose values are known, found {parameters!r}"
        ) from error
    check_shape("parameters", values.shape, (circuit.num_parameters,), _ONE_PER_PARAMETER)
    return [finite_angle(index, value) for index, value in enumerate(values)]


def finite_angle(index: int, value) -> float:
    """The value of one parameter; raises ConfigError unless it is a finite real number."""
    angle = real_number(value)
    if not np.isfinite(angle):
        raise ConfigError(
            f"parameters[{index}]: expected a finite real angle in radians, found {value!r}"
        )
    return angle
