"""The modulated adapter against loops in NumPy float64.

Error budget: products of a few numbers near 1 over sums of at most 12: below 100 eps = 1.2e-5.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkd_jax.nn.adapters import AdapterSpec
from qkd_jax.nn.encode import encode, encode_observed
from qkd_jax.nn.inputs import Raw
from qkd_jax.nn.inserts import Inserts
from qkd_jax.nn.modulated import (
    ModulatedSpec,
    apply_modulated,
    doubts,
    init_codes,
    init_shared,
)

BUDGET = 1.2e-5
SPEC = AdapterSpec(bottleneck=5, scale=0.5)
WIDTH, TOKENS, IMAGES, RANK = 6, 3, 4, 2


def drawn(*shape, seed=0):
    return np.float32(np.random.default_rng([seed, *shape]).normal(size=shape))


def block():
    shapes = {"down": (WIDTH, 5), "mid": (5, 5), "up": (5, WIDTH)}
    return {name: {"kernel": drawn(*shape)} for name, shape in shapes.items()}


def code(*axes):
    shapes = {"diagonal": (5,), "left": (5, RANK), "right": (5, RANK)}
    parts = enumerate(shapes.items())
    return {name: drawn(*axes, *shape, seed=10 + i) for i, (name, shape) in parts}


@pytest.mark.parametrize("axes", [(), (IMAGES,)], ids=["one code", "a code for each image"])
def test_the_formula(axes):
    """act(act(x W_down) W_mid) (Diag(s) + U V^T) W_up, scaled; dropout on z."""
    shared, given, x = block(), code(*axes), drawn(IMAGES, TOKENS, WIDTH)
    mask = np.float32(drawn(IMAGES, TOKENS, 5, seed=3) > 0) * 2
    found = apply_modulated(*jax.tree.map(jnp.asarray, (shared, given, x)), SPEC, jnp.asarray(mask))
    for image in range(IMAGES):
        own = {name: np.float64(a[image] if axes else a) for name, a in given.items()}
        mix = np.diag(own["diagonal"]) + own["left"] @ own["right"].T
        for token in range(TOKENS):
            z = np.maximum(np.float64(x[image, token]) @ shared["down"]["kernel"], 0)
            z = np.maximum(z @ shared["mid"]["kernel"], 0) * mask[image, token]
            expected = 0.5 * z @ mix @ shared["up"]["kernel"]
            np.testing.assert_allclose(found[image, token], expected, atol=10 * BUDGET)


@pytest.mark.parametrize("diagonal", [0.0, 1.0])
def test_a_new_code_has_a_gradient_in_the_diagonal_and_one_factor(key, diagonal):
    """With U = 0, V has none yet; with V = 0 too, neither would ever have one."""
    spec = AdapterSpec(bottleneck=5, first_block=1)
    shared = init_shared(key, spec, WIDTH, depth=3)
    codes = init_codes(key, spec, 3, num_tasks=4, rank=RANK, diagonal=diagonal)
    assert shared["mid"]["kernel"].shape == (2, 5, 5) and codes["left"].shape == (2, 4, 5, RANK)
    one, own = jax.tree.map(lambda a: a[1], shared), jax.tree.map(lambda a: a[1, 2], codes)
    x = jnp.asarray(drawn(IMAGES, TOKENS, WIDTH))

    def total(code):
        return jnp.sum(
            apply_modulated(one, code, x, spec) ** 2 + apply_modulated(one, code, x, spec)
        )

    size = {n: float(jnp.abs(g).max()) for n, g in jax.grad(total)(own).items()}
    assert size["diagonal"] > 0 and size["left"] > 0 and size["right"] == 0
    z = jnp.maximum(jnp.maximum(x @ one["down"]["kernel"], 0) @ one["mid"]["kernel"], 0)
    plain = diagonal * spec.scale * z @ one["up"]["kernel"]
    np.testing.assert_allclose(apply_modulated(one, own, x, spec), plain, atol=BUDGET)


def test_a_block_takes_the_code_of_least_entropy(key):
    """By heads of different sizes on its class token; a task without a class is never chosen."""
    spec = ModulatedSpec(bottleneck=5, head_scale=3.0)
    rows, x = drawn(3, 2, WIDTH, seed=6), drawn(IMAGES, TOKENS, WIDTH, seed=6)
    valid = np.array([[True, True], [False, False], [True, True]])
    found = doubts(jnp.asarray(x[:, 0]), jnp.asarray(rows), jnp.asarray(valid), 3.0)
    expected = np.full((IMAGES, 3), np.inf)
    for image, task in itertools.product(range(IMAGES), (0, 2)):
        token, own = np.float64(x[image, 0]), np.float64(rows[task])
        cosine = own @ token / (np.linalg.norm(own, axis=1) * np.linalg.norm(token))
        p = np.exp(3 * cosine) / np.exp(3 * cosine).sum()
        expected[image, task] = -(p * np.log(p)).sum()
    np.testing.assert_allclose(found, expected, atol=BUDGET)
    chosen = expected.argmin(axis=1)
    assert set(chosen) == {0, 2}
    shared, codes = jax.tree.map(jnp.asarray, (block(), code(3)))
    heads = {"rows": jnp.asarray(rows), "valid": jnp.asarray(valid)}
    ways = [{"heads": heads}, {"task": jnp.asarray(chosen)}]
    (free, seen), (given, _) = (
        spec.apply({"shared": shared, "codes": codes, **way}, jnp.asarray(x), None, jnp.float32)
        for way in ways
    )
    np.testing.assert_array_equal(free, given)
    np.testing.assert_array_equal(seen["task"], chosen)
    np.testing.assert_array_equal(seen["token"], x[:, 0])


@pytest.mark.parametrize("placement, reads", [("parallel", "norm"), ("sequential", "residual")])
def test_in_a_transformer_it_is_placed_as_other_adapters(tiny, placement, reads):
    """With W_mid = 1 and a code that changes nothing: the adapter of `adapters.py`."""
    spec = ModulatedSpec(bottleneck=3, placement=placement, input=reads, first_block=1)
    shared = init_shared(jax.random.key(0), spec, 12, 2)
    shared["mid"] = {"kernel": jnp.eye(3)[None]}
    codes = init_codes(jax.random.key(1), spec, 2, num_tasks=1, rank=2, diagonal=1.0)
    adapter = {"shared": shared, "codes": codes, "task": jnp.zeros(1, int)}
    plain = {
        name: {"kernel": shared[name]["kernel"], "bias": jnp.zeros((1, size))}
        for name, size in (("down", 3), ("up", 12))
    }
    images = Raw({"image": jnp.asarray(tiny.batch(tiny.tasks[0])["image"])})
    found, _ = encode_observed(tiny.backbone, images, Inserts(adapter, spec))
    expected = encode(tiny.backbone, images, Inserts(plain, spec_of_plain(spec)))
    np.testing.assert_allclose(found, expected, atol=BUDGET)


def spec_of_plain(spec):
    return AdapterSpec(**{f.name: getattr(spec, f.name) for f in dataclasses.fields(AdapterSpec)})
