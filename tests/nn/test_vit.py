"""The transformer against an independent implementation (golden arrays of timm) and itself."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from qkd_jax.errors import ConfigError
from qkd_jax.nn.adapters import AdapterSpec, init_adapter
from qkd_jax.nn.backbone import Backbone, stack_blocks
from qkd_jax.nn.encode import CLASS_TOKEN, block, encode, encode_all, prefix
from qkd_jax.nn.inputs import Raw, Stem, Tokens
from qkd_jax.nn.inserts import Inserts
from qkd_jax.nn.layers import ACTIVATIONS, layer_norm, matmul_trainable, standardize
from qkd_jax.nn.parameters import init_random
from qkd_jax.nn.pixels import Preprocessing, normalize
from qkd_jax.nn.positions import resample_positions
from qkd_jax.nn.vit import ViTSpec
from qkd_jax.weights.load import assemble

GOLDEN = Path(__file__).parent.parent / "golden"
SMALL = dict(width=24, depth=3, num_heads=3, mlp_width=48, patch_size=4, image_size=12, grid=3)
SPECS = {
    "augreg": ViTSpec(**SMALL),
    "clip": ViTSpec(**SMALL, activation="quick_gelu", eps=1e-5, pre_norm=True, patch_bias=False),
    "dinov2": ViTSpec(**SMALL, layer_scale=True),
}
VARIANTS = sorted(SPECS)


def golden(variant):
    """(parameters, expected arrays) of one variant; the weights come through the timm key map."""
    arrays = load_file(GOLDEN / f"vit_{variant}.safetensors")
    expected = {k.removeprefix("golden."): v for k, v in arrays.items() if k.startswith("golden.")}
    weights = {k: v for k, v in arrays.items() if not k.startswith("golden.")}
    return assemble(weights, "timm_safetensors", SPECS[variant], variant), expected


def relative(found, expected):
    """Largest error in units of the largest expected value."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    return np.abs(found - expected).max() / np.abs(expected).max()


def trained_inserts(key, spec, **settings):
    """Adapters that are not zero anywhere."""
    adapter_spec = AdapterSpec(bottleneck=5, scale=0.7, **settings)
    adapter = init_adapter(key, adapter_spec, spec.width, spec.depth)
    adapter = jax.tree.map(
        lambda a: a + 0.3 * jax.random.normal(jax.random.fold_in(key, a.size), a.shape, a.dtype),
        adapter,
    )
    return Inserts(adapter=adapter, adapter_spec=adapter_spec)


def feature_of(params, spec, images, inserts=None, **options):
    """[B, D]: the class token of normalised images, or the mean of the tokens that were added."""
    added = inserts is not None and inserts.tokens is not None
    rows = range(-inserts.tokens.shape[-2], 0) if added else CLASS_TOKEN
    inputs = images if isinstance(images, Tokens | Stem) else Raw({"image": images})
    return jnp.mean(encode(Backbone(params, spec), inputs, inserts, rows=rows, **options), axis=1)


def random_images(key, spec, batch=4):
    return jax.random.normal(key, (batch, spec.image_size, spec.image_size, 3), jnp.float32)


@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_timm_block_by_block(variant):
    # Budget: float32 sums of at most 48 terms (6e-8 * 7) in about 10 places make 5e-6.
    params, expected = golden(variant)
    spec = SPECS[variant]
    results = jax.jit(lambda x: encode_all(Backbone(params, spec), Raw({"image": x})))(
        expected["images"]
    )
    for index in range(spec.depth):
        assert relative(results[1 + index], expected[f"block.{index}"]) < 1e-5
    assert relative(results[-1], expected["tokens"]) < 1e-5


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_feature_equals_timm_in_both_forms(variant, stacked):
    params, expected = golden(variant)
    if stacked:
        params = stack_blocks(jax.tree.map(jnp.asarray, params))
    feature = jax.jit(lambda x: feature_of(params, SPECS[variant], x))(expected["images"])
    assert feature.dtype == jnp.float32
    assert relative(feature, expected["feature"]) < 1e-5


