"""Fidelities, expectations, reduced states and shots of states.

All functions take states [2**Q], real or complex, of norm 1, and raise ConfigError on any other
shape or type; batch them with `jax.vmap`. They compute in single precision at least.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from qkd_jax.errors import ConfigError
from qkd_jax.quantum.checks import (
    MAX_SHOTS,
    MAX_SIMULATED_QUBITS,
    as_array,
    as_integer,
    as_real,
    as_state,
    is_real_scalar,
    real_number,
)


def fidelity(psi: Array, phi: Array) -> Array:
    """|<psi|phi>|^2 of two states [2**Q]: a real scalar, in [0, 1] up to rounding."""
    psi, phi = as_state(psi), as_state(phi)
    if psi.shape != phi.shape:
        raise ConfigError(
            f"fidelity: expected two states of one size, found {list(psi.shape)} and "
            f"{list(phi.shape)}"
        )
    dtype = np.result_type(psi.dtype, phi.dtype)
    overlap = jnp.vdot(psi.astype(dtype), phi.astype(dtype), precision=lax.Precision.HIGHEST)
    return _square_modulus(overlap)


def expectation_z(state: Array) -> Array:
    """<Z> of every qubit: [Q] in [-1, 1]."""
    return _signed_sums(_square_modulus(as_state(state)))


def bloch_vectors(state: Array) -> Array:
    """<X>, <Y>, <Z> of every qubit's reduced state: [Q, 3]; <Y> is zero for a real state."""
    state, vectors = as_state(state), []
    for wire in range(_num_qubits(state)):
        parts = state.reshape(2**wire, 2, -1)
        low, high = parts[:, 0], parts[:, 1]
        coherence = 2 * jnp.sum(low.conj() * high)
        z = jnp.sum(_square_modulus(low)) - jnp.sum(_square_modulus(high))
        vectors.append(jnp.stack([coherence.real, coherence.imag, z]))
    return jnp.stack(vectors)


def projected_kernel(bloch_a: Array, bloch_b: Array, gamma: float | Array) -> Array:
    """The projected quantum kernel: a Gaussian of the distance of single-qubit states.

    exp(-gamma sum_j |rho_j - rho'_j|_F^2), where |rho - rho'|_F^2 is half of the squared distance
    of the Bloch vectors.

    Args:
      bloch_a: [B, Q, 3] from `bloch_vectors`.
      bloch_b: [T, Q, 3].
      gamma: one finite number above 0. Inside `jax.jit` its value is not checked.

    Returns:
      [B, T] in (0, 1], down to 0 where the exponential underflows.

    Raises:
      ConfigError: on a wrong shape or type, or a gamma that is not a finite number above 0.

    Source: Huang et al., "Power of data in quantum machine learning", 2021, eq. 9.
    """
    bloch_a, bloch_b = (
        as_real(name, bloch, "real Bloch vectors")
        for name, bloch in (("bloch_a", bloch_a), ("bloch_b", bloch_b))
    )
    if not bloch_a.ndim == bloch_b.ndim == 3 or not (
        bloch_a.shape[1:] == bloch_b.shape[1:] and bloch_a.shape[1] >= 1 and bloch_a.shape[2] == 3
    ):
        raise ConfigError(
            f"projected_kernel: expected Bloch vectors [B, Q, 3] and [T, Q, 3], found "
            f"{list(bloch_a.shape)} and {list(bloch_b.shape)}; they come from bloch_vectors"
        )
    dtype = np.result_type(bloch_a.dtype, bloch_b.dtype)
    difference = bloch_a.astype(dtype)[:, None] - bloch_b.astype(dtype)[None]
    distance = jnp.sum(jnp.square(difference), axis=(-2, -1))
    return jnp.exp(-0.5 * _width(gamma, dtype) * distance)


def amplitude_state(vectors: Array, num_qubits: int) -> Array:
    """Vectors used directly as amplitudes: cut or padded with zeros to 2**Q and normalised.

    Exact up to rounding for every finite vector, however large or small its entries. Numbers
    below the smallest normal one (float32: 1.2e-38) are zeros where the device flushes them (CPUs).

    Args:
      vectors: [..., D] floating or complex, D >= 1. Entries past 2**Q are lost.
      num_qubits: Q.

    Returns:
      [..., 2**Q] of norm 1 and of the type of `vectors`. A vector that is zero (after the cut)
      stays zero: its fidelity with every state is 0 and its gradient is finite. A NaN or infinite
      entry (after the cut) makes every entry NaN, and with them every fidelity of the state.

    Raises:
      ConfigError: on a wrong shape or type, or unless 1 <= Q <= 30.
    """
    size = 2 ** as_integer("num_qubits", num_qubits, 1, MAX_SIMULATED_QUBITS)
    vectors = as_array("vectors", vectors)
    dtype = vectors.dtype
    if not jnp.issubdtype(dtype, jnp.inexact) or vectors.ndim < 1 or vectors.shape[-1] < 1:
        raise ConfigError(
            "vectors: expected floating or complex entries of shape [..., D] with D >= 1, found "
            f"{dtype} of shape {list(vectors.shape)}"
        )
    vectors = vectors[..., :size].astype(np.result_type(np.float32, dtype))
    missing = size - vectors.shape[-1]
    vectors = jnp.pad(vectors, [(0, 0)] * (vectors.ndim - 1) + [(0, missing)])
    if jnp.iscomplexobj(vectors):  # as real ones, since the modulus of an entry can overflow
        parts = jnp.concatenate([vectors.real, vectors.imag], axis=-1)
        return lax.complex(*jnp.split(_normalised(parts), 2, axis=-1))
    return _normalised(vectors).astype(dtype)


