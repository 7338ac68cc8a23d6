"""APT against the authors' code: logits after two tasks, loss, gradients, merged prompt.

Reference: HaoranChen/Additive-Prompt-Tuning at 9b293dade6972c41ebbb90afcc68ed42fac53578. Called:
models/zoo.py `vit_pt_imnet` (ViTZoo with APT), learners/prompt.py `Prompt_Learner.update_model`,
and learners/default.py `NormalNN.learn_batch` with zero epochs, which leaves its merging at the end
of a task. APT is written for heads of 768 = 12 x 64, so the transformer keeps that width; their
`VisionTransformer` was given two blocks, an MLP of 24, patch 4 and image 8. ema_coeff 0.7, float64
(the prompt itself is float32 there).

How the arrays were made, by `golden/make_apt_golden.py`: weights and inputs are drawn here and
there by the same frozen NumPy generators, as below. The first task ended with the prompt `first`;
with `second` and four classes, of which the last two are new, one update gave loss and gradients;
the second task's end gave the merged prompt, and evaluation the logits of all four classes.

Error budget: two blocks in float32 with activations near 1; a logit is a sum of 768 products of a
standardised feature and a unit row and stays near 1: 200 eps = 2.4e-5. Gradients have the same
error relative to their largest entry.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qkd_jax
from qkd_jax.engine import verbs
from qkd_jax.learners import apt
from qkd_jax.nn.backbone import Backbone
from qkd_jax.nn.inputs import Raw
from qkd_jax.nn.vit import ViTSpec

BUDGET = 2.4e-5
SPEC = ViTSpec(width=768, depth=2, num_heads=12, mlp_width=24, patch_size=4, image_size=8, grid=2)
LABELS = np.array([2, 3, 3])


@pytest.fixture(scope="module")
def golden():
    return np.load(Path(__file__).parent / "golden" / "apt.npz")


@pytest.fixture(scope="module")
def inputs():
    """(weights, first and second prompt [4, D], rows [4, D], images): drawn in this order."""
    random = np.random.RandomState(2025)

    def draw(path, shape):
        values, name = random.standard_normal(shape.shape), path[-1].key
        if name == "kernel":
            values = values * shape.shape[0] ** -0.5
        else:
            values = 1.0 + 0.1 * values if name == "scale" else 0.1 * values
        return values.astype(np.float32)

    params = jax.tree_util.tree_map_with_path(draw, SPEC.param_shapes())
    random = np.random.RandomState(1993)
    first, second = (0.5 * random.standard_normal((2, 4, 768))).astype(np.float32)
    rows = (0.05 * random.standard_normal((4, 768))).astype(np.float32)
    return params, first, second, rows, random.random_sample((3, 8, 8, 3)).astype(np.float32)


def prompt_of(tokens):
    """Their rows are key and value of block 0, of block 1."""
    return {"key": jnp.asarray(tokens[0::2]), "value": jnp.asarray(tokens[1::2])}


@pytest.fixture(scope="module")
def second_task(tiny, inputs):
    """The state in the second task, after the first ended with `first`, before any update."""
    params, first, second, rows, _ = inputs
    config = tiny.config("method=apt", "apt.merge=0.3", "num_classes=4", "max_tasks=2")
    backbone = Backbone(params, SPEC)
    state = qkd_jax.init_state(jax.random.key(0), backbone, config)
    for index, tokens in enumerate((first, second)):
        classes = (2 * index, 2 * index + 1)
        state = qkd_jax.begin_task(state, qkd_jax.Task(index, classes))
        head = {"rows": jnp.asarray(rows[2 * index : 2 * index + 2])}
        state = state.replace(trainable={"prompt": prompt_of(tokens), "head": head})
        if index == 0:
            state = apt.LEARNER.finish(verbs.one_device().freeze(state), (), None)
    return state


def test_loss_and_gradients(golden, inputs, second_task):
    raw = Raw({"image": jnp.asarray(inputs[-1])})

    def mean_loss(trainable):
        batch = {"label": jnp.asarray(LABELS)}
        return jnp.mean(apt.LEARNER.loss(trainable, second_task, raw, batch, None)["loss"])

    loss, gradient = jax.jit(jax.value_and_grad(mean_loss))(second_task.trainable)
    np.testing.assert_allclose(loss, golden["loss"], atol=BUDGET)
    expected = golden["prompt_gradient"]
    for name, rows in (("key", expected[0::2]), ("value", expected[1::2])):
        found = gradient["prompt"][name]
        np.testing.assert_allclose(found, rows, atol=BUDGET * np.abs(expected).max())
    expected = golden["rows_gradient"]
    found = gradient["head"]["rows"]
    np.testing.assert_allclose(found, expected, atol=BUDGET * np.abs(expected).max())


def test_merged_prompt_and_logits(golden, inputs, second_task):
    state = apt.LEARNER.finish(verbs.one_device().freeze(second_task), (), None)
    merged = state.memory["prompt"]
    rows = np.stack([merged["key"], merged["value"]], axis=1).reshape(4, 768)
    np.testing.assert_allclose(rows[:, ::16], golden["merged"], atol=1e-6)
    np.testing.assert_allclose(qkd_jax.predict(state, inputs[-1]), golden["logits"], atol=BUDGET)
