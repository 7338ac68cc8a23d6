"""Any circuit as Pauli rotations and Clifford gates, which errors and shift rules are made for.

A Pauli operator moves past a Clifford gate as another Pauli operator, and past a Pauli rotation
with the sign of its angle turned where the two anticommute. The derivative by the angle of a Pauli
rotation is half of a difference of two values. T, the phase gate and controlled rotations have
neither property, but are products of gates that do.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from qkd_jax.quantum.statevector import Circuit, Gate

CLIFFORDS = ("H", "X", "Y", "Z", "S", "SDG", "SX", "CNOT", "CY", "CZ", "SWAP")
ROTATIONS = ("RX", "RY", "RZ", "RXX", "RYY", "RZZ")


class _Step(NamedTuple):
    """One gate of a product: its angle is `factor` times that of the whole, plus `offset`."""

    name: str
    wires: tuple[int, ...] = (0,)  # of those of the whole
    factor: float = 0.0
    offset: float = 0.0


_CRZ = (_Step("RZ", (1,), 0.5), _Step("RZZ", (0, 1), -0.5))
_CRX = (_Step("H", (1,)), *_CRZ, _Step("H", (1,)))
# In the order in which they act; equal to the gate up to a global phase.
_PRODUCTS = {
    "P": (_Step("RZ", factor=1.0),),
    "T": (_Step("RZ", offset=np.pi / 4),),
    "TDG": (_Step("RZ", offset=-np.pi / 4),),
    "CH": (
        _Step("RY", (1,), offset=-np.pi / 4),
        _Step("CZ", (0, 1)),
        _Step("RY", (1,), offset=np.pi / 4),
    ),
    "CRX": _CRX,
    "CRY": (_Step("SDG", (1,)), *_CRX, _Step("S", (1,))),
    "CRZ": _CRZ,
    "CP": (_Step("RZ", (0,), 0.5), *_CRZ),
}


class Elementary(NamedTuple):
    """A circuit as Pauli rotations, each with an angle of its own, and Clifford gates.

    Attributes:
      num_qubits: Q.
      groups: for each gate of the circuit, the gates that take its place.
      parameter: int [R], of each rotation: the parameter of the circuit that it depends on, or P
        where its angle is constant.
      factor, offset: [R], what the parameter is multiplied by, and what is added.
    """

    num_qubits: int
    groups: tuple[tuple[Gate, ...], ...]
    parameter: np.ndarray
    factor: np.ndarray
    offset: np.ndarray

    @property
    def circuit(self) -> Circuit:
        """The gates as a circuit with one parameter for each rotation."""
        return Circuit(self.num_qubits, tuple(gate for group in self.groups for gate in group))

    def angles(self, parameters: Array) -> Array:
        """The rotations' angles [R] from the circuit's parameters [P]: `apply(circuit, p)` equals
        `apply(elementary.circuit, elementary.angles(p))` up to a global phase.
        """
        dtype = parameters.dtype
        factor, offset = (jnp.asarray(a, dtype) for a in (self.factor, self.offset))
        return factor * jnp.append(parameters, jnp.zeros(1, dtype))[self.parameter] + offset


def elementary(circuit: Circuit) -> Elementary:
    """The circuit as Pauli rotations and Clifford gates."""
    constant = circuit.num_parameters
    groups, parameter, factor, offset = [], [], [], []
    for gate in circuit.gates:
        wires = tuple(range(len(gate.wires)))
        whole = (_Step(gate.name, wires, factor=1.0),)
        group = []
        for step in _PRODUCTS.get(gate.name, whole):
            index = None
            if step.name in ROTATIONS:
                index = len(parameter)
                parameter.append(gate.parameter if step.factor else constant)
                factor.append(step.factor)
                offset.append(step.offset)
            group.append(Gate(step.name, tuple(gate.wires[w] for w in step.wires), index))
        groups.append(tuple(group))
    numbers = np.array(factor), np.array(offset)
    return Elementary(circuit.num_qubits, tuple(groups), np.array(parameter, int), *numbers)
