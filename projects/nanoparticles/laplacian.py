"""Matrices of weights W_ij = exp(-|x_i - x_j|^2 / t), and positions of atoms from them.

Two decoders: by eigenvectors of the graph Laplacian, as Cao et al., arXiv 2509.01370, propose, and
by distances and metric multidimensional scaling, which they compare with. The results of both can
be refined by the same least squares on W. Lengths are in angstrom and t in angstrom^2.
"""

from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qkd_jax.errors import DataError

# The paper has t = 260 for up to 256 atoms. A cluster's radius grows with N^(1/3); with t that
# grows with N^(2/3), weights across a cluster stay the same: 260 (64 / 256)^(2/3) = 103.
T = 100.0
# A noisy weight below that of this distance counts as this distance, since a logarithm needs it.
LONGEST_DISTANCE = 25.0
NEAREST = 8.0  # an atom has a weight above that of this distance in its row (its own is 1)
REFINING_STEPS, LEAST_MOVE = 50, 1e-5  # the move in angstrom
SCALING_STEPS = 300  # of metric multidimensional scaling, the most that scikit-learn does
FIRST_DAMPING, LEAST_DAMPING, MOST_DAMPING = 1e-3, 1e-6, 1e7


def padding_mask(count: jax.Array, atoms: int) -> jax.Array:
    """Which entries of a matrix [A, A] belong to two atoms."""
    present = jnp.arange(atoms) < count
    return present[:, None] & present[None]


def squared_distances(positions: jax.Array) -> jax.Array:
    """[A, A] of positions [A, 3]; differences first, so that small distances stay exact."""
    return jnp.sum((positions[:, None] - positions[None]) ** 2, axis=-1)


@jax.jit
def weights_of(positions: jax.Array, count: jax.Array, t: float = T) -> jax.Array:
    """W [..., A, A] of positions [..., A, 3]; rows and columns from `count` [...] on are zeros."""

    def one(positions, count):
        weights = jnp.exp(-squared_distances(positions) / jnp.asarray(t, positions.dtype))
        return jnp.where(padding_mask(count, len(positions)), weights, 0)

    return jnp.vectorize(one, signature="(a,x),()->(a,a)")(positions, count)


def count_atoms(weights: jax.Array, t: float = T) -> jax.Array:
    """How many atoms W [..., A, A] has: rows with a weight above exp(-64 / t), int32 [...]."""
    return jnp.sum(jnp.max(weights, axis=-1) > np.exp(-(NEAREST**2) / t), axis=-1, dtype=jnp.int32)


def centred(positions: jax.Array, count: jax.Array) -> jax.Array:
    """Positions [A, 3] around the mean of the atoms, zeros as padding."""
    present = (jnp.arange(len(positions)) < count)[:, None]
    kept = jnp.where(present, positions, 0)
    mean = jnp.sum(kept, axis=0, keepdims=True) / jnp.maximum(count, 1).astype(positions.dtype)
    return jnp.where(present, kept - mean, 0)


def observed(weights: jax.Array, count: jax.Array) -> jax.Array:
    """The symmetric part of W [A, A], zeros outside of the atoms."""
    return jnp.where(padding_mask(count, len(weights)), (weights + weights.T) / 2, 0)


def distances_of(weights: jax.Array, count: jax.Array, t: jax.Array) -> jax.Array:
    """sqrt(-t log W) [A, A], zeros on the diagonal and in the padding."""
    least = jnp.exp(-(LONGEST_DISTANCE**2) / t)
    distances = jnp.sqrt(-t * jnp.log(jnp.clip(weights, least, 1)))
    apart = padding_mask(count, len(weights)) & ~jnp.eye(len(weights), dtype=bool)
    return jnp.where(apart, distances, 0)


