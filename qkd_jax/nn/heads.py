"""Classifiers over a feature, and the class means that can serve as their rows.

A head has one row, a vector [D], for each class.
"""

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax


def unit(vectors: jax.Array) -> jax.Array:
    """`vectors` [..., D] scaled to length 1; a zero vector stays zero and has gradient zero."""
    square = jnp.sum(vectors * vectors, axis=-1, keepdims=True)
    return vectors * lax.rsqrt(jnp.maximum(square, 1e-24))


def head_logits(features: jax.Array, rows: jax.Array, scale: jax.Array, kind: str) -> jax.Array:
    """Logits of `features` [..., D] on `rows` [C, D]: [..., C].

    `cosine`: scale * cos(feature, row). `linear`: feature . row. It has no bias, since biases that
    each task learns for its own classes only tell which task came last.
    """
    if kind == "cosine":
        return scale * (unit(features) @ unit(rows).T)
    return features @ rows.T


def linear_logits(features: jax.Array, rows: jax.Array, bias: jax.Array) -> jax.Array:
    """Logits [B, C] of `features` [B, D] on `rows` [C, D] with `bias` [C]."""
    return features @ rows.T + bias[None, :]


def init_rows(key: jax.Array, num_rows: int, width: int) -> jax.Array:
    """Rows [num_rows, width] ~ N(0, 1 / width), of length about 1."""
    return jax.random.normal(key, (num_rows, width)) * jnp.float32(width) ** -0.5


@flax.struct.dataclass
class ClassStatistics:
    """Sums over one task's images, from which class means and covariances follow.

    Attributes:
      total: [S, M, D], sum of features for each slot (adapter) and class of the task.
      count: [M], images seen.
      outer: [K, D, D], sum of h h^T over all images for the first K slots.
    """

    total: jax.Array
    count: jax.Array
    outer: jax.Array


def empty_statistics(
    num_slots: int, num_classes: int, width: int, num_outer: int
) -> ClassStatistics:
    """Statistics before any image; second moments are kept for the first `num_outer` slots."""
    return ClassStatistics(
        jnp.zeros((num_slots, num_classes, width)),
        jnp.zeros((num_classes,)),
        jnp.zeros((num_outer, width, width)),
    )


def add_to_statistics(
    statistics: ClassStatistics, features: jax.Array, positions: jax.Array, mask: jax.Array
) -> ClassStatistics:
    """`statistics` with a batch added.

    Args:
      features: [B, S, D].
      positions: int [B], among the task's classes.
      mask: bool [B], False where a row is padding.
    """
    num_classes = statistics.count.shape[0]
    one_hot = jax.nn.one_hot(positions, num_classes) * mask[:, None].astype(jnp.float32)
    kept = jnp.where(mask[:, None, None], features[:, : len(statistics.outer)], 0.0)
    return ClassStatistics(
        statistics.total + jnp.einsum("bm,bsd->smd", one_hot, features, precision="highest"),
        statistics.count + one_hot.sum(0),
        statistics.outer + jnp.einsum("bkd,bke->kde", kept, kept, precision="highest"),
    )


def class_means(statistics: ClassStatistics) -> jax.Array:
    """[S, M, D]: mean feature of each class under each slot; zero where no image was seen."""
    return statistics.total / jnp.maximum(statistics.count, 1.0)[None, :, None]


# The share of a sum of squares that float32 leaves uncertain when two such sums are subtracted.
ROUNDING = 1e-5


def within_class_scatter(statistics: ClassStatistics) -> jax.Array:
    """[K, D, D]: sum over images of (h - class mean)(h - class mean)^T in the first K slots.

    Where classes have one image each there is no scatter, and what the difference of both sums
    leaves is their rounding, which need not be positive: it counts as zero.
    """
    means = class_means(statistics)[: len(statistics.outer)]
    weighted = means * statistics.count[None, :, None]
    between = jnp.einsum("kmd,kme->kde", weighted, means, precision="highest")
    scatter = statistics.outer - between
    whole, left = (jnp.trace(sums, axis1=1, axis2=2) for sums in (statistics.outer, scatter))
    return jnp.where((left > ROUNDING * whole)[:, None, None], scatter, 0.0)
