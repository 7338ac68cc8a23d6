"""Gradients as a device would measure them, and how they fade: the parameter-shift rule, and the
variance of gradients over random parameters.

Training uses automatic differentiation; the rule is a test of it, and a way to gradients from
shots.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from qkd_jax.errors import ConfigError
from qkd_jax.quantum.checks import as_integer, as_real, check_shape
from qkd_jax.quantum.elementary import elementary
from qkd_jax.quantum.statevector import Circuit, apply


def parameter_shift(function: Callable[[Array], Array], parameters: Array) -> Array:
    """The Jacobian by the parameter-shift rule, without autodiff.

    (f(p + pi/2) - f(p - pi/2)) / 2 for each parameter. Exact when f is an expectation, or a
    fidelity with a fixed state, and every parameter belongs to one Pauli rotation. Where gates
    share a parameter or are controlled rotations, `circuit_gradient` sums over the rotations.

    Args:
      function: [P] -> [...].
      parameters: [P] real angles in radians.

    Returns:
      [P, ...].

    Raises:
      ConfigError: on a wrong shape or type of `parameters`.

    Source: Schuld et al., "Evaluating analytic gradients on quantum hardware", 2019.
    """
    parameters = as_real("parameters", parameters)
    if parameters.ndim != 1:
        raise ConfigError(
            f"parameters: expected shape [P], found {list(parameters.shape)}; batch with jax.vmap"
        )
    shifts = jnp.eye(parameters.shape[0], dtype=parameters.dtype) * (np.pi / 2)
    return jax.vmap(
        lambda shift: (function(parameters + shift) - function(parameters - shift)) / 2
    )(shifts)


def circuit_gradient(
    circuit: Circuit, parameters: Array, observe: Callable[[Array], Array]
) -> Array:
    """The Jacobian of what is observed after any circuit, by parameter shifts.

    Every gate becomes Pauli rotations (`elementary`); the shifts of all that depend on a parameter
    add up.

    Args:
      circuit: the gates; static.
      parameters: [P] real angles in radians.
      observe: a state [2**Q] -> [...], expectations or a fidelity with a fixed state, such as
        `expectation_z`.

    Returns:
      [P, ...].

    Raises:
      ConfigError: on a wrong shape or type of `parameters`.
    """
    parameters = as_real("parameters", parameters)
    check_shape("parameters", parameters.shape, (circuit.num_parameters,))
    parts = elementary(circuit)
    by_rotation = parameter_shift(
        lambda angles: observe(apply(parts.circuit, angles)), parts.angles(parameters)
    )
    factor = jnp.asarray(parts.factor, by_rotation.dtype)
    scaled = factor.reshape(-1, *[1] * (by_rotation.ndim - 1)) * by_rotation
    total = jnp.zeros((circuit.num_parameters + 1, *by_rotation.shape[1:]), by_rotation.dtype)
    return total.at[parts.parameter].add(scaled)[:-1]


def gradient_variance(
    key: Array, circuit: Circuit, observe: Callable[[Array], Array], samples: int
) -> Array:
    """The variance of each partial derivative over parameters drawn evenly from [-pi, pi).

    Where it falls exponentially with the qubits the circuit has a barren plateau: so many shots
    would be needed to see a gradient at all.

    Args:
      key: a random key.
      circuit: the gates; static.
      observe: a state [2**Q] -> a real scalar.
      samples: how many draws, at least 2; static. The relative standard deviation of a variance
        from n draws is about sqrt(2 / n), and more where gradients are mostly near zero.

    Returns:
      [P].

    Raises:
      ConfigError: unless samples >= 2.

    Source: McClean et al., "Barren plateaus in quantum neural network training landscapes", 2018.
    """
    samples = as_integer("samples", samples, 2)
    shape = (samples, circuit.num_parameters)
    parameters = jax.random.uniform(key, shape, minval=-np.pi, maxval=np.pi)
    gradients = jax.vmap(jax.grad(lambda p: observe(apply(circuit, p))))(parameters)
    return jnp.var(gradients, axis=0, ddof=1)
