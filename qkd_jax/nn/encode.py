"""The forward pass of a vision transformer as pure functions, with what is inserted in it.

A list of blocks is unrolled (fastest on CPU), a stacked dict is scanned (compiles once for all
blocks: TPU and deep models); both run the same `block`. The weights are frozen: callers close over
them or pass them as arguments that are not differentiated.

On TPU, XLA multiplies float32 matrices in bfloat16 passes unless `jax_default_matmul_precision`
says "highest"; parity with the reference implementations holds at that setting.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from qkd_jax.errors import ConfigError
from qkd_jax.nn.adapters import AdapterSpec, apply_adapter, dropout_mask, split_blocks
from qkd_jax.nn.layers import (
    ACTIVATIONS,
    AttentionInsert,
    as_row,
    at_least_float32,
    attention,
    layer_norm,
    linear,
)
from qkd_jax.nn.vit import ViTSpec, block_at


@struct.dataclass
class Inserts:
    """What is inserted in a frozen transformer: data, not subclasses.

    `adapter` is one adapter set (see `adapters.py`) and may be differentiated, mapped or stacked;
    its spec is static.

    Attributes:
        adapter, adapter_spec: one adapter for each block from `adapter_spec.first_block` on.
        hidden_factors: [B, R], a factor on each hidden unit of the adapter, for each image.
        attention: one `AttentionInsert` or None for each block; empty for none at all.
        tokens: [F, D] or [B, F, D], more tokens, without positions; the feature is then the mean of
            their outputs instead of the class token's (L2P).
    """

    adapter: Any = None
    adapter_spec: AdapterSpec = struct.field(pytree_node=False, default=AdapterSpec())
    hidden_factors: Any = None
    attention: tuple[AttentionInsert | None, ...] = ()
    tokens: Any = None


@struct.dataclass
class Stem:
    """What every adapter of an image shares: the frozen model up to where the first adapter adds.

    Attributes:
        residual: [B, N, D], the stream after attention in the first adapter's block (only the
            class token, N = 1, if that is the last block).
        mlp: [B, N, D], the output of that block's MLP.
    """

    residual: jax.Array
    mlp: jax.Array


def embed(
    params: dict, spec: ViTSpec, images: jax.Array, *, compute_dtype=jnp.float32
) -> jax.Array:
    """Patches, class token, positions and CLIP's first LayerNorm.

    Args:
        images: [B, H, W, 3] floating point, already normalised, H = W = spec.image_size.

    Returns:
        [B, N, D] residual stream (float32, or float64 for float64), class token first.

    Raises:
        ConfigError: images or positions do not fit the spec.
    """
    side, patch, width = spec.image_size, spec.patch_size, spec.width
    if images.ndim != 4 or images.shape[1:] != (side, side, 3):
        raise ConfigError(
            f"images: expected [B, {side}, {side}, 3], found {list(images.shape)}. "
            "Resize the images, or load the backbone with another image_size."
        )
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ConfigError(
            f"images: expected floating point, found {images.dtype}. Use `normalize` first."
        )
    if params["position"].shape[0] != spec.num_tokens:
        raise ConfigError(
            f"position has {params['position'].shape[0]} rows; image_size {side} needs "
            f"{spec.num_tokens}. Use `resample_positions` (load_backbone does)."
        )
    wide = at_least_float32(compute_dtype)
    batch, grid = images.shape[0], side // patch
    folded = images.reshape(batch, grid, patch, grid, patch, 3).transpose(0, 1, 3, 2, 4, 5)
    folded = folded.reshape(batch, grid * grid, patch * patch * 3)
    tokens = linear(params["patch"], folded, compute_dtype).astype(wide)
    class_token = jnp.broadcast_to(
        params["class_token"].astype(wide)[None, None, :], (batch, 1, width)
    )
    x = jnp.concatenate([class_token, tokens], axis=1)
    x = x + params["position"].astype(wide)[None]
    if spec.pre_norm:
        x = layer_norm(params["pre_norm"], x, spec.eps)
    return x


# Jitted, so that a deep model traces one block and not all of them.
@partial(jax.jit, static_argnames=("spec", "adapter_spec", "asking", "compute_dtype"))
def block(
    block_params: dict,
    spec: ViTSpec,
    x: jax.Array,
    *,
    adapter: dict | None = None,
    adapter_spec: AdapterSpec | None = None,
    mask: jax.Array | None = None,
    attention_insert: AttentionInsert | None = None,
    asking: tuple[int, int] | None = None,
    compute_dtype=jnp.float32,
) -> jax.Array:
    """One transformer block: x + attention(LN1(x)), then + MLP(LN2(x)), with optional inserts.

    Args:
        block_params: one entry of `params["blocks"]`.
        x: [B, N, D] residual stream.
        adapter: this block's adapter, or None (see `adapters.apply_adapter`).
        mask: [B, M, R] dropout factors of the adapter, or None.
        attention_insert: this block's, or None.
        asking: (start, stop), return only these M tokens; None is all. Keys and values still come
            from all tokens, so this is exact for a last block and saves nearly all its other work.

    Returns:
        [B, M, D].
    """
    stem, normed = _block_stem(block_params, spec, x, attention_insert, asking, compute_dtype)
    return _with_adapter(stem, normed, adapter, adapter_spec, mask, compute_dtype)


def _block_stem(p, spec, x, attention_insert, asking, compute_dtype):
    """What a block computes without its adapter, and the MLP's input."""
    wide = x.dtype
    normed = layer_norm(p["norm1"], x, spec.eps)
    queries_from = normed
    if asking is not None:
        rows = slice(*asking)
        x, queries_from = x[:, rows], normed[:, rows]
    attended = attention(
        p, queries_from, normed, spec.num_heads, compute_dtype, attention_insert
    ).astype(wide)
    if spec.layer_scale:
        attended = attended * as_row(p["scale1"].astype(wide), x)
    x = x + attended

    normed = layer_norm(p["norm2"], x, spec.eps)
    hidden = ACTIVATIONS[spec.activation](linear(p["fc1"], normed, compute_dtype))
    mlp = linear(p["fc2"], hidden, compute_dtype).astype(wide)
    if spec.layer_scale:
        mlp = mlp * as_row(p["scale2"].astype(wide), x)
    return Stem(x, mlp), normed