@pytest.mark.parametrize(("old", "new"), [(14, 6), (14, 9), (6, 14), (7, 5), (3, 4), (37, 16)])
@pytest.mark.parametrize("form", ["antialias", "plain"])
def test_positions_equal_torch(old, new, form):
    # torch computes the weights and both passes in float32: 16 terms of order 1.
    with np.load(GOLDEN / "positions.npz") as arrays:
        position, expected = arrays[f"{old}/position"], arrays[f"{old}/{new}/{form}"]
    found = resample_positions(position, old, new, antialias=form == "antialias")
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=5e-6)
    np.testing.assert_array_equal(found[0], position[0])


def test_positions_unchanged_at_the_same_grid_and_refused_for_a_wrong_one():
    position = np.arange(20, dtype=np.float32).reshape(10, 2)
    np.testing.assert_array_equal(resample_positions(position, 3, 3), position)
    with pytest.raises(ConfigError, match="expected 17 rows for a 4 x 4 grid, found 10"):
        resample_positions(position, 4, 3)


@pytest.mark.parametrize(
    ("variant", "first_block"),
    [
        ("augreg", 0),
        *(pytest.param(*form, marks=pytest.mark.slow) for form in (("clip", 1), ("dinov2", 2))),
    ],
)
def test_all_ways_through_the_model_agree(key, variant, first_block):
    # The same maths in another order of float32 sums; features are of order 1.
    spec = SPECS[variant]
    listed = init_random(key, spec)
    images = random_images(jax.random.fold_in(key, 1), spec)
    inserts = trained_inserts(jax.random.fold_in(key, 2), spec, first_block=first_block)
    keys = jax.random.split(jax.random.fold_in(key, 3), 4)

    @jax.jit
    def every_way(params):
        found = {"whole": feature_of(params, spec, images, inserts, dropout_key=keys)}
        backbone, raw = Backbone(params, spec), Raw({"image": images})
        for cut in {0, first_block}:
            tokens = prefix(backbone, raw, cut)
            found[f"cut {cut}"] = feature_of(params, spec, tokens, inserts, dropout_key=keys)
        tokens = encode_all(backbone, raw, inserts, dropout_key=keys)[-1]
        found["every token"] = tokens[:, 0]
        found["frozen"] = feature_of(params, spec, images)
        return found

    results = every_way(listed)
    frozen, whole = results.pop("frozen"), results["whole"]
    assert np.abs(whole - frozen).max() > 0.1
    scanned = every_way(stack_blocks(listed))
    np.testing.assert_allclose(scanned.pop("frozen"), frozen, atol=5e-6)
    assert len(results) == len(scanned) == 3 + (first_block > 0)
    for result in (*results.values(), *scanned.values()):
        np.testing.assert_allclose(result, whole, atol=5e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_block_asked_for_one_token_gives_row_zero_of_the_full_block(key, variant):
    spec = SPECS[variant]
    params = init_random(key, spec)["blocks"][0]
    x = jax.random.normal(key, (2, spec.num_tokens, spec.width))
    np.testing.assert_allclose(
        block(params, spec, x, rows=(0,))[:, 0], block(params, spec, x)[:, 0], atol=5e-6
    )


@pytest.mark.parametrize(
    ("variant", "placement"),
    [("augreg", "parallel"), ("clip", "sequential"), ("dinov2", "parallel")],
)
def test_a_new_adapter_changes_no_bit(key, variant, placement):
    spec = SPECS[variant]
    params = init_random(key, spec)
    adapter_spec = AdapterSpec(bottleneck=5, placement=placement)
    adapter = init_adapter(jax.random.fold_in(key, 1), adapter_spec, spec.width, spec.depth)
    images = random_images(jax.random.fold_in(key, 2), spec, 2)
    # Operation by operation the adapter adds an exact zero to each block.
    with jax.disable_jit():
        frozen = feature_of(params, spec, images)
        adapted = feature_of(params, spec, images, Inserts(adapter, adapter_spec))
    np.testing.assert_array_equal(adapted, frozen)
    # One compiled program: nothing of `down` reaches the feature while `up` is zero.
    run = jax.jit(lambda x, a: feature_of(params, spec, x, Inserts(a, adapter_spec)))
    other = {**adapter, "down": jax.tree.map(lambda a: 3.0 - a, adapter["down"])}
    adapted = run(images, adapter)
    np.testing.assert_array_equal(run(images, other), adapted)
    # Two compiled programs: the compiler may fuse the same sums differently (a few last bits).
    compiled = jax.jit(lambda x: feature_of(params, spec, x))(images)
    np.testing.assert_allclose(adapted, compiled, atol=3e-6)


@pytest.mark.parametrize(
    ("variant", "stacked"),
    [("clip", True), pytest.param("dinov2", False, marks=pytest.mark.slow)],
)
def test_gradient_equals_finite_differences(variant, stacked):
    # Central differences with step 1e-5 in float64: truncation 1e-10, rounding 1e-11.
    with jax.enable_x64(True):
        key = jax.random.key(4)
        spec = SPECS[variant]
        params = init_random(key, spec, jnp.float64)
        params = stack_blocks(params) if stacked else params
        images = random_images(jax.random.fold_in(key, 1), spec, 2).astype(jnp.float64)
        inserts = trained_inserts(jax.random.fold_in(key, 2), spec, first_block=1)
        inserts = jax.tree.map(lambda a: a.astype(jnp.float64), inserts)
        keys = jax.random.split(jax.random.fold_in(key, 3), 2)
        target = jax.random.normal(jax.random.fold_in(key, 5), (2, spec.width), jnp.float64)

        @jax.jit
        def loss(inserts):
            feature = feature_of(
                params, spec, images, inserts, dropout_key=keys, compute_dtype=jnp.float64
            )
            assert feature.dtype == jnp.float64
            return jnp.sum(jnp.sin(feature) * target)

        gradient = jax.jit(jax.grad(loss))(inserts)
        step = 1e-5
        for seed in range(3):
            direction = jax.tree.map(
                lambda a, s=seed: jax.random.normal(jax.random.key(a.size + s), a.shape, a.dtype),
                inserts,
            )
            moved = [
                loss(jax.tree.map(lambda a, d, s=sign: a + s * step * d, inserts, direction))
                for sign in (1, -1)
            ]
            expected = (moved[0] - moved[1]) / (2 * step)
            found = sum(
                jnp.vdot(g, d)
                for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True)
            )
            np.testing.assert_allclose(found, expected, rtol=1e-7)