def laplacian_start(weights: jax.Array, count: jax.Array, t: jax.Array) -> jax.Array:
    """Coordinates [A, 3] from eigenvectors 2 to 4 of L v = lambda M v, L = M - W, M = diag(W 1).

    M^(-1/2) W M^(-1/2) has the same eigenvectors times M^(1/2), with 1 - lambda; padding has 0.
    An eigenvector has no length. The authors leave it at 1; here each of the three gets the factor
    that fits -t log W best by least squares, with weights W^2, since an error of W is an error of W
    in the logarithm, divided by W.
    """
    present = jnp.arange(len(weights)) < count
    degree = jnp.maximum(jnp.sum(weights, axis=1), 1e-3)
    root = jnp.where(present, lax.rsqrt(degree), 0)
    _, vectors = jnp.linalg.eigh(root[:, None] * weights * root[None])
    vectors = jnp.where(present[:, None], vectors[:, -4:-1] * root[:, None], 0)
    apart = jnp.where(
        padding_mask(count, len(weights))[..., None], vectors[:, None] - vectors[None], 0
    )
    extent = jnp.maximum(jnp.max(apart, axis=(0, 1)), 1e-6)
    apart = (apart / extent[None, None]) ** 2
    squared = distances_of(weights, count, t) ** 2
    importance = jnp.clip(weights, 0, 1) ** 2
    product = partial(jnp.einsum, precision="highest")
    normal = product("ij,ijk,ijl->kl", importance, apart, apart)
    right = product("ij,ijk,ij->k", importance, apart, squared)
    held = (1e-6 * jnp.trace(normal) + 1e-9) * jnp.eye(3, dtype=weights.dtype)
    factors = jnp.linalg.solve(normal + held, right)
    # Noise may ask for a negative square; such an axis stays short, and refinement may stretch it.
    factors = jnp.maximum(factors, 1e-2 * jnp.max(jnp.abs(factors)))
    return vectors * (jnp.sqrt(factors) / extent)[None]


def scaling_start(distances: jax.Array, count: jax.Array) -> jax.Array:
    """Classical scaling (Torgerson, Psychometrika 17 (1952) 401): [A, A] -> [A, 3]."""
    mask = padding_mask(count, len(distances)).astype(distances.dtype)
    present, number = mask[0], jnp.maximum(count, 1).astype(distances.dtype)
    squared = distances**2
    rows = jnp.sum(squared, axis=1) / number
    gram = -0.5 * (squared - rows[:, None] - rows[None] + jnp.sum(rows) / number) * mask
    values, vectors = jnp.linalg.eigh(gram)
    return vectors[:, -3:] * jnp.sqrt(jnp.maximum(values[-3:], 0))[None] * present[:, None]


def scaled(distances: jax.Array, count: jax.Array) -> jax.Array:
    """Metric multidimensional scaling by majorisation of the stress (SMACOF), [A, A] -> [A, 3].

    The Guttman transform of de Leeuw (1977), as in `sklearn.manifold.MDS`, from the result of
    classical scaling instead of several random ones.
    """
    number = jnp.maximum(count, 1).astype(distances.dtype)

    def step(_, positions):
        # Where two points coincide any direction would do; their ratio counts as zero.
        squared = squared_distances(positions)
        inverse = jnp.where(squared > 1e-12, lax.rsqrt(jnp.maximum(squared, 1e-12)), 0)
        ratio = distances * inverse
        moved = jnp.sum(ratio, axis=1, keepdims=True) * positions
        return (moved - jnp.matmul(ratio, positions, precision="highest")) / number

    return lax.fori_loop(0, SCALING_STEPS, step, scaling_start(distances, count))


def misfit(positions: jax.Array, weights: jax.Array, mask: jax.Array, t: jax.Array) -> jax.Array:
    """sum_ij (exp(-|x_i - x_j|^2 / t) - W_ij)^2 over atoms."""
    residual = jnp.exp(-squared_distances(positions) / t) - weights
    return jnp.sum(jnp.where(mask, residual, 0) ** 2)


