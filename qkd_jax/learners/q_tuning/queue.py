"""The queue of soft prompts: its rows, newest first, and what leaves when it is full.

A queue is one array [C, D] with room for C / l prompts of l rows; of n tasks learned, the first
min(n l, C) rows are filled. Its shape never changes.

Source of the eviction: arXiv 2404.14607. That a principal component analysis trims the queue is
from the abstract; that it is a singular value decomposition, from a review. That rows are centred,
and that the first C - l components are kept, is unverified memory. The sign is our choice.
"""

import jax
import jax.numpy as jnp

# A cosine this small may be rounding: the larger the queue the more terms, but 1e-4 is safe.
ORTHOGONAL = 1e-4


def shifted(queue: jax.Array, length: int) -> jax.Array:
    """[C - l, D]: the rows but the last l, which are free, or the oldest prompt of a full queue."""
    return queue[: queue.shape[0] - length]


def random_rows(key: jax.Array, queue: jax.Array, length: int) -> jax.Array:
    """[C - l, D]: all rows but l that are drawn, in their order."""
    kept = jax.random.permutation(key, queue.shape[0])[: queue.shape[0] - length]
    return queue[jnp.sort(kept)]


def principal_rows(
    queue: jax.Array, length: int, *, keep_mean: bool = False, fix_sign: bool = True
) -> jax.Array:
    """[C - l, D]: the first rows of S V^T, where U S V^T are the rows of the queue less their mean.

    They are orthogonal, of length S_k, the longest first. With fewer than C - l of them, because
    D < C - l, the others are zero.

    Args:
      keep_mean: add the mean row to each of them.
      fix_sign: see `signed`; without it the signs are those of the linear algebra library.
    """
    mean = jnp.mean(queue, axis=0)
    _, lengths, directions = jnp.linalg.svd(queue - mean[None], full_matrices=False)
    rows = (lengths[:, None] * directions)[: queue.shape[0] - length]
    if fix_sign:
        rows = signed(rows, mean)
    rows = jnp.pad(rows, ((0, queue.shape[0] - length - rows.shape[0]), (0, 0)))
    return rows + mean[None] if keep_mean else rows


def signed(rows: jax.Array, mean: jax.Array) -> jax.Array:
    """`rows` [K, D] or their negatives, so that none points away from `mean` [D].

    A decomposition gives its rows up to sign, and a prompt means something else with the other one:
    results would depend on the library. A row that is orthogonal to the mean, up to rounding, gets
    the sign with which its largest entry is positive.
    """
    along = jnp.matmul(rows, mean, precision="highest")
    bound = ORTHOGONAL * jnp.linalg.norm(rows, axis=1) * jnp.linalg.norm(mean)
    largest = jnp.take_along_axis(rows, jnp.argmax(jnp.abs(rows), axis=1)[:, None], axis=1)[:, 0]
    decides = jnp.where(jnp.abs(along) > bound, along, largest)
    return jnp.where(decides < 0, -1.0, 1.0)[:, None] * rows
