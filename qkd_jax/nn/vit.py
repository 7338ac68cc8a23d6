"""What a vision transformer is made of: its spec and its parameters (`encode.py` runs it).

Parameters are a plain pytree:

    {"patch": {"kernel": [P*P*3, D], "bias"?: [D]},      kernel rows ordered (row, column, channel)
     "class_token": [D], "position": [1+N, D], "pre_norm"?: {"scale", "bias"},
     "blocks": list of L dicts, or one dict of arrays with a leading axis L (see `stack_blocks`),
         {"norm1", "query", "key", "value", "out", "norm2", "fc1", "fc2", "scale1"?, "scale2"?},
     "norm": {"scale", "bias"}}

One description holds ViT and DeiT (AugReg), CLIP and DINOv2.
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
from qkd_jax.nn.layers import ACTIVATIONS, as_row


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

    def __post_init__(self):
        if self.activation not in ACTIVATIONS:
            raise ConfigError(
                f"activation: expected one of {', '.join(sorted(ACTIVATIONS))}, "
                f"found {self.activation!r}"
            )
        if self.width % self.num_heads:
            raise ConfigError(
                f"width: expected a multiple of num_heads={self.num_heads}, found {self.width}"
            )
        if self.image_size < self.patch_size or self.image_size % self.patch_size:
            near = max(1, round(self.image_size / self.patch_size)) * self.patch_size
            raise ConfigError(
                f"image_size: expected a multiple of the patch size {self.patch_size}, found "
                f"{self.image_size}; try {near}"
            )

    @property
    def num_tokens(self) -> int:
        """The class token and the patches of one image."""
        return 1 + (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True)
class Preprocessing:
    """How pixels in [0, 1] become the input: minus mean, divided by std, of each channel (RGB)."""

    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)


@struct.dataclass
class Backbone:
    """A frozen transformer: parameters (pytree) and everything static about it."""

    params: Any
    spec: ViTSpec = struct.field(pytree_node=False)
    preprocessing: Preprocessing = struct.field(pytree_node=False, default=Preprocessing())
    name: str = struct.field(pytree_node=False, default="")


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
        if name == "kernel":
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


def block_at(params: dict, index: int | jax.Array) -> dict:
    """Parameters of one block, from either form; `index` may be traced in the stacked form."""
    blocks = params["blocks"]
    if isinstance(blocks, Sequence):
        return blocks[index]
    return jax.tree.map(
        lambda a: jax.lax.dynamic_index_in_dim(a, index, axis=0, keepdims=False), blocks
    )