def _normalised(vectors: Array) -> Array:
    """v / |v| along the last axis of real vectors; zero stays zero."""
    # First the largest entry is scaled to between 1 and 6, so that squares neither overflow nor
    # underflow. The scale is a power of two, which is exact; a quarter of the largest keeps both
    # the power and its reciprocal normal, since XLA flushes subnormal numbers. Without the barrier
    # XLA would move a constant scale out of the sum of squares again.
    info = jnp.finfo(vectors.dtype)
    largest = lax.stop_gradient(jnp.max(jnp.abs(vectors), axis=-1, keepdims=True))
    quarter = jnp.maximum(largest, 4 * info.tiny) / 4
    power = lax.reduce_precision(quarter, exponent_bits=info.nexp, mantissa_bits=0)
    vectors = lax.optimization_barrier(vectors * jnp.where(largest == 0, 1, 1 / power))
    squared_norm = jnp.sum(jnp.square(vectors), axis=-1, keepdims=True)
    return vectors / jnp.sqrt(jnp.where(squared_norm == 0, 1, squared_norm))


def sample(key: Array, state: Array, shots: int) -> Array:
    """Basis states measured on a state [2**Q]: [shots] integers, wire 0 the most significant bit.

    By inverse transform sampling; probabilities are exact up to rounding (float32: about 1e-7).

    Returns:
      [shots] integers in 0..2**Q-1, also for a zero or NaN state inside `jax.jit`, where values
      are unknown and such a state cannot be refused.

    Raises:
      ConfigError: on anything but a state, on one that is known to be zero, NaN or infinite, or
        unless 1 <= shots < 2**31.
    """
    shots = as_integer("shots", shots, 1, MAX_SHOTS)
    cumulative = jnp.cumsum(_square_modulus(as_state(state)))
    total = cumulative[-1]
    if _is_known(total) and not 0 < jax.device_get(total) < np.inf:
        raise ConfigError(
            f"state: expected norm 1, found a squared norm of {jax.device_get(total)}, which gives "
            "no probabilities; amplitude_state normalises"
        )
    uniform = jax.random.uniform(key, (shots,), cumulative.dtype)
    # Without the last boundary, rounding cannot give an outcome that is out of range.
    return jnp.searchsorted(cumulative[:-1], uniform * total, side="right")


def sample_expectation_z(key: Array, state: Array, shots: int) -> Array:
    """<Z> of every qubit estimated from shots: [Q], unbiased, with variance (1 - <Z>^2) / shots.

    Raises ConfigError as `sample` does; inside `jax.jit` a state that is zero, NaN or infinite
    gives NaN.
    """
    state, shots = as_state(state), as_integer("shots", shots, 1, MAX_SHOTS)
    counts = jnp.bincount(sample(key, state, shots), length=state.size)
    squares = _square_modulus(state)
    total = jnp.sum(squares)
    estimates = _signed_sums(counts.astype(squares.dtype)) / shots
    return jnp.where((total > 0) & (total < jnp.inf), estimates, jnp.nan)


def sample_fidelity(key: Array, fidelities: Array, shots: int) -> Array:
    """Fidelities p [...] as a device would estimate them, each from its own shots.

    A shot runs one circuit forward and the other backward and finds |0...0> with probability p.

    Args:
      key: a random key.
      fidelities: [...] real, in [0, 1] up to rounding.
      shots: static, from 1 to 2**31 - 1.

    Returns:
      [...] the fraction of |0...0>: unbiased, with variance p (1 - p) / shots. NaN where p is NaN
      or more than 0.01 outside of [0, 1], which is more than rounding.

    Raises:
      ConfigError: on fidelities that are not real and floating, or wrong shots.
    """
    shots = as_integer("shots", shots, 1, MAX_SHOTS)
    fidelities = as_real("fidelities", fidelities, "real floating numbers")
    probabilities = jnp.clip(fidelities, 0, 1)  # rounding may leave 1 + 1e-7
    fractions = jax.random.binomial(key, shots, probabilities, dtype=probabilities.dtype) / shots
    return jnp.where(jnp.abs(fidelities - probabilities) <= 0.01, fractions, jnp.nan)


def _square_modulus(array: Array) -> Array:
    """|a|^2 without the square root in `abs`, which has no gradient at 0."""
    if jnp.iscomplexobj(array):
        return jnp.square(array.real) + jnp.square(array.imag)
    return jnp.square(array)


def _signed_sums(weights: Array) -> Array:
    """[Q]: for every wire, the sum of `weights` [2**Q] where it is 0 minus that where it is 1."""
    sums = [weights.reshape(2**j, 2, -1).sum((0, 2)) for j in range(_num_qubits(weights))]
    return jnp.stack([zero - one for zero, one in sums])


def _num_qubits(state: Array) -> int:
    return state.size.bit_length() - 1


def _width(gamma: float | Array, dtype) -> Array:
    """The gamma of a kernel as a scalar of this type, checked unless it is traced."""
    largest = float(jnp.finfo(dtype).max)  # beyond it gamma times no distance would be NaN
    if _is_known(gamma):
        is_width = 0 < real_number(gamma) <= largest
    else:
        is_width = is_real_scalar(gamma)
    if not is_width:
        raise ConfigError(f"gamma: expected one finite number above 0, found {gamma!r}")
    return jnp.asarray(gamma, dtype)


def _is_known(array: Array) -> bool:
    """Whether the values of the array are known, which they are not while JAX traces."""
    return not isinstance(array, jax.core.Tracer)
