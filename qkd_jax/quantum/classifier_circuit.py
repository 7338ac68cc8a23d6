"""The variational classifier of QD-LLM (arXiv 2505.13205): data, two layers, <Z> of every qubit.

`classifier_circuit` is the circuit gate by gate. `classifier_expectations` computes its <Z> without
a statevector, exactly, with work that grows linearly with the qubits. Why that is possible:

* In a layer every R_ZZ can act before every R_Y: it commutes with those that come earlier.
* The last qubit has no R_Y, so its bit c never changes: the others see a coin of mean cos(x).
* The CNOTs map bits linearly, modulo 2. With b before them and y after: y_0 = b_0 + c + b_1,
  y_k = b_{k+1}, y_{Q-3} = b_1 + ... + b_{Q-3}, y_{Q-2} = y_{Q-3} + b_{Q-2}. Qubit 0 is a product
  until then, and the only other long link is a parity, resolved by a sum over one sign each for ket
  and bra.
* So layer 2 turns every <Z_j> into a product of one-qubit operators on a chain of sites y_1, y_2,
  ..., whose neighbours are linked by one phase of each layer. What passes a link is a Hermitian
  matrix of the bits (a, y) before and between the layers, 4 x 4, for each of four pairs of signs:
  64 real numbers for each row and observable, however many qubits there are.

The links have a constant size: no number of qubits makes these <Z> hard to compute.

Angles are radians, rotations exp(-i angle P / 2), wire 0 the most significant bit.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from qkd_jax.errors import ConfigError
from qkd_jax.quantum.checks import as_integer, as_real, check_shape
from qkd_jax.quantum.layers import HIGHEST, ry_matrix
from qkd_jax.quantum.statevector import Circuit, Gate

LAYERS = 2
# Successive rotations of a qubit about one axis: only their sum matters.
REPEATS = 3
LEAST_QUBITS = 5

Angles = dict[str, Array]


def angle_shapes(num_qubits: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the trained angles: 144 numbers for 11 qubits.

    "ry" [2, 3, Q-1]: no R_Y on the last qubit. "rzz" [2, Q-2]: entry j is on qubits j+1 and j+2.
    "rz" [2, 3, Q]: those of the second layer cannot change any <Z>.
    """
    as_integer("num_qubits", num_qubits, LEAST_QUBITS)
    return {
        "ry": (LAYERS, REPEATS, num_qubits - 1),
        "rzz": (LAYERS, num_qubits - 2),
        "rz": (LAYERS, REPEATS, num_qubits),
    }


