"""A statevector simulator for any circuit of one- and two-qubit gates.

Conventions: wire 0 is the most significant bit of the state's index, angles are radians, and a
rotation is exp(-i angle G / 2) for its generator G, as in PennyLane; `gates.py` has every gate. A
circuit is plain data: it can be hashed, compared, printed and passed to `jax.jit` as a static
argument.
"""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jax import Array

from qkd_jax.errors import ConfigError
from qkd_jax.quantum.checks import (
    MAX_SIMULATED_QUBITS,
    as_integer,
    as_real,
    as_state,
    check_shape,
)
from qkd_jax.quantum.gates import GATE_KINDS


@dataclass(frozen=True)
class Gate:
    """One gate: its name, its wires (the control first) and the index of its parameter.

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
        angle = () if gate.parameter is None else (parameters[gate.parameter],)
        state = GATE_KINDS[gate.name].act(state, *gate.wires, *angle)
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


def _as_tuple(name: str, values) -> tuple:
    try:
        return tuple(values)
    except TypeError as error:
        raise ConfigError(f"{name}: expected a sequence, found {values!r}") from error
