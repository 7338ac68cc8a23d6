"""Parameter shifts against automatic differentiation, and a barren plateau in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkd_jax.errors import ConfigError
from qkd_jax.quantum import (
    Circuit,
    Gate,
    apply,
    circuit_gradient,
    expectation_z,
    gradient_variance,
    parameter_shift,
    pauli_expectations,
)


def test_parameter_shift_of_a_product_of_cosines():
    p = jnp.array([0.3, -1.2, 2.0])
    found = parameter_shift(lambda x: jnp.stack([jnp.prod(jnp.cos(x)), jnp.sin(x[0])]), p)
    expected = jax.jacobian(lambda x: jnp.stack([jnp.prod(jnp.cos(x)), jnp.sin(x[0])]))(p).T
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_shifts_of_every_gate_equal_automatic_differentiation():
    """Controlled rotations, constant gates between them and a parameter in two gates."""
    gates = (
        *(Gate("H", (0,)), Gate("RY", (2,), 5), Gate("CRX", (0, 1), 0), Gate("T", (1,))),
        *(Gate("CRY", (1, 2), 1), Gate("CH", (2, 0)), Gate("CRZ", (2, 1), 2), Gate("SX", (1,))),
        *(Gate("CP", (0, 2), 3), Gate("RYY", (0, 1), 4), Gate("RX", (2,), 0), Gate("SX", (0,))),
        *(Gate("P", (0,), 5), Gate("RXX", (0, 2), 1), Gate("H", (0,)), Gate("RX", (1,), 3)),
    )
    circuit, p = Circuit(3, gates), jnp.array([0.7, -1.1, 0.4, 2.3, -0.6, 1.7])

    def both(p):
        return (
            circuit_gradient(circuit, p, expectation_z),
            jax.jacobian(lambda p: expectation_z(apply(circuit, p)))(p),
        )

    found, expected = jax.jit(both)(p)
    assert found.shape == (6, 3) and np.abs(expected).max(axis=0).min() > 0.01
    # Each entry sums up to 6 differences of values of 40 gates of error eps = 1.2e-7.
    np.testing.assert_allclose(found, np.transpose(expected), rtol=0, atol=6 * 40 * 1.2e-7)


@pytest.mark.parametrize("num_qubits", [1, 4])
def test_a_product_of_cosines_is_a_barren_plateau(key, num_qubits):
    """<Z...Z> after RY on every qubit is prod cos(p): every derivative has variance 2**-Q."""
    gates = tuple(Gate("RY", (wire,), wire) for wire in range(num_qubits))
    string, samples = "Z" * num_qubits, 10_000
    found = gradient_variance(
        key,
        Circuit(num_qubits, gates),
        lambda state: pauli_expectations(state, (string,))[0],
        samples,
    )
    # The fourth moment of sin or cos is 3/8, so that of the derivative is (3/8)**Q.
    deviation = np.sqrt((0.375**num_qubits - 0.25**num_qubits) / samples)
    np.testing.assert_allclose(found, [0.5**num_qubits] * num_qubits, rtol=0, atol=5 * deviation)


def test_a_variance_needs_two_samples(key):
    circuit = Circuit(1, (Gate("RY", (0,), 0),))
    with pytest.raises(ConfigError, match="samples: expected an integer >= 2, found 1"):
        gradient_variance(key, circuit, lambda state: expectation_z(state)[0], 1)
