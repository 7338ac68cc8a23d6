"""The forward pass of a frozen transformer, with optional inserts, as pure functions.

`encode` starts from whatever form the inputs are in (`inputs.py`), dispatches on the backbone's
spec, and returns the rows of the last block that were asked for. The last block computes only these
after its keys and values, since nothing reads the others: the result is the same, for a fraction of
the block's work. Pooling is up to the caller: the class token, the mean over prompts or over real
tokens, or an added token are all rows.

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

from qkd_jax.errors import ConfigError
from qkd_jax.nn.adapters import BlockInsert, split_blocks
from qkd_jax.nn.backbone import Backbone, Spec, block_at
from qkd_jax.nn.inputs import Raw, Stem, Tokens
from qkd_jax.nn.inserts import (
    Inserts,
    attention_inserts,
    dropout_factors,
    num_added,
    split_adapter,
    with_added,
)
from qkd_jax.nn.layers import (
    ACTIVATIONS,
    AttentionInsert,
    as_row,
    attention,
    layer_norm,
    linear,
)

CLASS_TOKEN = (0,)  # rows


def embed(
    backbone: Backbone,
    inputs: Raw | Tokens,
    inserts: Inserts | None = None,
    *,
    compute_dtype=jnp.float32,
) -> Tokens:
    """The residual stream before block 0, with `inserts.prompt`, or the `Tokens` as they are.

    Raises:
        ConfigError: the prompt does not fit the backbone, or its place was already passed.
    """
    prompt = None
    if inserts is not None and inserts.prompt is not None:
        prompt = inserts.prompt, inserts.prompt_mask
    if isinstance(inputs, Raw):
        fields = backbone.spec.resized(inputs.fields) if inputs.resize else inputs.fields
        return backbone.spec.embed(
            backbone.params, fields, backbone.preprocessing, compute_dtype, prompt
        )
    if prompt is not None:
        raise ConfigError(
            "prompt: expected inputs that are not embedded yet, where prompts go, found the tokens "
            f"before block {inputs.block}"
        )
    return inputs


def block(
    block_params: dict,
    spec: Spec,
    x: jax.Array,
    *,
    token_mask: jax.Array | None = None,
    adapter: dict | None = None,
    adapter_spec: BlockInsert | None = None,
    dropout: jax.Array | None = None,
    attention_insert: AttentionInsert | None = None,
    rows: tuple[int, ...] | None = None,
    compute_dtype=jnp.float32,
) -> jax.Array:
    """One transformer block, with optional inserts.

    With `spec.post_norm` False: x + attention(LN1(x)), then + MLP(LN2(x)). True, as in BERT:
    LN1(x + attention(x)), then LN2(x + MLP(x)).

    Args:
        block_params: one entry of `params["blocks"]`.
        x: [B, N, D] residual stream.
        token_mask: bool [B, N], the tokens that may be attended to; None is all.
        adapter: this block's adapter, or None (see `adapter_spec.apply`).
        dropout: [B, M, R] factors on the adapter's hidden units, or None.
        attention_insert: this block's, or None.
        rows: return only these M tokens; None is all. Keys and values still come from all tokens,
            so this is exact for a last block and saves nearly all its other work.

    Returns:
        [B, M, D].
    """
    return _block(
        block_params,
        x,
        token_mask,
        adapter,
        dropout,
        attention_insert,
        spec=spec,
        adapter_spec=adapter_spec,
        rows=rows,
        compute_dtype=compute_dtype,
    )[0]


# Jitted, so that a deep model traces one block and not all of them.
@partial(jax.jit, static_argnames=("spec", "adapter_spec", "rows", "compute_dtype"))
def _block(p, x, token_mask, adapter, dropout, insert, *, spec, adapter_spec, rows, compute_dtype):
    """(`block`, what its adapter observed)."""
    stem, normed = _block_stem(p, spec, x, token_mask, insert, rows, compute_dtype)
    return _block_output(p, spec, stem, normed, adapter, adapter_spec, dropout, compute_dtype)


def _block_stem(p, spec, x, token_mask, attention_insert, rows, compute_dtype):
    """(`Stem` of a block without its adapter, input of its MLP)."""
    wide = x.dtype
    normed = x if spec.post_norm else layer_norm(p["norm1"], x, spec.eps)
    x, queries_from = _take(x, rows), _take(normed, rows)
    attended = attention(
        p, queries_from, normed, spec.num_heads, compute_dtype, attention_insert, token_mask
    ).astype(wide)
    if spec.layer_scale:
        attended = attended * as_row(p["scale1"].astype(wide), x)
    x = x + attended
    if spec.post_norm:
        x = normed = layer_norm(p["norm1"], x, spec.eps)
    else:
        normed = layer_norm(p["norm2"], x, spec.eps)
    hidden = ACTIVATIONS[spec.activation](linear(p["fc1"], normed, compute_dtype))
    mlp = linear(p["fc2"], hidden, compute_dtype).astype(wide)
    if spec.layer_scale:
        mlp = mlp * as_row(p["scale2"].astype(wide), x)
    return Stem(x, mlp), normed


def _block_output(p, spec, stem, normed, adapter, adapter_spec, dropout, compute_dtype):
    """(Residual + MLP + adapter, normalised where the block is post-norm, or with an adapter
    behind all that; what the adapter observed).

    `normed` is the MLP's input; it may be None where no adapter reads it.
    """
    out, observed = stem.residual + stem.mlp, None
    behind = adapter is not None and adapter_spec.placement == "output"
    if adapter is not None and not behind:
        if adapter_spec.placement == "sequential":
            reads = stem.mlp
        else:
            reads = stem.residual if adapter_spec.input == "residual" else normed
        delta, observed = adapter_spec.apply(adapter, reads, dropout, compute_dtype)
        out = out + delta.astype(out.dtype)
    if spec.post_norm:
        out = layer_norm(p["norm2"], out, spec.eps)
    if behind:
        delta, observed = adapter_spec.apply(adapter, out, dropout, compute_dtype)
        out = out + delta.astype(out.dtype)
    return out, observed


def encode(
    backbone: Backbone,
    inputs: Raw | Tokens | Stem,
    inserts: Inserts | None = None,
    *,
    rows: Sequence[int] | None = CLASS_TOKEN,
    dropout_key: jax.Array | None = None,
    compute_dtype=jnp.float32,
) -> jax.Array:
    """The chosen rows of the last block's output, after the last LayerNorm.

    Args:
        inputs: `Raw`, or the result of an earlier `prefix` or `stem`.
        inserts: what is inserted; None is the frozen model.
        rows: which tokens are returned, static. Negative ones count from the end, so that the last
            F are those of `Inserts.tokens`. None = those of the input itself, without what was
            inserted.
        dropout_key: [B] typed keys, one for each input; None is no dropout.
        compute_dtype: dtype of the matrix products.

    Returns:
        [B, M, D] float32 (float64 when computing in float64).

    Raises:
        ConfigError: inserts sit in blocks that were already run, or do not fit the spec.
    """
    options = {"rows": rows, "dropout_key": dropout_key, "compute_dtype": compute_dtype}
    return encode_observed(backbone, inputs, inserts, **options)[0]


def encode_observed(
    backbone: Backbone,
    inputs: Raw | Tokens | Stem,
    inserts: Inserts | None = None,
    *,
    rows: Sequence[int] | None = CLASS_TOKEN,
    dropout_key: jax.Array | None = None,
    compute_dtype=jnp.float32,
) -> tuple[jax.Array, Any]:
    """(`encode`, what the adapters observed: a pytree of arrays with a leading axis of their
    blocks, or None). Arguments and errors as of `encode`.
    """
    if isinstance(inputs, Stem):
        return _encode_from_stem(
            backbone, inputs, inserts, rows, dropout_key=dropout_key, compute_dtype=compute_dtype
        )
    params, spec = backbone.params, backbone.spec
    tokens = with_added(inserts, embed(backbone, inputs, inserts, compute_dtype=compute_dtype))
    early, last_adapter, adapter_spec = split_adapter(inserts, spec)
    if adapter_spec is not None and adapter_spec.first_block < tokens.block:
        raise ConfigError(
            f"adapter.first_block: expected at least {tokens.block}, since the blocks before it "
            f"were run already, found {adapter_spec.first_block}"
        )
    last, chosen = spec.depth - 1, _positions(rows, tokens, inserts)
    mask_of = partial(dropout_factors, inserts, dropout_key, compute_dtype)
    inserted = attention_inserts(inserts, spec)
    if any(insert is not None for insert in inserted[: tokens.block]):
        raise ConfigError(
            f"attention inserts: expected none before block {tokens.block}, since the blocks "
            "before it were run already, found some"
        )
    x, observed = _run(
        params, spec, tokens, last, early, adapter_spec, mask_of, compute_dtype, inserted
    )
    x, observed_last = _block(
        block_at(params, last),
        x,
        tokens.mask,
        last_adapter,
        mask_of(last, len(chosen)),
        inserted[last] if inserted else None,
        spec=spec,
        adapter_spec=adapter_spec,
        rows=chosen,
        compute_dtype=compute_dtype,
    )
    return _last_norm(backbone, x), _stacked([*observed, _of_one_block(observed_last)])


def encode_pooled(
    backbone: Backbone,
    inputs: Raw | Tokens | Stem,
    inserts: Inserts | None = None,
    *,
    dropout_key: jax.Array | None = None,
    compute_dtype=jnp.float32,
) -> jax.Array:
    """The feature of each input as `spec.pooling` says, [B, D]: arguments as of `encode`."""
    options = {"dropout_key": dropout_key, "compute_dtype": compute_dtype}
    return encode_pooled_observed(backbone, inputs, inserts, **options)[0]


def encode_pooled_observed(
    backbone: Backbone,
    inputs: Raw | Tokens | Stem,
    inserts: Inserts | None = None,
    *,
    dropout_key: jax.Array | None = None,
    compute_dtype=jnp.float32,
) -> tuple[jax.Array, Any]:
    """(`encode_pooled`, what the adapters observed as from `encode_observed`)."""
    rows, observed = encode_observed(
        backbone,
        inputs,
        inserts,
        rows=pooled_rows(backbone.spec),
        dropout_key=dropout_key,
        compute_dtype=compute_dtype,
    )
    return _pooled(backbone.spec, inputs, rows), observed


def _pooled(spec, inputs, rows):
    if spec.pooling == "first":
        return rows[:, 0]
    mask = inputs.fields.get("token_mask") if isinstance(inputs, Raw) else inputs.mask
    if mask is None:
        return jnp.mean(rows, axis=1)
    weights = mask.astype(rows.dtype)[:, :, None]
    # A padded input has no tokens at all.
    return jnp.sum(rows * weights, axis=1) / jnp.maximum(jnp.sum(weights, axis=1), 1)


def pooled_rows(spec: Spec) -> tuple[int, ...] | None:
    """The rows that `encode_pooled` reads, to give to `stem`."""
    return CLASS_TOKEN if spec.pooling == "first" else None


def prefix(
    backbone: Backbone, inputs: Raw | Tokens, stop_block: int, *, compute_dtype=jnp.float32
) -> Tokens:
    """The residual stream before block `stop_block`, of the frozen model.

    It does not depend on adapters whose `first_block` is `stop_block` or later, so it can be
    computed once for each input and kept; `encode` continues from it.
    """
    params, spec = backbone.params, backbone.spec
    if not 0 <= stop_block < spec.depth:
        raise ConfigError(f"stop_block: expected 0 to {spec.depth - 1}, found {stop_block}")
    tokens = embed(backbone, inputs, compute_dtype=compute_dtype)
    x, _ = _run(params, spec, tokens, stop_block, None, None, None, compute_dtype)
    return Tokens(x, tokens.mask, stop_block)


def stem(
    backbone: Backbone,
    inputs: Raw | Tokens,
    first_block: int,
    *,
    rows: Sequence[int] | None = CLASS_TOKEN,
    compute_dtype=jnp.float32,
) -> Stem:
    """What all adapters share of these inputs, up to where one adds in block `first_block`.

    `rows` are those that `encode` will be asked for; they matter if that is the last block.
    """
    tokens = prefix(backbone, inputs, first_block, compute_dtype=compute_dtype)
    in_last = first_block == backbone.spec.depth - 1
    result, _ = _block_stem(
        block_at(backbone.params, first_block),
        backbone.spec,
        tokens.stream,
        tokens.mask,
        None,
        _positions(rows, tokens) if in_last else None,
        compute_dtype,
    )
    chosen = tuple(rows) if in_last and rows is not None else None
    return result.replace(mask=tokens.mask, block=first_block, rows=chosen)


def _encode_from_stem(backbone, stem, inserts, rows, *, dropout_key, compute_dtype):
    """`encode` from a `Stem`."""
    params, spec, first = backbone.params, backbone.spec, stem.block
    if inserts is not None and (inserts.attention or num_added(inserts)):
        raise ConfigError(
            "inserts: expected adapters only, since they alone share a stem, found other inserts; "
            "start from the inputs instead"
        )
    early, last_adapter, adapter_spec = split_adapter(inserts, spec)
    if adapter_spec is not None and adapter_spec.first_block != first:
        raise ConfigError(
            f"adapter.first_block: expected {first}, the block of the stem, found "
            f"{adapter_spec.first_block}"
        )
    in_last, p, normed = first == spec.depth - 1, block_at(params, first), None
    chosen = rows if rows is None else tuple(rows)
    if in_last and chosen != stem.rows:
        raise ConfigError(f"rows: expected {stem.rows}, those of the stem, found {chosen}")
    adapter = None
    if adapter_spec is not None:
        adapter = last_adapter if in_last else jax.tree.map(lambda a: a[0], early)
        if adapter_spec.input == "norm":
            normed = stem.residual
            normed = normed if spec.post_norm else layer_norm(p["norm2"], normed, spec.eps)
    dropout = dropout_factors(inserts, dropout_key, compute_dtype, first, stem.residual.shape[1])
    x, observed = _block_output(
        p, spec, stem, normed, adapter, adapter_spec, dropout, compute_dtype
    )
    observed = _of_one_block(observed)
    if in_last:
        return _last_norm(backbone, x), observed
    if adapter_spec is not None:
        inserts = inserts.replace(
            adapter=jax.tree.map(lambda a: a[1:], inserts.adapter),
            adapter_spec=dataclasses.replace(adapter_spec, first_block=first + 1),
        )
    tokens = Tokens(x, stem.mask, first + 1)
    options = {"rows": rows, "dropout_key": dropout_key, "compute_dtype": compute_dtype}
    rest, observed_later = encode_observed(backbone, tokens, inserts, **options)
    return rest, _stacked([observed, observed_later])


def encode_all(
    backbone: Backbone,
    inputs: Raw | Tokens,
    inserts: Inserts | None = None,
    *,
    dropout_key: jax.Array | None = None,
    compute_dtype=jnp.float32,
) -> list[jax.Array]:
    """Every intermediate result; slower than `encode`.

    Returns:
        L + 2 arrays [B, N, D]: after the embedding, after each block, after the last LayerNorm
        (the rows of a prompt follow the input's own, inserted tokens are the last).
    """
    params, spec = backbone.params, backbone.spec
    early, last_adapter, adapter_spec = split_adapter(inserts, spec)
    adapters = [None] * spec.depth
    if adapter_spec is not None:
        adapters[adapter_spec.first_block :] = [*split_blocks(early), last_adapter]
    inserted = attention_inserts(inserts, spec) or [None] * spec.depth
    tokens = with_added(inserts, embed(backbone, inputs, inserts, compute_dtype=compute_dtype))
    x = tokens.stream
    results = [x]
    for index, adapter in enumerate(adapters):
        dropout = None
        if adapter is not None:
            dropout = dropout_factors(inserts, dropout_key, compute_dtype, index, x.shape[1])
        x = block(
            block_at(params, index),
            spec,
            x,
            token_mask=tokens.mask,
            adapter=adapter,
            adapter_spec=adapter_spec,
            dropout=dropout,
            attention_insert=inserted[index],
            compute_dtype=compute_dtype,
        )
        results.append(x)
    return [*results, _last_norm(backbone, x)]


def _last_norm(backbone, x):
    """The LayerNorm after the last block; nothing for post-norm blocks, which end in one."""
    spec = backbone.spec
    return x if spec.post_norm else layer_norm(backbone.params["norm"], x, spec.eps)


def _of_one_block(observed):
    """What one block's adapter observed, with a leading axis of blocks."""
    return jax.tree.map(lambda a: a[None], observed)


def _stacked(observed):
    """What the adapters of several ranges of blocks observed, along one axis of blocks."""
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *observed)


