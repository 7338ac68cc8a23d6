"""What is inserted in a frozen transformer, as data, and how the forward pass reads it."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from qkd_jax.errors import ConfigError
from qkd_jax.nn.adapters import AdapterSpec, BlockInsert, dropout_mask
from qkd_jax.nn.backbone import Spec
from qkd_jax.nn.inputs import Tokens
from qkd_jax.nn.layers import AttentionInsert


@struct.dataclass
class Inserts:
    """What is inserted in a frozen transformer, as data.

    `adapter` is one adapter set (see `adapters.py`; `experts.py` for a mixture of several,
    `modulated.py` for one with a code of each task, `noise.py` for learned noise) and may be
    differentiated, mapped or stacked; its spec is static.

    Attributes:
        adapter, adapter_spec: one adapter for each block from `adapter_spec.first_block` on.
        hidden_factors: [B, R], for each input a factor on each hidden unit of the adapter.
        attention: one `AttentionInsert` or None for each block; empty = none in any block.
        tokens: [F, D] or [B, F, D], more tokens, without positions. They become the last F rows,
            -F to -1; attention does not depend on the order of tokens.
        prompt: [P, D] or [B, P, D], a soft prompt in front of a text's own tokens: it goes through
            the embedding as they do (`BertSpec.embed`). Its rows stand behind those of the text,
            so that row 0 is the class token as ever.
        prompt_mask: bool [P] or [B, P], False for rows that are not there; None is all. A prompt
            with such rows gives what one without them gives, up to the order of sums.
    """

    adapter: Any = None
    adapter_spec: BlockInsert = struct.field(pytree_node=False, default=AdapterSpec())
    hidden_factors: Any = None
    attention: tuple[AttentionInsert | None, ...] = ()
    tokens: Any = None
    prompt: Any = None
    prompt_mask: Any = None


def num_added(inserts: Inserts | None) -> int:
    """How many rows the inserted tokens and prompts are."""
    parts = () if inserts is None else (inserts.tokens, inserts.prompt)
    return sum(part.shape[-2] for part in parts if part is not None)


def attention_inserts(inserts: Inserts | None, spec: Spec) -> tuple:
    """One entry for each block, or an empty tuple."""
    attention = () if inserts is None else inserts.attention
    if attention and len(attention) != spec.depth:
        raise ConfigError(
            f"attention inserts: expected {spec.depth}, one or None for each block, found "
            f"{len(attention)}"
        )
    return attention


def with_added(inserts: Inserts | None, tokens: Tokens) -> Tokens:
    """The tokens, followed by the inserted ones."""
    if inserts is None or inserts.tokens is None:
        return tokens
    if tokens.block != 0:
        raise ConfigError(f"inserted tokens: expected block 0 next, found block {tokens.block}")
    x, mask = tokens.stream, tokens.mask
    added = jnp.broadcast_to(
        inserts.tokens.astype(x.dtype), (x.shape[0], *inserts.tokens.shape[-2:])
    )
    if mask is not None:
        mask = jnp.concatenate([mask, jnp.ones(added.shape[:2], bool)], axis=1)
    return Tokens(jnp.concatenate([x, added], axis=1), mask)


def split_adapter(inserts: Inserts | None, spec: Spec) -> tuple[Any, Any, BlockInsert | None]:
    """(adapters of all blocks but the last, adapter of the last block, adapter spec or None)."""
    if inserts is None or inserts.adapter is None:
        return None, None, None
    found = {leaf.shape[0] for leaf in jax.tree.leaves(inserts.adapter)}
    expected = spec.depth - inserts.adapter_spec.first_block
    if found != {expected}:
        raise ConfigError(
            f"adapter: expected {expected} blocks, as {spec.depth} blocks with first_block "
            f"{inserts.adapter_spec.first_block} need, found {sorted(found)}"
        )
    leaves, treedef = jax.tree.flatten(inserts.adapter)
    parts = [jnp.split(leaf, [expected - 1], axis=0) for leaf in leaves]
    early = treedef.unflatten([part[0] for part in parts])
    last = treedef.unflatten([jnp.squeeze(part[1], axis=0) for part in parts])
    return early, last, inserts.adapter_spec


def dropout_factors(
    inserts: Inserts | None, dropout_key: Any, dtype: Any, index: int, num_tokens: int
) -> jax.Array | None:
    """Factors on the adapter's hidden units in one block: the given ones, dropout, or None."""
    if inserts is None or inserts.adapter is None:
        return None
    if inserts.hidden_factors is not None:
        return inserts.hidden_factors[:, None, :].astype(dtype)
    if dropout_key is None or inserts.adapter_spec.dropout == 0.0:
        return None
    return dropout_mask(dropout_key, inserts.adapter_spec, index, num_tokens, dtype)
