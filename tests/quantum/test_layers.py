"""The reversals that stand for a CNOT chain, against the chain as a dense permutation matrix."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkd_jax.errors import ConfigError
from qkd_jax.quantum.layers import apply_layer, product_state, ry_matrix, two_layer_halves


def dense_chain(num_qubits):
    """CNOT(0 -> 1), CNOT(1 -> 2), ...: bit j of the new index is the parity of bits 0..j."""
    matrix = np.zeros((2**num_qubits, 2**num_qubits))
    for old in range(2**num_qubits):
        bits = [old >> (num_qubits - 1 - j) & 1 for j in range(num_qubits)]
        new = sum((sum(bits[: j + 1]) % 2) << (num_qubits - 1 - j) for j in range(num_qubits))
        matrix[new, old] = 1
    return matrix


@pytest.mark.parametrize("chain", [False, True])
@pytest.mark.parametrize("num_qubits", [2, 6, 9])  # one, two and three Kronecker groups
def test_layers_equal_dense_matrices(num_qubits, chain):
    generator = np.random.default_rng(0)
    with jax.enable_x64(True):
        first, second = ry_matrix(jnp.asarray(generator.uniform(-3, 3, (2, num_qubits))))
        state = jnp.asarray(generator.normal(size=2**num_qubits))
        product = product_state(first[:, :, 0], chain)
        layer = jax.jit(apply_layer, static_argnums=2)(state, second, chain)
        left, right = jax.jit(two_layer_halves, static_argnums=2)(first[:, :, 0], second, chain)
    after = dense_chain(num_qubits) if chain else np.eye(2**num_qubits)
    kron_first, kron_second = (functools.reduce(np.kron, np.asarray(m)) for m in (first, second))
    # Each amplitude is a sum over at most 2**9 products: 512 eps |state|, and |state| is about 23.
    close = functools.partial(np.testing.assert_allclose, rtol=0, atol=512 * 2.2e-16 * 32)
    close(product, after @ kron_first[:, 0])
    close(layer, after @ kron_second @ np.asarray(state))
    # The halves start from a chained product state and leave out the CNOT between them.
    rows = np.asarray(left) @ np.asarray(right)
    if chain:
        rows[1::2] = rows[1::2, ::-1]
    close(rows.reshape(-1), after @ kron_second @ dense_chain(num_qubits) @ kron_first[:, 0])


def test_a_layer_acts_on_states_only_and_keeps_imaginary_parts():
    turned = ry_matrix(jnp.zeros(2))
    state = jnp.array([0.6, 0.8j, 0, 0])
    np.testing.assert_array_equal(apply_layer(state, turned, False), state)
    for size, message in (
        (3, "shape [2**Q], found [3]"),
        (8, "shape [4] for 2 qubit(s), found [8]"),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            apply_layer(jnp.ones(size), turned, False)