def _take(x, rows):
    """Rows of x [B, N, D]; None = all."""
    if rows is None:
        return x
    if rows == tuple(range(rows[0], rows[0] + len(rows))):
        return x[:, rows[0] : rows[-1] + 1]
    return jnp.stack([x[:, row] for row in rows], axis=1)


def _positions(rows, tokens, inserts=None):
    """`rows` as indices from 0."""
    count = tokens.stream.shape[1]
    if rows is None:
        return tuple(range(count - num_added(inserts)))
    rows = tuple(rows)
    if not rows or not all(-count <= row < count for row in rows):
        raise ConfigError(f"rows: expected some of {count} tokens, found {rows}")
    return tuple(row % count for row in rows)


def _run(params, spec, tokens, stop, adapters, adapter_spec, mask_of, dtype, inserted=()):
    """(The stream before block `stop`, with the adapters of blocks first_block to L - 2; a list of
    what these observed, each with a leading axis of blocks).
    """
    x, start = tokens.stream, tokens.block
    first = stop if adapter_spec is None else min(adapter_spec.first_block, stop)

    def one(x, index, adapter, insert=None):
        dropout = None
        if adapter is not None:
            dropout = mask_of(index, x.shape[1])
        return _block(
            block_at(params, index),
            x,
            tokens.mask,
            adapter,
            dropout,
            insert,
            spec=spec,
            adapter_spec=adapter_spec,
            rows=None,
            compute_dtype=dtype,
        )

    # Attention inserts differ in shape from block to block, so they are unrolled in both forms.
    if isinstance(params["blocks"], Sequence) or inserted:
        per_block, observed = split_blocks(adapters) if first < stop else [], []
        for index in range(start, stop):
            adapter = per_block[index - first] if index >= first else None
            x, seen = one(x, index, adapter, inserted[index] if inserted else None)
            observed += [_of_one_block(seen)] if index >= first else []
        return x, observed
    # The frozen arrays are indexed, not scanned over, so a range of blocks copies no weights.
    if start < first:
        x, _ = jax.lax.scan(lambda x, i: one(x, i, None), x, jnp.arange(start, first))
    if first == stop:
        return x, []
    x, observed = jax.lax.scan(lambda x, row: one(x, *row), x, (jnp.arange(first, stop), adapters))
    return x, [observed]
