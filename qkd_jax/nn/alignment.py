"""Classifier alignment: a head trained once more on pseudo-features of every class seen.

The images of old classes are gone, but a Gaussian stands for each class. From those, features of
all classes are drawn in equal numbers, and the head learns all classes side by side. Source: SLCA,
arXiv 2303.05118, after prototype augmentation, PASS (CVPR 2021).

A class is stored as its mean and a *factor* F of its covariance, F F^T = cov + jitter I: all that
sampling needs, at half the memory of both. With few images the covariance is singular, so the
jitter is not a detail. `ClassMoments` collects mean and scatter in one pass over batches, centred
as it goes: sums of squares would lose the small eigenvalues to rounding.
"""

from collections.abc import Callable
from typing import Any, Literal

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

Kind = Literal["covariance", "variance"]


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
    """Moments of no image."""
    shape = (num_classes, width, width) if kind == "covariance" else (num_classes, width)
    return ClassMoments(
        jnp.zeros(num_classes), jnp.zeros((num_classes, width)), jnp.zeros(shape, jnp.float32)
    )


def add_to_moments(
    moments: ClassMoments, features: jax.Array, positions: jax.Array, mask: jax.Array
) -> ClassMoments:
    """Adds a batch: features [B, D], positions int [B] among the task's classes, mask bool [B].

    Two sets of a class are merged by Chan's rule (1983): the scatters add up, plus
    n m / (n + m) d d^T for the distance d of the means.
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
    """F with F F^T = cov + jitter I for each class: [M, D, D]; for variances [M, D] its diagonal.

    The covariance divides by n - 1; one image alone has covariance 0. F is the Cholesky factor,
    or, where rounding leaves no positive matrix, that of the eigenvalues cut off at zero.
    """
    freedom = jnp.maximum(moments.count - 1.0, 1.0)
    if moments.scatter.ndim == 2:
        return jnp.sqrt(moments.scatter / freedom[:, None] + jitter)
    covariance = moments.scatter / freedom[:, None, None]
    covariance = covariance + jitter * jnp.eye(covariance.shape[-1])[None]
    return lax.map(_factor, covariance)


def _factor(covariance):
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
    """Room for every class that may come."""
    moments = empty_moments(num_classes, width, kind)
    return Gaussians(moments.mean, moments.scatter)


def store_gaussians(
    gaussians: Gaussians, moments: ClassMoments, columns: jax.Array, jitter: float
) -> Gaussians:
    """`gaussians` with those of a task's classes at class columns [M]; padding is dropped."""
    return Gaussians(
        gaussians.mean.at[columns].set(moments.mean, mode="drop"),
        gaussians.factor.at[columns].set(covariance_factors(moments, jitter), mode="drop"),
    )


def cosine_factor(epoch: jax.Array, period: int) -> jax.Array:
    """(1 + cos(pi e / period)) / 2: from 1 at epoch 0 to 0 at `period`, then up again."""
    return 0.5 * (1.0 + jnp.cos(jnp.pi * epoch.astype(jnp.float32) / period))


def sgd_step(
    head: Any, velocity: Any, grads: Any, rate: jax.Array, momentum: float, weight_decay: float
) -> tuple[Any, Any]:
    """(head, velocity): v <- momentum v + g + decay p; p <- p - rate v, for every leaf."""
    velocity = jax.tree.map(
        lambda v, g, p: momentum * v + g + weight_decay * p, velocity, grads, head
    )
    return jax.tree.map(lambda p, v: p - rate * v, head, velocity), velocity


def align_head(
    key: jax.Array,
    head: Any,
    objective: Callable[[Any, jax.Array, jax.Array], jax.Array],
    gaussians: Gaussians,
    seen: jax.Array,
    *,
    epochs: int,
    samples: int,
    learning_rate: float,
    weight_decay: float,
    momentum: float = 0.9,
    period: int = 0,
) -> Any:
    """The head after SGD on pseudo-features.

    An epoch draws `samples` features of each class seen, shuffles them all and cuts them into as
    many batches as there are classes. The rate follows `cosine_factor`, one value an epoch.

    Args:
      key: typed key.
      head: pytree of parameters, e.g. {"rows": [C, D], "bias": [C]}.
      objective: (head, features [N, D], labels [N]) -> scalar; masks classes not seen.
      gaussians: of all classes; those not seen may hold anything finite.
      seen: bool [C].
      samples: N, of a class in an epoch, and the size of a batch.
      period: epochs from the full rate to zero, after which it rises again; 0 = `epochs`.
    """
    count, num_classes = jnp.sum(seen), len(seen)
    # Full covariances: drawn class by class, one product each, and kept for the epoch. That is
    # smaller than the factors themselves as long as N < D. Diagonal ones: drawn in every step.
    pooled = gaussians.factor.ndim == 3
    order_of_seen = jnp.argsort(~seen, stable=True)

    def pool(key):
        def draw(i, drawn):
            c = order_of_seen[i]
            noise = jax.random.normal(jax.random.fold_in(key, c), drawn.shape[1:])
            return drawn.at[c].set(gaussians.mean[c][None] + noise @ gaussians.factor[c].T)

        empty = jnp.zeros((num_classes, samples, gaussians.mean.shape[1]))
        return lax.fori_loop(0, count, draw, empty)

    def epoch(carry, index):
        key_noise, key_order = jax.random.split(jax.random.fold_in(key, index))
        # A random order of all samples; those of classes not seen go to the end.
        place = jax.random.uniform(key_order, (num_classes, samples))
        place = jnp.argsort(jnp.where(seen[:, None], place, 2.0).ravel())
        drawn = pool(key_noise) if pooled else None
        rate = learning_rate * cosine_factor(index, period or epochs)

        def step(i, carry):
            head, velocity = carry
            chosen = lax.dynamic_slice(place, (i * samples,), (samples,))
            labels = chosen // samples
            if pooled:
                features = drawn.reshape(-1, drawn.shape[-1])[chosen]
            else:
                mean, factor = gaussians.mean[labels], gaussians.factor[labels]
                noise = jax.random.normal(jax.random.fold_in(key_noise, i), mean.shape)
                features = mean + factor * noise
            grads = jax.grad(objective)(head, features, labels)
            return sgd_step(head, velocity, grads, rate, momentum, weight_decay)

        return lax.fori_loop(0, count, step, carry), None

    velocity = jax.tree.map(jnp.zeros_like, head)
    (head, _), _ = lax.scan(epoch, (head, velocity), jnp.arange(epochs))
    return head
