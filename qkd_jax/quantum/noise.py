"""What a circuit's <Z> look like on a noisy device: finite shots, depolarising gates, bit flips.

After every gate an error happens with a probability of its own: a Pauli operator other than the
identity on the gate's wires, each equally likely. (PennyLane's `DepolarizingChannel`, for one
wire.) This is sampled by trajectories: every shot draws its own errors, so that the mean over shots
is exact. A readout error flips a measured bit.

No error has to be simulated as a gate. A Pauli operator moves to the end of the circuit: past a
rotation it turns the angle's sign where the two anticommute, past the other gates it becomes
another Pauli operator, and at the end it flips outcomes; gates for which this is not so are taken
apart first (`elementary`). All of this is linear over bits, so that one matrix, computed once from
the circuit, says which angles and outcomes the errors of a shot turn.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from qkd_jax.errors import ConfigError
from qkd_jax.quantum.checks import MAX_SHOTS, as_integer, as_real, check_shape, real_number
from qkd_jax.quantum.elementary import elementary
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


def noisy_expectations(
    key: Array, circuit: Circuit, parameters: Array, noise: Noise, shots: int
) -> Array:
    """<Z> of every qubit estimated from shots on a noisy device.

    A circuit is compiled anew when errors of gates or of readout come in, not for each of their
    probabilities or for more shots.

    Args:
      key: a random key; every row and shot has numbers of its own.
      circuit: the gates; static.
      parameters: [B, P] real angles in radians, one row for each circuit that is run.
      noise: how probable errors are.
      shots: of each row, from 1 to 2**31 - 1.

    Returns:
      [B, Q] in [-1, 1]: unbiased for the noisy <Z>, with variance (1 - <Z>^2) / shots.

    Raises:
      ConfigError: on a wrong shape or type.
    """
    shots = as_integer("shots", shots, 1, MAX_SHOTS)
    parameters = as_real("parameters", parameters)
    check_shape("parameters", parameters.shape, (None, circuit.num_parameters), "one row a circuit")
    has_errors = noise.one_qubit > 0 or noise.two_qubit > 0
    # Without errors a chunk is drawn from one state, so that drawing too many costs nothing.
    chunk = min(shots, CHUNK) if has_errors else CHUNK
    errors = (noise.one_qubit, noise.two_qubit) if has_errors else None
    readout = noise.readout if noise.readout > 0 else None
    return _estimates(key, circuit, parameters, errors, readout, shots, chunk)


@partial(jax.jit, static_argnames=("circuit", "chunk"))
def _estimates(key, circuit, parameters, errors, readout, shots, chunk):
    keys = jax.random.split(key, parameters.shape[0])
    sums = partial(_sum_of_outcomes, circuit, errors, readout, shots, chunk)
    return lax.map(lambda row: sums(*row), (keys, parameters)) / shots


def _sum_of_outcomes(circuit, errors, readout, shots, chunk, key, parameters):
    """[Q]: the sum over shots of the signs that are measured, for one row [P].

    The probabilities `errors`, of gates on one qubit and on two, and `readout` are None where
    nothing happens.
    """
    key_shots, key_readout = jax.random.split(key)
    parts = elementary(circuit)
    angles, merged = parts.angles(parameters), merged_rotations(parts.circuit)
    sums = jnp.asarray(merged.sums, angles.dtype)

    def state_of(angles):
        """The state by one angle for each rotation [R]."""
        return apply(merged.circuit, jnp.dot(angles, sums, precision=HIGHEST))

    def shot(key):
        """[Q] bits of one trajectory, without readout errors."""
        turned, key_outcome = drawn(key)
        state = state_of(turned_signs(turned.angles, angles.dtype) * angles)
        return _bits(sample(key_outcome, state, 1), circuit.num_qubits)[0] ^ turned.flips

    state, drawn = None, None
    if errors is None:
        state = state_of(angles)
    else:
        drawn = drawn_errors(error_table(circuit), *errors)
    num_chunks = -(-shots // chunk)

    def outcomes(index):
        """[chunk, Q] measured bits."""
        key = jax.random.fold_in(key_shots, index)
        if state is None:
            return jax.vmap(shot)(jax.random.split(key, chunk))
        return _bits(sample(key, state, chunk), circuit.num_qubits)

    def add(index, total):
        bits = outcomes(index)
        if readout is not None:
            key = jax.random.fold_in(key_readout, index)
            flips = jax.random.bernoulli(key, readout, bits.shape)
            bits = bits ^ flips.astype(bits.dtype)
        real = index * chunk + jnp.arange(chunk) < shots
        return total + jnp.sum(jnp.where(real[:, None], 1 - 2 * bits, 0), axis=0)

    total = lax.fori_loop(0, num_chunks, add, jnp.zeros(circuit.num_qubits, jnp.int32))
    return total.astype(parameters.dtype)


def _bits(indices: Array, num_qubits: int) -> Array:
    """[N, Q] bits of basis states [N]; wire 0 is the most significant."""
    return (indices[:, None] >> jnp.arange(num_qubits - 1, -1, -1)[None]) & 1


class ErrorTable(NamedTuple):
    """What single X and Z errors do: E of them, one of each after each gate on each of its wires.

    Errors are moved to the end of the circuit, whose gates are taken as `elementary` gates. A row
    says which of the R rotations' angles change their sign, on which of the Q wires an X is then
    left at the end, and on which a Z: R + 2Q columns. Y is both X and Z; errors add up modulo 2.

    Attributes:
      effects: bool [E, R + 2Q].
      start: bool [Q, R + 2Q], of an X on each wire before the first gate.
      gate: int [E], the gate of the circuit that each error follows.
      bit: int [E], its place in the number of the gate's Pauli operator.
      num_wires: int [G], of each gate.
    """

    effects: np.ndarray
    start: np.ndarray
    gate: np.ndarray
    bit: np.ndarray
    num_wires: np.ndarray


def error_table(circuit: Circuit) -> ErrorTable:
    """The effects of all errors, from the last gate to the first."""
    parts = elementary(circuit)
    rotation, num_qubits = len(parts.parameter), circuit.num_qubits
    # Of an X and of a Z on each wire at the current place.
    ends = np.eye(rotation + 2 * num_qubits, dtype=bool)[rotation:]
    x, z = ends[:num_qubits].copy(), ends[num_qubits:].copy()
    effects, owners, bits = [], [], []
    for position, group in reversed(list(enumerate(parts.groups))):
        for k, wire in enumerate(circuit.gates[position].wires):
            effects += [x[wire].copy(), z[wire].copy()]
            owners += [position, position]
            bits += [2 * k, 2 * k + 1]
        for gate in reversed(group):
            if gate.parameter is not None:
                rotation -= 1
                for wire in gate.wires:
                    x[wire, rotation] ^= gate.name[1] != "X"
                    z[wire, rotation] ^= gate.name[1] != "Z"
            else:
                _move_before(gate, x, z)
    num_wires = np.array([len(gate.wires) for gate in circuit.gates], int)
    effects = np.array(effects, bool).reshape(-1, ends.shape[1])
    return ErrorTable(effects, x, np.array(owners, int), np.array(bits, int), num_wires)


def _move_before(gate: Gate, x: np.ndarray, z: np.ndarray) -> None:
    """Changes x and z, effects of errors behind a Clifford gate, to those of errors before it."""
    first, last = gate.wires[0], gate.wires[-1]
    if gate.name == "H":
        x[first], z[first] = z[first].copy(), x[first].copy()
    elif gate.name in ("S", "SDG"):
        x[first] ^= z[first]
    elif gate.name == "SX":
        z[first] ^= x[first]
    elif gate.name == "CNOT":
        x[first] ^= x[last]
        z[last] ^= z[first]
    elif gate.name == "CY":
        x[first] ^= x[last] ^ z[last]
        x[last] ^= z[first]
        z[last] ^= z[first]
    elif gate.name == "CZ":
        x[first] ^= z[last]
        x[last] ^= z[first]
    elif gate.name == "SWAP":
        for effects in (x, z):
            effects[[first, last]] = effects[[last, first]]


class Turned(NamedTuple):
    """What the errors of one trajectory do, as zeros and ones.

    Attributes:
      angles: [R], which of the rotations' angles change their sign.
      flips, signs: [Q], on which wires an X and a Z are left at the end.
    """

    angles: Array
    flips: Array
    signs: Array


def drawn_errors(
    table: ErrorTable, one_qubit: Array | float, two_qubit: Array | float
) -> Callable[..., tuple[Turned, Array]]:
    """A function that draws the errors of one trajectory from a key, and returns a fresh key too.

    Its second argument is the probability of an X on each wire before the first gate, if there is
    one.

    Args:
      table: of the circuit.
      one_qubit, two_qubit: probabilities of an error after a gate on so many qubits.
    """
    num_qubits = len(table.start)
    effects, start = _packed(table.effects), _packed(table.start)
    strengths = jnp.asarray([one_qubit, two_qubit], jnp.float32)[table.num_wires - 1]
    # A number from 1: its bits say where there is an X, and where a Z.
    kinds = 4**table.num_wires

    def draw(key: Array, before: Array | float | None = None) -> tuple[Turned, Array]:
        key_error, key_kind, key = jax.random.split(key, 3)
        happens = jax.random.uniform(key_error, kinds.shape) < strengths
        kind = jax.random.randint(key_kind, kinds.shape, 1, jnp.asarray(kinds, jnp.int32))
        bits = (kind[table.gate] >> jnp.asarray(table.bit)) & 1
        turned = _sum_modulo_2(effects, happens[table.gate] & (bits == 1))
        if before is not None:
            key, key_before = jax.random.split(key)
            turned ^= _sum_modulo_2(start, jax.random.bernoulli(key_before, before, (num_qubits,)))
        bits = (turned[:, None] >> jnp.arange(32, dtype=jnp.uint32)[None]) & 1
        bits = bits.reshape(-1)[: table.start.shape[1]].astype(jnp.int32)
        cuts = [bits.size - 2 * num_qubits, bits.size - num_qubits]
        return Turned(*jnp.split(bits, cuts)), key

    return draw


def turned_signs(turned: Array, dtype) -> Array:
    """-1 where something is turned, else 1."""
    return (1 - 2 * turned).astype(dtype)


def _packed(rows: np.ndarray) -> np.ndarray:
    """Rows of bits [E, n] as words of 32 bits: uint32 [E, ceil(n / 32)]."""
    rows = np.pad(rows, [(0, 0), (0, -rows.shape[1] % 32)]).reshape(len(rows), -1, 32)
    return np.sum(rows << np.arange(32, dtype=np.uint64), axis=2, dtype=np.uint64).astype(np.uint32)


def _sum_modulo_2(rows: np.ndarray, chosen: Array) -> Array:
    """The sum of the chosen rows [E], bit by bit modulo 2: uint32 [words]."""
    rows = jnp.where(chosen[:, None], jnp.asarray(rows), jnp.uint32(0))
    return lax.reduce(rows, np.uint32(0), lax.bitwise_xor, (0,))


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
