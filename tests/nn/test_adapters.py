"""Adapters against a dense float64 NumPy forward of the whole model, and their initialisation."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkd_jax.errors import ConfigError
from qkd_jax.nn.adapters import (
    AdapterSpec,
    apply_adapter,
    dropout_mask,
    init_adapter,
    split_blocks,
)
from qkd_jax.nn.backbone import Backbone
from qkd_jax.nn.encode import encode
from qkd_jax.nn.inputs import Raw
from qkd_jax.nn.inserts import Inserts
from qkd_jax.nn.parameters import init_random
from qkd_jax.nn.vit import ViTSpec
from qkd_jax.settings.config import Config

ERF = np.vectorize(math.erf)
SPECS = {
    "plain": ViTSpec(12, 3, 2, 20, 4, 8, 2),
    "clip": ViTSpec(12, 3, 2, 20, 4, 8, 2, "quick_gelu", 1e-5, True, False),
    "layer_scale": ViTSpec(12, 3, 2, 20, 4, 8, 2, layer_scale=True),
}


def dense_forward(params, spec, images, adapter, adapter_spec, masks):
    """The definition, token by token and head by head, in float64; returns [B, D]."""

    def norm(p, x):
        mean = sum(x) / len(x)
        variance = sum((x - mean) ** 2) / len(x)
        return (x - mean) / math.sqrt(variance + spec.eps) * p["scale"] + p["bias"]

    def dense(p, x):
        return x @ p["kernel"] + p.get("bias", 0.0)

    def activation(x):
        if spec.activation == "quick_gelu":
            return x / (1 + np.exp(-1.702 * x))
        return x * 0.5 * (1 + ERF(x / math.sqrt(2)))

    features = []
    for b, image in enumerate(images):
        side = spec.image_size // spec.patch_size
        tokens = [params["class_token"]]
        for r in range(side):
            for c in range(side):
                rows = slice(r * spec.patch_size, (r + 1) * spec.patch_size)
                columns = slice(c * spec.patch_size, (c + 1) * spec.patch_size)
                tokens.append(dense(params["patch"], image[rows, columns].reshape(-1)))
        x = np.stack(tokens) + params["position"]
        if spec.pre_norm:
            x = np.stack([norm(params["pre_norm"], t) for t in x])
        for i, p in enumerate(params["blocks"]):
            y = np.stack([norm(p["norm1"], t) for t in x])
            q, k, v = (dense(p[name], y) for name in ("query", "key", "value"))
            size = spec.width // spec.num_heads
            mixed = np.zeros_like(x)
            for h in range(spec.num_heads):
                s = slice(h * size, (h + 1) * size)
                weights = np.exp(q[:, s] @ k[:, s].T / math.sqrt(size))
                mixed[:, s] = weights / weights.sum(1, keepdims=True) @ v[:, s]
            x = x + dense(p["out"], mixed) * p.get("scale1", 1.0)
            y = np.stack([norm(p["norm2"], t) for t in x])
            m = dense(p["fc2"], activation(dense(p["fc1"], y))) * p.get("scale2", 1.0)
            out = x + m
            j = i - adapter_spec.first_block
            if j >= 0:
                read = x if adapter_spec.input == "residual" else y
                read = m if adapter_spec.placement == "sequential" else read
                down, up = adapter["down"], adapter["up"]
                hidden = np.maximum(read @ down["kernel"][j] + down["bias"][j], 0) * masks[i][b]
                out = out + adapter_spec.scale * (hidden @ up["kernel"][j] + up["bias"][j])
            x = out
        features.append(norm(params["norm"], x[0]))
    return np.stack(features)


def feature_of(params, spec, images, inserts=None, **options):
    """[B, D]: the class token of normalised images."""
    return encode(Backbone(params, spec), Raw({"image": images}), inserts, **options)[:, 0]


@pytest.mark.parametrize(
    ("placement", "reads", "first_block", "drop"),
    [
        ("parallel", "residual", 0, True),
        ("parallel", "norm", 1, False),
        ("sequential", "residual", 0, True),
        ("parallel", "residual", 2, False),
    ],
)
@pytest.mark.parametrize("variant", sorted(SPECS))
def test_adapted_model_equals_the_dense_definition(
    key, variant, placement, reads, first_block, drop
):
    spec = SPECS[variant]
    settings = AdapterSpec(5, 0.5, 0.4, placement, reads, first_block)
    params = init_random(key, spec)
    adapter = init_adapter(key, settings, spec.width, spec.depth)
    adapter = jax.tree.map(lambda a: a + 0.4 * jax.random.normal(key, a.shape), adapter)
    images = jax.random.normal(key, (2, 8, 8, 3))
    keys = jax.random.split(key, 2) if drop else None
    masks = np.ones((spec.depth, 2, 1, 1))
    if drop:
        masks = [dropout_mask(keys, settings, i, spec.num_tokens) for i in range(spec.depth)]
        assert all((np.asarray(mask) == 0).any() for mask in masks)

    def wide(tree):
        return jax.tree.map(lambda a: np.asarray(a, np.float64), tree)

    expected = dense_forward(wide(params), spec, wide(images), wide(adapter), settings, wide(masks))
    found = jax.jit(
        lambda a: feature_of(params, spec, images, Inserts(a, settings), dropout_key=keys)
    )(adapter)
    # float32 sums of up to 48 terms through three blocks against float64; features of order 1.
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_start_of_training(key):
    settings = AdapterSpec(bottleneck=64)
    adapter = init_adapter(key, settings, 768, 12)
    down = np.asarray(adapter["down"]["kernel"])
    assert down.shape == (12, 768, 64)
    bound = 768**-0.5
    assert np.abs(down).max() <= bound
    # Uniform in (-bound, bound): standard deviation bound / sqrt(3), 590k draws, 5 sigma.
    assert abs(down.std() / (bound / math.sqrt(3)) - 1) < 5 / math.sqrt(down.size)
    assert abs(down.mean()) < 5 * bound / math.sqrt(3 * down.size)
    assert not np.array_equal(down[0], down[1])
    for zero in (adapter["down"]["bias"], adapter["up"]["kernel"], adapter["up"]["bias"]):
        assert not np.asarray(zero).any()
    # A block's start does not depend on how many blocks have adapters.
    late = init_adapter(key, AdapterSpec(bottleneck=64, first_block=6), 768, 12)
    np.testing.assert_array_equal(late["down"]["kernel"], down[6:])


def test_parameter_count():
    adapter = init_adapter(jax.random.key(0), AdapterSpec(bottleneck=64), 768, 12)
    total = sum(leaf.size for leaf in jax.tree.leaves(adapter))
    assert total == 12 * 99_136 == 1_189_632  # 2 D R + R + D per block


def test_dropout_is_per_image_and_unbiased(key):
    settings = AdapterSpec(bottleneck=50, dropout=0.25)
    keys = jax.random.split(key, 6)
    mask = dropout_mask(keys, settings, 3, 40)
    assert set(np.unique(mask)) == {np.float32(0), np.float32(1 / 0.75)}
    # 12,000 draws of variance 1/3: 5 sigma = 0.026.
    assert abs(float(mask.mean()) - 1) < 0.027
    np.testing.assert_array_equal(dropout_mask(keys[2:4], settings, 3, 40), mask[2:4])
    np.testing.assert_array_equal(dropout_mask(keys, settings, 3, 1), mask[:, :1])
    assert not np.array_equal(dropout_mask(keys, settings, 4, 40), mask)


def test_no_dropout_without_keys_or_rate(key):
    spec = SPECS["plain"]
    params, images = init_random(key, spec), jax.random.normal(key, (2, 8, 8, 3))
    adapter = jax.tree.map(
        lambda a: a + 0.4, init_adapter(key, AdapterSpec(5), spec.width, spec.depth)
    )
    adapter["up"]["kernel"] = jax.random.normal(key, adapter["up"]["kernel"].shape)
    keys = jax.random.split(key, 2)

    def run(rate, keys):
        return feature_of(
            params, spec, images, Inserts(adapter, AdapterSpec(5, dropout=rate)), dropout_key=keys
        )

    np.testing.assert_array_equal(run(0.5, None), run(0.0, keys))
    assert not np.array_equal(run(0.5, keys), run(0.5, None))


def test_split_blocks_inverts_stacking_and_its_gradient_is_exact(key):
    adapter = init_adapter(key, AdapterSpec(3), 4, 5)
    parts = split_blocks(adapter)
    assert len(parts) == 5
    jax.tree.map(
        np.testing.assert_array_equal, jax.tree.map(lambda *a: jnp.stack(a), *parts), adapter
    )
    weights = jnp.arange(1.0, 6.0)

    def loss(adapter):
        return sum(
            w * p["down"]["kernel"].sum()
            for w, p in zip(weights, split_blocks(adapter), strict=True)
        )

    gradient = jax.grad(loss)(adapter)["down"]["kernel"]
    np.testing.assert_array_equal(gradient, np.broadcast_to(weights[:, None, None], (5, 4, 3)))
    assert split_blocks(jax.tree.map(lambda a: a[:0], adapter)) == []


def test_apply_adapter_keeps_dtype(key):
    adapter = jax.tree.map(lambda a: a[0], init_adapter(key, AdapterSpec(3), 4, 1))
    out = apply_adapter(adapter, jnp.ones((2, 4), jnp.bfloat16), AdapterSpec(3))
    assert out.dtype == jnp.bfloat16 and out.shape == (2, 4)


@pytest.mark.parametrize(
    "settings",
    [
        {"bottleneck": 0},
        {"dropout": 1.0},
        {"dropout": -0.1},
        {"placement": "before"},
        {"input": "raw"},
        {"placement": "sequential", "input": "norm"},
        {"first_block": -1},
    ],
)
def test_bad_settings_are_refused(settings):
    with pytest.raises(ConfigError, match=r"adapter\."):
        Config(method="finetune").replace(adapter=AdapterSpec(**settings))


def test_first_block_beyond_the_model_is_refused(key):
    with pytest.raises(ConfigError, match="first_block: expected 0 to 2 of 3 blocks, found 3"):
        init_adapter(key, AdapterSpec(first_block=3), 8, 3)