def _with_adapter(stem, normed, adapter, adapter_spec, mask, compute_dtype):
    """The block's output: residual + MLP + adapter."""
    out = stem.residual + stem.mlp
    if adapter is None:
        return out
    if adapter_spec.placement == "sequential":
        reads = stem.mlp
    else:
        reads = stem.residual if adapter_spec.input == "residual" else normed
    delta = apply_adapter(adapter, reads.astype(compute_dtype), adapter_spec, mask)
    return out + delta.astype(out.dtype)


def encode(
    params: dict,
    spec: ViTSpec,
    images: jax.Array,
    inserts: Inserts | None = None,
    *,
    dropout_key: jax.Array | None = None,
    compute_dtype=jnp.float32,
) -> jax.Array:
    """The feature of each image: the class token after the last LayerNorm.

    Args:
        params: parameters as in the module docstring.
        images: [B, H, W, 3] floating point, already normalised.
        inserts: what is inserted; None is the frozen model.
        dropout_key: [B] typed keys, one per image; None is no dropout.
        compute_dtype: dtype of the matrix products.

    Returns:
        [B, D] float32 (float64 when computing in float64).
    """
    x = embed(params, spec, images, compute_dtype=compute_dtype)
    return encode_from(
        params, spec, x, inserts, 0, dropout_key=dropout_key, compute_dtype=compute_dtype
    )


def encode_prefix(
    params: dict, spec: ViTSpec, images: jax.Array, stop_block: int, *, compute_dtype=jnp.float32
) -> jax.Array:
    """The residual stream [B, N, D] before block `stop_block`, of the frozen model.

    It does not depend on adapters whose `first_block` is `stop_block` or later, so it can be
    computed once an image and kept. `encode_from` continues from it.
    """
    x = embed(params, spec, images, compute_dtype=compute_dtype)
    if not 0 <= stop_block < spec.depth:
        raise ConfigError(f"stop_block: expected 0 to {spec.depth - 1}, found {stop_block}")
    return _run(params, spec, x, 0, stop_block, None, None, None, compute_dtype)


