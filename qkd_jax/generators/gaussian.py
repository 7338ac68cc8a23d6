"""One Gaussian for each class, with a covariance of its own or one that all classes share.

A class is stored as its mean and a *factor* F of its covariance, F F^T = cov + jitter I: all that
sampling needs, at half the memory of both. With few images the covariance is singular, so the
jitter matters. `ClassMoments` collects mean and scatter in one pass over batches, centred
as it goes: sums of squares would lose the small eigenvalues to rounding.

Drawing means alone is what remains where the covariance is taken for zero.
"""

from functools import partial
from typing import Literal

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from qkd_jax.generators.generator import Generator

# What is kept of each class beside its mean: all of its covariance, the diagonal of it, nothing but
# a share in one covariance within classes, or nothing at all.
Kind = Literal["covariance", "variance", "shared", "mean"]


@flax.struct.dataclass
class ClassMoments:
    """Moments of the classes of one task.

    Attributes:
      count: [M], images seen.
      mean: [M, D].
      scatter: sum of (h - mean)(h - mean)^T: [M, D, D], or only its diagonal, [M, D].
    """

    count: jax.Array
    mean: jax.Array
    scatter: jax.Array


def empty_moments(num_classes: int, width: int, kind: Kind) -> ClassMoments:
    """Moments before any image."""
    full = kind in ("covariance", "shared")
    shape = (num_classes, width, width) if full else (num_classes, width)
    return ClassMoments(
        jnp.zeros(num_classes), jnp.zeros((num_classes, width)), jnp.zeros(shape, jnp.float32)
    )


def add_to_moments(
    moments: ClassMoments, features: jax.Array, positions: jax.Array, mask: jax.Array
) -> ClassMoments:
    """`moments` with a batch added.

    Two sets of one class are merged by Chan's rule (1983): the scatters add up, plus
    n m / (n + m) d d^T for the distance d of the means.

    Args:
      features: [B, D].
      positions: int [B], among the task's classes.
      mask: bool [B], False where a row is padding.
    """
    member = jax.nn.one_hot(positions, len(moments.count)) * mask[:, None].astype(jnp.float32)
    features = jnp.where(mask[:, None], features, 0.0)
    new = member.sum(0)
    total = jnp.matmul(member.T, features, precision="highest")
    mean = total / jnp.maximum(new, 1.0)[:, None]
    count = moments.count + new
    share = new / jnp.maximum(count, 1.0)
    gap = mean - moments.mean
    between = moments.count * share
    centred = (features - mean[positions]) * mask[:, None].astype(jnp.float32)
    if moments.scatter.ndim == 3:
        each = jnp.einsum("bm,bd,be->mde", member, centred, centred, precision="highest")
        added = each + between[:, None, None] * gap[:, :, None] * gap[:, None, :]
    else:
        each = jnp.matmul(member.T, centred * centred, precision="highest")
        added = each + between[:, None] * gap * gap
    return ClassMoments(count, moments.mean + share[:, None] * gap, moments.scatter + added)


def covariance_factors(moments: ClassMoments, jitter: float) -> jax.Array:
    """F with F F^T = cov + jitter I for each class: [M, D, D], or its diagonal [M, D].

    The covariance divides by n - 1 (a single image has covariance 0). F is the Cholesky factor,
    or, where rounding leaves the matrix indefinite, one from the eigenvalues clipped at zero.
    """
    freedom = jnp.maximum(moments.count - 1.0, 1.0)
    if moments.scatter.ndim == 2:
        return jnp.sqrt(moments.scatter / freedom[:, None] + jitter)
    covariance = moments.scatter / freedom[:, None, None]
    return lax.map(partial(_factor, jitter=jitter), covariance)


def _factor(covariance, jitter):
    covariance = covariance + jitter * jnp.eye(len(covariance))
    lower = jnp.linalg.cholesky(covariance)

    def from_eigenvalues():
        values, vectors = jnp.linalg.eigh(covariance)
        return vectors * jnp.sqrt(jnp.maximum(values, 0.0))[None, :]

    return lax.cond(jnp.isfinite(lower).all(), lambda: lower, from_eigenvalues)


@flax.struct.dataclass
class Gaussians:
    """One Gaussian for each class.

    Attributes:
      mean: [C, D].
      factor: [C, D, D], or [C, D] where the covariances are diagonal.
    """

    mean: jax.Array
    factor: jax.Array


