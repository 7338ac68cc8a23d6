"""The fused path against the plain one, and which gates share a pass."""

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

from qkd_jax.errors import ConfigError
from qkd_jax.quantum import (
    Circuit,
    FeatureMap,
    Gate,
    apply,
    apply_fused,
    expectation_z,
    feature_circuit,
)
from qkd_jax.quantum.fused import moments
from tests.quantum.example_circuits import circuits

quick_jit = functools.partial(
    jax.jit, static_argnums=0, compiler_options={"xla_backend_optimization_level": 0}
)


@quick_jit
def both(circuit, parameters, state):
    """From |0...0> and from a state, by both paths."""
    return [
        run(circuit, parameters, start) for start in (None, state) for run in (apply, apply_fused)
    ]


@given(circuits(5, 25, 4), st.booleans())
def test_equals_the_plain_path(circuit, is_complex):
    generator = np.random.default_rng(0)
    size = 2**circuit.num_qubits
    state = generator.normal(size=size) + 1j * is_complex * generator.normal(size=size)
    state = state / np.linalg.norm(state)
    state = state.astype(np.complex64) if is_complex else state.real.astype(np.float32)
    parameters = generator.uniform(-3, 3, circuit.num_parameters).astype(np.float32)
    plain, fused, plain_from, fused_from = both(circuit, parameters, state)
    # 25 gates of a few roundings each, by either path.
    for found, expected in ((fused, plain), (fused_from, plain_from)):
        assert found.dtype == expected.dtype
        np.testing.assert_allclose(found, expected, rtol=0, atol=2 * 25 * 4 * 1.2e-7)


def test_gradients_equal_those_of_the_plain_path():
    gates = [Gate(name, (wire,), wire) for name in ("RY", "RZ") for wire in range(3)]
    gates += [Gate("RZZ", (1, 0), 3), Gate("CP", (2, 1), 4), Gate("CZ", (0, 2))]  # phases
    gates += [Gate("RX", (wire,), wire) for wire in range(3)]
    gates += [Gate("CNOT", (0, 1)), Gate("SWAP", (1, 2)), Gate("CRX", (2, 1), 3)]
    circuit = Circuit(3, tuple(gates))
    values = np.random.default_rng(1).uniform(-3, 3, circuit.num_parameters).astype(np.float32)

    @quick_jit
    def gradients(circuit, values):
        return [
            jax.grad(lambda p, run=run: expectation_z(run(circuit, p))[1])(values)
            for run in (apply, apply_fused)
        ]

    plain, fused = gradients(circuit, values)
    assert np.abs(plain).min() > 0.01
    # 15 gates, and as many on the way back, of a few roundings each.
    np.testing.assert_allclose(fused, plain, rtol=0, atol=2 * 2 * 15 * 4 * 1.2e-7)


@pytest.mark.parametrize(
    ("circuit", "kinds"),
    [
        (feature_circuit(FeatureMap(6, 2)), "turns moves turns moves"),
        # The second CNOT waits for the H, and the last one joins the first.
        (
            Circuit(
                5,
                (
                    *(Gate("CNOT", (0, 1)), Gate("H", (2,)), Gate("CNOT", (1, 2))),
                    Gate("SWAP", (3, 4)),
                ),
            ),
            "moves turns moves",
        ),
        (Circuit(2, (Gate("H", (0,)), Gate("CZ", (0, 1)), Gate("H", (1,)))), "turns phases turns"),
        (
            Circuit(3, (Gate("RZZ", (0, 1), 0), Gate("CP", (2, 1), 0), Gate("CRX", (0, 2), 0))),
            "phases alone",
        ),
        (Circuit(2, ()), ""),
    ],
)
def test_gates_share_moments(circuit, kinds):
    found = moments(circuit)
    assert sorted(g.name for m in found for g in m.gates) == sorted(g.name for g in circuit.gates)
    assert " ".join(moment.kind for moment in found) == kinds


def test_arguments_and_types_are_those_of_the_plain_path():
    """A real circuit stays real, and wrong arguments are refused as by `apply`."""
    circuit = Circuit(2, (Gate("RY", (0,), 0), Gate("CZ", (0, 1)), Gate("SWAP", (0, 1))))
    assert apply_fused(circuit, jnp.ones(1)).dtype == jnp.float32
    with pytest.raises(ConfigError, match=r"parameters: expected shape \[1\], found \[2\]"):
        apply_fused(circuit, jnp.ones(2))
    with pytest.raises(ConfigError, match=r"state: expected shape \[4\], found \[2\]"):
        apply_fused(circuit, jnp.ones(1), jnp.ones(2))
