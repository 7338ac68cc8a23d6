"""What a circuit's <Z> look like on a noisy device: finite shots, depolarising gates, bit flips.

After every gate an error happens with a probability of its own: a Pauli operator other than the
identity on the gate's wires, each equally likely. (PennyLane's `DepolarizingChannel`, for one
wire.) This is sampled by trajectories: every shot draws its own errors, so that the mean over shots
is exact. A readout error flips a measured bit.

No error has to be simulated as a gate. A Pauli operator moves to the end of the circuit: past a
rotation it turns the angle's sign where the two anticommute, past the other gates it becomes
another Pauli operator, and at the end it flips outcomes. All of this is linear over bits, so that
one matrix, computed once from the circuit, says which angles and outcomes the errors of a shot
turn.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from qkd_jax.errors import ConfigError
from qkd_jax.quantum.checks import MAX_SHOTS, as_integer, as_real, check_shape, real_number
from qkd_jax.quantum.layers import HIGHEST
from qkd_jax.quantum.measure import sample
from qkd_jax.quantum.statevector import Circuit, Gate, apply

# Trajectories that are computed at a time: 4 MiB of states at 11 qubits.
CHUNK = 256


@dataclass(frozen=True)
class Noise:
    """Probabilities of errors, each from 0 to 1; static.

    Attributes:
      one_qubit: of X, Y or Z after a gate on one qubit.
      two_qubit: of one of the 15 Pauli operators after a gate on two qubits.
      readout: that a measured bit is flipped.

    Raises:
      ConfigError: on a value out of range.
    """

    one_qubit: float = 0.0
    two_qubit: float = 0.0
    readout: float = 0.0

    def __post_init__(self):
        for name, value in vars(self).items():
            if not 0 <= real_number(value) <= 1:
                raise ConfigError(f"Noise.{name}: expected a number from 0 to 1, found {value!r}")
            object.__setattr__(self, name, float(value))


def after_readout(expectations: Array, probability: float) -> Array:
    """<Z> [...] once every measured bit is flipped with this probability: (1 - 2p) <Z>."""
    return (1 - 2 * probability) * expectations


@partial(jax.jit, static_argnames=("circuit", "noise", "shots"))
def noisy_expectations(
    key: Array, circuit: Circuit, parameters: Array, noise: Noise, shots: int
) -> Array:
    """<Z> of every qubit estimated from shots on a noisy device.

    Args:
      key: a random key; every row and shot has numbers of its own.
      circuit: the gates; static.
      parameters: [B, P] real angles in radians, one row for each circuit that is run.
      noise: static.
      shots: of each row, from 1 to 2**31 - 1; static.

    Returns:
      [B, Q] in [-1, 1]: unbiased for the noisy <Z>, with variance (1 - <Z>^2) / shots.

    Raises:
      ConfigError: on a wrong shape or type.
    """
    shots = as_integer("shots", shots, 1, MAX_SHOTS)
    parameters = as_real("parameters", parameters)
    check_shape("parameters", parameters.shape, (None, circuit.num_parameters), "one row a circuit")
    keys = jax.random.split(key, parameters.shape[0])
    sums = partial(_sum_of_outcomes, circuit=circuit, noise=noise, shots=shots)
    return lax.map(lambda row: sums(*row), (keys, parameters)) / shots


def _sum_of_outcomes(key, parameters, circuit, noise, shots):
    """[Q]: the sum over shots of the signs that are measured, for one row [P]."""
    key_shots, key_readout = jax.random.split(key)
    has_errors = noise.one_qubit > 0 or noise.two_qubit > 0
    chunk = min(shots, CHUNK)
    rotations = np.array([g.parameter for g in circuit.gates if g.parameter is not None], int)
    angles, merged = parameters[rotations], merged_rotations(circuit)
    sums = jnp.asarray(merged.sums, angles.dtype)

    def state_of(angles):
        """The state by one angle for each rotation [R]."""
        return apply(merged.circuit, jnp.dot(angles, sums, precision=HIGHEST))

    shot = _shot(circuit, angles, state_of, noise)
    state = None if has_errors else state_of(angles)
    num_chunks = -(-shots // chunk)

    def outcomes(index):
        """[chunk, Q] measured bits."""
        key = jax.random.fold_in(key_shots, index)
        if has_errors:
            return jax.vmap(shot)(jax.random.split(key, chunk))
        return _bits(sample(key, state, chunk), circuit.num_qubits)

    def add(index, total):
        bits = outcomes(index)
        if noise.readout > 0:
            flips = jax.random.bernoulli(
                jax.random.fold_in(key_readout, index), noise.readout, bits.shape
            )
            bits = bits ^ flips.astype(bits.dtype)
        real = index * chunk + jnp.arange(chunk) < shots
        return total + jnp.sum(jnp.where(real[:, None], 1 - 2 * bits, 0), axis=0)

    total = lax.fori_loop(0, num_chunks, add, jnp.zeros(circuit.num_qubits, jnp.int32))
    return total.astype(parameters.dtype)


def _shot(circuit, angles, state_of, noise):
    """A function key -> [Q] bits of one trajectory, without readout errors."""
    table = error_table(circuit)
    effects = jnp.asarray(table.effects, jnp.float32)
    strengths = np.array([noise.one_qubit, noise.two_qubit])[table.num_wires - 1]
    # A number from 1: its bits say where there is an X, and where a Z.
    kinds = jnp.asarray(4**table.num_wires, jnp.int32)

    def shot(key):
        key_error, key_kind, key_outcome = jax.random.split(key, 3)
        happens = jax.random.uniform(key_error, kinds.shape) < jnp.asarray(strengths, jnp.float32)
        kind = jax.random.randint(key_kind, kinds.shape, 1, kinds)
        bits = (kind[table.gate] >> jnp.asarray(table.bit)) & 1
        errors = jnp.where(happens[table.gate], bits, 0).astype(jnp.float32)
        # Sums of a few hundred zeros and ones: exact.
        turned = jnp.dot(errors, effects, precision=HIGHEST).astype(jnp.int32) & 1
        signs = (1 - 2 * turned[: angles.size]).astype(angles.dtype)
        outcome = _bits(sample(key_outcome, state_of(signs * angles), 1), circuit.num_qubits)[0]
        return outcome ^ turned[angles.size :]

    return shot


def _bits(indices: Array, num_qubits: int) -> Array:
    """[N, Q] bits of basis states [N]; wire 0 is the most significant."""
    return (indices[:, None] >> jnp.arange(num_qubits - 1, -1, -1)[None]) & 1


class ErrorTable(NamedTuple):
    """What single X and Z errors do, E of them: one of each after each gate on each of its wires.

    Attributes:
      effects: bool [E, R + Q], which of the R rotations' angles change their sign, in gate order,
        and which of the Q measured bits flip. Y is both X and Z; errors add up modulo 2.
      gate: int [E], the gate that each error follows.
      bit: int [E], its place in the number of the gate's Pauli operator.
      num_wires: int [G], of each gate.
    """

    effects: np.ndarray
    gate: np.ndarray
    bit: np.ndarray
    num_wires: np.ndarray


def error_table(circuit: Circuit) -> ErrorTable:
    """The effects of all errors, from the last gate to the first."""
    num_rotations = sum(gate.parameter is not None for gate in circuit.gates)
    size = num_rotations + circuit.num_qubits
    # Of an X and of a Z on each wire at the current place; at the end a Z does nothing.
    x = np.eye(size, dtype=bool)[num_rotations:]
    z = np.zeros_like(x)
    effects, owners, bits = [], [], []
    rotation = num_rotations
    for position, gate in reversed(list(enumerate(circuit.gates))):
        for k, wire in enumerate(gate.wires):
            effects += [x[wire].copy(), z[wire].copy()]
            owners += [position, position]
            bits += [2 * k, 2 * k + 1]
        if gate.parameter is not None:
            rotation -= 1
            for wire in gate.wires:
                x[wire, rotation] ^= gate.name != "RX"
                z[wire, rotation] ^= gate.name in ("RX", "RY")
        elif gate.name == "H":
            (wire,) = gate.wires
            x[wire], z[wire] = z[wire].copy(), x[wire].copy()
        elif gate.name == "CNOT":
            control, target = gate.wires
            x[control] ^= x[target]
            z[target] ^= z[control]
        elif gate.name == "CZ":
            first, second = gate.wires
            x[first] ^= z[second]
            x[second] ^= z[first]
    num_wires = np.array([len(gate.wires) for gate in circuit.gates])
    return ErrorTable(np.array(effects), np.array(owners), np.array(bits), num_wires)


class MergedRotations(NamedTuple):
    """A circuit with successive rotations of the same kind on the same wires as one gate.

    Attributes:
      circuit: with one parameter for each rotation.
      sums: [R, M] zeros and ones: which of the R rotations before add up to each of the M.
    """

    circuit: Circuit
    sums: np.ndarray


def merged_rotations(circuit: Circuit) -> MergedRotations:
    """Merges rotations between which no other gate acts on their wires."""
    gates, groups = [], []
    latest: dict[int, int | None] = {}  # wire -> position of the last gate on it
    rotation = 0
    for gate in circuit.gates:
        before = {latest.get(wire) for wire in gate.wires}
        position = next(iter(before)) if len(before) == 1 else None
        if gate.parameter is not None and position is not None:
            same = gates[position]
            if same.name == gate.name and set(same.wires) == set(gate.wires):
                groups[same.parameter].append(rotation)
                rotation += 1
                continue
        parameter = None
        if gate.parameter is not None:
            parameter = len(groups)
            groups.append([rotation])
            rotation += 1
        latest |= dict.fromkeys(gate.wires, len(gates))
        gates.append(Gate(gate.name, gate.wires, parameter))
    sums = np.zeros((rotation, len(groups)))
    for column, group in enumerate(groups):
        sums[group, column] = 1
    return MergedRotations(Circuit(circuit.num_qubits, tuple(gates)), sums)
