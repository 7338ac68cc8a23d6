"""APT: merging, the head and the additive prompt against NumPy; what stays as it was.

Error budget: logits of 12 numbers standardised and a unit row, near 1: below 100 eps = 1.2e-5. A
merged prompt is one rounding of numbers near 0.1: 1e-7.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qkd_jax
from qkd_jax.engine import verbs
from qkd_jax.errors import ConfigError
from qkd_jax.learners import apt
from qkd_jax.learners.features import pooled_feature
from qkd_jax.nn.backbone import Backbone
from qkd_jax.nn.encode import encode
from qkd_jax.nn.inputs import Raw
from qkd_jax.nn.vit import ViTSpec

BUDGET = 2e-5
COLUMNS = [4, 1, 0, 5, 2]  # classes in the order of the tasks


@pytest.fixture(scope="module")
def history(tiny):
    return tiny.run(tiny.backbone, tiny.config("method=apt", "apt.merge=0.3"))


def leaves(prompt):
    return np.stack([np.float64(prompt["key"]), np.float64(prompt["value"])])


def test_the_prompt_of_vit_b16_has_18432_numbers():
    spec = ViTSpec(
        width=768, depth=12, num_heads=12, mlp_width=3072, patch_size=16, image_size=224, grid=14
    )
    config = qkd_jax.Config(method="apt")
    shapes = jax.eval_shape(lambda k: apt.init(k, Backbone(None, spec), config), jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes[0]["prompt"])) == 18_432


def test_start_is_normal_with_deviation_002(tiny):
    spec = ViTSpec(
        width=384, depth=6, num_heads=12, mlp_width=12, patch_size=4, image_size=8, grid=2
    )
    trainable, _ = apt.init(jax.random.key(1), Backbone(None, spec), tiny.config("method=apt"))
    drawn = leaves(trainable["prompt"])
    # 4608 numbers: mean and deviation are off by 0.02 / 68 and 0.02 / 96; five of each.
    assert abs(drawn.mean()) < 5 * 0.02 / 68 and abs(drawn.std() - 0.02) < 5 * 0.02 / 96
    # Not cut at two deviations, where none of 4608 would lie beyond 0.04.
    assert (np.abs(drawn) > 0.04).sum() > 100
    assert np.abs(np.float64(trainable["head"]["rows"])).max() <= 384**-0.5


def test_inference_uses_the_merged_prompt_and_training_goes_on(history):
    """p <- 0.7 p + 0.3 current, the first is a copy; training goes on from the current one."""
    merged = None
    for index, stage in enumerate(history):
        current = leaves(stage.trained.trainable["prompt"])
        merged = current if index == 0 else 0.7 * merged + 0.3 * current
        found = leaves(stage.ended.memory["prompt"])
        np.testing.assert_allclose(found, merged, atol=1e-7)
        np.testing.assert_array_equal(leaves(stage.ended.trainable["prompt"]), current)
        if index:
            before = history[index - 1].trained.trainable["prompt"]
            np.testing.assert_array_equal(leaves(stage.begun.trainable["prompt"]), leaves(before))
    np.testing.assert_array_equal(
        leaves(history[0].ended.memory["prompt"]), leaves(history[0].trained.trainable["prompt"])
    )
    start, end = (s.trainable["prompt"] for s in (history[0].begun, history[0].trained))
    assert np.abs(leaves(end) - leaves(start)).max() > 1e-5


def test_score_is_a_standardised_feature_on_unit_rows(tiny, history):
    state = history[2].ended
    images = tiny.batch(tiny.tasks[0], 9)["image"]
    feature = np.float64(verbs.slot_features(state, images)[:, 2])
    centred = feature - feature.mean(1, keepdims=True)
    standard = centred / np.sqrt((centred**2).mean(1, keepdims=True) + 1e-5)
    rows = np.concatenate(
        [
            np.float64(stage.trained.trainable["head"]["rows"])[: len(task.classes)]
            for task, stage in zip(tiny.tasks, history, strict=True)
        ]
    )
    expected = standard @ (rows / np.linalg.norm(rows, axis=1, keepdims=True)).T
    scores = np.asarray(qkd_jax.predict(state, images))
    np.testing.assert_allclose(scores[:, COLUMNS], expected, atol=BUDGET)
    assert (scores[:, [3, 6]] == -np.inf).all()


def test_a_zero_prompt_is_the_frozen_model(tiny, history):
    state = history[2].ended
    images = jnp.asarray(tiny.batch(tiny.tasks[0])["image"])
    feature = jax.jit(lambda p: pooled_feature(state, Raw({"image": images}), apt.inserts(p)))
    found = feature(jax.tree.map(jnp.zeros_like, state.memory["prompt"]))
    frozen = jax.jit(lambda x: encode(tiny.backbone, Raw({"image": x}))[:, 0])(images)
    np.testing.assert_allclose(found, frozen, atol=BUDGET)
    assert np.abs(feature(state.memory["prompt"]) - frozen).max() > 10 * BUDGET


def test_a_task_of_one_class_and_a_padded_batch(tiny, history):
    _, metrics = qkd_jax.train_task(tiny.copy(history[1].begun), tiny.batch(tiny.tasks[1]))
    assert float(metrics["loss"]) == 0.0 and float(metrics["train_accuracy"]) == 100.0
    stepped = []
    for padding in (0.0, np.nan):
        batch = tiny.batch(tiny.tasks[0])
        batch["image"][2:] = padding
        batch["mask"] = np.array([True, True, False, False])
        stepped.append(qkd_jax.train_task(tiny.copy(history[0].begun), batch))
    (first, _), (second, _) = stepped
    jax.tree.map(np.testing.assert_array_equal, first.trainable, second.trainable)


def test_predictions_do_not_depend_on_the_batch(tiny, history):
    state, images = history[2].ended, tiny.batch(tiny.tasks[2])["image"]
    scores = np.asarray(qkd_jax.predict(state, images))
    order = np.array([3, 1, 0, 2])
    np.testing.assert_allclose(qkd_jax.predict(state, images[order]), scores[order], atol=BUDGET)
    jax.tree.map(np.testing.assert_array_equal, tiny.backbone.params, state.backbone.params)


def test_a_share_out_of_range_is_refused(tiny):
    with pytest.raises(ConfigError, match=r"apt\.merge: expected 0 to 1, found 1\.5"):
        tiny.config("method=apt", "apt.merge=1.5")
