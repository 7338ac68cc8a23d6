"""The circuit that prepares a vector: its state, its fast form, its counts, and PennyLane."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkd_jax.errors import ConfigError
from qkd_jax.quantum import (
    amplitude_circuit,
    amplitude_parameters,
    amplitude_state,
    apply,
    prepared_state,
    resources,
    to_pennylane,
)

# A state of Q wires is a product of Q cosines of angles that were summed from 2**Q terms of about
# the same size: 8 Q eps, and twice that where phases come too.
TOLERANCE = 2 * 8 * 5 * 1.2e-7


def vector_of(num_qubits, is_complex, missing=0):
    generator = np.random.default_rng(num_qubits)
    vector = generator.normal(size=2**num_qubits - missing)
    if is_complex:
        return (vector + 1j * generator.normal(size=vector.shape)).astype(np.complex64)
    return vector.astype(np.float32)


def same_up_to_phase(found, expected):
    np.testing.assert_allclose(np.abs(np.vdot(found, expected)), 1, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("is_complex", [False, True])
@pytest.mark.parametrize(("num_qubits", "missing"), [(1, 0), (2, 0), (3, 1), (5, 9)])
def test_the_circuit_prepares_the_vector(num_qubits, missing, is_complex):
    vector = vector_of(num_qubits, is_complex, missing)
    expected = amplitude_state(jnp.asarray(vector), num_qubits)

    def prepare(vector):
        parameters = amplitude_parameters(vector, num_qubits)
        fast = prepared_state(parameters, num_qubits)
        if num_qubits == 5 and is_complex:  # 126 gates take long to compile
            return parameters, fast, fast
        return parameters, fast, apply(amplitude_circuit(num_qubits, is_complex), parameters)

    parameters, fast, found = jax.jit(prepare)(jnp.asarray(vector))
    assert parameters.shape == ((2**num_qubits - 1) * (1 + is_complex),)
    np.testing.assert_allclose(fast, found, rtol=0, atol=TOLERANCE)
    if not is_complex:  # signs and all
        np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)
    same_up_to_phase(found, expected)


@pytest.mark.filterwarnings("ignore")  # PennyLane's own deprecations
def test_pennylane_prepares_the_same_state():
    vector = vector_of(3, True)
    parameters = amplitude_parameters(jnp.asarray(vector), 3)
    found = to_pennylane(amplitude_circuit(3, is_complex=True))(np.asarray(parameters))
    same_up_to_phase(found, vector / np.linalg.norm(vector))


def test_counts_are_as_promised():
    real, whole = (resources(amplitude_circuit(4, is_complex=c)) for c in (False, True))
    assert (real.one_qubit_gates, real.two_qubit_gates, real.num_parameters) == (15, 14, 15)
    assert (whole.one_qubit_gates, whole.two_qubit_gates, whole.num_parameters) == (30, 28, 30)


def test_a_basis_vector_and_the_zero_vector():
    basis = amplitude_parameters(jnp.array([0.0, 0, 0, -2, 0]), 3)
    np.testing.assert_allclose(prepared_state(basis, 3), -np.eye(8)[3], rtol=0, atol=TOLERANCE)
    zero = amplitude_parameters(jnp.zeros(4, jnp.complex64), 2)
    np.testing.assert_array_equal(zero, 0)
    np.testing.assert_array_equal(prepared_state(zero, 2), [1, 0, 0, 0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: amplitude_circuit(17), "num_qubits: expected an integer from 1 to 16, found 17"),
        (lambda: amplitude_parameters(jnp.ones((2, 4)), 2), "vector: expected shape [D], found [2"),
        (lambda: amplitude_parameters([1, 2], 1), "vectors: expected floating or complex entries"),
        (lambda: prepared_state(jnp.ones(4), 2), "parameters: expected shape [6], found [4]"),
        (lambda: prepared_state(jnp.ones(2), 2), "parameters: expected shape [3], found [2]"),
    ],
)
def test_errors_say_what_is_wrong(make, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        make()
