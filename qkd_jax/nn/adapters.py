"""Bottleneck adapters: the small trainable part inserted into every block of a frozen transformer.

One adapter set is one pytree with a leading axis of blocks,
`{"down": {"kernel": [L, D, R], "bias": [L, R]}, "up": {"kernel": [L, R, D], "bias": [L, D]}}`,
where L counts the blocks from `first_block` on, D is the width and R the bottleneck.

With x the residual stream after attention and m = MLP(LN2(x)) the block's output is

    parallel     x + m + scale * up(dropout(relu(down(u)))),   u = x, or LN2(x) by `input`
    sequential   x + m + scale * up(dropout(relu(down(m))))

(with LayerScale, m is the scaled output). `up` starts at zero, so a new adapter changes nothing.

Source: AdaptFormer, arXiv 2205.13535; in class-incremental learning EASE, arXiv 2403.12030.
"""

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp

from qkd_jax.errors import ConfigError
from qkd_jax.nn.layers import as_row, matmul_trainable
from qkd_jax.settings.ranges import Conflicts, setting


class BlockInsert(Protocol):
    """What the forward pass (`encode.py`) asks of the static settings of an adapter set, or of
    anything else that adds to a block's output.

    Attributes:
        bottleneck: how many hidden units have dropout.
        dropout: its rate.
        placement, input: what is read, as of `AdapterSpec`, or "output": what the block returns,
            to which it is added.
        first_block: the first block that has one.
    """

    bottleneck: int
    dropout: float
    placement: str
    input: str
    first_block: int

    def apply(
        self, adapter_block: Any, x: jax.Array, dropout_mask: jax.Array | None, compute_dtype: Any
    ) -> tuple[jax.Array, Any]:
        """(What one block adds to its output, what it observed: arrays or None).

        Args:
            adapter_block: this block's part of the adapter set.
            x: [B, N, D], what it reads, in the dtype of the stream.
            dropout_mask: [B, N, bottleneck] factors, or None.
            compute_dtype: dtype of the matrix products.
        """


@dataclass(frozen=True)
class AdapterSpec:
    """Static settings of one adapter set.

    Attributes:
        bottleneck: R, the inner width.
        scale: factor on the adapter's output.
        dropout: rate inside the bottleneck, used only when dropout keys are given.
        placement: "parallel" to the MLP, or "sequential" on the MLP's output.
        input: what a parallel adapter reads: "residual", the un-normalised stream after
            attention, or "norm", the same after the block's second LayerNorm.
        first_block: adapters sit in blocks first_block, first_block + 1, ...
    """

    bottleneck: int = setting(64, low=1)
    scale: float = 0.1
    dropout: float = setting(0.1, low=0, below=1)
    placement: Literal["parallel", "sequential"] = "parallel"
    input: Literal["residual", "norm"] = "residual"
    first_block: int = setting(0, low=0)

    def conflicts(self) -> Conflicts:
        if self.placement == "sequential" and self.input != "residual":
            yield "input", "residual, since a sequential adapter reads the MLP's output"

    def apply(self, adapter_block, x, dropout_mask, compute_dtype):
        """`apply_adapter`, which observes nothing (`BlockInsert.apply`)."""
        return apply_adapter(adapter_block, x.astype(compute_dtype), self, dropout_mask), None


def init_adapter(key: jax.Array, spec: AdapterSpec, width: int, depth: int) -> dict:
    """A new adapter set in float32.

    `down` is Kaiming-uniform with a = sqrt(5), i.e. uniform in (-1/sqrt(D), 1/sqrt(D)); `up` and
    both biases are zero, so the frozen model is unchanged. Each block has its own key.

    Args:
        key: one typed key.
        width: D of the transformer.
        depth: its number of blocks.

    Returns:
        The pytree of the module docstring, L = depth - spec.first_block.

    Raises:
        ConfigError: no block is left for the adapters.
    """
    blocks = num_blocks(spec, depth)
    bound = width**-0.5
    keys = jax.vmap(lambda block: jax.random.fold_in(key, block))(
        jnp.arange(spec.first_block, depth)
    )
    down = jax.vmap(
        lambda k: jax.random.uniform(
            k, (width, spec.bottleneck), jnp.float32, minval=-bound, maxval=bound
        )
    )(keys)
    return {
        "down": {"kernel": down, "bias": jnp.zeros((blocks, spec.bottleneck), jnp.float32)},
        "up": {
            "kernel": jnp.zeros((blocks, spec.bottleneck, width), jnp.float32),
            "bias": jnp.zeros((blocks, width), jnp.float32),
        },
    }


def num_blocks(spec: AdapterSpec, depth: int) -> int:
    """L, how many of `depth` blocks have an adapter.

    Raises:
        ConfigError: none has.
    """
    if spec.first_block >= depth:
        raise ConfigError(
            f"adapter.first_block: expected 0 to {depth - 1} of {depth} blocks, "
            f"found {spec.first_block}"
        )
    return depth - spec.first_block


