"""A statevector simulator for any circuit of one- and two-qubit gates.

Conventions: wire 0 is the most significant bit of the state's index, angles are radians, and a
rotation is exp(-i angle G / 2) for its generator G, as in PennyLane. A circuit is plain data: it
can be hashed, compared, printed and passed to `jax.jit` as a static argument.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from qkd_jax.errors import ConfigError

MAX_SIMULATED_QUBITS = 30  # 2**31 amplitudes no longer have a 32-bit index


class GateKind(NamedTuple):
    """What every gate of one name has in common."""

    num_wires: int
    has_parameter: bool
    is_real: bool


GATE_KINDS = {
    "RX": GateKind(num_wires=1, has_parameter=True, is_real=False),
    "RY": GateKind(num_wires=1, has_parameter=True, is_real=True),
    "RZ": GateKind(num_wires=1, has_parameter=True, is_real=False),
    "H": GateKind(num_wires=1, has_parameter=False, is_real=True),
    "X": GateKind(num_wires=1, has_parameter=False, is_real=True),
    "CNOT": GateKind(num_wires=2, has_parameter=False, is_real=True),
    "CZ": GateKind(num_wires=2, has_parameter=False, is_real=True),
    "RZZ": GateKind(num_wires=2, has_parameter=True, is_real=False),
}


@dataclass(frozen=True)
class Gate:
    """One gate: its name, its wires (CNOT: control, target) and the index of its parameter.

    Several gates may name the same parameter; that is how data are uploaded more than once.
    """

    name: str
    wires: tuple[int, ...]
    parameter: int | None = None

    def __post_init__(self):
        kind = GATE_KINDS.get(self.name)
        if kind is None:
            raise ConfigError(f"gate {self.name!r} is unknown; use one of {', '.join(GATE_KINDS)}")
        object.__setattr__(self, "wires", tuple(self.wires))
        if len(self.wires) != kind.num_wires:
            raise ConfigError(
                f"gate {self.name} acts on {kind.num_wires} wire(s), found wires {self.wires}"
            )
        if not all(_is_index(wire) for wire in self.wires):
            raise ConfigError(f"gate {self.name}: wires are integers >= 0, found {self.wires}")
        if len(set(self.wires)) != len(self.wires):
            raise ConfigError(f"gate {self.name} needs distinct wires, found {self.wires}")
        if kind.has_parameter and not _is_index(self.parameter):
            raise ConfigError(
                f"gate {self.name} needs the index of its angle among the circuit's parameters "
                f"(an integer >= 0), found {self.parameter!r}"
            )
        if not kind.has_parameter and self.parameter is not None:
            raise ConfigError(f"gate {self.name} has no parameter, found {self.parameter!r}")


@dataclass(frozen=True)
class Circuit:
    """Gates in the order in which they act on |0...0>."""

    num_qubits: int
    gates: tuple[Gate, ...]

    def __post_init__(self):
        if not _is_index(self.num_qubits) or self.num_qubits < 1:
            raise ConfigError(f"a circuit needs num_qubits >= 1, found {self.num_qubits!r}")
        object.__setattr__(self, "gates", tuple(self.gates))
        for position, gate in enumerate(self.gates):
            if not isinstance(gate, Gate):
                raise ConfigError(f"gates[{position}] must be a Gate, found {gate!r}")
            if max(gate.wires) >= self.num_qubits:
                raise ConfigError(
                    f"gates[{position}] is {gate.name} on wires {gate.wires}, but the circuit has "
                    f"{self.num_qubits} qubit(s): wires run from 0 to {self.num_qubits - 1}"
                )

    @property
    def num_parameters(self) -> int:
        """Length P of the parameter vector: one more than the largest index used."""
        return 1 + max((g.parameter for g in self.gates if g.parameter is not None), default=-1)

    @property
    def is_real(self) -> bool:
        """Whether every gate is a real matrix, so that a real state stays real."""
        return all(GATE_KINDS[gate.name].is_real for gate in self.gates)


def zero_state(num_qubits: int, dtype=jnp.float32) -> Array:
    """|0...0> as a vector [2**Q]. Raises ConfigError above 30 qubits."""
    if not 1 <= num_qubits <= MAX_SIMULATED_QUBITS:
        raise ConfigError(
            f"a statevector needs 1 to {MAX_SIMULATED_QUBITS} qubits, found {num_qubits}"
        )
    return jnp.zeros(2**num_qubits, dtype).at[0].set(1)


def apply(circuit: Circuit, parameters: Array, state: Array | None = None) -> Array:
    """The state after the circuit.

    Args:
      circuit: the gates; static.
      parameters: [P] real angles in radians, P = circuit.num_parameters.
      state: [2**Q] the state to start from, real or complex; |0...0> when left out.

    Returns:
      [2**Q], real when the circuit and the given state are real, complex otherwise; in the wider
      precision of the parameters and the state (float32 at least). Batch with `jax.vmap`.

    Raises:
      ConfigError: on a wrong shape or type of `parameters` or `state`.
    """
    parameters = jnp.asarray(parameters)
    if not jnp.issubdtype(parameters.dtype, jnp.floating):
        raise ConfigError(f"parameters are real angles in radians, found {parameters.dtype}")
    if parameters.shape != (circuit.num_parameters,):
        raise ConfigError(
            f"the circuit has parameters of shape [{circuit.num_parameters}], found "
            f"{list(parameters.shape)}; batch with jax.vmap"
        )
    if state is None:
        state = zero_state(circuit.num_qubits, parameters.dtype)
    state = jnp.asarray(state)
    if not jnp.issubdtype(state.dtype, jnp.inexact):
        raise ConfigError(f"a state is floating or complex, found {state.dtype}")
    if state.shape != (2**circuit.num_qubits,):
        raise ConfigError(
            f"a state of {circuit.num_qubits} qubit(s) has shape [{2**circuit.num_qubits}], found "
            f"{list(state.shape)}; batch with jax.vmap"
        )
    dtype = np.result_type(np.float32, parameters.dtype, state.dtype)
    if not circuit.is_real:
        dtype = np.promote_types(dtype, np.complex64)
    state = state.astype(dtype)
    parameters = parameters.astype(jnp.finfo(dtype).dtype)
    for gate in circuit.gates:
        function = _GATES[gate.name]
        if gate.parameter is None:
            state = function(state, *gate.wires)
        else:
            state = function(state, *gate.wires, parameters[gate.parameter])
    return state


def separate_parameters(circuit: Circuit) -> tuple[Circuit, tuple[int, ...]]:
    """The same circuit with one parameter for each parametrised gate, in gate order.

    Returns:
      The circuit and the index of the shared parameter that each new one copies:
      `apply(circuit, p)` equals `apply(separate, p[jnp.array(index)])`. The parameter-shift rule
      needs this form; the gradient of a shared parameter is the sum over its copies.
    """
    gates, index = [], []
    for gate in circuit.gates:
        if gate.parameter is not None:
            index.append(gate.parameter)
            gate = Gate(gate.name, gate.wires, len(index) - 1)
        gates.append(gate)
    return Circuit(circuit.num_qubits, tuple(gates)), tuple(index)


# The gates: [2**Q], wire(s), angle -> [2**Q]. RX, RZ and RZZ need a complex state.


def rx(state: Array, wire: int, angle: Array) -> Array:
    """exp(-i angle X / 2) on a complex state [2**Q]."""
    low, high = _split(state, wire)
    cosine, sine = _half_angle(angle, state.dtype)
    return _join(cosine * low - 1j * sine * high, cosine * high - 1j * sine * low)


def ry(state: Array, wire: int, angle: Array) -> Array:
    """exp(-i angle Y / 2) on a state [2**Q]: [[cos, -sin], [sin, cos]](angle / 2)."""
    low, high = _split(state, wire)
    cosine, sine = _half_angle(angle, state.dtype)
    return _join(cosine * low - sine * high, sine * low + cosine * high)


def rz(state: Array, wire: int, angle: Array) -> Array:
    """exp(-i angle Z / 2) on a complex state [2**Q]."""
    low, high = _split(state, wire)
    cosine, sine = _half_angle(angle, state.dtype)
    return _join((cosine - 1j * sine) * low, (cosine + 1j * sine) * high)


def hadamard(state: Array, wire: int) -> Array:
    """(X + Z) / sqrt(2) on a state [2**Q]."""
    low, high = _split(state, wire)
    return _join((low + high) * 0.5**0.5, (low - high) * 0.5**0.5)


def pauli_x(state: Array, wire: int) -> Array:
    """A bit flip on a state [2**Q]."""
    low, high = _split(state, wire)
    return _join(high, low)


def cnot(state: Array, control: int, target: int) -> Array:
    """Flips `target` where `control` is 1, on a state [2**Q]."""
    return _where_control(lambda part, wire: pauli_x(part, wire), state, control, target)


def cz(state: Array, first: int, second: int) -> Array:
    """Negates the amplitudes where both wires are 1, on a state [2**Q]."""

    def pauli_z(part, wire):
        low, high = _split(part, wire)
        return _join(low, -high)

    return _where_control(pauli_z, state, first, second)


def rzz(state: Array, first: int, second: int, angle: Array) -> Array:
    """exp(-i angle Z Z / 2) on a complex state [2**Q]."""
    low, high = _split(state, first)
    second -= second > first  # the wire's number once `first` is split off
    return _join(
        rz(low.reshape(-1), second, angle).reshape(low.shape),
        rz(high.reshape(-1), second, -angle).reshape(high.shape),
    )


_GATES: dict[str, Callable[..., Array]] = {
    "RX": rx,
    "RY": ry,
    "RZ": rz,
    "H": hadamard,
    "X": pauli_x,
    "CNOT": cnot,
    "CZ": cz,
    "RZZ": rzz,
}


def _split(state: Array, wire: int) -> tuple[Array, Array]:
    """The two halves [2**wire, 2**(Q-wire-1)] where the wire is 0 and where it is 1."""
    parts = state.reshape(2**wire, 2, -1)
    return parts[:, 0], parts[:, 1]


def _join(low: Array, high: Array) -> Array:
    return jnp.stack([low, high], axis=1).reshape(-1)


def _half_angle(angle: Array, dtype) -> tuple[Array, Array]:
    return lax.cos(angle * 0.5).astype(dtype), lax.sin(angle * 0.5).astype(dtype)


def _where_control(gate: Callable, state: Array, control: int, target: int) -> Array:
    low, high = _split(state, control)
    target -= target > control  # the wire's number once the control is split off
    return _join(low, gate(high.reshape(-1), target).reshape(high.shape))


def _is_index(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