def encode_from(
    params: dict,
    spec: ViTSpec,
    tokens: jax.Array,
    inserts: Inserts | None,
    start_block: int,
    *,
    dropout_key: jax.Array | None = None,
    compute_dtype=jnp.float32,
) -> jax.Array:
    """Continue from the residual stream before `start_block` to the feature.

    Args:
        tokens: [B, N, D] as from `encode_prefix` or `embed`.
        start_block: first block that is still to run.

    Returns:
        [B, D], as `encode`.

    Raises:
        ConfigError: adapters sit in blocks that were already run.
    """
    early, last_adapter, adapter_spec = _split_inserts(inserts, spec)
    if adapter_spec is not None and adapter_spec.first_block < start_block:
        raise ConfigError(
            f"adapters start at block {adapter_spec.first_block}, but the cached tokens "
            f"are those before block {start_block}; cache at most up to the first adapter."
        )
    if not 0 <= start_block < spec.depth:
        raise ConfigError(f"start_block: expected 0 to {spec.depth - 1}, found {start_block}")
    last = spec.depth - 1
    mask_of = partial(_mask, inserts, dropout_key, compute_dtype)
    inserted = _attention_inserts(inserts, spec)
    tokens, asking = _with_tokens(inserts, tokens, start_block)
    x = _run(
        params,
        spec,
        tokens,
        start_block,
        last,
        early,
        adapter_spec,
        mask_of,
        compute_dtype,
        inserted,
    )
    x = block(
        block_at(params, last),
        spec,
        x,
        adapter=last_adapter,
        adapter_spec=adapter_spec,
        mask=mask_of(last, asking[1] - asking[0]),
        attention_insert=inserted[last] if inserted else None,
        asking=asking,
        compute_dtype=compute_dtype,
    )
    return jnp.mean(layer_norm(params["norm"], x, spec.eps), axis=1)


def encode_stem(
    params: dict, spec: ViTSpec, tokens: jax.Array, first_block: int, *, compute_dtype=jnp.float32
) -> Stem:
    """The frozen part of the block of the first adapter, for `encode_from_stem`.

    Args:
        tokens: [B, N, D] before block `first_block`, from `encode_prefix` or `embed`.
    """
    asking = (0, 1) if first_block == spec.depth - 1 else None
    stem, _ = _block_stem(block_at(params, first_block), spec, tokens, None, asking, compute_dtype)
    return stem


def encode_from_stem(
    params: dict,
    spec: ViTSpec,
    stem: Stem,
    inserts: Inserts,
    *,
    dropout_key: jax.Array | None = None,
    compute_dtype=jnp.float32,
) -> jax.Array:
    """The feature [B, D] under one adapter, from what all adapters share; equals `encode`.

    Raises:
        ConfigError: more than an adapter is inserted: the stem knows of no prompts.
    """
    if inserts.attention or inserts.tokens is not None:
        raise ConfigError("a stem is shared by adapters alone; start from the images instead.")
    early, last_adapter, adapter_spec = _split_inserts(inserts, spec)
    first = adapter_spec.first_block
    in_last = first == spec.depth - 1
    adapter = last_adapter if in_last else jax.tree.map(lambda a: a[0], early)
    p, normed = block_at(params, first), None
    if adapter_spec.input == "norm":
        normed = layer_norm(p["norm2"], stem.residual, spec.eps)
    mask = _mask(inserts, dropout_key, compute_dtype, first, stem.residual.shape[1])
    x = _with_adapter(stem, normed, adapter, adapter_spec, mask, compute_dtype)
    if in_last:
        return jnp.mean(layer_norm(params["norm"], x, spec.eps), axis=1)
    rest = inserts.replace(
        adapter=jax.tree.map(lambda a: a[1:], inserts.adapter),
        adapter_spec=dataclasses.replace(adapter_spec, first_block=first + 1),
    )
    options = {"dropout_key": dropout_key, "compute_dtype": compute_dtype}
    return encode_from(params, spec, x, rest, first + 1, **options)


def _attention_inserts(inserts, spec):
    """One entry for each block, or an empty tuple."""
    found = () if inserts is None else inserts.attention
    if found and len(found) != spec.depth:
        raise ConfigError(
            f"there are {len(found)} attention inserts; {spec.depth} blocks need {spec.depth} "
            "(None where a block has none)."
        )
    return found


def _with_tokens(inserts, x, start_block):
    """(x with the inserted tokens at the end, which rows give the feature). Attention does not see
    the order of tokens, so in front and at the end are the same.
    """
    if inserts is None or inserts.tokens is None:
        return x, (0, 1)
    if start_block != 0:
        raise ConfigError(f"tokens are inserted before block 0, not before block {start_block}.")
    extra = jnp.broadcast_to(
        inserts.tokens.astype(x.dtype), (x.shape[0], *inserts.tokens.shape[-2:])
    )
    return jnp.concatenate([x, extra], axis=1), (x.shape[1], x.shape[1] + extra.shape[1])


