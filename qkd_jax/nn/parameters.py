"""The parameters of a transformer as a pytree: their shapes, and random ones."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qkd_jax.nn.backbone import Spec


def array(*shape: int) -> jax.ShapeDtypeStruct:
    """The shape of one parameter."""
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def dense(fan_in: int, fan_out: int) -> dict:
    """Shapes of a linear layer."""
    return {"kernel": array(fan_in, fan_out), "bias": array(fan_out)}


def norm(width: int) -> dict:
    """Shapes of a LayerNorm."""
    return {"scale": array(width), "bias": array(width)}


def blocks(spec: Spec) -> list[dict]:
    """Shapes of all blocks."""
    width = spec.width
    shapes = {"norm1": norm(width), "norm2": norm(width)}
    shapes |= {name: dense(width, width) for name in ("query", "key", "value", "out")}
    shapes |= {"fc1": dense(width, spec.mlp_width), "fc2": dense(spec.mlp_width, width)}
    if spec.layer_scale:
        shapes |= {"scale1": array(width), "scale2": array(width)}
    return [dict(shapes) for _ in range(spec.depth)]


@partial(jax.jit, static_argnames=("spec", "dtype"))
def init_random(key: jax.Array, spec: Spec, dtype: Any = jnp.float32) -> dict:
    """Random parameters with the shapes of `spec`, for tests and measurements.

    Kernels are normal with standard deviation 1/sqrt(fan in); scales are near 1; every bias,
    token and position is non-zero, so that nothing can be dropped unnoticed.
    """
    paths, treedef = jax.tree_util.tree_flatten_with_path(spec.param_shapes())
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