def refined(positions: jax.Array, weights: jax.Array, count: jax.Array, t: jax.Array) -> jax.Array:
    """The nearest minimum of the misfit between W and the weights of positions, [A, 3].

    The method of Levenberg and Marquardt, at most 50 steps of one linear system of 3 A equations
    each; it ends when no coordinate moves by more than 1e-5 angstrom. The authors minimise the same
    sum by 200 steps of `scipy.optimize.minimize(method="trust-constr")`. Rigid motions, which the
    sum does not see, and padding have zeros in the system and are held by the damping.
    """
    atoms = len(positions)
    mask = padding_mask(count, atoms) & ~jnp.eye(atoms, dtype=bool)
    same = jnp.eye(atoms, dtype=positions.dtype)[:, None, :, None]

    def system(positions):
        gaps = positions[:, None] - positions[None]
        fitted = jnp.where(mask, jnp.exp(-jnp.sum(gaps**2, axis=-1) / t), 0)
        residual = jnp.where(mask, fitted - weights, 0)
        # Derivative of the residual of a pair by its first atom; by the second it is the negative.
        slope = -2 / t * fitted[..., None] * gaps
        gradient = jnp.sum(residual[..., None] * slope, axis=1)
        blocks = slope[..., :, None] * slope[..., None, :]  # [A, A, 3, 3]
        own = jnp.sum(blocks, axis=1)
        matrix = same * own[:, :, None, :] - jnp.transpose(blocks, (0, 2, 1, 3))
        return gradient.reshape(-1), matrix.reshape(3 * atoms, 3 * atoms)

    def step(carry):
        positions, value, damping, _, steps = carry
        gradient, matrix = system(positions)
        scale = jnp.maximum(jnp.max(jnp.diagonal(matrix)), 1e-9)
        held = matrix + damping * scale * jnp.eye(3 * atoms, dtype=matrix.dtype)
        change = jax.scipy.linalg.solve(held, gradient, assume_a="pos").reshape(positions.shape)
        moved = positions - change
        found = misfit(moved, weights, mask, t)
        better = found < value
        damping = jnp.where(better, damping / 5, damping * 4)
        damping = jnp.clip(damping, LEAST_DAMPING, MOST_DAMPING)
        positions, value = jnp.where(better, moved, positions), jnp.where(better, found, value)
        return positions, value, damping, jnp.max(jnp.abs(change)), steps + 1

    def unfinished(carry):
        # NaN, of a system that is singular in float32, goes on: the damping grows.
        return ~(carry[3] < LEAST_MOVE) & (carry[4] < REFINING_STEPS)

    value = misfit(positions, weights, mask, t)
    start = positions, value, jnp.asarray(FIRST_DAMPING, positions.dtype)
    return lax.while_loop(unfinished, step, (*start, jnp.full_like(value, jnp.inf), 0))[0]


@partial(jax.jit, static_argnames="refine")
def decode_laplacian(
    weights: jax.Array, count: jax.Array, t: float = T, refine: bool = True
) -> jax.Array:
    """Positions [..., A, 3] from W by Laplacian eigenvectors, centred, zeros as padding.

    Args:
      weights: [..., A, A]; the symmetric part of the first `count` rows and columns is read.
      count: [...] atoms, 4 or more.
      t: of the weights.
      refine: minimise the misfit of W from there; without it the eigenvectors are the result.
    """

    def one(weights, count):
        scale, weights = jnp.asarray(t, weights.dtype), observed(weights, count)
        positions = laplacian_start(weights, count, scale)
        if refine:
            positions = refined(positions, weights, count, scale)
        return centred(positions, count)

    return jnp.vectorize(one, signature="(a,a),()->(a,x)")(weights, count)


@partial(jax.jit, static_argnames="refine")
def decode_distances(
    weights: jax.Array, count: jax.Array, t: float = T, refine: bool = False
) -> jax.Array:
    """Positions [..., A, 3] from W by distances sqrt(-t log W) and metric scaling; else the same.

    Weights outside of (exp(-25^2 / t), 1], which only noise makes, count as the nearest end.
    """

    def one(weights, count):
        scale, weights = jnp.asarray(t, weights.dtype), observed(weights, count)
        positions = scaled(distances_of(weights, count, scale), count)
        if refine:
            positions = refined(positions, weights, count, scale)
        return centred(positions, count)

    return jnp.vectorize(one, signature="(a,a),()->(a,x)")(weights, count)


