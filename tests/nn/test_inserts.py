"""What is inserted in attention, and extra tokens, against a transformer written in plain NumPy.

Both sides compute in float64, so the budget is that of about 1000 sums of terms near 1 at 2e-16:
1e-12 of a feature near 1. The gradient is compared with central differences of the oracle at step
1e-5: truncation 1e-10 and rounding 1e-16 / 1e-5 = 1e-11 of slopes up to 100; bound 1e-7 relative.
"""

import dataclasses
import operator
from math import erf, sqrt
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkd_jax.errors import ConfigError
from qkd_jax.nn.adapters import AdapterSpec, init_adapter
from qkd_jax.nn.backbone import Backbone, stack_blocks
from qkd_jax.nn.encode import CLASS_TOKEN, encode, encode_all, prefix, stem
from qkd_jax.nn.inputs import Raw, Stem, Tokens
from qkd_jax.nn.inserts import Inserts
from qkd_jax.nn.layers import AttentionInsert
from qkd_jax.nn.parameters import init_random
from qkd_jax.nn.vit import ViTSpec

SPEC = ViTSpec(width=12, depth=3, num_heads=2, mlp_width=16, patch_size=4, image_size=8, grid=2)
BATCH = 3
ERF = np.vectorize(erf)


def norm(p, x):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt(x.var(-1, keepdims=True) + SPEC.eps) * p["scale"] + p["bias"]