def empty_gaussians(num_classes: int, width: int, kind: Kind) -> Gaussians:
    """Gaussians of zeros, with room for every class that may come."""
    moments = empty_moments(num_classes, width, kind)
    return Gaussians(moments.mean, moments.scatter)


def store_gaussians(
    gaussians: Gaussians,
    moments: ClassMoments,
    columns: jax.Array,
    key: jax.Array,
    *,
    jitter: float,
) -> Gaussians:
    """`gaussians` with those of a task's classes at `columns` [M]; padding is dropped. The key of
    `Generator.fit` is not needed.
    """
    return Gaussians(
        gaussians.mean.at[columns].set(moments.mean, mode="drop"),
        gaussians.factor.at[columns].set(covariance_factors(moments, jitter), mode="drop"),
    )


def draw_features(gaussians: Gaussians, key: jax.Array, labels: jax.Array) -> jax.Array:
    """One feature for each of labels [N]: [N, D]. With full covariances all labels must be the
    same, so that one product serves them all; the rows of other labels are NaN.
    """
    mean = gaussians.mean[labels]
    noise = jax.random.normal(key, mean.shape)
    if gaussians.factor.ndim == 2:
        return mean + gaussians.factor[labels] * noise
    drawn = mean + noise @ gaussians.factor[labels[0]].T
    return jnp.where((labels == labels[0])[:, None], drawn, jnp.nan)


@flax.struct.dataclass
class SharedGaussians:
    """One Gaussian for each class, all with the covariance within classes.

    Attributes:
      mean: [C, D].
      scatter: [D, D], the sum of (h - mean)(h - mean)^T over the images of all classes.
      freedom: [], of the scatter: images less classes.
      factor: [D, D], of the covariance.
    """

    mean: jax.Array
    scatter: jax.Array
    freedom: jax.Array
    factor: jax.Array


def empty_shared(num_classes: int, width: int) -> SharedGaussians:
    """Gaussians of zeros, with room for every class that may come."""
    zeros = jnp.zeros((width, width))
    return SharedGaussians(jnp.zeros((num_classes, width)), zeros, jnp.float32(0), zeros)


def store_shared(
    gaussians: SharedGaussians,
    moments: ClassMoments,
    columns: jax.Array,
    key: jax.Array,
    *,
    jitter: float,
) -> SharedGaussians:
    """As `store_gaussians`; the covariance is that of all classes so far."""
    scatter = gaussians.scatter + moments.scatter.sum(0)
    freedom = gaussians.freedom + jnp.sum(jnp.maximum(moments.count - 1.0, 0.0))
    return SharedGaussians(
        gaussians.mean.at[columns].set(moments.mean, mode="drop"),
        scatter,
        freedom,
        _factor(scatter / jnp.maximum(freedom, 1.0), jitter),
    )


def draw_shared(gaussians: SharedGaussians, key: jax.Array, labels: jax.Array) -> jax.Array:
    """One feature for each of labels [N]: [N, D]."""
    mean = gaussians.mean[labels]
    return mean + jax.random.normal(key, mean.shape) @ gaussians.factor.T


@flax.struct.dataclass
class Means:
    """The means of classes alone, [C, D]."""

    mean: jax.Array


def gaussian(kind: Kind, jitter: float) -> Generator:
    """The generator whose statistics are `ClassMoments`, and whose memory are `Gaussians`, or with
    `shared` `SharedGaussians`, or with `mean` `Means`.
    """
    collected = {"statistics": partial(empty_moments, kind=kind), "add": add_to_moments}
    if kind == "mean":
        return Generator(
            empty=lambda num_classes, width: Means(jnp.zeros((num_classes, width))),
            fit=lambda means, moments, columns, key: Means(
                means.mean.at[columns].set(moments.mean, mode="drop")
            ),
            draw=lambda means, key, labels: means.mean[labels],
            **collected,
        )
    if kind == "shared":
        return Generator(
            empty=empty_shared,
            fit=partial(store_shared, jitter=jitter),
            draw=draw_shared,
            **collected,
        )
    return Generator(
        empty=partial(empty_gaussians, kind=kind),
        fit=partial(store_gaussians, jitter=jitter),
        draw=draw_features,
        one_class=kind == "covariance",
        **collected,
    )