def encode_all(
    params: dict,
    spec: ViTSpec,
    images: jax.Array,
    inserts: Inserts | None = None,
    *,
    dropout_key: jax.Array | None = None,
    compute_dtype=jnp.float32,
) -> list[jax.Array]:
    """Every intermediate result, for tests, probes and plots; slower than `encode`.

    Returns:
        L + 2 arrays [B, N, D]: after the embedding, after each block, after the last LayerNorm
        (its row 0 is the feature; inserted tokens are the last rows).
    """
    early, last_adapter, adapter_spec = _split_inserts(inserts, spec)
    adapters = [None] * spec.depth
    if adapter_spec is not None:
        adapters[adapter_spec.first_block :] = [*split_blocks(early), last_adapter]
    inserted = _attention_inserts(inserts, spec) or [None] * spec.depth
    x = embed(params, spec, images, compute_dtype=compute_dtype)
    x, _ = _with_tokens(inserts, x, 0)
    results = [x]
    for index, adapter in enumerate(adapters):
        mask = None
        if adapter is not None:
            mask = _mask(inserts, dropout_key, compute_dtype, index, x.shape[1])
        x = block(
            block_at(params, index),
            spec,
            x,
            adapter=adapter,
            adapter_spec=adapter_spec,
            mask=mask,
            attention_insert=inserted[index],
            compute_dtype=compute_dtype,
        )
        results.append(x)
    return [*results, layer_norm(params["norm"], x, spec.eps)]


def _split_inserts(inserts, spec):
    """(adapters of all blocks but the last, adapter of the last block, adapter spec or None)."""
    if inserts is None or inserts.adapter is None:
        return None, None, None
    rows = {leaf.shape[0] for leaf in jax.tree.leaves(inserts.adapter)}
    expected = spec.depth - inserts.adapter_spec.first_block
    if rows != {expected}:
        raise ConfigError(
            f"the adapter has {sorted(rows)} rows of blocks; {spec.depth} blocks with first_block "
            f"{inserts.adapter_spec.first_block} need {expected}."
        )
    leaves, treedef = jax.tree.flatten(inserts.adapter)
    parts = [jnp.split(leaf, [expected - 1], axis=0) for leaf in leaves]
    early = treedef.unflatten([part[0] for part in parts])
    last = treedef.unflatten([jnp.squeeze(part[1], axis=0) for part in parts])
    return early, last, inserts.adapter_spec


def _mask(inserts, dropout_key, dtype, index, num_tokens):
    """Factors on the adapter's hidden units in one block: dropout, given ones, or None."""
    if inserts is None or inserts.adapter is None:
        return None
    if inserts.hidden_factors is not None:
        return inserts.hidden_factors[:, None, :].astype(dtype)
    if dropout_key is None or inserts.adapter_spec.dropout == 0.0:
        return None
    return dropout_mask(dropout_key, inserts.adapter_spec, index, num_tokens, dtype)


def _run(params, spec, x, start, stop, adapters, adapter_spec, mask_of, dtype, inserted=()):
    """Blocks start, ..., stop - 1 on all tokens. `adapters` holds those of [first_block, L - 1)."""
    first = stop if adapter_spec is None else min(adapter_spec.first_block, stop)

    def one(x, index, adapter, insert=None):
        mask = None
        if adapter is not None:
            mask = mask_of(index, x.shape[1])
        return block(
            block_at(params, index),
            spec,
            x,
            adapter=adapter,
            adapter_spec=adapter_spec,
            mask=mask,
            attention_insert=insert,
            compute_dtype=dtype,
        )

    # Attention inserts differ in shape from block to block, so they are unrolled in both forms.
    if isinstance(params["blocks"], Sequence) or inserted:
        per_block = split_blocks(adapters) if first < stop else []
        for index in range(start, stop):
            adapter = per_block[index - first] if index >= first else None
            x = one(x, index, adapter, inserted[index] if inserted else None)
        return x
    # The frozen arrays are indexed, not scanned over, so a range of blocks copies no weights.
    if start < first:
        x, _ = jax.lax.scan(lambda x, i: (one(x, i, None), None), x, jnp.arange(start, first))
    if first < stop:
        x, _ = jax.lax.scan(
            lambda x, row: (one(x, *row), None), x, (jnp.arange(first, stop), adapters)
        )
    return x
