"""Checks of what the simulator takes: numbers, states, angles.

Arrays are checked by shape and type, never by value, so that every check passes through `jax.jit`,
`jax.vmap` and `jax.grad`.
"""

import operator
import reprlib

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from qkd_jax.errors import ConfigError

MAX_SIMULATED_QUBITS = 30  # 2**31 amplitudes no longer have a 32-bit index
MAX_SHOTS = 2**31 - 1  # counts are 32-bit integers


def as_integer(name: str, value, low: int, high: int | None = None) -> int:
    """A Python integer from any kind of integer, NumPy's and 0-d arrays included.

    Raises:
      ConfigError: on a boolean, on any float, or outside of low..high.
    """
    try:
        is_boolean = isinstance(value, bool | np.bool_)
        number = None if is_boolean else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < low or (high is not None and number > high):
        expected = f">= {low}" if high is None else f"from {low} to {high}"
        raise ConfigError(f"{name}: expected an integer {expected}, found {value!r}")
    return number


def real_number(value) -> float:
    """The value of a real number; NaN for anything else (boolean, text, list, traced value)."""
    try:
        number = np.asarray(value)
    except (TypeError, ValueError):
        return np.nan
    return float(number) if is_real_scalar(number) else np.nan


def is_real_scalar(array) -> bool:
    """Whether an array, perhaps a traced one, holds one floating or integer number."""
    is_real = any(jnp.issubdtype(array.dtype, kind) for kind in (jnp.floating, jnp.integer))
    return is_real and array.ndim == 0


def as_state(state, num_qubits: int | None = None) -> Array:
    """`state` as an array [2**Q], Q >= 1, floating or complex, in single precision at least.

    Args:
      state: an array, or what JAX can make one of.
      num_qubits: Q, where the rest of the computation fixes it.

    Raises:
      ConfigError: on anything else.
    """
    state = as_array("state", state)
    if not jnp.issubdtype(state.dtype, jnp.inexact):
        raise ConfigError(f"state: expected floating or complex amplitudes, found {state.dtype}")
    size = state.size
    if state.ndim != 1 or size < 2 or size & (size - 1):
        raise ConfigError(
            f"state: expected shape [2**Q], found {list(state.shape)}; batch with jax.vmap"
        )
    if num_qubits is not None and size != 2**num_qubits:
        raise ConfigError(f"state: expected shape [{2**num_qubits}], found [{size}]")
    return _single_at_least(state)


def as_real(name: str, values, meaning: str = "real angles in radians") -> Array:
    """`values` as a real floating array in single precision at least.

    Raises:
      ConfigError: on integers, booleans, complex numbers and anything that is not an array.
    """
    values = as_array(name, values)
    if not jnp.issubdtype(values.dtype, jnp.floating):
        raise ConfigError(f"{name}: expected {meaning}, found {values.dtype}")
    return _single_at_least(values)


def as_array(name: str, values) -> Array:
    """`values` as a JAX array; raises ConfigError where they cannot be one."""
    try:
        if any(isinstance(leaf, str) for leaf in jax.tree.leaves(values)):
            raise TypeError("text")  # JAX would look for the type of that name first
        return jnp.asarray(values)
    except (TypeError, ValueError, OverflowError) as error:
        found = reprlib.repr(values)
        raise ConfigError(f"{name}: expected an array of numbers, found {found}") from error


def check_shape(
    name: str,
    found: tuple[int, ...],
    expected: tuple[int | None, ...],
    advice: str = "batch with jax.vmap",
) -> None:
    """Raises ConfigError unless the shapes agree; None stands for any batch size."""
    fits = len(found) == len(expected) and all(
        size in (None, other) for size, other in zip(expected, found, strict=True)
    )
    if not fits:
        sizes = ", ".join("batch" if size is None else str(size) for size in expected)
        raise ConfigError(f"{name}: expected shape [{sizes}], found {list(found)}; {advice}")


def _single_at_least(array: Array) -> Array:
    return array.astype(np.result_type(np.float32, array.dtype))
