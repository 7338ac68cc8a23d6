"""Another way through any circuit: fewer passes over the state than one for each gate.

Gates are sorted into moments of three kinds, without exchanging any two that may not commute:

* turns: any gates on one qubit. Those of one wire are multiplied, as 2 x 2 matrices; rotations
  about one axis add up to the same thing. Neighbouring wires are turned together, by a product with
  a Kronecker product of up to four matrices.
* phases: diagonal gates on two qubits. Their angles add up to one for each basis state: one pass,
  however many gates.
* moves: CNOT and SWAP. They permute basis states: one gather, however many gates.

What fits none of these (controlled H, Y, RX and RY; RXX and RYY) acts alone, as in `apply`.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from qkd_jax.quantum.checks import as_real, as_state, check_shape
from qkd_jax.quantum.gates import GATE_KINDS
from qkd_jax.quantum.layers import GROUP_SIZE, HIGHEST, product_state
from qkd_jax.quantum.statevector import Circuit, Gate, zero_state

_MOVES = ("CNOT", "SWAP")


class Moment(NamedTuple):
    """Gates that act in one pass.

    Attributes:
      kind: "turns", "phases", "moves" or "alone".
      gates: in their order.
    """

    kind: str
    gates: tuple[Gate, ...]


def moments(circuit: Circuit) -> tuple[Moment, ...]:
    """The circuit's gates in moments, each as early as its wires allow."""
    kinds: list[str] = []
    gates: list[list[Gate]] = []
    latest = [-1] * circuit.num_qubits  # the last moment that acts on each wire
    for gate in circuit.gates:
        last = max(latest[wire] for wire in gate.wires)
        kind = _kind_of(gate)
        later = range(max(last, 0), len(kinds)) if kind != "alone" else ()
        place = next((m for m in later if kinds[m] == kind), len(kinds))
        if place == len(kinds):
            kinds.append(kind)
            gates.append([])
        gates[place].append(gate)
        for wire in gate.wires:
            latest[wire] = place
    return tuple(Moment(kind, tuple(own)) for kind, own in zip(kinds, gates, strict=True))


def _kind_of(gate: Gate) -> str:
    if len(gate.wires) == 1:
        return "turns"
    if GATE_KINDS[gate.name].is_diagonal:
        return "phases"
    return "moves" if gate.name in _MOVES else "alone"


def apply_fused(circuit: Circuit, parameters: Array, state: Array | None = None) -> Array:
    """The state after the circuit: the same as `apply`, up to rounding, in fewer passes.

    Circuits in layers gain by it; where gates follow in no order it can be slower than `apply`.

    Arguments, result and errors are those of `apply`.
    """
    parameters = as_real("parameters", parameters)
    check_shape("parameters", parameters.shape, (circuit.num_parameters,))
    todo = list(moments(circuit))
    dtype = parameters.dtype if state is None else as_state(state, circuit.num_qubits).dtype
    dtype = np.result_type(parameters.dtype, dtype)
    if not circuit.is_real:
        dtype = np.promote_types(dtype, np.complex64)
    parameters = parameters.astype(jnp.finfo(dtype).dtype)
    if state is None and todo and todo[0].kind == "turns":
        vectors = jnp.eye(2, dtype=dtype)[:1].repeat(circuit.num_qubits, axis=0)
        turns = _turns(todo.pop(0).gates, parameters, dtype)
        for wire, matrix in turns.items():
            vectors = vectors.at[wire].set(matrix[:, 0])
        state = product_state(vectors, chain=False)
    elif state is None:
        state = zero_state(circuit.num_qubits, dtype)
    state = as_state(state, circuit.num_qubits).astype(dtype)
    for moment in todo:
        state = _ACT[moment.kind](state, moment.gates, parameters)
    return state


def _turns(gates: tuple[Gate, ...], parameters: Array, dtype) -> dict[int, Array]:
    """The matrix [2, 2] of each wire that is turned."""
    found: dict[int, Array] = {}
    for gate in gates:
        (wire,) = gate.wires
        matrix = found.get(wire, jnp.eye(2, dtype=dtype))
        angle = () if gate.parameter is None else (parameters[gate.parameter],)
        # A gate on wire 0 of two "qubits" acts on the rows of a matrix.
        found[wire] = GATE_KINDS[gate.name].act(matrix.reshape(-1), 0, *angle).reshape(2, 2)
    return found


def _act_turns(state: Array, gates: tuple[Gate, ...], parameters: Array) -> Array:
    turns = _turns(gates, parameters, state.dtype)
    num_qubits, wire = state.size.bit_length() - 1, 0
    while wire < num_qubits:
        matrices = []
        while wire + len(matrices) in turns and len(matrices) < GROUP_SIZE:
            matrices.append(turns[wire + len(matrices)])
        if matrices:
            product = matrices[0]
            for matrix in matrices[1:]:
                product = jnp.kron(product, matrix)
            parts = state.reshape(2**wire, len(product), -1)
            state = jnp.einsum("ab,pbr->par", product, parts, precision=HIGHEST).reshape(-1)
        wire += max(1, len(matrices))
    return state


# The phase of each value of the wires of a diagonal gate, for an angle of 1; CZ has always pi.
_PHASES = {
    "RZZ": np.array([[-0.5, 0.5], [0.5, -0.5]]),
    "CRZ": np.array([[0.0, 0.0], [-0.5, 0.5]]),
    "CP": np.array([[0.0, 0.0], [0.0, 1.0]]),
}


def _act_phases(state: Array, gates: tuple[Gate, ...], parameters: Array) -> Array:
    num_qubits = state.size.bit_length() - 1
    state = state.reshape([2] * num_qubits)
    signs, total = np.ones([1] * num_qubits), jnp.zeros([1] * num_qubits, parameters.dtype)
    for gate in gates:
        shape = [2 if wire in gate.wires else 1 for wire in range(num_qubits)]
        if gate.name == "CZ":  # real, and exact as a sign
            signs = signs * np.array([1, 1, 1, -1]).reshape(shape)
            continue
        phases = _PHASES[gate.name]
        phases = (phases if gate.wires[0] < gate.wires[1] else phases.T).reshape(shape)
        total = total + parameters[gate.parameter] * jnp.asarray(phases, total.dtype)
    state = state * jnp.asarray(signs, state.dtype)
    if any(gate.name != "CZ" for gate in gates):
        state = state * lax.complex(jnp.cos(total), jnp.sin(total))
    return state.reshape(-1)


def _act_moves(state: Array, gates: tuple[Gate, ...], parameters: Array) -> Array:
    num_qubits = state.size.bit_length() - 1
    source = np.arange(state.size).reshape([2] * num_qubits)
    for gate in gates:
        first, second = gate.wires
        if gate.name == "SWAP":
            source = np.swapaxes(source, first, second)
        else:
            low, high = np.split(np.moveaxis(source, (first, second), (0, 1)), 2)
            source = np.moveaxis(np.concatenate([low, high[:, ::-1]]), (0, 1), (first, second))
    return state[source.reshape(-1)]


def _act_alone(state: Array, gates: tuple[Gate, ...], parameters: Array) -> Array:
    for gate in gates:
        angle = () if gate.parameter is None else (parameters[gate.parameter],)
        state = GATE_KINDS[gate.name].act(state, *gate.wires, *angle)
    return state


_ACT = {"turns": _act_turns, "phases": _act_phases, "moves": _act_moves, "alone": _act_alone}
