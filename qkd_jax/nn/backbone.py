"""The parameters of a frozen transformer, and a spec that says how to run it."""

from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import struct

from qkd_jax.nn.inputs import Tokens


class Spec(Protocol):
    """What the forward pass (`encode.py`) and the engine ask of an architecture.

    A spec is a frozen dataclass, a static argument of compiled functions. `vit.ViTSpec` reads
    images, `bert.BertSpec` texts.

    Attributes:
      width, depth, num_heads, mlp_width: D, L, H and the hidden width of the MLP.
      num_tokens: N, tokens of an input, or the most that it can have.
      input_size: how large inputs are: the side of an image in pixels, or tokens of a text.
      unit: of `input_size`, "px" or "tokens".
      fields: names of the batch fields that it reads, such as ("image",).
      pooling: which output is the feature of an input: of the "first" token, the class token, or
        the "mean" over all real tokens.
      activation: a name in `layers.ACTIVATIONS`.
      eps: of every LayerNorm.
      layer_scale: learned factors on both branches of every block.
      post_norm: False: x + branch(norm(x)), and a LayerNorm after the last block. True:
        norm(x + branch(x)), and none after it (BERT).
    """

    width: int
    depth: int
    num_heads: int
    mlp_width: int
    num_tokens: int
    input_size: int
    unit: str
    fields: tuple[str, ...]
    pooling: str
    activation: str
    eps: float
    layer_scale: bool
    post_norm: bool

    def check_form(
        self, fields: dict[str, Any], *, of_steps: bool = False
    ) -> tuple[dict[str, Any], tuple[int, ...]]:
        """The fields as a compiled function takes them, and their leading shape: (B,), or also
        (S, B) with `of_steps`. Raises DataError where shapes or types do not fit.
        """

    def check_values(self, fields: dict[str, Any], mask: Any) -> None:
        """Raises DataError where a real row (mask [B] or [S, B]) has values out of range."""

    def embed(
        self,
        params: dict,
        fields: dict[str, jax.Array],
        preprocessing: Any,
        compute_dtype: Any,
        prompt: tuple[jax.Array, jax.Array | None] | None = None,
    ) -> Tokens:
        """The residual stream before block 0; `prompt` is `Inserts.prompt` and its mask. Raises
        ConfigError where there is no place for a prompt.
        """

    def resized(self, fields: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """The fields with inputs of any size brought to `input_size`, if that is possible."""

    def param_shapes(self) -> dict:
        """Shapes of the parameters, a pytree of `jax.ShapeDtypeStruct` with a list of blocks."""


@struct.dataclass
class Backbone:
    """A frozen transformer.

    Attributes:
      params: pytree of arrays, described in the module of the spec.
      spec: a `Spec`, such as `vit.ViTSpec`.
      preprocessing: how inputs become what the weights were trained on: `pixels.Preprocessing` of
        images, `tokens.Tokenizer` of texts; None = not at all.
      name: the name of the weights.
    """

    params: Any
    spec: Spec = struct.field(pytree_node=False)
    preprocessing: Any = struct.field(pytree_node=False, default=None)
    name: str = struct.field(pytree_node=False, default="")


def stack_blocks(params: dict) -> dict:
    """The parameters with one dict of arrays [L, ...] in place of the list of blocks."""
    blocks = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params["blocks"])
    return {**params, "blocks": blocks}


def norms_of(params: dict) -> dict:
    """{"blocks": the LayerNorms of all blocks, leaves [L, D], "norm"?: the last one}, float32."""
    blocks = params["blocks"]
    if isinstance(blocks, list | tuple):
        blocks = stack_blocks({"blocks": [_norms_in(block) for block in blocks]})["blocks"]
    found = {"blocks": _norms_in(blocks), **{n: params[n] for n in ("norm",) if n in params}}
    return jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), found)


def with_norms(params: dict, norms: dict) -> dict:
    """The parameters with other LayerNorms, as from `norms_of`."""
    blocks, own = params["blocks"], norms["blocks"]
    if isinstance(blocks, list | tuple):
        blocks = [
            {**block, **jax.tree.map(lambda a, index=index: a[index], own)}
            for index, block in enumerate(blocks)
        ]
    else:
        blocks = {**blocks, **own}
    return {**params, **norms, "blocks": blocks}


def _norms_in(block):
    return {name: block[name] for name in ("norm1", "norm2")}


def block_at(params: dict, index: int | jax.Array) -> dict:
    """The parameters of one block, from a list or a stack; in a stack, `index` may be traced."""
    blocks = params["blocks"]
    if isinstance(blocks, list | tuple):
        return blocks[index]
    return jax.tree.map(
        lambda a: jax.lax.dynamic_index_in_dim(a, index, axis=0, keepdims=False), blocks
    )
