"""MIN: ridge regression over tasks against the solution of all images, weights, the first session.

Error budget: cosines and softmaxes of float32 numbers near 1, 1e-6; the ridge regression of some
features of order 1 with a ridge of 1, 1e-4.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qkd_jax
from qkd_jax.learners import min_noise
from qkd_jax.nn.encode import block
from qkd_jax.nn.inputs import Raw
from qkd_jax.nn.noise import NoiseSpec, mixture, mixture_weights
from qkd_jax.nn.parameters import init_random
from qkd_jax.nn.vit import ViTSpec

BUDGET = 1e-6


def tasks_of(tiny, config, steps):
    """The state after each task, with that many steps of training."""
    state, states = qkd_jax.init_state(jax.random.key(7), tiny.backbone, config), []
    for task in tiny.tasks:
        batches = [with_padding(tiny.batch(task, seed)) for seed in range(2)]
        state = qkd_jax.begin_task(state, task, num_steps=4, batches=batches)
        for batch in batches[:steps]:
            state, _ = qkd_jax.train_task(state, batch)
        state = qkd_jax.end_task(state, batches)
        states.append(tiny.copy(state))
    return states


def with_padding(batch):
    """The batch with a row that is not a number, and is padding."""
    last = {"image": np.full_like(batch["image"][:1], np.nan), "label": batch["label"][:1]}
    rows = {name: np.concatenate([batch[name], last[name]]) for name in last}
    return {**rows, "mask": np.arange(len(rows["label"])) < len(batch["label"])}


def test_untrained_tasks_give_the_ridge_regression_of_all_images(tiny):
    """Every image counts fits + 1 times, whatever its task."""
    state = tasks_of(tiny, tiny.config("method=min", "min.ridge=1.0", "min.fits=2"), 0)[-1]
    batches = [tiny.batch(task, seed) for task in tiny.tasks for seed in range(2)]
    images, labels = (np.concatenate([b[n] for b in batches]) for n in ("image", "label"))

    @jax.jit
    def hidden_in(images):
        features = min_noise.extract(state, Raw({"image": images}), 0, None)
        return min_noise.hidden_of(state, features)

    def hidden_of(images):
        return np.float64(hidden_in(jnp.asarray(images)))

    hidden = hidden_of(images)
    gram = 3.0 * hidden.T @ hidden + np.eye(16)
    rows = np.linalg.solve(gram, 3.0 * hidden.T @ np.eye(7)[labels])
    query = tiny.batch(tiny.tasks[0], 9)["image"]
    found, seen = np.asarray(qkd_jax.predict(state, query)), [0, 1, 2, 4, 5]
    np.testing.assert_allclose(found[:, seen], (hidden_of(query) @ rows)[:, seen], atol=1e-4)
    assert np.isfinite(state.memory["prototypes"]).all() and np.ptp(found[:, seen]) > 0.1


@pytest.mark.parametrize("first_session", [True, False])
def test_dense_layers_and_norms_are_tuned_in_the_first_session_alone(tiny, first_session):
    settings = "method=min", f"min.first_session={first_session}".lower()
    states = tasks_of(tiny, tiny.config(*settings), 2)
    start = qkd_jax.init_state(jax.random.key(7), tiny.backbone, states[0].config)

    def same(one, other, name):
        pairs = jax.tree.map(np.array_equal, one.memory[name], other.memory[name])
        return all(jax.tree.leaves(pairs))

    for name in ("dense", "norms"):
        assert same(start, states[0], name) != first_session
        assert same(states[0], states[1], name) and same(states[1], states[2], name)
    for task in range(3):  # each generator is trained in its own task, and kept
        kept = [np.asarray(s.memory["generators"]["mean"]["kernel"][task]) for s in states]
        assert not any(a.any() for a in kept[:task]) and kept[task].any()
        for later in kept[task:]:
            np.testing.assert_array_equal(later, kept[task])


@pytest.mark.parametrize("kind", ["current", "previous"])
def test_weights_of_a_run_against_loops(tiny, kind):
    """Softmax of cosines to the new task's mean, or to that of the one before it, where the first
    two tasks have no noise.
    """
    states = tasks_of(tiny, tiny.config("method=min", f"min.weights={kind}"), 0)
    for task, state in enumerate(states):
        means = np.float64(state.memory["prototypes"])[: task + 1]
        reference = means[task if kind == "current" else max(task - 1, 0)]
        lengths = np.linalg.norm(means, axis=1) * np.linalg.norm(reference)
        cosines = means @ reference / lengths
        cosines[task] = 1.0
        expected = np.zeros(4)
        if kind == "current" or task > 1:
            expected[: task + 1] = np.exp(cosines) / np.exp(cosines).sum()
        np.testing.assert_allclose(state.memory["weights"], expected, atol=BUDGET)


def test_weights_follow_the_cosines():
    prototypes = jnp.asarray([[2.0, 0.0], [0.0, 3.0], [1.0, 1.0], [0.0, 0.0]])
    found = mixture_weights(prototypes, jnp.int32(2), jnp.int32(2))
    logits = np.array([0.5**0.5, 0.5**0.5, 1.0])
    np.testing.assert_allclose(found[:3], np.exp(logits) / np.exp(logits).sum(), atol=BUDGET)
    assert found[3] == 0.0


@pytest.mark.parametrize("post_norm", [False, True])
def test_noise_is_added_to_what_a_block_returns(post_norm):
    """Behind the last LayerNorm of a block that ends in one. Budget: the same float32 sums."""
    keys = jax.random.split(jax.random.key(0), 8)
    spec = ViTSpec(width=6, depth=1, num_heads=2, mlp_width=8, patch_size=4, image_size=8, grid=2)

    class Post(ViTSpec):
        post_norm = True

    params = init_random(keys[0], spec)["blocks"][0]
    spec = Post(**dataclasses.asdict(spec)) if post_norm else spec
    shapes = {"down": (6, 3), "up": (3, 6)}
    noise = {
        n: jax.random.normal(k, s) for k, (n, s) in zip(keys[1:3], shapes.items(), strict=True)
    }
    for key, name, width in ((keys[3], "dense", 6), (keys[4], "mixed", 3)):
        kernel = jax.random.normal(key, (width, width))
        noise[name] = {"kernel": kernel, "bias": jnp.arange(width, dtype=jnp.float32)}
    x = jax.random.normal(keys[5], (2, 5, 6))
    without = np.float64(block(params, spec, x))
    found = block(params, spec, x, adapter=noise, adapter_spec=NoiseSpec(3))
    noise = jax.tree.map(np.float64, noise)
    mixed = without @ noise["down"] @ noise["mixed"]["kernel"] + noise["mixed"]["bias"]
    dense = without @ noise["dense"]["kernel"] + noise["dense"]["bias"]
    np.testing.assert_allclose(found, without + mixed @ noise["up"] + dense, rtol=1e-5, atol=1e-4)


def test_the_mixture_is_the_weighted_sum_of_both_maps():
    generator = np.random.default_rng(0)
    maps = {
        name: {
            "kernel": generator.normal(size=(3, 2, 4, 4)),
            "bias": generator.normal(size=(3, 2, 4)),
        }
        for name in ("mean", "spread")
    }
    weights = np.array([0.2, 0.7, 0.1])
    found = mixture(jax.tree.map(jnp.float32, maps), jnp.float32(weights))
    for name in ("kernel", "bias"):
        both = maps["mean"][name] + maps["spread"][name]
        expected = sum(w * both[i] for i, w in enumerate(weights))
        np.testing.assert_allclose(found[name], expected, atol=4 * BUDGET)
