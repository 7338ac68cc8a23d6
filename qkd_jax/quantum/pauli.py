"""Expectations of Pauli strings such as "XIZ": one letter I, X, Y or Z for each wire, wire 0 first.

States are [2**Q], real or complex, of norm 1; batch with `jax.vmap`. A sum of strings with weights
w is `jnp.dot(w, pauli_expectations(state, strings))`.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from qkd_jax.errors import ConfigError
from qkd_jax.quantum.checks import MAX_SHOTS, as_integer, as_state
from qkd_jax.quantum.gates import PAULIS


def pauli_expectations(state: Array, strings: Sequence[str]) -> Array:
    """<P> of each Pauli string.

    Args:
      state: [2**Q] of norm 1.
      strings: K strings of Q letters; static.

    Returns:
      [K] real, in [-1, 1] up to rounding.

    Raises:
      ConfigError: on a wrong state, or a string that is not Q letters I, X, Y or Z.
    """
    state = as_state(state)
    strings = _as_strings(strings, state.size.bit_length() - 1)
    if not strings:
        return jnp.zeros(0, jnp.finfo(state.dtype).dtype)
    return jnp.stack([_expectation(state, string) for string in strings])


def sample_pauli_expectations(
    key: Array, state: Array, strings: Sequence[str], shots: int
) -> Array:
    """<P> of each Pauli string estimated from shots: every string is measured by its own.

    A shot gives +1 with probability (1 + <P>) / 2 and else -1.

    Args:
      key: a random key.
      state: [2**Q] of norm 1.
      strings: K strings of Q letters; static.
      shots: of each string, from 1 to 2**31 - 1; static.

    Returns:
      [K] real, unbiased, with variance (1 - <P>^2) / shots; NaN where the state is.

    Raises:
      ConfigError: as `pauli_expectations`, or on wrong shots.
    """
    shots = as_integer("shots", shots, 1, MAX_SHOTS)
    exact = pauli_expectations(state, strings)
    probabilities = jnp.clip((1 + exact) / 2, 0, 1)  # rounding may leave 1 + 1e-7
    counts = jax.random.binomial(key, shots, probabilities, dtype=exact.dtype)
    return jnp.where(jnp.isnan(exact), exact, 2 * counts / shots - 1)


def _as_strings(strings: Sequence[str], num_qubits: int) -> tuple[str, ...]:
    if isinstance(strings, str):
        raise ConfigError(f"strings: expected a sequence of Pauli strings, found {strings!r}")
    for position, string in enumerate(strings):
        right = isinstance(string, str) and len(string) == num_qubits and set(string) <= set("IXYZ")
        if not right:
            raise ConfigError(
                f"strings[{position}]: expected {num_qubits} letters I, X, Y or Z, one for each "
                f"wire, found {string!r}"
            )
    return tuple(strings)


def _expectation(state: Array, string: str) -> Array:
    """<state| P |state> of one string."""
    real = not jnp.iscomplexobj(state)
    if real and string.count("Y") % 2:  # imaginary and antisymmetric
        return jnp.zeros((), state.dtype)
    turned = state.astype(np.promote_types(state.dtype, np.complex64)) if "Y" in string else state
    for wire, letter in enumerate(string):
        if letter != "I":
            turned = PAULIS[letter](turned, wire)
    turned = turned.real if real else turned
    return jnp.vdot(state, turned, precision=lax.Precision.HIGHEST).real