def aligned(found: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Atoms [N, 3] after the rigid motion or reflection that brings them nearest to `truth`.

    Kabsch, Acta Cryst. A32 (1976) 922, in float64; without the sign that keeps the handedness,
    since neither G(r) nor W knows a cluster from its mirror image.
    """
    found, truth = np.asarray(found, np.float64), np.asarray(truth, np.float64)
    middle = truth.mean(axis=0)
    left, _, right = np.linalg.svd((found - found.mean(axis=0)).T @ (truth - middle))
    return (found - found.mean(axis=0)) @ (left @ right) + middle


def rmsd(found: np.ndarray, truth: np.ndarray, reorder: bool = False) -> float:
    """Root of the mean squared distance between atoms [N, 3], in angstrom, at best alignment.

    Args:
      reorder: atoms of `found` may be assigned to those of `truth` in another order: alignment and
        the best assignment (`scipy.optimize.linear_sum_assignment`) in turn, from the order as it
        is and from those of `orientations`. The least result counts. It is at most what the order
        as it is gives, but a search can miss the very best assignment.

    Raises:
      DataError: the shapes differ, or a number is not finite.
    """
    found, truth = np.asarray(found, np.float64), np.asarray(truth, np.float64)
    if found.shape != truth.shape or found.ndim != 2 or found.shape[1] != 3 or not len(found):
        raise DataError(
            f"positions: expected two arrays [N, 3] of as many atoms, found {found.shape} and "
            f"{truth.shape}"
        )
    if not (np.isfinite(found).all() and np.isfinite(truth).all()):
        raise DataError("positions: expected finite numbers, found NaN or infinity")
    starts = [found]
    if reorder:
        starts += [found[best_assignment(turned, truth)] for turned in orientations(found, truth)]
    best = np.inf
    for atoms in starts:
        squared = np.sum((aligned(atoms, truth) - truth) ** 2)
        while reorder:
            atoms = atoms[best_assignment(aligned(atoms, truth), truth)]
            again = np.sum((aligned(atoms, truth) - truth) ** 2)
            if not again < squared * (1 - 1e-9):
                break
            squared = again
        best = min(best, squared)
    return float(np.sqrt(best / len(truth)))


def best_assignment(found: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Which atom of `found` belongs to each of `truth`, with the least sum of squared distances."""
    from scipy.optimize import linear_sum_assignment

    squared = np.sum((truth[:, None] - found[None]) ** 2, axis=-1)
    return linear_sum_assignment(squared)[1]


def orientations(found: np.ndarray, truth: np.ndarray) -> list[np.ndarray]:
    """`found` turned or mirrored onto `truth` in the most promising ways, both around their means.

    Of 1,024 random orthogonal matrices the 128 with the least sum of squared distances from each
    atom to the nearest true one, since the principal axes of a symmetric cluster are any; and these
    axes in eight signs.
    """
    found, truth = found - found.mean(axis=0), truth - truth.mean(axis=0)
    axes = [np.linalg.svd(atoms, full_matrices=False)[2] for atoms in (found, truth)]
    signs = 1.0 - 2 * np.array(list(np.ndindex(2, 2, 2)))
    by_axes = (axes[0].T * signs[:, None]) @ axes[1]
    turns = _random_turns()
    products = (found @ turns) @ truth.T  # [1024, N, M]
    squared = np.sum(truth**2, axis=1) - 2 * products
    promising = np.argsort(squared.min(axis=2).sum(axis=1), kind="stable")[:128]
    return [found @ turn for turn in (*by_axes, *turns[promising])]


@cache
def _random_turns() -> np.ndarray:
    """The same 1,024 random orthogonal matrices [1024, 3, 3] every time."""
    return np.linalg.qr(np.random.default_rng(0).normal(size=(1024, 3, 3)))[0]


class NoiseStudy(NamedTuple):
    """How far decoded atoms are from the true ones under noise on W.

    Attributes:
      levels: float64 [E], standard deviations of the noise on a weight.
      rmsd: for each decoder's name float64 [E, K], in angstrom.
    """

    levels: np.ndarray
    rmsd: dict[str, np.ndarray]


DECODERS = {
    "Laplacian, refined": partial(decode_laplacian, refine=True),
    "distances, refined": partial(decode_distances, refine=True),
    "Laplacian": partial(decode_laplacian, refine=False),
    "distances": partial(decode_distances, refine=False),
}


def study_noise(
    key: jax.Array,
    positions: np.ndarray,
    count: np.ndarray,
    levels: list[float],
    t: float = T,
) -> NoiseStudy:
    """RMSD of all decoders on the weights of known clusters with symmetric Gaussian noise.

    Args:
      key: the noise of each level; every decoder sees the same.
      positions, count: [K, A, 3] and [K] of `structures.make_clusters`.
      levels: standard deviations of the noise on each W_ij, i < j, whose range is 0 to 1.
    """
    exact = weights_of(jnp.asarray(positions), jnp.asarray(count), t)
    found = {name: np.zeros((len(levels), len(count))) for name in DECODERS}
    for row, level in enumerate(levels):
        draws = jax.random.normal(jax.random.fold_in(key, row), exact.shape)
        upper = jnp.triu(draws, k=1)
        noisy = exact + level * (upper + jnp.swapaxes(upper, -1, -2))
        for name, decode in DECODERS.items():
            decoded = np.asarray(decode(noisy, jnp.asarray(count), t))
            found[name][row] = [
                rmsd(a[:n], b[:n]) for a, b, n in zip(decoded, positions, count, strict=True)
            ]
    return NoiseStudy(np.array(levels), found)
