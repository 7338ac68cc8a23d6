"""Fast forms of layers of one-qubit rotations and an open CNOT chain.

The chain runs CNOT(0 -> 1), CNOT(1 -> 2), ...: bit j becomes the parity of bits 0..j. If the bits
before some qubits have parity 1, the chain flips all of those qubits, which reverses the order of
their amplitudes. So reversals are enough, and no step gathers or scatters. Every product asks for
full precision, since accelerators round the inputs of a default product to bfloat16.
"""

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from qkd_jax.quantum.checks import as_state

HIGHEST = lax.Precision.HIGHEST
GROUP_SIZE = 4  # qubits rotated by one 16 x 16 Kronecker product; larger groups cost more flops


def layered_state(rotations: list[Array], last_chain: bool) -> Array:
    """The state [2**Q] after all layers; the chain of the last layer only if asked for."""
    num_layers, num_qubits = len(rotations), rotations[0].shape[0]
    vectors = rotations[0][:, :, 0]
    if num_layers == 1:
        return product_state(vectors, last_chain)
    if num_qubits == 1:
        state, done = vectors[0], 1
    else:
        chain = last_chain or num_layers > 2
        left, right = two_layer_halves(vectors, rotations[1], chain)
        if chain:
            left = left.reshape(-1, 2, 2)
            state = jnp.einsum("awy,wyb->awb", left, _and_reversed(right), precision=HIGHEST)
        else:
            state = jnp.dot(left, right, precision=HIGHEST)
        state, done = state.reshape(-1), 2
    for layer in range(done, num_layers):
        state = apply_layer(state, rotations[layer], last_chain or layer < num_layers - 1)
    return state


def product_state(vectors: Array, chain: bool) -> Array:
    """The product of one-qubit states [Q, 2], then the chain: [2**Q]."""
    state = vectors[-1]
    for vector in vectors[-2::-1]:
        if_one = state[::-1] if chain else state
        state = jnp.concatenate([vector[0] * state, vector[1] * if_one])
    return state


def two_layer_halves(vectors: Array, rotations: Array, chain: bool) -> tuple[Array, Array]:
    """Product state, chain, rotations and, if asked for, the chain again, as two halves.

    Let y be the bits after the first chain. Its bit j is x_j ^ y_{j-1}, so only y_{j-1} and y_j
    meet in qubit j: the state is a matrix-product state of bond 2.

    Args:
      vectors: [Q, 2] the product state, Q >= 2.
      rotations: [Q, 2, 2] of the second layer.
      chain: whether the second chain acts inside each half. The one CNOT between the halves is
        left to the caller: it reverses the right half where the left half ends in a 1.

    Returns:
      left [2**(Q//2), 2] and right [2, 2**(Q - Q//2)] with state = left @ right.
    """
    num_qubits = vectors.shape[0]
    half = num_qubits // 2
    by_previous = jnp.stack([vectors, vectors[:, ::-1]], axis=1)  # [Q, y_{j-1}, y_j]
    by_previous = by_previous.astype(rotations.dtype)
    sites = by_previous[:, :, None, :] * rotations[:, None, :, :]  # [Q, y_{j-1}, z_j, y_j]

    # Sums over the bond have two terms and are written out: XLA fuses these, but not a small dot.
    left = sites[0, 0]
    for site in sites[1:half]:
        if chain:
            left = left.reshape(-1, 2, 2)  # [.., z_{j-1}, y_{j-1}]
            site = jnp.stack([site, site[:, ::-1]])  # [z_{j-1}, y_{j-1}, z_j, y_j]
            left = left[:, :, 0, None, None] * site[None, :, 0] + (
                left[:, :, 1, None, None] * site[None, :, 1]
            )
        else:
            left = left[:, 0, None, None] * site[None, 0] + left[:, 1, None, None] * site[None, 1]
        left = left.reshape(-1, 2)
    right = sites[-1].sum(-1)
    for site in sites[half:-1][::-1]:
        rest = _and_reversed(right) if chain else jnp.stack([right, right])  # [z_j, y_j, ..]
        right = site[:, :, 0, None] * rest[None, :, 0] + site[:, :, 1, None] * rest[None, :, 1]
        right = right.reshape(2, -1)
    return left, right


def apply_layer(state: Array, rotations: Array, chain: bool) -> Array:
    """One-qubit rotations [Q, 2, 2], then the chain, on a state [2**Q], by Kronecker groups."""
    state = as_state(state, rotations.shape[0])
    dtype = np.result_type(state.dtype, rotations.dtype)
    state, rotations = state.astype(dtype), rotations.astype(dtype)
    for first in range(0, rotations.shape[0], GROUP_SIZE):
        matrix = _kronecker(rotations[first : first + GROUP_SIZE], chain)
        size = matrix.shape[0]
        if first and chain:  # reversed where the last bit of the previous group is 1
            state = state.reshape(2 ** (first - 1), 2, size, -1)
            matrix = jnp.stack([matrix, matrix[::-1]])
            state = jnp.einsum("kab,pkbr->pkar", matrix, state, precision=HIGHEST)
        else:
            state = state.reshape(2**first, size, -1)
            state = jnp.einsum("ab,pbr->par", matrix, state, precision=HIGHEST)
    return state.reshape(-1)


def _kronecker(rotations: Array, chain: bool) -> Array:
    """The Kronecker product of [n, 2, 2], then the chain: [2**n, 2**n]."""
    matrix = rotations[-1]
    for rotation in rotations[-2::-1]:
        rows = jnp.stack([matrix, matrix[::-1] if chain else matrix])  # [z, a, b]
        size = 2 * matrix.shape[0]
        matrix = (rotation[:, None, :, None] * rows[:, :, None, :]).reshape(size, size)
    return matrix


def _and_reversed(right: Array) -> Array:
    """[2, 2, n]: `right` [2, n] as it is after a bit 0, and reversed after a bit 1."""
    return jnp.stack([right, right[:, ::-1]])


def ry_matrix(angle: Array) -> Array:
    """RY matrices [..., 2, 2]."""
    cosine, sine = jnp.cos(angle * 0.5), jnp.sin(angle * 0.5)
    return _matrix(cosine, -sine, sine, cosine)


def rx_matrix(angle: Array) -> Array:
    """RX matrices [..., 2, 2], complex."""
    cosine, sine = jnp.cos(angle * 0.5), jnp.sin(angle * 0.5)
    zero = jnp.zeros_like(cosine)
    diagonal, other = lax.complex(cosine, zero), lax.complex(zero, -sine)
    return _matrix(diagonal, other, other, diagonal)


def rz_matrix(angle: Array) -> Array:
    """RZ matrices [..., 2, 2], complex."""
    cosine, sine = jnp.cos(angle * 0.5), jnp.sin(angle * 0.5)
    zero = jnp.zeros_like(lax.complex(cosine, sine))
    return _matrix(lax.complex(cosine, -sine), zero, zero, lax.complex(cosine, sine))


def _matrix(a: Array, b: Array, c: Array, d: Array) -> Array:
    return jnp.stack([jnp.stack([a, b], axis=-1), jnp.stack([c, d], axis=-1)], axis=-2)
