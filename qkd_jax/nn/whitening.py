"""The metric of the stored within-class covariance: directions of high variance count less.

This is linear discriminant analysis without its classifier: vectors are centred at the mean of the
class means and whitened by the pooled covariance within classes, shrunk towards a multiple of the
identity. Sums over features are all that it needs.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Metric(NamedTuple):
    """The map v = whitener (h - centre), after which classes vary equally in all directions.

    Angles between whitened vectors do not depend on which square root of the covariance is taken.

    Attributes:
      centre: [D], mean of the class means.
      whitener: [D, D] = F^-1, lower triangular, with F F^T the shrunk pooled covariance.
    """

    centre: jax.Array
    whitener: jax.Array


def identity_metric(width: int) -> Metric:
    """The metric before anything was learned, which changes nothing."""
    return Metric(jnp.zeros(width), jnp.eye(width))


def isotropic_share(shrinkage: float, prior: float, count: Any, width: int) -> Any:
    """The share s of the isotropic part: `shrinkage`, or where that is 0 what the number of images
    asks for, s = prior D / (prior D + n).

    This is the posterior mean of a covariance whose conjugate prior, inverse Wishart with an
    isotropic mean, weighs as much as `prior` images for each dimension.

    Args:
      count: n, number of images; a float or an array [].
      width: D.
    """
    return shrinkage if shrinkage > 0 else prior * width / (prior * width + count)


def shrunk_factor(scatter: jax.Array, count: jax.Array, shrinkage: Any) -> jax.Array:
    """[D, D] lower triangular F with F F^T = (1 - s) Sigma + s tr(Sigma) / D I.

    Args:
      scatter: [D, D], sum over images of (h - class mean)(h - class mean)^T.
      count: [], number of images; Sigma = scatter / count.
      shrinkage: s in [0, 1]; a float or an array [].
    """
    width = scatter.shape[0]
    sigma = scatter / jnp.maximum(count, 1.0)
    # With one image per class there is no scatter: the floor keeps F regular.
    mean_variance = jnp.maximum(jnp.trace(sigma) / width, 1e-6)
    isotropic = jnp.maximum(shrinkage, 1e-3) * mean_variance * jnp.eye(width)
    return jnp.linalg.cholesky((1.0 - shrinkage) * sigma + isotropic)


def learned_metric(
    scatter: jax.Array,
    count: jax.Array,
    class_means: jax.Array,
    members: jax.Array,
    shrinkage: Any,
) -> Metric:
    """The metric of the classes where `members` (bool [C]) holds.

    Args:
      scatter, count, shrinkage: as in `shrunk_factor`.
      class_means: [C, D].
    """
    factor = shrunk_factor(scatter, count, shrinkage)
    identity = jnp.eye(scatter.shape[0])
    whitener = jax.scipy.linalg.solve_triangular(factor, identity, lower=True)
    weight = members.astype(jnp.float32)
    total = jnp.matmul(weight, class_means, precision="highest")  # else bfloat16 on a TPU
    centre = total / jnp.maximum(weight.sum(), 1.0)
    return Metric(centre, whitener)


def whiten(metric: Metric, vectors: jax.Array) -> jax.Array:
    """`vectors` [..., D], centred and whitened by `metric`."""
    centre = metric.centre.reshape((1,) * (vectors.ndim - 1) + (-1,))
    return jnp.matmul(vectors - centre, metric.whitener.T, precision="highest")
