"""The fidelity of two states as a noisy device measures it: one prepared, then the other undone.

|0...0> is found with probability tr(rho sigma), where rho and sigma are what the two noisy circuits
prepare from |0...0>: depolarising errors on a gate's wires commute with the gate, so errors behind
the gates of the undone circuit are errors behind those of the circuit itself. A measured bit that
is flipped is an X before the first gate of the second circuit. So B + T states need trajectories,
not B T circuits.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax

from qkd_jax.quantum.checks import as_integer, as_real, check_shape
from qkd_jax.quantum.elementary import elementary
from qkd_jax.quantum.layers import HIGHEST
from qkd_jax.quantum.noise import Noise, drawn_errors, error_table, turned_signs
from qkd_jax.quantum.statevector import Circuit, apply


def noisy_fidelities(
    key: Array,
    circuit: Circuit,
    parameters_a: Array,
    parameters_b: Array,
    noise: Noise,
    trajectories: int,
    state_of: Callable[[Array], Array] | None = None,
) -> Array:
    """p[i, j], the probability of |0...0> after circuit(a[i]) and the inverse of circuit(b[j]).

    Args:
      key: a random key.
      circuit: the gates; static.
      parameters_a: [B, P] real angles in radians.
      parameters_b: [T, P] real angles in radians.
      noise: how probable errors are. Readout errors flip the bits that are measured at the end.
      trajectories: K, how many times the errors of each of the B + T states are drawn; static.
      state_of: a faster way to the state [2**Q] from the angles [R] of the circuit's `elementary`
        rotations, if there is one; static, so give the same function to every call.

    Returns:
      [B, T] real: the mean over the K x K pairs of trajectories. Unbiased; trajectories of one
      state are shared by its row or column, so errors of p within it are correlated and fall as
      1 / sqrt(K).

    Raises:
      ConfigError: on a wrong shape or type.
    """
    trajectories = as_integer("trajectories", trajectories, 1)
    for name, values in (("parameters_a", parameters_a), ("parameters_b", parameters_b)):
        shape = as_real(name, values).shape
        check_shape(name, shape, (None, circuit.num_parameters), "one row a circuit")
    errors = noise.one_qubit, noise.two_qubit
    readout = noise.readout if noise.readout > 0 else None
    return _estimates(
        key, circuit, parameters_a, parameters_b, errors, readout, trajectories, state_of
    )


@partial(jax.jit, static_argnames=("circuit", "trajectories", "state_of"))
def _estimates(key, circuit, parameters_a, parameters_b, errors, readout, trajectories, state_of):
    parts = elementary(circuit)
    draw = drawn_errors(error_table(circuit), *errors)
    state_of = state_of or partial(apply, parts.circuit)

    def states(key, parameters, before):
        """[rows, K, 2**Q]."""

        def one(key, angles):
            turned, _ = draw(key, before)
            state = state_of(turned_signs(turned.angles, angles.dtype) * angles)
            return _with_errors(state, turned.flips, turned.signs)

        def row(row):
            key, angles = row
            return jax.vmap(one, in_axes=(0, None))(jax.random.split(key, trajectories), angles)

        keys = jax.random.split(key, len(parameters))
        return lax.map(row, (keys, jax.vmap(parts.angles)(parameters)))

    key_a, key_b = jax.random.split(key)
    first = states(key_a, parameters_a, None)
    second = states(key_b, parameters_b, readout)

    def fidelities(psi):
        overlap = jnp.einsum("kn,tln->tkl", psi.conj(), second, precision=HIGHEST)
        return jnp.mean(jnp.square(jnp.abs(overlap)), axis=(1, 2))

    return lax.map(fidelities, first)


def _with_errors(state: Array, flips: Array, signs: Array) -> Array:
    """A state [2**Q] with Z and then X on the wires where `signs` and `flips` [Q] are 1."""
    num_qubits = flips.size
    index = jnp.arange(state.size)
    places = jnp.arange(num_qubits - 1, -1, -1)  # wire 0 is the most significant bit
    odd = jnp.sum(((index[:, None] >> places[None]) & 1) * signs[None], axis=1) & 1
    turned = turned_signs(odd, state.dtype) * state
    return turned[index ^ jnp.sum(flips << places)]
