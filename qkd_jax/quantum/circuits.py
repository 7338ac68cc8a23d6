"""The feature map of QKD, from angles to a state, and the fidelities of such states.

Layer l is RY(angle_j) RY(theta_{l,j}) on every qubit j, then the open chain CNOT(j -> j+1). Three
facts make it cheap, and all are exact:

* Every amplitude is real, so nothing here is complex unless `last_axis` asks for it.
* After two layers the state is a sum of two products of its left and its right half, because the
  chain links the halves by one bit. Fidelities of two-layer states are computed from the halves,
  which never get multiplied out: 2**(Q/2) numbers, not 2**Q.
* The last gates that both states of a fidelity share cancel: always the last CNOT chain, and the
  last thetas too when both sides have the same ones (`cut_tail`).

The fast forms of the layers themselves are in `layers.py`.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from qkd_jax.errors import ConfigError
from qkd_jax.quantum.checks import MAX_SIMULATED_QUBITS, as_integer, as_real, check_shape
from qkd_jax.quantum.layers import (
    HIGHEST,
    layered_state,
    product_state,
    rx_matrix,
    ry_matrix,
    rz_matrix,
    two_layer_halves,
)
from qkd_jax.quantum.statevector import Circuit, Gate


@dataclass(frozen=True)
class FeatureMap:
    """The form of the circuit; static. Integers of any kind (NumPy's too) are kept as `int`.

    Attributes:
      num_qubits: Q, from 1 to 30.
      num_layers: L.
      reupload: whether every layer encodes the data, or only the first. Without re-uploading a
        shared theta cannot change any fidelity, at any depth.
      last_axis: axis of the theta rotation in the last layer. "y" is the paper. With "x" or "z" it
        stands *before* the layer's data rotation: the two do not commute, and behind the data it
        would still cancel. A shared last theta then has a gradient (zero only at theta = 0, and
        for "z" with one layer, where it is a global phase), and amplitudes become complex.
      cut_tail: whether `fidelity_matrix` leaves out what cancels. The result is the same;
        switching it off runs the literal circuit.

    Raises:
      ConfigError: on a value of the wrong type or out of range.
    """

    num_qubits: int = 9
    num_layers: int = 2
    reupload: bool = True
    last_axis: str = "y"
    cut_tail: bool = True

    def __post_init__(self):
        for name, high in (("num_qubits", MAX_SIMULATED_QUBITS), ("num_layers", None)):
            value = as_integer(f"FeatureMap.{name}", getattr(self, name), 1, high)
            object.__setattr__(self, name, value)
        if not isinstance(self.last_axis, str) or self.last_axis not in ("x", "y", "z"):
            raise ConfigError(
                f"FeatureMap.last_axis: expected 'x', 'y' or 'z', found {self.last_axis!r}"
            )
        object.__setattr__(self, "last_axis", str(self.last_axis))  # np.str_ becomes str
        for name in ("reupload", "cut_tail"):
            value = getattr(self, name)
            if not isinstance(value, bool | np.bool_):
                raise ConfigError(f"FeatureMap.{name}: expected True or False, found {value!r}")
            object.__setattr__(self, name, bool(value))

    def encodes_data(self, layer: int) -> bool:
        """Whether this layer (from 0) rotates by the sample's angles."""
        return self._check_layer(layer) == 0 or self.reupload

    def axis(self, layer: int) -> str:
        """The axis of this layer's (from 0) theta rotation."""
        return self.last_axis if self._check_layer(layer) == self.num_layers - 1 else "y"

    def _check_layer(self, layer: int) -> int:
        return as_integer("layer", layer, 0, self.num_layers - 1)


def init_theta(key: Array, feature_map: FeatureMap, scale: float = 0.1, dtype=jnp.float32) -> Array:
    """Normal random theta [L, Q] in radians with standard deviation `scale`.

    Keep it small: the CNOT chain carries one flipped bit to all later qubits, so at large theta
    the state is a chaotic function of its angles.
    """
    shape = (feature_map.num_layers, feature_map.num_qubits)
    return scale * jax.random.normal(key, shape, dtype)


def feature_circuit(feature_map: FeatureMap) -> Circuit:
    """The circuit as plain data, to draw, to export, or to run on the general simulator.

    Its parameters are the Q angles followed by theta row by row:
    `jnp.concatenate([angles, theta.reshape(-1)])`, so theta_{l,j} has index Q + l Q + j.
    """
    qubits = range(feature_map.num_qubits)
    gates = []
    for layer in range(feature_map.num_layers):
        axis = feature_map.axis(layer)
        first_theta = feature_map.num_qubits * (1 + layer)
        thetas = [Gate(f"R{axis.upper()}", (j,), first_theta + j) for j in qubits]
        data = [Gate("RY", (j,), j) for j in qubits] if feature_map.encodes_data(layer) else []
        gates += data + thetas if axis == "y" else thetas + data
        gates += [Gate("CNOT", (j, j + 1)) for j in qubits[:-1]]
    return Circuit(feature_map.num_qubits, tuple(gates))


def feature_state(feature_map: FeatureMap, angles: Array, theta: Array) -> Array:
    """The state of one sample, the whole circuit with its last chain.

    Args:
      feature_map: static.
      angles: [Q] radians.
      theta: [L, Q] radians.

    Returns:
      [2**Q] of norm 1, real unless `last_axis` is "x" or "z". Batch with `jax.vmap`.

    Raises:
      ConfigError: on a wrong shape or type.
    """
    angles, theta = _common_float(angles=angles, theta=theta)
    check_shape("angles", angles.shape, (feature_map.num_qubits,))
    _check_theta("theta", theta, feature_map)
    return layered_state(_rotations(feature_map, angles, theta), last_chain=True)


def fidelity_matrix(
    feature_map: FeatureMap,
    angles_a: Array,
    angles_b: Array,
    theta: Array,
    theta_b: Array | None = None,
) -> Array:
    """p[i, j] = |<psi(angles_a[i], theta) | psi(angles_b[j], theta_b)>|^2, from B + T states.

    Args:
      feature_map: static.
      angles_a: [B, Q] radians.
      angles_b: [T, Q] radians.
      theta: [L, Q] radians.
      theta_b: [L, Q] radians for the second side; `theta` when left out. Zeros put theta on one
        branch only, which gives the last layer a gradient.

    Returns:
      [B, T] real, in [0, 1] up to rounding (a few times L Q eps).

    Raises:
      ConfigError: on a wrong shape or type.
    """
    shared = theta_b is None
    angles_a, angles_b, theta, theta_b = _common_float(
        angles_a=angles_a, angles_b=angles_b, theta=theta, theta_b=theta if shared else theta_b
    )
    check_shape("angles_a", angles_a.shape, (None, feature_map.num_qubits))
    check_shape("angles_b", angles_b.shape, (None, feature_map.num_qubits))
    _check_theta("theta", theta, feature_map)
    _check_theta("theta_b", theta_b, feature_map)
    prepare = jax.vmap(
        lambda angles, theta: _pieces(feature_map, angles, theta, shared),
        in_axes=(0, None),
    )
    if shared:  # one preparation for both sides compiles once and runs as one batch
        pieces = prepare(jnp.concatenate([angles_a, angles_b]), theta)
        pieces_a, pieces_b = zip(
            *(jnp.split(piece, [angles_a.shape[0]]) for piece in pieces), strict=True
        )
    else:
        pieces_a, pieces_b = prepare(angles_a, theta), prepare(angles_b, theta_b)
    overlap = 1
    for piece_a, piece_b in zip(pieces_a, pieces_b, strict=True):
        overlap *= jnp.einsum("bxi,tyi->xybt", piece_a.conj(), piece_b, precision=HIGHEST)
    overlap = overlap.sum((0, 1))
    if jnp.iscomplexobj(overlap):
        return jnp.square(overlap.real) + jnp.square(overlap.imag)
    return jnp.square(overlap)


def _pieces(feature_map: FeatureMap, angles: Array, theta: Array, shared: bool) -> list[Array]:
    """One state as pieces [bond, size], without what cancels in a fidelity.

    The state is the sum over the bond of the Kronecker product of the pieces' rows.
    """
    if not feature_map.cut_tail:
        return [layered_state(_rotations(feature_map, angles, theta), last_chain=True)[None]]
    rotations = _rotations(feature_map, angles, theta)
    if shared and feature_map.num_layers > 1 and not feature_map.reupload:
        rotations = [ry_matrix(angles)]
    elif shared and feature_map.last_axis == "y":
        rotations[-1] = ry_matrix(angles)
    if len(rotations) > 2 or feature_map.num_qubits == 1:
        return [layered_state(rotations, last_chain=False)[None]]
    half = feature_map.num_qubits // 2
    vectors = rotations[0][:, :, 0]
    if len(rotations) == 1:
        return [
            product_state(vectors[:half], False)[None],
            product_state(vectors[half:], False)[None],
        ]
    left, right = two_layer_halves(vectors, rotations[1], chain=False)
    return [left.T, right]


def _rotations(feature_map: FeatureMap, angles: Array, theta: Array) -> list[Array]:
    """The one-qubit matrices [Q, 2, 2] of each layer, products of data and theta rotations."""
    rotations = []
    for layer in range(feature_map.num_layers):
        encodes_data, axis = feature_map.encodes_data(layer), feature_map.axis(layer)
        if axis == "y":  # rotations about one axis: their angles add
            rotations.append(ry_matrix(theta[layer] + angles if encodes_data else theta[layer]))
            continue
        rotation = (rx_matrix if axis == "x" else rz_matrix)(theta[layer])
        if encodes_data:
            data = ry_matrix(angles).astype(rotation.dtype)
            rotation = jnp.einsum("qzx,qxy->qzy", data, rotation, precision=HIGHEST)
        rotations.append(rotation)
    return rotations


def _common_float(**arrays: Array) -> list[Array]:
    """The arrays in the widest of their precisions, float32 at least."""
    angles = [as_real(name, array) for name, array in arrays.items()]
    dtype = np.result_type(*(array.dtype for array in angles))
    return [array.astype(dtype) for array in angles]


def _check_theta(name: str, theta: Array, feature_map: FeatureMap) -> None:
    check_shape(name, theta.shape, (feature_map.num_layers, feature_map.num_qubits))
