"""One adapter for all tasks, whose hidden units every task weighs and mixes by a code of its own.

In a block, with x what the adapter reads, as of `adapters.py`, and R its bottleneck, no biases:

    z = relu(relu(x W_down) W_mid)
    z_c = z (Diag(s) + U V^T)                    s [R], U and V [R, K]: the code of a task
    added = scale * z_c W_up

The task is given, or chosen in every block: small heads, one for each task, read the class token
that the adapter reads, and the task whose head has the least entropy over its own classes wins.

Source: FACET, September 2026. Its s, U and V are linear in a one-hot code of the task, so they are
the rows of a table.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from qkd_jax.nn.adapters import AdapterSpec, bias_rows, num_blocks
from qkd_jax.nn.heads import unit
from qkd_jax.nn.layers import matmul_trainable
from qkd_jax.nn.losses import MASKED, entropy


@dataclass(frozen=True)
class ModulatedSpec(AdapterSpec):
    """Static settings of a modulated adapter; an `adapters.BlockInsert`.

    An adapter set is {"shared", "codes", "task"}, or {"shared", "codes", "heads"} where every block
    chooses, each leaf with a leading axis of blocks: "shared" of `init_shared`, "codes" of
    `init_codes`, "task" int [] or [B], "heads" {"rows": [T, M, D], "valid": bool [T, M]}.

    Attributes:
        head_scale: factor on the cosines of the heads.
    """

    head_scale: float = 20.0

    def apply(self, adapter_block, x, dropout_mask, compute_dtype):
        """(What the adapter adds, {"token": [B, D] the class token, "task": int [B] whose code was
        taken}); see `adapters.BlockInsert.apply`.
        """
        token = x[:, 0]
        if "heads" in adapter_block:
            task = jnp.argmin(doubts(token, **adapter_block["heads"], scale=self.head_scale), 1)
        else:
            task = adapter_block["task"]
        code = jax.tree.map(lambda a: a[task], adapter_block["codes"])
        x = x.astype(compute_dtype)
        added = apply_modulated(adapter_block["shared"], code, x, self, dropout_mask)
        return added, {"token": token, "task": jnp.broadcast_to(task, len(x))}


def init_shared(key: jax.Array, spec: AdapterSpec, width: int, depth: int) -> dict:
    """The part that all tasks share, float32: {"down": {"kernel": [L, D, R]}, "mid": {"kernel":
    [L, R, R]}, "up": {"kernel": [L, R, D]}}, L = depth - spec.first_block.

    Kernels are uniform in +-1 / sqrt(number of inputs).
    """
    blocks, inner = num_blocks(spec, depth), spec.bottleneck
    shapes = {"down": (width, inner), "mid": (inner, inner), "up": (inner, width)}

    def kernel(index, shape):
        key_of = jax.random.fold_in(key, index)
        bound = shape[0] ** -0.5
        return jax.random.uniform(key_of, (blocks, *shape), minval=-bound, maxval=bound)

    return {name: {"kernel": kernel(i, shape)} for i, (name, shape) in enumerate(shapes.items())}


def init_codes(
    key: jax.Array, spec: AdapterSpec, depth: int, num_tasks: int, rank: int, diagonal: float
) -> dict:
    """The codes of all tasks, float32: {"diagonal": [L, T, R], "left", "right": [L, T, R, K]}.

    s starts at `diagonal` and U at zero. V does not: if both were zero, neither had a gradient.
    """
    shape = (num_blocks(spec, depth), num_tasks, spec.bottleneck)
    drawn = spec.bottleneck**-0.5 * jax.random.normal(key, (*shape, rank))
    # Typed as after a step, so that steps are compiled once.
    start = jnp.full(shape, diagonal, jnp.float32)
    return {"diagonal": start, "left": jnp.zeros_like(drawn), "right": drawn}


def apply_modulated(
    shared: dict, code: dict, x: jax.Array, spec: AdapterSpec, dropout_mask: jax.Array | None = None
) -> jax.Array:
    """scale * z_c W_up of one block, without the residual.

    Args:
        shared: the kernels of one block.
        code: {"diagonal": [R], "left", "right": [R, K]}, or leaves [B, ...]: a code for each image.
        x: [B, N, D]; its dtype is that of the products.
        dropout_mask: [B, N, R] factors on z, or None for no dropout.

    Returns:
        [B, N, D] in the dtype of `x`.
    """
    shared, code = jax.tree.map(lambda a: a.astype(x.dtype), (shared, code))
    z = jax.nn.relu(matmul_trainable(x, shared["down"]["kernel"]))
    z = jax.nn.relu(matmul_trainable(z, shared["mid"]["kernel"]))
    if dropout_mask is not None:
        z = z * dropout_mask.astype(x.dtype)
    mixed = jnp.matmul(jnp.matmul(z, code["left"]), jnp.swapaxes(code["right"], -1, -2))
    z = z * bias_rows(code["diagonal"], z) + mixed
    return spec.scale * matmul_trainable(z, shared["up"]["kernel"])


def head_logits_of(token: jax.Array, rows: jax.Array, scale: float) -> jax.Array:
    """scale * cosines of class tokens [B, D] to rows [..., M, D]: [B, ..., M]."""
    return scale * jnp.einsum("bd,...md->b...m", unit(token), unit(rows))


def doubts(token: jax.Array, rows: jax.Array, valid: jax.Array, scale: float) -> jax.Array:
    """[B, T]: the entropy over the own classes of each task, infinite for tasks without a class.

    Args:
        token: [B, D], class tokens of one block.
        rows: [T, M, D], the block's heads.
        valid: bool [T, M], which rows stand for a class.
    """
    logits = head_logits_of(token, rows, scale)
    doubt = entropy(jax.nn.softmax(jnp.where(valid[None], logits, MASKED)))
    return jnp.where(valid.any(axis=1)[None], doubt, jnp.inf)