def init_angles(key: Array, num_qubits: int, scale: float = 0.01) -> Angles:
    """Normal angles of deviation `scale`: 0.01 is what the trained file of the authors began with,
    as its gates without effect still show.
    """
    shapes = angle_shapes(num_qubits)
    keys = jax.random.split(key, len(shapes))
    return {
        name: scale * jax.random.normal(k, shape)
        for k, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def classifier_circuit(num_qubits: int = 11) -> Circuit:
    """The circuit as published, gate by gate; its parameters are those of `circuit_parameters`."""
    shapes = angle_shapes(num_qubits)
    first, position = {}, num_qubits
    for name, shape in shapes.items():
        first[name] = position + np.arange(np.prod(shape)).reshape(shape)
        position += int(np.prod(shape))
    gates = [Gate("RX", (j,), j) for j in range(num_qubits)]
    for layer in range(LAYERS):
        for j in range(num_qubits - 1):
            gates += [Gate("RY", (j,), first["ry"][layer, k, j]) for k in range(REPEATS)]
            if j != num_qubits - 2:
                gates.append(Gate("RZZ", (j + 1, j + 2), first["rzz"][layer, j]))
        for j in range(num_qubits):
            gates += [Gate("RZ", (j,), first["rz"][layer, k, j]) for k in range(REPEATS)]
        gates.append(Gate("CNOT", (num_qubits - 1, 0)))
        for k in range(1, num_qubits - 2):
            gates += [Gate("CNOT", (k, k + 1)), Gate("CNOT", (k, k - 1))]
    return Circuit(num_qubits, tuple(gates))


def circuit_parameters(inputs: Array, angles: Angles) -> Array:
    """[Q + P]: the parameters of `classifier_circuit` for the data angles [Q] of one row."""
    return jnp.concatenate([inputs, *(angles[name].reshape(-1) for name in ("ry", "rzz", "rz"))])


def classifier_expectations(inputs: Array, angles: Angles) -> Array:
    """<Z_j> of every qubit after the circuit, [B, Q] in [-1, 1] up to rounding.

    Equal to running `classifier_circuit`, see the module's docstring; work and memory are O(B Q).

    Args:
      inputs: [B, Q] data angles in radians, Q >= 5.
      angles: trained angles in the shapes of `angle_shapes`.

    Raises:
      ConfigError: on a wrong shape or type.
    """
    inputs = as_real("inputs", inputs)
    if inputs.ndim != 2:
        raise ConfigError(f"inputs: expected shape [batch, Q], found {list(inputs.shape)}")
    num_qubits, dtype = inputs.shape[1], inputs.dtype
    for name, shape in angle_shapes(num_qubits).items():
        check_shape(f"angles[{name!r}]", angles[name].shape, shape, "see angle_shapes")
    ry, rz = (jnp.sum(angles[name], axis=1).astype(dtype) for name in ("ry", "rz"))
    rzz = angles["rzz"].astype(dtype)
    data = _data_factors(inputs.T)
    first_unitaries = _first_layer(ry[0], rz[0])
    transfers = _transfers(first_unitaries, rzz)  # of sites 1..Q-2, at positions 0..Q-3
    traced = _site(jnp.ones(2, dtype), jnp.zeros((), dtype))
    # RY(-t) Z RY(t), what is measured on a site before the second layer's R_Y.
    reflections = jnp.cos(ry[1])[:, None] * jnp.asarray(_SIGNS, dtype)[None], -jnp.sin(ry[1])
    measured = jax.vmap(_site)(*(values[1:] for values in reflections))

    # From the left. Column 0 of an environment: nothing measured so far; column 1: every site.
    begin = _start(first_unitaries, ry[1, 0], inputs[:, 0], _of(data, 1))
    begin = _mix(_transfer(transfers[0], begin), _of(data, 2), "a")
    site_1 = _mix(begin, _of(measured, 0), "site")
    left = _columns(_mix(_column(begin, 0), traced, "site"), _column(site_1, 0))

    # Sites 2..Q-3. The last of them is the parity, which brings no qubit of its own.
    one = jnp.ones_like(data[0][:1])
    weights = tuple(
        jnp.concatenate([values[3:-2], end])
        for values, end in zip(data, (one, jnp.zeros_like(one)), strict=True)
    )
    sites = transfers[1:-1], weights, tuple(values[1:-1] for values in measured)

    def forward(left, site):
        matrix, weights, own = site
        out = _mix(_transfer(matrix, left), weights, "a")
        untouched, long = _column(out, 0), _column(out, 1)
        single, long = _mix(untouched, own, "site"), _mix(long, own, "site")
        return _columns(_mix(untouched, traced, "site"), long), single

    left, singles = lax.scan(forward, left, sites)

    # From the right: site Q-2 with the last qubit, whose sign is a factor of column 1.
    ends = _mix(_ends(rzz[:, -1], inputs[:, -1]), _transposed(_of(data, -2)), "a")
    no_parity = _site(jnp.ones(2, dtype), jnp.zeros((), dtype), in_parity=False)
    last = _site(*(values[-1] for values in reflections), in_parity=False)
    right = _transfer(transfers[-1].T, _mix(ends, _transposed(no_parity), "site"))
    every = _transfer(transfers[-1].T, _mix(_column(ends, 0), _transposed(last), "site"))

    def backward(right, step):
        (matrix, weights, _), single = step
        expectation = _close(single, _column(right, 0))
        right = _mix(right, _transposed(traced), "site")
        return _transfer(matrix.T, _mix(right, _transposed(weights), "a")), expectation

    long = _column(left, 1)
    tail = [_close(long, _column(right, 0)), _close(long, every), jnp.cos(inputs[:, -1])]
    right, middle = lax.scan(backward, right, (sites, singles), reverse=True)
    head = _close(_columns(_column(site_1, 1), _column(site_1, 2)), right)
    return jnp.stack([head, *middle, *tail], axis=1)


# An environment is a real array [2, 2, 2, 2, K, 2, 2, B]: the Hermitian matrix of (a, y) at a link,
# for K observables and B rows. Two axes hold the matrix of a bit, (kind, which): its diagonal
# (00, 11), or real and imaginary part of the element 01. The first two are a, the next y. The two
# before B are the signs that resolve the parity, of ket and bra: ((++, --), (real and imaginary
# part of +-)); -+ is the conjugate of +-.
_BIT_BASIS = np.array([[[1, 0], [0, 0]], [[0, 0], [0, 1]], [[0, 1], [1, 0]], [[0, 1j], [-1j, 0]]])
# The coordinates of a Hermitian matrix m in this basis are sum(_BIT_DUAL * m).
_BIT_DUAL = np.array([1, 1, 0.5, 0.5])[:, None, None] * _BIT_BASIS.conj()


def _of_two(basis: np.ndarray) -> np.ndarray:
    """[16, 4, 4] for (a, y) from [4, 2, 2] for one bit."""
    return np.einsum("uij,vkl->uvikjl", basis, basis).reshape(16, 4, 4)


_SIGNS = np.array([1.0, -1.0])  # of a bit 0 and 1: the eigenvalues of Z
_SIGN_PAIRS = np.outer(_SIGNS, _SIGNS)
# What sign^y for ket and bra does to the diagonal [y, 2, 2] and to the rest of y's matrix.
_PARITY_DIAGONAL = np.stack([np.ones((2, 2)), np.array([[1, 1], [-1, -1]])])
_PARITY_REST = np.stack([np.array([[1, -1], [0, 0]])] * 2)
_PARITY_SWAP = np.stack([np.array([[0, 0], [1, -1]]), np.array([[0, 0], [-1, 1]])])

Factors = tuple[Array, Array]


def _mix(env: Array, factors: Factors, which: str) -> Array:
    """The elementwise product of a Hermitian matrix with another one, in real coordinates.

    Where the product is with an imaginary number, two coordinates change places: real and imaginary
    part of an element of "a"; of "site", of an element and of the sign pair +- at once.
    """
    keep, swap = factors
    return keep * env + swap * lax.rev(env, {"a": (1,), "site": (3, 6)}[which])


def _transposed(factors: Factors) -> Factors:
    """With these, `_mix` is its own transpose: axes that do not change places have size 1."""
    keep, swap = factors
    return keep, lax.rev(swap, (1, 3, 6))


def _site(diagonal: Array, rest: Array, in_parity: bool = True) -> Factors:
    """What measures the operator [[diagonal_0, rest], [rest, diagonal_1]] on a bit y."""
    dtype = diagonal.dtype
    constants = (_PARITY_DIAGONAL, _PARITY_REST, _PARITY_SWAP)
    if not in_parity:
        constants = (np.ones((2, 2, 2)), np.ones((2, 2, 2)), np.zeros((2, 2, 2)))
    on_diagonal, on_rest, swapped = (jnp.asarray(c, dtype) for c in constants)
    keep = jnp.stack([diagonal[:, None, None] * on_diagonal, rest * on_rest])
    swap = jnp.stack([jnp.zeros_like(swapped), rest * swapped])
    return tuple(values[None, None, :, :, None, :, :, None] for values in (keep, swap))


def _data_factors(inputs: Array) -> Factors:
    """For R_X(x)|0>, x [Q, B]: the factors [Q, 2, 2, 1, 1, 1, 1, 1, B] of the bit a of a qubit."""
    cosine, sine = 0.5 * jnp.cos(inputs), 0.5 * jnp.sin(inputs)
    zero = jnp.zeros_like(cosine)
    keep = jnp.stack([jnp.stack([0.5 + cosine, 0.5 - cosine], 1), jnp.stack([zero, zero], 1)], 1)
    swap = jnp.stack([jnp.stack([zero, zero], 1), jnp.stack([-sine, sine], 1)], 1)
    return tuple(values[:, :, :, None, None, None, None, None] for values in (keep, swap))


def _of(factors: Factors, index: int) -> Factors:
    return tuple(values[index] for values in factors)


def _column(env: Array, index: int) -> Array:
    return lax.slice_in_dim(env, index, index + 1, axis=4)


def _columns(*envs: Array) -> Array:
    return jnp.concatenate(envs, axis=4)


def _close(left: Array, right: Array) -> Array:
    """[B]: the sum over all observables of an environment from the left and one from the right."""
    return jnp.sum(left * right, axis=tuple(range(7)))


def _transfer(matrix: Array, env: Array) -> Array:
    """Over one link: `matrix` [16, 16] on (a, y)."""
    return jnp.dot(matrix, env.reshape(16, -1), precision=HIGHEST).reshape(env.shape)


def _phases(angles: Array) -> Array:
    """The diagonals of R_ZZ by angles [K] and the two bits, [K, 2, 2]."""
    half = 0.5 * angles[:, None, None] * jnp.asarray(_SIGN_PAIRS, angles.dtype)[None]
    return lax.complex(jnp.cos(half), -jnp.sin(half))


def _first_layer(ry: Array, rz: Array) -> Array:
    """RZ RY of the first layer, [Q-1, b, a]; the last qubit has no R_Y, and its R_Z no effect."""
    half = 0.5 * rz[:-1, None] * jnp.asarray(_SIGNS, rz.dtype)[None]
    phases = lax.complex(jnp.cos(half), -jnp.sin(half))
    return phases[:, :, None] * ry_matrix(ry).astype(phases.dtype)


def _transfers(first_unitaries: Array, rzz: Array) -> Array:
    """[Q-2, 16, 16], real: from (a, y) of one site to those of the next, without the data."""
    dtype = first_unitaries.dtype
    links, later = _phases(rzz[0])[:-1], _phases(rzz[1])[:-1]
    # Site k = 1..Q-4 brings qubit k + 1, and y_k is its bit b; nothing is linked to site 1.
    later = jnp.concatenate([jnp.ones_like(later[:1]), later])
    plain = jnp.einsum("kij,kli,klm->kiljm", links[:-1], first_unitaries[2:-1], later[:-2])
    parity = jnp.einsum("ij,lm->iljm", jnp.eye(2, dtype=dtype), later[-2])
    # b_{Q-2} = y_{Q-3} + y_{Q-2}
    by_parity = jnp.stack([first_unitaries[-1], first_unitaries[-1, ::-1]])  # [y_{Q-3}, y_{Q-2}, a]
    last = jnp.einsum("ij,mli,lm->iljm", links[-1], by_parity, later[-1])
    kets = jnp.concatenate([plain, parity[None], last[None]]).reshape(-1, 4, 4)
    return jax.vmap(lambda ket: _real_map(ket, _of_two(_BIT_BASIS), _of_two(_BIT_DUAL)))(kets)


def _real_map(ket: Array, basis: np.ndarray, dual: np.ndarray) -> Array:
    """The map m -> ket m ket^dagger of Hermitian matrices, in real coordinates."""
    basis, dual = (jnp.asarray(values, ket.dtype) for values in (basis, dual))
    images = jnp.einsum("im,qmn,jn->qij", ket, basis, ket.conj(), precision=HIGHEST)
    return jnp.einsum("pij,qij->pq", dual, images, precision=HIGHEST).real


def _start(first_unitaries: Array, ry: Array, inputs: Array, data: Factors) -> Array:
    """What qubits 0 and 1 leave at the link to site 1, [..., 3 observables, ..., B].

    Qubit 0 receives b_1 and the last bit c, and is measured in column 1 and 2, which add up to
    <Z_0>: column 2 is without the sign of c, which the right end brings. `ry` and `inputs` [B] are
    those of qubit 0, in the second layer and of the data; `data` of qubit 1.
    """
    dtype = inputs.dtype
    bloch = _real_map(first_unitaries[0], _BIT_BASIS, _BIT_DUAL)
    cosine, sine = 0.5 * jnp.cos(inputs), 0.5 * jnp.sin(inputs)
    zero = jnp.zeros_like(cosine)
    prepared = jnp.stack([0.5 + cosine, 0.5 - cosine, zero, sine])
    zeros, ones, real, imaginary = jnp.dot(bloch, prepared, precision=HIGHEST)
    x, y, z = 2 * real, -2 * imaginary, zeros - ones
    one = jnp.ones_like(x)
    # By b_1 of ket and bra, as (00, 11, real and imaginary part of 01).
    traced = jnp.stack([one, one, x, zero])
    along_z = jnp.cos(ry) * jnp.stack([z, -z, zero, -y])
    along_x = -jnp.sin(ry) * jnp.stack([x, x, one, zero])
    start = jnp.stack([traced, along_z, along_x], 1)  # [4, 3, B]
    start = start.reshape(1, 1, 2, 2, 3, 1, 1, -1)
    no_imaginary_part = jnp.asarray([[1, 1], [1, 0]], dtype)
    start = start * no_imaginary_part[None, None, None, None, None, :, :, None]
    start = _mix(start, _site(jnp.ones(2, dtype), jnp.ones((), dtype)), "site")
    back = _real_map(first_unitaries[1].T, _BIT_BASIS, _BIT_DUAL)  # from b_1 to a_1
    start = jnp.dot(back, start.reshape(4, -1), precision=HIGHEST)
    start = start.reshape(2, 2, 1, 1, 3, 2, 2, -1)
    y_is_zero = jnp.zeros((2, 2), dtype).at[0, 0].set(1)
    start = start * y_is_zero[None, None, :, :, None, None, None, None]
    return _mix(start, data, "a")


def _ends(rzz: Array, inputs: Array) -> Array:
    """The links of site Q-2 to the last qubit, whose bit c has the mean sign cos(inputs) [B];
    column 1 with that sign as a factor. The signs of the parity are summed here.
    """
    dtype = inputs.dtype
    signs = jnp.asarray(_SIGNS, dtype)
    half = 0.5 * ((rzz[0] * signs)[:, None] + (rzz[1] * signs)[None]).reshape(4)
    gap = half[:, None] - half[None, :]
    basis = _of_two(_BIT_BASIS)
    even = jnp.einsum("uij,ij->u", jnp.asarray(basis.real, dtype), jnp.cos(gap), precision=HIGHEST)
    odd = jnp.einsum("uij,ij->u", jnp.asarray(basis.imag, dtype), jnp.sin(gap), precision=HIGHEST)
    mean = jnp.cos(inputs)[None]
    ends = jnp.stack([even[:, None] + odd[:, None] * mean, even[:, None] * mean + odd[:, None]], 1)
    weights = jnp.asarray([[0.25, 0.25], [0.5, 0.0]], dtype)
    ends = ends.reshape(2, 2, 2, 2, 2, 1, 1, -1)
    return ends * weights[None, None, None, None, None, :, :, None]
