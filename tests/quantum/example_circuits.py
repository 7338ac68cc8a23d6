"""Circuits that several tests read: one of fixed gates, and any of the gates there are."""

import hypothesis.strategies as st

from qkd_jax.quantum import Circuit, Gate
from qkd_jax.quantum.gates import GATE_KINDS

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


@st.composite
def circuits(draw, max_qubits, max_gates, max_parameters):
    """A circuit of any gates, some of which share a parameter."""
    num_qubits = draw(st.integers(1, max_qubits))
    names = [name for name, kind in GATE_KINDS.items() if kind.num_wires <= num_qubits]
    gates = []
    for name in draw(st.lists(st.sampled_from(names), max_size=max_gates)):
        kind = GATE_KINDS[name]
        wires = draw(st.permutations(range(num_qubits)))[: kind.num_wires]
        parameter = draw(st.integers(0, max_parameters - 1)) if kind.has_parameter else None
        gates.append(Gate(name, tuple(wires), parameter))
    return Circuit(num_qubits, tuple(gates))
