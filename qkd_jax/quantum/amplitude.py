"""A circuit that prepares any vector as amplitudes, from rotations and CNOTs.

Wire after wire, from the most significant, each bit gets its amplitude by a rotation whose angle
depends on the bits before. Such a multiplexed rotation of k controls is 2**k plain rotations with a
CNOT after each: the controls in the order of a Gray code turn the signs of the angles, so that the
angles of the gates are a Walsh-Hadamard transform of those that are wanted.

A vector of 2**Q real numbers needs 2**Q - 1 RY and 2**Q - 2 CNOTs; a complex one twice as many
gates, with RZ for the phases, and is prepared up to a global phase. Shallow it is not: nothing in
the data is used to save gates.

Source: Mottonen et al., "Transformation of quantum states using uniformly controlled rotations",
2004.
"""

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from qkd_jax.errors import ConfigError
from qkd_jax.quantum.checks import as_integer, as_real, check_shape
from qkd_jax.quantum.gates import join, split
from qkd_jax.quantum.measure import amplitude_state
from qkd_jax.quantum.statevector import Circuit, Gate

MAX_PREPARED_QUBITS = 16  # 65,535 rotations


def amplitude_circuit(num_qubits: int, is_complex: bool = False) -> Circuit:
    """The circuit whose state from |0...0> is the vector of `amplitude_parameters`.

    Raises:
      ConfigError: unless 1 <= Q <= 16.
    """
    num_qubits = as_integer("num_qubits", num_qubits, 1, MAX_PREPARED_QUBITS)
    gates, parameter = [], 0
    for name in ("RY", "RZ") if is_complex else ("RY",):
        for target in range(num_qubits):
            for step in range(2**target):
                gates.append(Gate(name, (target,), parameter))
                parameter += 1
                if target:
                    flipped = _gray(step) ^ _gray((step + 1) % 2**target)
                    gates.append(Gate("CNOT", (target - flipped.bit_length(), target)))
    return Circuit(num_qubits, tuple(gates))


def amplitude_parameters(vector: Array, num_qubits: int) -> Array:
    """The angles of `amplitude_circuit` for a vector, which is cut, padded and normalised.

    Args:
      vector: [D] floating or complex, D >= 1; entries past 2**Q are lost. Batch with `jax.vmap`.
      num_qubits: Q, from 1 to 16.

    Returns:
      [2**Q - 1] radians, of a complex vector twice as many. A zero vector gives zeros: |0...0>.

    Raises:
      ConfigError: on a wrong shape or type.
    """
    num_qubits = as_integer("num_qubits", num_qubits, 1, MAX_PREPARED_QUBITS)
    state = amplitude_state(vector, num_qubits)
    if state.ndim != 1:
        raise ConfigError(f"vector: expected shape [D], found {[*state.shape]}; use jax.vmap")
    if jnp.iscomplexobj(state):
        # arctan2 and not jnp.angle, for the angle of 0.
        phases = jnp.arctan2(state.imag, state.real)
        return jnp.concatenate([_magnitude_angles(jnp.abs(state)), _phase_angles(phases)])
    return _magnitude_angles(state)


def prepared_state(parameters: Array, num_qubits: int) -> Array:
    """The state of `amplitude_circuit`, computed wire by wire and not gate by gate.

    Args:
      parameters: [2**Q - 1] real angles, or twice as many for the complex circuit.
      num_qubits: Q, from 1 to 16.

    Returns:
      [2**Q], real for the real circuit: `apply(amplitude_circuit(Q), parameters)`, with Q 2**Q
      operations instead of 4**Q.

    Raises:
      ConfigError: on a wrong shape or type.
    """
    num_qubits = as_integer("num_qubits", num_qubits, 1, MAX_PREPARED_QUBITS)
    parameters = as_real("parameters", parameters)
    half, is_complex = 2**num_qubits - 1, parameters.size > 2**num_qubits - 1
    check_shape("parameters", parameters.shape, (half * (1 + is_complex),))
    state = jnp.ones(1, parameters.dtype)
    for angles in _multiplexed(parameters[:half]):
        half_angles = 0.5 * angles
        state = jnp.stack([state * jnp.cos(half_angles), state * jnp.sin(half_angles)], axis=1)
        state = state.reshape(-1)
    if not is_complex:
        return state
    phases = jnp.zeros(1, parameters.dtype)
    for angles in _multiplexed(parameters[half:]):
        phases = jnp.stack([phases - 0.5 * angles, phases + 0.5 * angles], axis=1).reshape(-1)
    return lax.complex(state * jnp.cos(phases), state * jnp.sin(phases))


def _magnitude_angles(state: Array) -> Array:
    """Of the RY, from real amplitudes: the last wire's bring the signs."""
    levels = []
    while state.size > 1:
        low, high = state.reshape(-1, 2).T
        levels.append(2 * jnp.arctan2(high, low))
        state = jnp.hypot(low, high)
    return _plain(levels[::-1])


def _phase_angles(phases: Array) -> Array:
    """Of the RZ: differences of mean phases."""
    levels = []
    while phases.size > 1:
        low, high = phases.reshape(-1, 2).T
        levels.append(high - low)
        phases = 0.5 * (low + high)
    return _plain(levels[::-1])


def _plain(levels: list[Array]) -> Array:
    """The gates' angles, from those [2**k] of each wire by the value of the bits before it."""
    return jnp.concatenate(
        [_walsh_hadamard(level)[_gray(np.arange(level.size))] / level.size for level in levels]
    )


def _multiplexed(parameters: Array) -> list[Array]:
    """The inverse of `_plain`."""
    sizes = 2 ** np.arange(parameters.size.bit_length())
    levels = jnp.split(parameters, np.cumsum(sizes)[:-1])
    return [_walsh_hadamard(v[np.argsort(_gray(np.arange(v.size)))]) for v in levels]


def _gray(number):
    """The Gray code of a whole number: neighbours differ in one bit."""
    return number ^ (number >> 1)


def _walsh_hadamard(values: Array) -> Array:
    """[2**k]: at b, the sum over i of values[i] times -1 to the number of ones in b and i."""
    for axis in range(values.size.bit_length() - 1):
        low, high = split(values, axis)
        values = join(low + high, low - high)
    return values