def test_list_and_scan_gradients_agree(key):
    spec = SPECS["augreg"]
    params = init_random(key, spec)
    images = random_images(key, spec)
    inserts = trained_inserts(key, spec, first_block=1)

    def gradient(params):
        return jax.jit(jax.grad(lambda i: jnp.sum(feature_of(params, spec, images, i)[:, 0] ** 3)))(
            inserts
        )

    listed, scanned = gradient(params), gradient(stack_blocks(params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), listed, scanned)


def _flops(function, *arguments):
    return jax.jit(function).lower(*arguments).cost_analysis()["flops"]


def test_nothing_below_the_first_adapter_and_no_frozen_weight_is_differentiated(key):
    """FLOPs of a step = forward + products with activations above the first adapter only."""
    spec = ViTSpec(
        width=32, depth=6, num_heads=2, mlp_width=128, patch_size=4, image_size=16, grid=4
    )
    params = init_random(key, spec)
    images = random_images(key, spec)
    inserts = {f: trained_inserts(key, spec, first_block=f) for f in (0, 3)}

    def forward(inserts, params):
        return jnp.sum(feature_of(params, spec, images, inserts))

    cost = {f: _flops(forward, inserts[f], params) for f in (0, 3)}
    step = {f: _flops(jax.value_and_grad(forward), inserts[f], params) for f in (0, 3)}
    everything = _flops(jax.value_and_grad(forward, argnums=(0, 1)), inserts[0], params)
    # With frozen weights the backward pass is about one forward pass; with their gradients, two.
    assert step[0] < 2.35 * cost[0]
    assert everything > 2.7 * cost[0]
    # Three of six blocks lie below: their share of the backward pass is gone.
    backward = {f: step[f] - cost[f] for f in (0, 3)}
    assert backward[3] < 0.6 * backward[0]


def test_frozen_weights_get_right_gradients_when_somebody_asks(key):
    # The hand-written derivatives must not hide gradients: compare a LayerNorm scale with autodiff
    # of the plain formula.
    x = jax.random.normal(key, (3, 5, 8))
    params = {"scale": jnp.linspace(0.5, 2.0, 8), "bias": jnp.linspace(-1.0, 1.0, 8)}

    def plain(params, x):
        mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        y = (x - mean) / jnp.sqrt(variance + 1e-6)
        return y * params["scale"].reshape(1, 1, 8) + params["bias"].reshape(1, 1, 8)

    def total(function):
        loss = jax.grad(lambda p, x: jnp.sum(jnp.sin(function(p, x))), argnums=(0, 1))
        return jax.jit(loss)(params, x)

    found, expected = total(lambda p, x: layer_norm(p, x, 1e-6)), total(plain)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-6), found, expected)


