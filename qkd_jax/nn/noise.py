"""Learned noise behind every block: what MIN adds to a block's output.

With r [N, D] the output of a block, and one generator for each of T tasks,

    r + dense(r) + ( sum_i w_i (mean_i(z) + spread_i(z)) ) up,      z = r down,

where down [D, R] and up [R, D] are drawn once and fixed, mean_i and spread_i are linear maps of
R numbers, and dense one of D. In the paper spread_i is multiplied by random noise eps; the authors'
code takes eps = 1, in training and at test, and so do we.

All of this is linear in r, so the mixture of all tasks is one R x R map and costs as much as one.

Source: MIN, arXiv 2509.16738 (authors' code ASCIIJK/MiN-NeurIPS2025).
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from qkd_jax.nn.layers import as_row, matmul_trainable


@dataclass(frozen=True)
class NoiseSpec:
    """Static settings of the noise; an `adapters.BlockInsert` without dropout, in every block.

    A set is {"down", "up", "dense", "mixed"}, leaves with a leading axis of blocks: `projections`,
    `new_linear` of width D, and `mixture`.
    """

    bottleneck: int
    dropout = 0.0
    placement = "output"
    input = "residual"
    first_block = 0

    def apply(self, adapter_block, x, dropout_mask, compute_dtype):
        """(The noise, None); see `adapters.BlockInsert.apply`."""
        block = jax.tree.map(lambda a: a.astype(compute_dtype), adapter_block)
        x = x.astype(compute_dtype)
        mixed = _linear(block["mixed"], x @ block["down"]) @ block["up"]
        return mixed + _linear(block["dense"], x), None


def _linear(params, x):
    y = matmul_trainable(x, params["kernel"])
    return y + as_row(params["bias"], y)


def new_linear(blocks: int, width: int) -> dict:
    """{"kernel": [L, D, D], "bias": [L, D]} of zeros."""
    return {"kernel": jnp.zeros((blocks, width, width)), "bias": jnp.zeros((blocks, width))}


def projections(key: jax.Array, blocks: int, width: int, bottleneck: int) -> dict:
    """{"down": [L, D, R], "up": [L, R, D]}: uniform in +-1 / sqrt(outputs), as torch draws what it
    takes for a transposed weight.
    """
    shapes = {"down": (blocks, width, bottleneck), "up": (blocks, bottleneck, width)}
    return {
        name: jax.random.uniform(
            key, shape, jnp.float32, minval=-(shape[-1] ** -0.5), maxval=shape[-1] ** -0.5
        )
        for key, (name, shape) in zip(jax.random.split(key), shapes.items(), strict=True)
    }


def mixture(generators: dict, weights: jax.Array) -> dict:
    """The generators {"mean", "spread"} [T, L, ...] as one linear map [L, ...].

    Args:
        generators: two of `new_linear`, of width R, with a leading axis of tasks.
        weights: w [T].
    """
    total = jax.tree.map(jnp.add, generators["mean"], generators["spread"])
    return jax.tree.map(lambda a: jnp.einsum("t,t...->...", weights, a), total)


def mixture_weights(prototypes: jax.Array, task: jax.Array, reference: jax.Array) -> jax.Array:
    """w [T]: over the tasks up to `task`, the softmax of cos(p_reference, p_i), which is taken to
    be 1 for `task` itself; zero for coming tasks.

    Args:
        prototypes: p [T, D], mean features of the tasks.
    """
    lengths = jnp.linalg.norm(prototypes, axis=1)
    products = jnp.matmul(prototypes, prototypes[reference], precision="highest")
    cosines = products / jnp.maximum(lengths * lengths[reference], 1e-24)
    order = jnp.arange(len(prototypes))
    cosines = jnp.where(order == task, 1.0, cosines)
    return jax.nn.softmax(jnp.where(order <= task, cosines, -jnp.inf))
