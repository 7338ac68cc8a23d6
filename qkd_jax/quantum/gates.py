"""The gates: what they are called, and what each does to a state.

A gate is a function of a state [2**Q], its wire or wires and, for a parametrised gate, its angle in
radians. Matrices are those of PennyLane and of OpenQASM 3's standard gates, global phases included;
a rotation is exp(-i angle G / 2) for its generator G. Wire 0 is the most significant bit.

The functions rely on the checks of `statevector.Gate` and `statevector.apply`, and those that are
not real need a complex state.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax


class GateKind(NamedTuple):
    """What every gate of one name has in common.

    Attributes:
      act: state, wire(s) and perhaps an angle -> state.
      num_wires: one or two; of a controlled gate the control comes first.
      has_parameter: whether it has an angle.
      is_real: whether its matrix is real.
      is_diagonal: whether its matrix is diagonal.
      controlled: the name of the gate that it applies where the control is 1; else empty.
    """

    act: Callable[..., Array]
    num_wires: int = 1
    has_parameter: bool = False
    is_real: bool = False
    is_diagonal: bool = False
    controlled: str = ""


def split(state: Array, wire: int) -> tuple[Array, Array]:
    """The two halves [2**wire, 2**(Q-wire-1)] where the wire is 0 and where it is 1."""
    parts = state.reshape(2**wire, 2, -1)
    return parts[:, 0], parts[:, 1]


def join(low: Array, high: Array) -> Array:
    """The state [2**Q] whose halves these are."""
    return jnp.stack([low, high], axis=1).reshape(-1)


def half_angle(angle: Array, dtype) -> tuple[Array, Array]:
    """Cosine and sine of half of an angle."""
    return lax.cos(angle * 0.5).astype(dtype), lax.sin(angle * 0.5).astype(dtype)


def _rx(state: Array, wire: int, angle: Array) -> Array:
    """exp(-i angle X / 2)."""
    low, high = split(state, wire)
    cosine, sine = half_angle(angle, state.dtype)
    return join(cosine * low - 1j * sine * high, cosine * high - 1j * sine * low)


def _ry(state: Array, wire: int, angle: Array) -> Array:
    """exp(-i angle Y / 2): [[cos, -sin], [sin, cos]](angle / 2)."""
    low, high = split(state, wire)
    cosine, sine = half_angle(angle, state.dtype)
    return join(cosine * low - sine * high, sine * low + cosine * high)


def _rz(state: Array, wire: int, angle: Array) -> Array:
    """exp(-i angle Z / 2)."""
    low, high = split(state, wire)
    cosine, sine = half_angle(angle, state.dtype)
    return join((cosine - 1j * sine) * low, (cosine + 1j * sine) * high)


def _p(state: Array, wire: int, angle: Array) -> Array:
    """diag(1, e^(i angle))."""
    low, high = split(state, wire)
    cosine, sine = half_angle(2 * angle, state.dtype)
    return join(low, (cosine + 1j * sine) * high)


def _h(state: Array, wire: int) -> Array:
    """(X + Z) / sqrt(2)."""
    low, high = split(state, wire)
    return join((low + high) * 0.5**0.5, (low - high) * 0.5**0.5)


def _x(state: Array, wire: int) -> Array:
    """A bit flip."""
    low, high = split(state, wire)
    return join(high, low)


def _y(state: Array, wire: int) -> Array:
    """[[0, -i], [i, 0]]."""
    low, high = split(state, wire)
    return join(-1j * high, 1j * low)


def _sx(state: Array, wire: int) -> Array:
    """The square root of X with positive real parts: e^(i pi / 4) RX(pi / 2)."""
    low, high = split(state, wire)
    plus, minus = 0.5 + 0.5j, 0.5 - 0.5j
    return join(plus * low + minus * high, minus * low + plus * high)


def _phase(factor: complex) -> Callable[[Array, int], Array]:
    """diag(1, factor)."""

    def act(state: Array, wire: int) -> Array:
        low, high = split(state, wire)
        return join(low, factor * high)

    return act


def _swap(state: Array, first: int, second: int) -> Array:
    """Exchanges the two wires."""
    low, high = sorted((first, second))
    parts = state.reshape(2**low, 2, 2 ** (high - low - 1), 2, -1)
    return jnp.swapaxes(parts, 1, 3).reshape(-1)


def _controlled(act: Callable, state: Array, control: int, target: int, *angle: Array) -> Array:
    """Acts on `target` where `control` is 1."""
    low, high = split(state, control)
    target -= target > control  # the wire's number once the control is split off
    return join(low, act(high.reshape(-1), target, *angle).reshape(high.shape))


def _pauli_pair(pauli: Callable, state: Array, first: int, second: int, angle: Array) -> Array:
    """exp(-i angle P P / 2) for the Pauli operator P."""
    cosine, sine = half_angle(angle, state.dtype)
    return cosine * state - 1j * sine * pauli(pauli(state, first), second)


def _rzz(state: Array, first: int, second: int, angle: Array) -> Array:
    """exp(-i angle Z Z / 2)."""
    low, high = split(state, first)
    second -= second > first  # the wire's number once `first` is split off
    return join(
        _rz(low.reshape(-1), second, angle).reshape(low.shape),
        _rz(high.reshape(-1), second, -angle).reshape(high.shape),
    )


_z = _phase(-1)
# The eighth root of 1, to rounding the same real and imaginary part.
_EIGHTH = complex(0.5**0.5, 0.5**0.5)

_ONE_WIRE = {
    "RX": GateKind(_rx, has_parameter=True),
    "RY": GateKind(_ry, has_parameter=True, is_real=True),
    "RZ": GateKind(_rz, has_parameter=True, is_diagonal=True),
    "P": GateKind(_p, has_parameter=True, is_diagonal=True),
    "H": GateKind(_h, is_real=True),
    "X": GateKind(_x, is_real=True),
    "Y": GateKind(_y),
    "Z": GateKind(_z, is_real=True, is_diagonal=True),
    "S": GateKind(_phase(1j), is_diagonal=True),
    "SDG": GateKind(_phase(-1j), is_diagonal=True),
    "T": GateKind(_phase(_EIGHTH), is_diagonal=True),
    "TDG": GateKind(_phase(_EIGHTH.conjugate()), is_diagonal=True),
    "SX": GateKind(_sx),
}
_CONTROLLED = {"CNOT": "X", "CY": "Y", "CZ": "Z", "CH": "H"} | {
    f"C{name}": name for name in ("RX", "RY", "RZ", "P")
}

GATE_KINDS: dict[str, GateKind] = {
    **_ONE_WIRE,
    **{
        name: _ONE_WIRE[base]._replace(
            act=partial(_controlled, _ONE_WIRE[base].act), num_wires=2, controlled=base
        )
        for name, base in _CONTROLLED.items()
    },
    "SWAP": GateKind(_swap, num_wires=2, is_real=True),
    "RXX": GateKind(partial(_pauli_pair, _x), num_wires=2, has_parameter=True),
    "RYY": GateKind(partial(_pauli_pair, _y), num_wires=2, has_parameter=True),
    "RZZ": GateKind(_rzz, num_wires=2, has_parameter=True, is_diagonal=True),
}

PAULIS: dict[str, Callable[[Array, int], Array]] = {"X": _x, "Y": _y, "Z": _z}