def test_standardize_survives_a_large_offset(key):
    # A one-pass variance loses all digits: (1e4)^2 is rounded to steps of 8, the variance is 1.
    x = jax.random.normal(key, (4, 64))
    shifted = x + 1e4
    exact = np.asarray(shifted, np.float64)
    exact = (exact - exact.mean(-1, keepdims=True)) / exact.std(-1, keepdims=True)
    # Budget: 64 values of 1e4 sum to 6.4e5, where float32 steps are 0.06: 1e-3 of the mean for each
    # of a few roundings.
    np.testing.assert_allclose(standardize(shifted, 0.0), exact, atol=5e-3)


@pytest.mark.parametrize("eps", [1e-5, 1e-6])
def test_the_last_layer_norm_has_the_eps_of_the_spec(eps):
    """On a residual stream of variance 1e-5, which eps changes by a good part."""
    spec = ViTSpec(**SMALL, eps=eps)
    silent = jax.tree.map(lambda a: jnp.zeros(a.shape), spec.param_shapes())  # x goes through
    silent["norm"]["scale"] = jnp.ones(spec.width)
    x = 0.003 * np.random.default_rng(0).normal(size=(2, 10, 24))
    found = encode(Backbone(silent, spec), Tokens(jnp.float32(x)))[:, 0]
    centred = x[:, 0] - x[:, 0].mean(-1, keepdims=True)
    expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps)
    assert relative(found, expected) < 1e-5


def test_activations_and_their_slopes_are_the_textbooks():
    """Oracle: Phi from the C library's erf, in float64; float32 errs by 1e-6 of values up to 12."""
    x = np.concatenate([np.linspace(-12, 12, 2001), [-80.0, 80.0]])
    phi = np.array([0.5 * (1 + math.erf(v / math.sqrt(2))) for v in x])
    sigmoid = 0.5 * (1 + np.tanh(0.851 * x))
    density = np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)
    expected = {
        "gelu": (x * phi, phi + x * density),
        "quick_gelu": (x * sigmoid, sigmoid * (1 + 1.702 * x * (1 - sigmoid))),
    }
    for name, (value, slope) in expected.items():
        found = jax.vmap(jax.value_and_grad(ACTIVATIONS[name]))(jnp.asarray(x, jnp.float32))
        np.testing.assert_allclose(found[0], value, rtol=1e-6, atol=2e-6)
        np.testing.assert_allclose(found[1], slope, rtol=1e-6, atol=2e-6)


def test_trainable_product_has_the_plain_gradient(key):
    x, w = jax.random.normal(key, (2, 3, 5)), jax.random.normal(key, (5, 4))
    found = jax.grad(lambda x, w: jnp.sum(jnp.sin(matmul_trainable(x, w))), (0, 1))(x, w)
    expected = jax.grad(lambda x, w: jnp.sum(jnp.sin(x @ w)), (0, 1))(x, w)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_bfloat16_products_stay_close(variant):
    # Rounding to 8 bits (2^-9 relative) in about 8 products a block and 3 blocks, adding as a
    # random walk: 2^-9 * sqrt(24) = 1e-2 of the feature's size; bound 3e-2 on the largest error.
    params, expected = golden(variant)
    feature = jax.jit(lambda x: feature_of(params, SPECS[variant], x, compute_dtype=jnp.bfloat16))(
        expected["images"]
    )
    assert feature.dtype == jnp.float32
    error = relative(feature, expected["feature"])
    assert 1e-5 < error < 3e-2


def test_an_image_does_not_see_its_batch(key):
    spec = SPECS["clip"]
    params = init_random(key, spec)
    inserts = trained_inserts(key, spec)
    images = random_images(key, spec)
    keys = jax.random.split(key, 4)
    run = jax.jit(lambda x, k: feature_of(params, spec, x, inserts, dropout_key=k))
    whole = run(images, keys)
    order = np.array([2, 0, 3, 1])
    np.testing.assert_allclose(run(images[order], keys[order]), whole[order], atol=5e-6)
    halves = [run(images[:2], keys[:2]), run(images[2:], keys[2:])]
    np.testing.assert_allclose(np.concatenate(halves), whole, atol=5e-6)
    others_changed = images.at[1:].set(-100.0)
    np.testing.assert_allclose(run(others_changed, keys)[0], whole[0], atol=5e-6)


