"""One vision transformer as pure functions: ViT and DeiT (AugReg), CLIP and DINOv2.

Parameters are a plain pytree:

    {"patch": {"kernel": [P*P*3, D], "bias"?: [D]},      kernel rows ordered (row, column, channel)
     "class_token": [D], "position": [1+N, D], "pre_norm"?: {"scale", "bias"},
     "blocks": list of L dicts, or one dict of arrays with a leading axis L (see `stack_blocks`),
         {"norm1", "query", "key", "value", "out", "norm2", "fc1", "fc2", "scale1"?, "scale2"?},
     "norm": {"scale", "bias"}, "projection"?: [D, E]}

A list of blocks is unrolled (fastest on CPU), a stacked dict is scanned (compiles once for all
blocks: TPU and deep models); both run the same `block`. The weights are frozen: callers close over
them or pass them as arguments that are not differentiated.

On TPU, XLA multiplies float32 matrices in bfloat16 passes unless `jax_default_matmul_precision`
says "highest"; parity with the reference implementations holds at that setting.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
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


@dataclass(frozen=True)
class ViTSpec:
    """Static architecture of one vision transformer.

    Attributes:
        width, depth, num_heads, mlp_width: D, L, H and the hidden width of the MLP.
        patch_size: P, pixels.
        image_size: side of the square images it runs at, pixels; a multiple of P.
        grid: side of the position grid in the parameters (image_size / P once loaded).
        activation: "gelu" (exact) or "quick_gelu" (CLIP).
        eps: of every LayerNorm.
        pre_norm: a LayerNorm before block 0 (CLIP).
        patch_bias: the patch projection has a bias (not in CLIP).
        layer_scale: learned factors on both branches of every block (DINOv2).
        projection: E of CLIP's joint embedding, or None. Features are always D wide.
    """

    width: int
    depth: int
    num_heads: int
    mlp_width: int
    patch_size: int
    image_size: int
    grid: int
    activation: Literal["gelu", "quick_gelu"] = "gelu"
    eps: float = 1e-6
    pre_norm: bool = False
    patch_bias: bool = True
    layer_scale: bool = False
    projection: int | None = None

    def __post_init__(self):
        if self.activation not in ACTIVATIONS:
            raise ConfigError(
                f"activation is {self.activation!r}; it must be one of {sorted(ACTIVATIONS)}."
            )
        if self.width % self.num_heads:
            raise ConfigError(f"width {self.width} is not a multiple of {self.num_heads} heads.")
        if self.image_size < self.patch_size or self.image_size % self.patch_size:
            near = max(1, round(self.image_size / self.patch_size)) * self.patch_size
            raise ConfigError(
                f"image_size {self.image_size} is not a multiple of the patch size "
                f"{self.patch_size}; try {near}."
            )

    @property
    def num_tokens(self) -> int:
        """The class token and the patches of one image."""
        return 1 + (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True)
class Preprocessing:
    """How pixels in [0, 1] become the input: resize, crop, subtract mean, divide by std.

    Attributes:
        mean, std: of each channel (RGB).
        interpolation: of the resize, e.g. "bicubic".
        crop_fraction: side of the centre crop over the side of the resized image, for evaluation.
    """

    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    interpolation: str = "bicubic"
    crop_fraction: float = 0.875


@struct.dataclass
class Backbone:
    """A frozen transformer: parameters (pytree) and everything static about it."""

    params: Any
    spec: ViTSpec = struct.field(pytree_node=False)
    preprocessing: Preprocessing = struct.field(pytree_node=False, default=Preprocessing())
    name: str = struct.field(pytree_node=False, default="")


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


def normalize(images: jax.Array, preprocessing: Preprocessing, dtype=jnp.float32) -> jax.Array:
    """Turn pixels into the transformer's input.

    Args:
        images: [B, H, W, 3]; uint8 in 0..255, or floating point in [0, 1].

    Returns:
        [B, H, W, 3] in `dtype`.
    """
    if jnp.issubdtype(images.dtype, jnp.integer):
        images = images.astype(dtype) * jnp.asarray(1.0 / 255.0, dtype)
    images = images.astype(dtype)
    mean = as_row(jnp.asarray(preprocessing.mean, dtype), images)
    std = as_row(jnp.asarray(preprocessing.std, dtype), images)
    return (images - mean) / std


def param_shapes(spec: ViTSpec) -> dict:
    """Shapes of the parameters of `spec`, as a pytree of `jax.ShapeDtypeStruct` in list form."""

    def leaf(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    width = spec.width

    def dense(fan_in, fan_out):
        return {"kernel": leaf(fan_in, fan_out), "bias": leaf(fan_out)}

    def norm():
        return {"scale": leaf(width), "bias": leaf(width)}

    def one_block():
        p = {"norm1": norm(), "norm2": norm()}
        p |= {name: dense(width, width) for name in ("query", "key", "value", "out")}
        p |= {"fc1": dense(width, spec.mlp_width), "fc2": dense(spec.mlp_width, width)}
        if spec.layer_scale:
            p |= {"scale1": leaf(width), "scale2": leaf(width)}
        return p

    patch = dense(spec.patch_size**2 * 3, width)
    if not spec.patch_bias:
        del patch["bias"]
    shapes = {
        "patch": patch,
        "class_token": leaf(width),
        "position": leaf(1 + spec.grid**2, width),
        "blocks": [one_block() for _ in range(spec.depth)],
        "norm": norm(),
    }
    if spec.pre_norm:
        shapes["pre_norm"] = norm()
    if spec.projection is not None:
        shapes["projection"] = leaf(width, spec.projection)
    return shapes


@partial(jax.jit, static_argnames=("spec", "dtype"))
def init_random(key: jax.Array, spec: ViTSpec, dtype=jnp.float32) -> dict:
    """Random parameters with the shapes of `spec`, for tests and measurements.

    Kernels are normal with standard deviation 1/sqrt(fan in); scales are near 1; every bias,
    token and position is non-zero, so that nothing can be dropped unnoticed.
    """
    paths, treedef = jax.tree_util.tree_flatten_with_path(param_shapes(spec))
    sizes = [int(np.prod(shape.shape)) for _, shape in paths]
    noise = jnp.split(jax.random.normal(key, (sum(sizes),), dtype), np.cumsum(sizes)[:-1].tolist())
    leaves = []
    for (path, shape), values in zip(paths, noise, strict=True):
        values, name = values.reshape(shape.shape), path[-1].key
        if name in ("kernel", "projection"):
            leaves.append(values * shape.shape[0] ** -0.5)
        elif name in ("scale", "scale1", "scale2"):
            leaves.append(1.0 + 0.1 * values)
        else:
            leaves.append(0.1 * values)
    return treedef.unflatten(leaves)


def stack_blocks(params: dict) -> dict:
    """Turn the list of blocks into one dict of arrays with a leading axis L (the scanned form)."""
    blocks = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params["blocks"])
    return {**params, "blocks": blocks}


def resample_positions(
    position: jax.Array | np.ndarray, grid: int, new_grid: int, *, antialias: bool = True
) -> np.ndarray:
    """Bicubic resampling of the position grid; done once, when weights are loaded.

    Half-pixel centres; weights beyond the border are dropped and the rest renormalised when
    `antialias` is on (the kernel with a = -0.5, widened when shrinking), or the border is repeated
    (a = -0.75) when it is off. These are the two forms that PyTorch's `interpolate` computes, which
    published checkpoints were resampled with: on for timm's ViTs, off for DINOv2.

    Args:
        position: [1 + grid^2, D], class token first.

    Returns:
        [1 + new_grid^2, D] float32.
    """
    position = np.asarray(position)
    if grid == new_grid:
        return position
    weights = _bicubic_weights(grid, new_grid, antialias)
    tokens, width = position.shape
    if tokens != 1 + grid**2:
        raise ConfigError(f"position has {tokens} rows, but a {grid} x {grid} grid needs more.")
    patches = position[1:].astype(np.float64).reshape(grid, grid, width)
    patches = np.einsum("ai,bj,ijd->abd", weights, weights, patches, optimize=True)
    new = np.concatenate([position[:1], patches.reshape(new_grid**2, width)])
    return new.astype(np.float32)


def _bicubic_weights(size: int, new_size: int, antialias: bool) -> np.ndarray:
    """[new_size, size] interpolation weights, float64; every row sums to one."""
    a = -0.5 if antialias else -0.75
    ratio = size / new_size
    stretch = max(ratio, 1.0) if antialias else 1.0
    weights = np.zeros((new_size, size))
    for row in range(new_size):
        centre = (row + 0.5) * ratio - 0.5
        reach = 2.0 * stretch
        for column in range(int(np.floor(centre - reach)), int(np.ceil(centre + reach)) + 1):
            t = abs(column - centre) / stretch
            if t < 1.0:
                w = (a + 2.0) * t**3 - (a + 3.0) * t**2 + 1.0
            elif t < 2.0:
                w = a * (t**3 - 5.0 * t**2 + 8.0 * t - 4.0)
            else:
                continue
            if antialias and not 0 <= column < size:
                continue
            weights[row, min(max(column, 0), size - 1)] += w
    return weights / weights.sum(axis=1, keepdims=True)


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
            f"images have shape {images.shape}; expected [B, {side}, {side}, 3]. "
            "Resize the images, or load the backbone with another image_size."
        )
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ConfigError(
            f"images are {images.dtype}; expected floating point. Use `normalize` first."
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


def block(
    block_params: dict,
    spec: ViTSpec,
    x: jax.Array,
    *,
    adapter: dict | None = None,
    adapter_spec: AdapterSpec | None = None,
    mask: jax.Array | None = None,
    attention_insert: AttentionInsert | None = None,
    asking: slice | None = None,
    compute_dtype=jnp.float32,
) -> jax.Array:
    """One transformer block: x + attention(LN1(x)), then + MLP(LN2(x)), with optional inserts.

    Args:
        block_params: one entry of `params["blocks"]`.
        x: [B, N, D] residual stream.
        adapter: this block's adapter, or None (see `adapters.apply_adapter`).
        mask: [B, M, R] dropout factors of the adapter, or None.
        attention_insert: this block's, or None.
        asking: return only these M tokens; None is all. Keys and values still come from all tokens,
            so this is exact for a last block and saves nearly all its other work.

    Returns:
        [B, M, D].
    """
    p, wide = block_params, x.dtype
    normed = layer_norm(p["norm1"], x, spec.eps)
    queries_from = normed
    if asking is not None:
        x, queries_from = x[:, asking], normed[:, asking]
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
    out = x + mlp
    if adapter is not None:
        if adapter_spec.placement == "sequential":
            reads = mlp
        else:
            reads = x if adapter_spec.input == "residual" else normed
        delta = apply_adapter(adapter, reads.astype(compute_dtype), adapter_spec, mask)
        out = out + delta.astype(wide)
    return out


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
        raise ConfigError(f"stop_block is {stop_block}; it must be in [0, {spec.depth}).")
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
        raise ConfigError(f"start_block is {start_block}; it must be in [0, {spec.depth}).")
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
        mask=mask_of(last, asking.stop - asking.start),
        attention_insert=inserted[last] if inserted else None,
        asking=asking,
        compute_dtype=compute_dtype,
    )
    return jnp.mean(layer_norm(params["norm"], x, spec.eps), axis=1)


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
        return x, slice(0, 1)
    if start_block != 0:
        raise ConfigError(f"tokens are inserted before block 0, not before block {start_block}.")
    extra = jnp.broadcast_to(
        inserts.tokens.astype(x.dtype), (x.shape[0], *inserts.tokens.shape[-2:])
    )
    return jnp.concatenate([x, extra], axis=1), slice(x.shape[1], x.shape[1] + extra.shape[1])


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


def block_at(params: dict, index: int | jax.Array) -> dict:
    """Parameters of one block, from either form; `index` may be traced in the stacked form."""
    blocks = params["blocks"]
    if isinstance(blocks, Sequence):
        return blocks[index]
    return jax.tree.map(
        lambda a: jax.lax.dynamic_index_in_dim(a, index, axis=0, keepdims=False), blocks
    )


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
