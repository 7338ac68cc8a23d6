"""What can be read off a state: fidelities, expectations, reduced states, shots, gradients.

All functions take states [2**Q], real or complex, of norm 1; batch them with `jax.vmap`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from qkd_jax.errors import ConfigError


def fidelity(psi: Array, phi: Array) -> Array:
    """|<psi|phi>|^2 of two states [2**Q]: a real scalar, in [0, 1] up to rounding."""
    if psi.shape != phi.shape:
        raise ConfigError(f"a fidelity needs states of one size, found {psi.shape}, {phi.shape}")
    dtype = np.result_type(psi.dtype, phi.dtype)
    overlap = jnp.vdot(psi.astype(dtype), phi.astype(dtype), precision=lax.Precision.HIGHEST)
    return _square_modulus(overlap)


def expectation_z(state: Array) -> Array:
    """<Z> of every qubit: [Q] in [-1, 1]."""
    return _signed_sums(_square_modulus(state))


def bloch_vectors(state: Array) -> Array:
    """<X>, <Y>, <Z> of every qubit's reduced state: [Q, 3]; <Y> is zero for a real state."""
    vectors = []
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
      gamma: positive.

    Returns:
      [B, T] in (0, 1].

    Source: Huang et al., "Power of data in quantum machine learning", 2021, eq. 9.
    """
    if bloch_a.ndim != 3 or bloch_b.ndim != 3 or bloch_a.shape[1:] != bloch_b.shape[1:]:
        raise ConfigError(
            f"projected_kernel needs Bloch vectors [B, Q, 3] and [T, Q, 3], found "
            f"{list(bloch_a.shape)} and {list(bloch_b.shape)}"
        )
    difference = bloch_a[:, None] - bloch_b[None]
    return jnp.exp(-0.5 * gamma * jnp.sum(jnp.square(difference), axis=(-2, -1)))


def amplitude_state(vectors: Array, num_qubits: int) -> Array:
    """Vectors used directly as amplitudes: cut or padded with zeros to 2**Q and normalised.

    Args:
      vectors: [..., D] floating or complex. Entries past 2**Q are lost.
      num_qubits: Q.

    Returns:
      [..., 2**Q] of norm 1. A vector that is zero (after the cut) stays zero: its fidelity with
      every state is 0 and its gradient is finite.
    """
    if num_qubits < 1:
        raise ConfigError(f"amplitude_state needs num_qubits >= 1, found {num_qubits}")
    vectors = vectors[..., : 2**num_qubits]
    missing = 2**num_qubits - vectors.shape[-1]
    vectors = jnp.pad(vectors, [(0, 0)] * (vectors.ndim - 1) + [(0, missing)])
    # The largest entry becomes 1 first, so that squares neither overflow nor underflow.
    largest = lax.stop_gradient(jnp.max(jnp.abs(vectors), axis=-1, keepdims=True))
    is_zero = largest == 0
    vectors = vectors / jnp.where(is_zero, 1, largest).astype(vectors.dtype)
    squared_norm = jnp.sum(_square_modulus(vectors), axis=-1, keepdims=True)
    norm = jnp.sqrt(jnp.where(is_zero, 1, squared_norm))
    return vectors / norm.astype(vectors.dtype)


def sample(key: Array, state: Array, shots: int) -> Array:
    """Basis states measured on a state [2**Q]: [shots] integers, wire 0 the most significant bit.

    By inverse transform sampling; probabilities are met up to rounding (float32: about 1e-7).
    """
    _check_shots(shots)
    cumulative = jnp.cumsum(_square_modulus(state))
    uniform = jax.random.uniform(key, (shots,), cumulative.dtype)
    return jnp.searchsorted(cumulative, uniform * cumulative[-1], side="right")


def sample_expectation_z(key: Array, state: Array, shots: int) -> Array:
    """<Z> of every qubit estimated from shots: [Q], unbiased, with variance (1 - <Z>^2) / shots."""
    counts = jnp.bincount(sample(key, state, shots), length=state.shape[0])
    return _signed_sums(counts.astype(_square_modulus(state).dtype)) / shots


def sample_fidelity(key: Array, fidelities: Array, shots: int) -> Array:
    """Fidelities p [...] as a device would estimate them, each from its own shots.

    A shot runs one circuit forward and the other backward and finds |0...0> with probability p.

    Returns:
      [...] the fraction found: unbiased, with variance p (1 - p) / shots.
    """
    _check_shots(shots)
    probabilities = jnp.clip(fidelities, 0, 1)  # rounding may leave 1 + 1e-7
    return jax.random.binomial(key, shots, probabilities, dtype=probabilities.dtype) / shots


def parameter_shift(function: Callable[[Array], Array], parameters: Array) -> Array:
    """The Jacobian by the parameter-shift rule: a test oracle that needs no autodiff.

    (f(p + pi/2) - f(p - pi/2)) / 2 in each parameter; exact when f is an expectation or a
    fidelity, linear in one of the two states, and every parameter belongs to one gate. Where gates
    share a parameter use `separate_parameters` and sum over the copies.

    Args:
      function: [P] -> [...].
      parameters: [P].

    Returns:
      [P, ...].

    Source: Schuld et al., "Evaluating analytic gradients on quantum hardware", 2019.
    """
    shifts = jnp.eye(parameters.shape[0], dtype=parameters.dtype) * (np.pi / 2)
    return jax.vmap(
        lambda shift: (function(parameters + shift) - function(parameters - shift)) / 2
    )(shifts)


def _square_modulus(array: Array) -> Array:
    """|a|^2 without the square root in `abs`, which has no gradient at 0."""
    if jnp.iscomplexobj(array):
        return jnp.square(array.real) + jnp.square(array.imag)
    return jnp.square(array)


def _signed_sums(weights: Array) -> Array:
    """For every wire, the weight [2**Q] where it is 0 less the weight where it is 1: [Q]."""
    sums = [weights.reshape(2**j, 2, -1).sum((0, 2)) for j in range(_num_qubits(weights))]
    return jnp.stack([zero - one for zero, one in sums])


def _num_qubits(state: Array) -> int:
    num_qubits = state.shape[0].bit_length() - 1 if state.ndim == 1 else 0
    if num_qubits < 1 or state.shape != (2**num_qubits,):
        raise ConfigError(
            f"a state has shape [2**Q], found {list(state.shape)}; batch with jax.vmap"
        )
    return num_qubits


def _check_shots(shots: int) -> None:
    if shots < 1:
        raise ConfigError(f"shots must be >= 1, found {shots}")
