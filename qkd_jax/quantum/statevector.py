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
from qkd_jax.quantum.checks import (
    MAX_SIMULATED_QUBITS,
    as_integer,
    as_real,
    as_state,
    check_shape,
)


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
    Integers of any kind (NumPy's too) are taken and kept as `int`.

    Raises:
      ConfigError: on an unknown name, wires that do not fit it, or a wrong parameter.
    """

    name: str
    wires: tuple[int, ...]
    parameter: int | None = None

    def __post_init__(self):
        kind = GATE_KINDS.get(self.name) if isinstance(self.name, str) else None
        if kind is None:
            raise ConfigError(
                f"gate name: expected one of {', '.join(GATE_KINDS)}, found {self.name!r}"
            )
        name = str(self.name)  # np.str_ becomes str
        wires = _as_tuple(f"gate {name}: wires", self.wires)
        if len(wires) != kind.num_wires:
            raise ConfigError(f"gate {name}: expected {kind.num_wires} wire(s), found {wires!r}")
        wires = tuple(as_integer(f"gate {name}: wires[{i}]", w, 0) for i, w in enumerate(wires))
        if len(set(wires)) != len(wires):
            raise ConfigError(f"gate {name}: expected distinct wires, found {wires}")
        parameter = self.parameter
        if kind.has_parameter:
            parameter = as_integer(f"gate {name}: index of its angle (parameter)", parameter, 0)
        elif parameter is not None:
            raise ConfigError(f"gate {name}: expected no parameter, found {parameter!r}")
        for field, value in (("name", name), ("wires", wires), ("parameter", parameter)):
            object.__setattr__(self, field, value)


@dataclass(frozen=True)
class Circuit:
    """Gates in the order in which they act on |0...0>.

    Raises:
      ConfigError: unless num_qubits >= 1 and all are gates on wires 0..num_qubits-1.
    """

    num_qubits: int
    gates: tuple[Gate, ...]

    def __post_init__(self):
        num_qubits = as_integer("Circuit.num_qubits", self.num_qubits, 1)
        object.__setattr__(self, "num_qubits", num_qubits)
        object.__setattr__(self, "gates", _as_tuple("Circuit.gates", self.gates))
        for position, gate in enumerate(self.gates):
            if not isinstance(gate, Gate):
                raise ConfigError(f"gates[{position}]: expected a Gate, found {gate!r}")
            if max(gate.wires) >= self.num_qubits:
                raise ConfigError(
                    f"gates[{position}]: expected wires from 0 to {num_qubits - 1}, as the circuit "
                    f"has {num_qubits} qubit(s), found {gate.name} on wires {gate.wires}"
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
    """|0...0> as a vector [2**Q].

    Raises:
      ConfigError: unless 1 <= Q <= 30 and `dtype` is floating or complex.
    """
    num_qubits = as_integer("num_qubits", num_qubits, 1, MAX_SIMULATED_QUBITS)
    if not jnp.issubdtype(dtype, jnp.inexact):
        raise ConfigError(f"dtype: expected floating or complex, found {jnp.dtype(dtype)}")
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
    parameters = as_real("parameters", parameters)
    check_shape("parameters", parameters.shape, (circuit.num_parameters,))
    if state is None:
        state = zero_state(circuit.num_qubits, parameters.dtype)
    state = as_state(state, circuit.num_qubits)
    dtype = np.result_type(parameters.dtype, state.dtype)
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


# The gates: [2**Q], wire(s), angle -> [2**Q]. RX, RZ and RZZ need a complex state. They are private
# because they rely on the checks of `apply` and `Gate`.


def _rx(state: Array, wire: int, angle: Array) -> Array:
    """exp(-i angle X / 2) on a complex state [2**Q]."""
    low, high = _split(state, wire)
    cosine, sine = _half_angle(angle, state.dtype)
    return _join(cosine * low - 1j * sine * high, cosine * high - 1j * sine * low)


def _ry(state: Array, wire: int, angle: Array) -> Array:
    """exp(-i angle Y / 2) on a state [2**Q]: [[cos, -sin], [sin, cos]](angle / 2)."""
    low, high = _split(state, wire)
    cosine, sine = _half_angle(angle, state.dtype)
    return _join(cosine * low - sine * high, sine * low + cosine * high)


def _rz(state: Array, wire: int, angle: Array) -> Array:
    """exp(-i angle Z / 2) on a complex state [2**Q]."""
    low, high = _split(state, wire)
    cosine, sine = _half_angle(angle, state.dtype)
    return _join((cosine - 1j * sine) * low, (cosine + 1j * sine) * high)


def _hadamard(state: Array, wire: int) -> Array:
    """(X + Z) / sqrt(2) on a state [2**Q]."""
    low, high = _split(state, wire)
    return _join((low + high) * 0.5**0.5, (low - high) * 0.5**0.5)


def _pauli_x(state: Array, wire: int) -> Array:
    """A bit flip on a state [2**Q]."""
    low, high = _split(state, wire)
    return _join(high, low)


def _cnot(state: Array, control: int, target: int) -> Array:
    """Flips `target` where `control` is 1, on a state [2**Q]."""
    return _where_control(_pauli_x, state, control, target)


def _cz(state: Array, first: int, second: int) -> Array:
    """Negates the amplitudes where both wires are 1, on a state [2**Q]."""

    def pauli_z(part, wire):
        low, high = _split(part, wire)
        return _join(low, -high)

    return _where_control(pauli_z, state, first, second)


def _rzz(state: Array, first: int, second: int, angle: Array) -> Array:
    """exp(-i angle Z Z / 2) on a complex state [2**Q]."""
    low, high = _split(state, first)
    second -= second > first  # the wire's number once `first` is split off
    return _join(
        _rz(low.reshape(-1), second, angle).reshape(low.shape),
        _rz(high.reshape(-1), second, -angle).reshape(high.shape),
    )


_GATES: dict[str, Callable[..., Array]] = {
    "RX": _rx,
    "RY": _ry,
    "RZ": _rz,
    "H": _hadamard,
    "X": _pauli_x,
    "CNOT": _cnot,
    "CZ": _cz,
    "RZZ": _rzz,
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


def _as_tuple(name: str, values) -> tuple:
    try:
        return tuple(values)
    except TypeError as error:
        raise ConfigError(f"{name}: expected a sequence, found {values!r}") from error