def one_head(q, k, v):
    weights = q @ k.T / sqrt(q.shape[-1])
    weights = np.exp(weights - weights.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ v


def rows_of(array, image):
    """What image number `image` gets of an array for each image, or for all."""
    return array[image] if array.ndim == 3 else array


def attended(p, insert, x, image):
    """Attention of every token of one image, x [N, D] normalised, written head by head."""
    q, k, v = (x @ p[n]["kernel"] + p[n]["bias"] for n in ("query", "key", "value"))
    if insert is not None and insert.lora_key is not None:
        k = k + x @ insert.lora_key["down"] @ insert.lora_key["up"]
        v = v + x @ insert.lora_value["down"] @ insert.lora_value["up"]
    if insert is not None and insert.class_key is not None:
        k = np.vstack([k[:1] + insert.class_key, k[1:]])
        v = np.vstack([v[:1] + insert.class_value, v[1:]])
    if insert is not None and insert.prefix_key is not None:
        k = np.vstack([rows_of(insert.prefix_key, image), k])
        v = np.vstack([rows_of(insert.prefix_value, image), v])
    width = SPEC.width // SPEC.num_heads
    heads = [slice(h * width, (h + 1) * width) for h in range(SPEC.num_heads)]
    mixed = np.hstack([one_head(q[:, h], k[:, h], v[:, h]) for h in heads])
    return mixed @ p["out"]["kernel"] + p["out"]["bias"]


def oracle(params, images, inserts):
    """(feature [B, D], last tokens [B, N, D]) of the dense transformer, image by image."""
    features, tokens = [], []
    attention = inserts.attention or (None,) * SPEC.depth
    for number, image in enumerate(images):
        patches = [
            image[4 * i : 4 * i + 4, 4 * j : 4 * j + 4].reshape(-1) for i in (0, 1) for j in (0, 1)
        ]
        embedded = np.array(patches) @ params["patch"]["kernel"] + params["patch"]["bias"]
        x = np.vstack([params["class_token"][None], embedded]) + params["position"]
        if inserts.tokens is not None:
            # In front, as the method describes it; ours stand at the end.
            x = np.vstack([rows_of(inserts.tokens, number), x])
        front = x.shape[0] - SPEC.num_tokens
        for p, insert in zip(params["blocks"], attention, strict=True):
            assert front == 0 or insert is None or insert.class_key is None
            x = x + attended(p, insert, norm(p["norm1"], x), number)
            hidden = norm(p["norm2"], x) @ p["fc1"]["kernel"] + p["fc1"]["bias"]
            hidden = 0.5 * hidden * (1.0 + ERF(hidden / sqrt(2.0)))
            x = x + hidden @ p["fc2"]["kernel"] + p["fc2"]["bias"]
        x = norm(params["norm"], x)
        features.append(x[:front].mean(0) if front else x[0])
        tokens.append(np.vstack([x[front:], x[:front]]))
    return np.array(features), np.array(tokens)


def kinds():
    """One of each kind of insert, in some of the blocks, and several at once."""
    random = np.random.default_rng(0)

    def draw(*shape):
        return 0.7 * random.standard_normal(shape)

    def lora():
        return {"down": draw(SPEC.width, 2), "up": draw(2, SPEC.width)}

    d = SPEC.width
    shared = AttentionInsert(prefix_key=draw(2, d), prefix_value=draw(2, d))
    own = AttentionInsert(prefix_key=draw(BATCH, 3, d), prefix_value=draw(BATCH, 3, d))
    additive = AttentionInsert(class_key=draw(d), class_value=draw(d))
    low_rank = AttentionInsert(lora_key=lora(), lora_value=lora())
    both = AttentionInsert(
        prefix_key=draw(BATCH, 1, d),
        prefix_value=draw(BATCH, 1, d),
        class_key=draw(d),
        class_value=draw(d),
        lora_key=lora(),
        lora_value=lora(),
    )
    return {
        "prefix shared": Inserts(attention=(shared, None, shared)),
        "prefix of each image": Inserts(attention=(None, own, own)),
        "class token": Inserts(attention=(additive, additive, additive)),
        "low rank": Inserts(attention=(low_rank, None, low_rank)),
        "all in one block": Inserts(attention=(None, both, both)),
        "tokens shared": Inserts(tokens=draw(2, d)),
        "tokens of each image, with prefix": Inserts(
            attention=(own, None, low_rank), tokens=draw(BATCH, 2, d)
        ),
    }


KINDS = kinds()


@pytest.fixture(scope="module")
def model():
    """Parameters and images in NumPy float64."""
    with jax.enable_x64(True):
        params = init_random(jax.random.key(0), SPEC, jnp.float64)
        images = jax.random.normal(jax.random.key(1), (BATCH, 8, 8, 3), jnp.float64)
        return jax.tree.map(np.asarray, params), np.asarray(images)


def feature_of(params, spec, images, inserts=None, **options):
    """[B, D]: the class token of normalised images, or the mean of the tokens that were added."""
    added = inserts is not None and inserts.tokens is not None
    rows = range(-inserts.tokens.shape[-2], 0) if added else CLASS_TOKEN
    inputs = images if isinstance(images, Tokens | Stem) else Raw({"image": images})
    return jnp.mean(encode(Backbone(params, spec), inputs, inserts, rows=rows, **options), axis=1)


@pytest.mark.parametrize("kind", KINDS)
def test_features_tokens_and_gradients_equal_a_dense_numpy_transformer(model, kind):
    params, images = model
    inserts = KINDS[kind]
    target = np.random.default_rng(1).standard_normal((BATCH, SPEC.width))

    def through(params, inserts):
        return feature_of(params, SPEC, images, inserts, compute_dtype=jnp.float64)

    def every_way(inserts):
        def loss(inserts):
            listed = through(params, inserts)
            return jnp.sum(jnp.sin(listed) * target), listed

        gradient, listed = jax.grad(loss, has_aux=True)(inserts)
        tokens = encode_all(
            Backbone(params, SPEC), Raw({"image": images}), inserts, compute_dtype=jnp.float64
        )[-1]
        return listed, through(stack_blocks(params), inserts), tokens, gradient

    with jax.enable_x64(True):
        listed, stacked, tokens, gradient = jax.jit(every_way)(inserts)
    expected, expected_tokens = oracle(params, images, inserts)
    assert listed.dtype == np.float64
    assert np.abs(expected - oracle(params, images, Inserts())[0]).max() > 1e-2
    np.testing.assert_allclose(listed, expected, atol=1e-11)
    np.testing.assert_allclose(stacked, expected, atol=1e-11)
    np.testing.assert_allclose(tokens, expected_tokens, atol=1e-11)

    random = np.random.default_rng(2)
    direction = jax.tree.map(lambda a: random.standard_normal(a.shape), inserts)

    def loss(sign):
        moved = jax.tree.map(lambda a, d: a + sign * 1e-5 * d, inserts, direction)
        return np.sum(np.sin(oracle(params, images, moved)[0]) * target)

    leaves = jax.tree.leaves(gradient)
    assert leaves and all(np.isfinite(leaf).all() for leaf in leaves)
    found = sum(np.vdot(g, d) for g, d in zip(leaves, jax.tree.leaves(direction), strict=True))
    np.testing.assert_allclose(found, (loss(1) - loss(-1)) / 2e-5, rtol=1e-7, atol=1e-8)


def test_a_prefix_goes_on_from_kept_tokens(model):
    """Inserts in late blocks only: the blocks before need not run again."""
    params, images = model
    inserts = KINDS["prefix of each image"]

    def both(inserts):
        raw = Raw({"image": images})
        kept = prefix(Backbone(params, SPEC), raw, 1, compute_dtype=jnp.float64)
        return feature_of(params, SPEC, kept, inserts, compute_dtype=jnp.float64)

    with jax.enable_x64(True):
        found = jax.jit(both)(inserts)
    np.testing.assert_allclose(found, oracle(params, images, inserts)[0], atol=1e-11)


def test_an_image_reads_its_own_rows_only(model):
    """Rows of another image's prefix do not reach this one."""
    params, images = model
    inserts = KINDS["prefix of each image"]
    other = jax.tree.map(lambda a: np.concatenate([a[:1], 9.0 + a[1:]]), inserts)
    with jax.enable_x64(True):
        run = jax.jit(lambda i: feature_of(params, SPEC, images, i, compute_dtype=jnp.float64))
        before, after = run(inserts), run(other)
    np.testing.assert_array_equal(before[0], after[0])
    assert np.abs(before[1:] - after[1:]).max() > 1e-3


def test_inserts_that_do_not_fit_are_named(model):
    params, images = jax.tree.map(np.float32, model)
    short = Inserts(attention=(AttentionInsert(class_key=jnp.zeros(12)), None))
    with pytest.raises(ConfigError, match=r"attention inserts: expected 3, .* found 2"):
        feature_of(params, SPEC, images, short)
    with pytest.raises(ConfigError, match=r"attention inserts: .* found 2"):
        encode_all(Backbone(params, SPEC), Raw({"image": images}), short)
    tokens = Inserts(tokens=jnp.zeros((2, 12)))
    with pytest.raises(ConfigError, match="expected block 0 next, found block 1"):
        feature_of(params, SPEC, Tokens(jnp.zeros((BATCH, 5, 12)), block=1), tokens)


STEMS = [("parallel", "residual"), ("parallel", "norm"), ("sequential", "residual")]


@pytest.mark.parametrize("placement, reads", STEMS)
@pytest.mark.parametrize("first_block", range(SPEC.depth))
@pytest.mark.parametrize("form", [dict, pytest.param(stack_blocks, marks=pytest.mark.slow)])
def test_from_the_stem_of_all_adapters_as_from_the_images(placement, reads, first_block, form):
    """float64, the same sums: 1e-12 of features near 1. Dropout masks follow the block's number."""
    settings = AdapterSpec(3, 0.7, 0.4, placement, reads, first_block)
    with jax.enable_x64(True):
        params = form(init_random(jax.random.key(0), SPEC, jnp.float64))
        images = jax.random.normal(jax.random.key(1), (BATCH, 8, 8, 3), jnp.float64)
        adapter = jax.tree.map(
            lambda a: jax.random.normal(jax.random.key(a.size), a.shape, jnp.float64),
            init_adapter(jax.random.key(2), settings, SPEC.width, SPEC.depth),
        )
        options = {"dropout_key": jax.random.split(jax.random.key(3), BATCH)}
        options["compute_dtype"] = jnp.float64
        inserts = Inserts(adapter, settings)
        expected = feature_of(params, SPEC, images, inserts, **options)
        raw = Raw({"image": images})
        kept = stem(Backbone(params, SPEC), raw, first_block, compute_dtype=jnp.float64)
        found = feature_of(params, SPEC, kept, inserts, **options)
        frozen = feature_of(params, SPEC, images, compute_dtype=jnp.float64)
        unadapted = feature_of(params, SPEC, kept, compute_dtype=jnp.float64)
    np.testing.assert_allclose(found, expected, atol=1e-12)
    np.testing.assert_allclose(unadapted, frozen, atol=1e-12)
    assert np.abs(expected - frozen).max() > 1e-3


@pytest.mark.parametrize("rows", [(0,), (0, -1), (-2, -1), (3, 0), tuple(range(7))])
def test_the_rows_that_are_asked_for(model, rows):
    """A token that was added stands beside the class token; which of them is read is free."""
    params, images = model
    inserts = KINDS["tokens shared"]
    options = {"rows": rows, "compute_dtype": jnp.float64}
    with jax.enable_x64(True):
        backbone, raw = Backbone(params, SPEC), Raw({"image": images})
        found = jax.jit(lambda i: encode(backbone, raw, i, **options))(inserts)
    np.testing.assert_allclose(found, oracle(params, images, inserts)[1][:, rows], atol=1e-11)


@pytest.mark.parametrize("kind", ["prefix of each image", "tokens shared"])
def test_padding_is_not_attended_to(model, kind):
    """Tokens of 3 and of 5 real rows give what each gives alone, whatever stands in the padding."""
    params, inserts = model[0], KINDS[kind]
    stream = np.random.default_rng(2).standard_normal((BATCH, 5, SPEC.width))
    lengths = np.array([3, 5, 3])
    mask = np.arange(5)[None, :] < lengths[:, None]

    def of(stream, mask, inserts):
        tokens = Tokens(jnp.asarray(stream), None if mask is None else jnp.asarray(mask))
        return feature_of(params, SPEC, tokens, inserts, compute_dtype=jnp.float64)

    with jax.enable_x64(True):
        found = of(stream, mask, inserts)
        other = of(np.where(mask[:, :, None], stream, 1e3), mask, inserts)
        careless = of(stream, None, inserts)
        for number, length in enumerate(lengths):
            one = jax.tree.map(lambda a, n=number: a[n : n + 1] if a.ndim == 3 else a, inserts)
            alone = of(stream[number : number + 1, :length], None, one)
            np.testing.assert_allclose(found[number], alone[0], atol=1e-12)
    np.testing.assert_array_equal(found, other)
    assert np.abs(found - careless)[0].max() > 1e-3


@dataclasses.dataclass(frozen=True)
class PostNormSpec(ViTSpec):
    """Blocks as BERT's: a LayerNorm after each sum, none at the end."""

    post_norm: ClassVar[bool] = True


@pytest.mark.parametrize("placement, reads", STEMS)
@pytest.mark.parametrize("first_block", [0, 2])
def test_post_norm_blocks_equal_a_dense_numpy_transformer(placement, reads, first_block):
    """LN1(x + attention(x)), then LN2(x + MLP(x) + adapter), also from the stem."""
    spec = PostNormSpec(*dataclasses.astuple(SPEC))
    settings = AdapterSpec(3, 0.7, 0.0, placement, reads, first_block)
    with jax.enable_x64(True):
        params = init_random(jax.random.key(0), spec, jnp.float64)
        adapter = jax.tree.map(
            lambda a: jax.random.normal(jax.random.key(a.size), a.shape, jnp.float64),
            init_adapter(jax.random.key(2), settings, SPEC.width, SPEC.depth),
        )
        stream = jax.random.normal(jax.random.key(1), (BATCH, 5, SPEC.width), jnp.float64)
        inserts, options = Inserts(adapter, settings), {"compute_dtype": jnp.float64}
        found = feature_of(params, spec, Tokens(stream), inserts, **options)
        kept = stem(Backbone(params, spec), Tokens(stream), first_block, **options)
        from_stem = feature_of(params, spec, kept, inserts, **options)
    params, adapter, streams = jax.tree.map(np.asarray, (params, adapter, stream))
    for number, x in enumerate(streams):
        for index, p in enumerate(params["blocks"]):
            x = norm(p["norm1"], x + attended(p, None, x, number))
            hidden = x @ p["fc1"]["kernel"] + p["fc1"]["bias"]
            hidden = 0.5 * hidden * (1.0 + ERF(hidden / sqrt(2.0)))
            mlp = hidden @ p["fc2"]["kernel"] + p["fc2"]["bias"]
            added = 0.0
            if index >= first_block:
                own = jax.tree.map(operator.itemgetter(index - first_block), adapter)
                down, up = own["down"], own["up"]
                inner = (mlp if placement == "sequential" else x) @ down["kernel"] + down["bias"]
                added = 0.7 * (np.maximum(inner, 0) @ up["kernel"] + up["bias"])
            x = norm(p["norm2"], x + mlp + added)
        np.testing.assert_allclose(found[number], x[0], atol=1e-11)
        np.testing.assert_allclose(from_stem[number], x[0], atol=1e-11)
