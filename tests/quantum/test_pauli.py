"""Pauli strings against dense matrices, PennyLane, and shots against their own variance."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkd_jax.errors import ConfigError
from qkd_jax.quantum import (
    Circuit,
    Gate,
    apply,
    expectation_z,
    pauli_expectations,
    sample_pauli_expectations,
    to_pennylane,
)

pytestmark = pytest.mark.floor

STRINGS = ("III", "XYZ", "ZIY", "YYI", "IXI", "ZZZ", "YXY", "YYY")
PAULI = {
    "I": np.eye(2),
    "X": np.array([[0, 1], [1, 0]]),
    "Y": np.array([[0, -1j], [1j, 0]]),
    "Z": np.diag([1, -1]),
}
# Sums of 8 rounded products of a unit vector.
TOLERANCE = 16 * 1.2e-7


def state_of(is_complex):
    generator = np.random.default_rng(0)
    state = generator.normal(size=8) + 1j * is_complex * generator.normal(size=8)
    state = state / np.linalg.norm(state)
    return jnp.asarray(state.astype(np.complex64) if is_complex else state.real.astype(np.float32))


def dense(state, string):
    operator = np.kron(np.kron(PAULI[string[0]], PAULI[string[1]]), PAULI[string[2]])
    wide = np.asarray(state).astype(np.complex128)
    return (wide.conj() @ operator @ wide).real


@pytest.mark.parametrize("is_complex", [False, True])
def test_equals_dense_operators(is_complex):
    state = state_of(is_complex)
    found = jax.jit(pauli_expectations, static_argnums=1)(state, STRINGS)
    assert found.dtype == jnp.float32
    expected = [dense(state, string) for string in STRINGS]
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)
    single_z = pauli_expectations(state, ("ZII", "IZI", "IIZ"))
    np.testing.assert_allclose(single_z, expectation_z(state), rtol=0, atol=TOLERANCE)
    assert pauli_expectations(state, ()).shape == (0,)


@pytest.mark.filterwarnings("ignore")  # PennyLane's own deprecations
def test_equals_pennylane():
    import pennylane as qml

    gates = (Gate("RX", (0,), 0), Gate("CRY", (0, 2), 1), Gate("RXX", (1, 2), 0), Gate("S", (1,)))
    circuit, parameters = Circuit(3, (*gates, Gate("H", (1,)))), np.array([0.7, -1.9])

    def measure():
        return [qml.expval(qml.pauli.string_to_pauli_word(string)) for string in STRINGS[1:]]

    expected = to_pennylane(circuit, measure)(parameters)
    state = apply(circuit, jnp.asarray(parameters, jnp.float32))
    found = pauli_expectations(state, STRINGS[1:])
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)


def test_shots_are_unbiased_and_as_spread_as_promised(key):
    shots, repeats, state = 50, 400, state_of(True)
    draw = jax.jit(jax.vmap(lambda k: sample_pauli_expectations(k, state, STRINGS, shots)))
    estimates = np.asarray(draw(jax.random.split(key, repeats)))
    expected = pauli_expectations(state, STRINGS)
    deviation = np.sqrt(np.maximum(1 - np.square(expected), 0) / shots)
    assert np.all(np.abs(estimates.mean(0) - expected) <= 5 * deviation / repeats**0.5 + 1e-6)
    # The relative deviation of a standard deviation from n samples is about sqrt(1 / 2n).
    np.testing.assert_allclose(
        estimates.std(0), deviation, rtol=5 * np.sqrt(0.5 / repeats), atol=1e-6
    )
    # The identity has no spread; XLA may divide by the shots as a product with their inverse.
    np.testing.assert_allclose(estimates[:, 0], 1, rtol=0, atol=2 * 1.2e-7)
    np.testing.assert_array_equal(np.rint(estimates * shots) % 2, shots % 2)


def test_a_state_that_is_not_a_number_gives_none(key):
    state = jnp.array([jnp.nan, 0.0])
    assert np.isnan(sample_pauli_expectations(key, state, ("Z",), 5)).all()


@pytest.mark.parametrize(
    ("strings", "message"),
    [
        ("XYZ", "strings: expected a sequence of Pauli strings, found 'XYZ'"),
        (["XYZ", "XY"], "strings[1]: expected 3 letters I, X, Y or Z, one for each wire, found 'X"),
        (["xyz"], "strings[0]: expected 3 letters"),
        ([3], "strings[0]: expected 3 letters I, X, Y or Z, one for each wire, found 3"),
    ],
)
def test_what_is_no_pauli_string_is_refused(strings, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        pauli_expectations(state_of(False), strings)