def test_gradients_on_eight_devices_equal_one(key):
    spec = SPECS["augreg"]
    params = stack_blocks(init_random(key, spec))
    inserts = trained_inserts(key, spec)
    images = random_images(key, spec, 16)
    keys = jax.random.split(key, 16)

    def loss(inserts, images, keys):
        return jnp.mean(feature_of(params, spec, images, inserts, dropout_key=keys)[:, 0] ** 3)

    def step(inserts, images, keys):
        return jax.lax.pmean(jax.grad(loss)(inserts, images, keys), "data")

    expected = jax.jit(jax.grad(loss))(inserts, images, keys)
    found = jax.pmap(step, axis_name="data", in_axes=(None, 0, 0), out_axes=None)(
        inserts, images.reshape(8, 2, *images.shape[1:]), keys.reshape(8, 2)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), found, expected)


def test_param_shapes_describe_the_parameters(key):
    for spec in SPECS.values():
        params = init_random(key, spec)
        assert jax.tree.map(jnp.shape, params) == jax.tree.map(
            lambda s: s.shape, spec.param_shapes()
        )
    clip = ViTSpec(768, 12, 12, 3072, 16, 224, 14, "quick_gelu", 1e-5, True, False)
    count = sum(np.prod(s.shape) for s in jax.tree.leaves(clip.param_shapes()))
    assert count == 85_799_424


def test_normalize_takes_bytes_and_floats():
    bytes_ = jnp.array([[[[0, 51, 255]]]], jnp.uint8)
    settings = Preprocessing((0.5, 0.2, 0.0), (0.5, 0.1, 2.0))
    expected = np.array([[[[-1.0, 0.0, 0.5]]]])
    np.testing.assert_allclose(normalize(bytes_, settings), expected, atol=1e-6)
    floats = bytes_.astype(jnp.float32) / 255.0
    np.testing.assert_allclose(normalize(floats, settings), expected, atol=1e-6)


def test_wrong_inputs_are_named(key):
    spec = SPECS["augreg"]
    params = init_random(key, spec)
    with pytest.raises(ConfigError, match=r"expected \[B, 12, 12, 3\]"):
        feature_of(params, spec, jnp.zeros((1, 16, 16, 3)))
    with pytest.raises(ConfigError, match=r"position: expected 10 rows.*found 5"):
        feature_of({**params, "position": jnp.zeros((5, 24))}, spec, jnp.zeros((1, 12, 12, 3)))
    with pytest.raises(ConfigError, match="try 12"):
        ViTSpec(**{**SMALL, "image_size": 13})
    with pytest.raises(ConfigError, match="heads"):
        ViTSpec(**{**SMALL, "num_heads": 5})
    with pytest.raises(ConfigError, match="quick_gelu"):
        ViTSpec(**SMALL, activation="relu")
    inserts = trained_inserts(key, spec, first_block=1)
    with pytest.raises(ConfigError, match=r"first_block: expected at least 2.*found 1"):
        feature_of(params, spec, Tokens(jnp.zeros((1, 10, 24)), block=2), inserts)
    with pytest.raises(ConfigError, match=r"rows: expected some of 10 tokens, found \(10,\)"):
        encode(Backbone(params, spec), Tokens(jnp.zeros((1, 10, 24))), rows=(10,))
    with pytest.raises(ConfigError, match=r"first_block: expected 2, the block of the stem"):
        feature_of(params, spec, Stem(*[jnp.zeros((1, 10, 24))] * 2, block=2), inserts)
    with pytest.raises(ConfigError, match=r"adapter: expected 3 blocks, .* found"):
        wrong = Inserts(inserts.adapter, AdapterSpec(bottleneck=5))
        feature_of(params, spec, jnp.zeros((1, 12, 12, 3)), wrong)
    with pytest.raises(ConfigError, match="stop_block"):
        prefix(Backbone(params, spec), Raw({"image": jnp.zeros((1, 12, 12, 3))}), 3)
