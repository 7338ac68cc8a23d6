"""Arrays of the reference repositories, as this package holds them."""

from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkd_jax.nn.backbone import Backbone
from qkd_jax.nn.vit import ViTSpec

# Names of a block's parts here and in the reference repositories.
PARTS = {
    "norm1": "norm1",
    "query": "attn.q_proj",
    "key": "attn.k_proj",
    "value": "attn.v_proj",
    "out": "attn.proj",
    "norm2": "norm2",
    "fc1": "fc1",
    "fc2": "fc2",
}


def linear_of(arrays, prefix):
    """torch keeps weights as [out, in]; here kernels are [in, out]."""
    weight, bias = arrays[f"{prefix}.weight"], arrays[f"{prefix}.bias"]
    return {"kernel": jnp.asarray(weight.swapaxes(-1, -2)), "bias": jnp.asarray(bias)}


def norm_of(arrays, prefix):
    scale, bias = arrays[f"{prefix}.weight"], arrays[f"{prefix}.bias"]
    return {"scale": jnp.asarray(scale), "bias": jnp.asarray(bias)}


def adapter_of(arrays, prefix):
    """An adapter set from `<prefix>/down_proj.weight` and so on."""
    return {name: linear_of(arrays, f"{prefix}/{name}_proj") for name in ("down", "up")}


def backbone_of(arrays, num_heads=2, image_size=8):
    """A `Backbone` from `vit/<name>` and `blocks/<name>`, the latter with a leading block axis."""
    depth, mlp_width, width = arrays["blocks/fc1.weight"].shape
    patch = arrays["vit/patch_embed.proj.weight"]
    side = patch.shape[-1]
    stacked = {
        ours: (norm_of if "norm" in ours else linear_of)(arrays, f"blocks/{theirs}")
        for ours, theirs in PARTS.items()
    }
    params = {
        "patch": {
            "kernel": jnp.asarray(patch.transpose(2, 3, 1, 0).reshape(-1, width)),
            "bias": jnp.asarray(arrays["vit/patch_embed.proj.bias"]),
        },
        "class_token": jnp.asarray(arrays["vit/cls_token"][0, 0]),
        "position": jnp.asarray(arrays["vit/pos_embed"][0]),
        "blocks": [jax.tree.map(lambda a, i=i: a[i], stacked) for i in range(depth)],
        "norm": norm_of(arrays, "vit/norm"),
    }
    grid = image_size // side
    return Backbone(params, ViTSpec(width, depth, num_heads, mlp_width, side, image_size, grid))


@pytest.fixture(scope="session")
def golden(tiny):
    """name -> arrays of golden/<name>.npz, and the transformer and adapters in them."""

    def load(name):
        with np.load(Path(__file__).parent / "golden" / f"{name}.npz") as stored:
            arrays = dict(stored)
        return SimpleNamespace(
            arrays=arrays,
            config=tiny.config_of,
            backbone=backbone_of(arrays),
            adapter=lambda prefix: adapter_of(arrays, prefix),
        )

    return load