def split_blocks(adapter: dict) -> list[dict]:
    """Splits arrays with a leading block axis into a list of one dict per block.

    One split, not one index per block: its derivative is a concatenation, not a sum of L padded
    arrays.
    """
    leaves, treedef = jax.tree.flatten(adapter)
    blocks = leaves[0].shape[0]
    if blocks == 0:
        return []
    columns = [jnp.split(leaf, blocks, axis=0) for leaf in leaves]
    return [
        treedef.unflatten([jnp.squeeze(part, axis=0) for part in row])
        for row in zip(*columns, strict=True)
    ]


def dropout_mask(
    keys: jax.Array, spec: AdapterSpec, block: int | jax.Array, num_tokens: int, dtype=jnp.float32
) -> jax.Array:
    """Inverted-dropout factors, 0 or 1 / (1 - rate), for one block.

    Each image has its own key, so the mask of an image does not depend on how a batch is split.

    Args:
        keys: [B] typed keys, one per image.
        block: index of the block in the transformer; folded into every key.
        num_tokens: N. The factors of a token do not depend on N.

    Returns:
        [B, N, R].
    """
    keep = 1.0 - spec.dropout

    def one(key):
        key = jax.random.fold_in(key, block)
        return jax.random.bernoulli(key, keep, (num_tokens, spec.bottleneck))

    return jax.vmap(one)(keys).astype(dtype) * jnp.asarray(1.0 / keep, dtype)


def apply_adapter(
    adapter_block: dict,
    x: jax.Array,
    spec: AdapterSpec,
    dropout_mask: jax.Array | None = None,
) -> jax.Array:
    """scale * up(mask * relu(down(x))) of one block, without the residual.

    Args:
        adapter_block: {"down": {"kernel": [D, R], "bias": [R]},
            "up": {"kernel": [R, D], "bias": [D]}}, or leaves [B, ...]: an adapter for each image.
        x: [..., D], or [B, N, D] where each image has its own adapter; its dtype is that of the
            products.
        dropout_mask: [..., R] factors, or None for no dropout.

    Returns:
        [..., D] in the dtype of `x`.
    """
    down = jax.tree.map(lambda a: a.astype(x.dtype), adapter_block["down"])
    up = jax.tree.map(lambda a: a.astype(x.dtype), adapter_block["up"])
    hidden = matmul_trainable(x, down["kernel"])
    hidden = jax.nn.relu(hidden + bias_rows(down["bias"], hidden))
    if dropout_mask is not None:
        hidden = hidden * dropout_mask.astype(x.dtype)
    out = matmul_trainable(hidden, up["kernel"])
    return spec.scale * (out + bias_rows(up["bias"], out))


def bias_rows(bias: jax.Array, like: jax.Array) -> jax.Array:
    """A vector [E], or one per image [B, E], in a shape that broadcasts against `like` [..., E]."""
    return as_row(bias, like) if bias.ndim == 1 else bias[:, None, :]


def mixed_adapter(adapters: dict, weights: jax.Array) -> tuple[dict, jax.Array]:
    """One adapter that computes exactly sum_i weights[b, i] adapter_i(x) for image b.

    Each up-bias becomes the row of one more hidden unit that is always 1, so that it is also
    weighted.

    Args:
        adapters: adapter sets with a leading task axis: down kernel [T, L, D, R] and so on.
        weights: [B, T].

    Returns:
        (adapter set with bottleneck T (R + 1), factors [B, T (R + 1)] on its hidden units).
    """
    down, up = adapters["down"], adapters["up"]
    num_tasks, blocks, width, bottleneck = down["kernel"].shape

    def joined(kernel):  # [T, L, R + 1, D] -> [L, T (R + 1), D]
        return jnp.swapaxes(kernel, 0, 1).reshape(blocks, -1, width)

    columns = jnp.swapaxes(down["kernel"], 2, 3)
    constant = jnp.zeros((num_tasks, blocks, 1, width), columns.dtype)
    bias = jnp.concatenate([down["bias"], jnp.ones_like(constant[..., 0])], axis=2)
    wide = {
        "down": {
            "kernel": jnp.swapaxes(joined(jnp.concatenate([columns, constant], axis=2)), 1, 2),
            "bias": jnp.swapaxes(bias, 0, 1).reshape(blocks, -1),
        },
        "up": {
            "kernel": joined(jnp.concatenate([up["kernel"], up["bias"][:, :, None]], axis=2)),
            "bias": jnp.zeros((blocks, width), columns.dtype),
        },
    }
    return wide, jnp.repeat(weights, bottleneck + 1, axis=1)
