"""Pools of prompts for a frozen transformer: how an image chooses from one, and the inserts.

A pool has prompts [K, L, D] with keys [K, D]; an image chooses by the cosine of its query to the
keys. A choice never depends on the other images of a batch; only the reductions `sum` and
`gtripl_sum` of the key loss couple images, in training.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax import lax

from qkd_jax.errors import ConfigError
from qkd_jax.nn.backbone import Backbone
from qkd_jax.nn.heads import unit
from qkd_jax.nn.inserts import Inserts
from qkd_jax.nn.layers import AttentionInsert

# Ranges of the uniform start of prompts and keys, as the public code bases draw them.
STARTS = {"small": (0.0, 0.01), "unit": (0.0, 1.0), "signed": (-1.0, 1.0)}


def new_rows(key: jax.Array, shape: tuple[int, ...], start: str) -> jax.Array:
    """Prompts or keys of `shape`, uniform in the range that `STARTS` gives `start`."""
    low, high = STARTS[start]
    return jax.random.uniform(key, shape, minval=low, maxval=high)


def cosines(queries: jax.Array, keys: jax.Array) -> jax.Array:
    """[B, K]: cosine of queries [B, D] to keys [K, D]; a zero vector has cosine 0."""
    return jnp.matmul(unit(queries), unit(keys).T, precision="highest")


def nearest(scores: jax.Array, top_k: int, allowed: jax.Array | None = None) -> jax.Array:
    """int [B, N]: positions of the `top_k` largest of scores [B, K], best first, ties in order.

    `allowed` bool [K] must hold for at least `top_k` of them.
    """
    if allowed is not None:
        scores = jnp.where(allowed[None, :], scores, -jnp.inf)
    return lax.top_k(scores, top_k)[1]


def key_loss(
    cosine: jax.Array, chosen: jax.Array, reduction: str, mask: jax.Array, gather: Callable
) -> jax.Array:
    """[B]: terms that pull the chosen keys to the queries; the loss is their mean over real images.

    With the distance 1 - cos, `mean` is the sum over the N chosen keys and the mean over images;
    `sum` is the sum over images too; `gtripl_sum` sums over images b and b' the distances of query
    b to the keys that b' chose (B^2 N terms), so that keys are also pulled to queries of images
    that did not choose them, as in the public L2P++.

    Args:
      cosine: [B, K].
      chosen: int [B, N].
      mask: bool [B], False where a row is padding.
      gather: [B, ...] -> the same of all devices, [B of all, ...].
    """
    count = jnp.sum(gather(mask).astype(cosine.dtype))
    if reduction == "gtripl_sum":
        real = gather(mask)[:, None, None].astype(cosine.dtype)
        votes = jnp.sum(jax.nn.one_hot(gather(chosen), cosine.shape[1]) * real, axis=(0, 1))
        return count * jnp.sum((1.0 - cosine) * votes[None, :], axis=1)
    own = jnp.sum(1.0 - jnp.take_along_axis(cosine, chosen, axis=1), axis=1)
    return count * own if reduction == "sum" else own


def chosen_rows(prompts: jax.Array, chosen: jax.Array) -> jax.Array:
    """[B, N L, D]: the prompts, of [K, L, D], that each image chose, chosen int [B, N]."""
    rows = prompts[chosen]
    return rows.reshape(rows.shape[0], -1, rows.shape[-1])


def split_prefix(rows: jax.Array) -> AttentionInsert:
    """Prefix tuning: the first half of a prompt's L rows are keys, the last half values.

    Rows are [L, D] for all images, [B, L, D] per image, or [B, N, L, D] for N prompts per image,
    each of which is halved.
    """
    half = rows.shape[-2] // 2
    halves = rows[..., :half, :], rows[..., half:, :]
    if rows.ndim == 4:
        halves = tuple(part.reshape(part.shape[0], -1, part.shape[-1]) for part in halves)
    return AttentionInsert(prefix_key=halves[0], prefix_value=halves[1])


def in_blocks(
    depth: int, inserts: Mapping[int, AttentionInsert]
) -> tuple[AttentionInsert | None, ...]:
    """`Inserts.attention` of a transformer with `depth` blocks, from the inserts of some blocks."""
    return tuple(inserts.get(index) for index in range(depth))


def with_prefixes(inserts: Inserts, depth: int, prefixes: Mapping[int, AttentionInsert]) -> Inserts:
    """`inserts` with more prefix rows in some blocks, after those that are there. Attention does
    not depend on the order of keys.
    """
    attention = list(inserts.attention or (None,) * depth)
    for index, prefix in prefixes.items():
        before = attention[index] or AttentionInsert()
        attention[index] = before.replace(
            prefix_key=joined_rows(before.prefix_key, prefix.prefix_key),
            prefix_value=joined_rows(before.prefix_value, prefix.prefix_value),
        )
    return inserts.replace(attention=tuple(attention))


def joined_rows(first: jax.Array | None, second: jax.Array) -> jax.Array:
    """Rows one after the other, each [P, D] or [B, P, D]; `first` may be absent."""
    if first is None:
        return second
    batch = max(first.shape[:-2], second.shape[:-2])
    rows = [jnp.broadcast_to(part, (*batch, *part.shape[-2:])) for part in (first, second)]
    return jnp.concatenate(rows, axis=-2)


def check_blocks(name: str, needed: int, depth: int) -> None:
    """Raises ConfigError where prompts go into more blocks than there are."""
    if needed > depth:
        raise ConfigError(
            f"{name}: expected at most {depth}, the blocks of the backbone, found {needed}"
        )


def vocabulary_rows(key: jax.Array, backbone: Backbone, count: int) -> jax.Array:
    """[count, D]: rows of a text encoder's token table, drawn with replacement: a soft prompt that
    starts as words.
    """
    table = backbone.params["token"]
    drawn = jax.random.randint(key, (count,), 0, table.shape[0])
    return table[drawn].astype(jnp.float32)
