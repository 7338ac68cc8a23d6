"""CaRE: which experts are used while few are known, against loops; what a new one adds; settings.

Error budget: softmaxes over at most four float32 numbers near 1, 1e-6.
"""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qkd_jax
from qkd_jax.errors import ConfigError
from qkd_jax.learners import care
from qkd_jax.nn import experts
from qkd_jax.nn.experts import ExpertsSpec

BUDGET = 1e-6
TASKS, CLASSES, WIDTH, IMAGES = 4, 3, 5, 40


weights_of = jax.jit(ExpertsSpec.weights, static_argnums=0)
apply = jax.jit(ExpertsSpec.apply, static_argnums=(0, 4))


def softmax(z):
    e = np.exp(z - z.max())
    return e / e.sum()


def weights_by_loops(spec, sizes, newest, forced, router, outputs, logits):
    found = np.zeros((len(outputs), TASKS))
    for image in range(len(outputs)):
        own = [softmax(logits[image, i, : sizes[i]]) for i in range(newest + 1)]
        doubt = [-(p * np.log(p)).sum() for p in own]
        if forced:
            doubt[newest] = -np.inf
        for i in np.argsort(doubt)[: spec.routers_per_input]:
            votes = (outputs[image, i] @ router["kernel"][i] + router["bias"][i])[: i + 1]
            kept = np.argsort(-votes)[: spec.experts_per_router]
            found[image, kept] += softmax(votes[kept])
    return found


@pytest.mark.parametrize("newest", range(TASKS))
@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize("counts", [(2, 3), (1, 1), (3, 9)])
def test_routing_against_loops(newest, forced, counts):
    """Also with fewer experts than there are to choose, and classes that are padding."""
    generator, sizes = np.random.default_rng(newest), np.array([3, 1, 2, 3])
    outputs = generator.normal(size=(IMAGES, TASKS, WIDTH))
    logits = generator.normal(size=(IMAGES, TASKS, CLASSES))
    if newest:  # one class alone leaves no doubt: let the others be as sure now and then
        logits[::2, 0, 0] = logits[1::3, newest, 0] = 60.0
        logits[:, 1] += 1e-3
    router = {
        "kernel": generator.normal(size=(TASKS, WIDTH, TASKS)),
        "bias": generator.normal(size=(TASKS, TASKS)),
    }
    spec = ExpertsSpec(TASKS, 2, 3, *counts, dropout=0.0)
    block = {
        "experts": {"router": jax.tree.map(jnp.float32, router)},
        "class_mask": jnp.arange(CLASSES)[None] < jnp.asarray(sizes)[:, None],
        "newest": jnp.int32(newest),
        "forced": jnp.bool_(forced),
    }
    found = weights_of(spec, block, jnp.float32(outputs), jnp.float32(logits))
    rest = (sizes, newest, forced, router, outputs, logits)
    np.testing.assert_allclose(found, weights_by_loops(spec, *rest), atol=BUDGET)


def test_a_new_mixture_adds_nothing_and_an_old_expert_what_it_is_worth():
    spec, keys = ExpertsSpec(TASKS, 2, 3, 1, 1, dropout=0.0), jax.random.split(jax.random.key(0), 3)
    one = experts.new_expert(keys[0], spec, 1, WIDTH, CLASSES)
    block = {
        "experts": jax.tree.map(lambda a: jnp.stack([a[0]] * TASKS), one),
        "shared": jax.tree.map(
            lambda a: a[0], experts.new_adapter(keys[1], 1, WIDTH, spec.shared_bottleneck)
        ),
        "class_mask": jnp.ones((TASKS, CLASSES), bool),
        "newest": jnp.int32(0),
        "forced": jnp.bool_(False),
    }
    x = jax.random.normal(keys[2], (2, 7, WIDTH))
    added, _ = apply(spec, block, x, None, jnp.float32)
    np.testing.assert_array_equal(added, jnp.zeros_like(x))
    scales = block["experts"]["expert"]["scale"].at[0].set(1.0)
    block["experts"]["expert"]["scale"] = scales
    added, observed = apply(spec, block, x, None, jnp.float32)
    np.testing.assert_array_equal(observed["weights"], np.eye(TASKS)[[0, 0]])
    x, own = np.float64(x), jax.tree.map(lambda a: np.float64(a[0]), one["expert"])
    normed = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    expected = np.maximum(normed @ own["down"]["kernel"], 0.0) @ own["up"]["kernel"]
    np.testing.assert_allclose(added, expected, atol=5 * BUDGET)


def test_half_precision_rounds_the_mixture_and_no_more():
    """bfloat16 keeps 8 bits: a product of sums of a few terms is right to about 1 %."""
    spec, keys = ExpertsSpec(2, 4, 4, 2, 2, dropout=0.0), jax.random.split(jax.random.key(1), 4)
    one = experts.new_expert(keys[0], spec, 1, WIDTH, CLASSES)
    block = {
        "experts": jax.tree.map(lambda a: jnp.stack([a[0]] * 2), one),
        "shared": jax.tree.map(lambda a: a[0], experts.new_adapter(keys[1], 1, WIDTH, 4)),
        "class_mask": jnp.ones((2, CLASSES), bool),
        "newest": jnp.int32(1),
        "forced": jnp.bool_(True),
    }
    block["experts"]["expert"]["scale"] = jnp.ones((2, WIDTH))
    x = jax.random.normal(keys[2], (3, 4, WIDTH))
    exact, _ = apply(spec, block, x, None, jnp.float32)
    rounded, _ = apply(spec, block, x, None, jnp.bfloat16)
    assert rounded.dtype == jnp.float32
    np.testing.assert_allclose(rounded, exact, atol=0.03 * np.abs(exact).max())


def test_the_first_task_moves_the_shared_adapter_freely(tiny):
    """Later ones keep a thousandth of a step."""
    kept, config = {"shared": {"bias": jnp.zeros(3)}}, tiny.config("method=care")
    for task, expected in ((0, 1.0), (1, 0.001)):
        state = SimpleNamespace(task=jnp.int32(task), config=config, memory=kept)
        moved = care.project({"shared": {"bias": jnp.ones(3)}, "head": 5.0}, state)
        np.testing.assert_allclose(moved["shared"]["bias"], expected, rtol=1e-4)
        assert moved["head"] == 5.0


def test_a_block_that_is_not_there_is_named(tiny):
    config = tiny.config("method=care", "care.first_block=2")
    with pytest.raises(ConfigError, match=r"care.first_block: expected 0 to 1 of 2 blocks"):
        qkd_jax.init_state(jax.random.key(0), tiny.backbone, config)
