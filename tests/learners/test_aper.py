"""APER against direct NumPy in float64: joined class means, cosines, one tuning.

Error budget: means of 8 features near 1 and cosines of 24 numbers, below 100 eps = 1.2e-5; the
transformer itself is compared with itself, compiled once more: 2e-5 in all.
"""

import itertools

import jax
import numpy as np
import pytest

import qkd_jax
from qkd_jax.engine import verbs
from qkd_jax.errors import ConfigError
from qkd_jax.learners.task_adapters import encode_with
from qkd_jax.nn.encode import encode
from qkd_jax.nn.inputs import Raw

BUDGET = 2e-5


@pytest.fixture(scope="module")
def history(tiny):
    return tiny.run(tiny.backbone, tiny.config("method=aper"))


def test_slots_are_the_frozen_and_the_tuned_model(tiny, history):
    state, images = history[-1].ended, tiny.batch(tiny.tasks[0])["image"]
    tuned = history[0].trained.trainable["adapter"]
    frozen = jax.jit(lambda x: encode(tiny.backbone, Raw({"image": x}))[:, 0])(images)
    adapted = jax.jit(lambda x: encode_with(state, tuned, Raw({"image": x})))(images)
    features = verbs.slot_features(state, images)
    np.testing.assert_allclose(features[:, 0], frozen, atol=BUDGET)
    np.testing.assert_allclose(features[:, 1], adapted, atol=BUDGET)
    assert np.abs(np.asarray(adapted) - np.asarray(frozen)).max() > 1e-3


def test_scores_are_cosines_to_joined_class_means(tiny, history):
    state, means = history[-1].ended, {}
    for task in tiny.tasks:
        batches = [tiny.batch(task, step) for step in range(2)]
        joined = np.concatenate([verbs.slot_features(state, b["image"]) for b in batches])
        labels = np.concatenate([b["label"] for b in batches])
        joined = np.float64(joined.reshape(len(joined), -1))
        means |= {c: joined[labels == c].mean(0) for c in task.classes}
    queries = tiny.batch(tiny.tasks[1], 9)["image"]
    feature = np.float64(verbs.slot_features(state, queries)).reshape(4, -1)
    rows = np.stack([means[c] for c in sorted(means)])
    lengths = np.linalg.norm(feature, axis=1)[:, None] * np.linalg.norm(rows, axis=1)[None]
    scores = np.asarray(qkd_jax.predict(state, queries))
    np.testing.assert_allclose(scores[:, sorted(means)], feature @ rows.T / lengths, atol=BUDGET)
    assert (scores[:, [3, 6]] == -np.inf).all()


def test_only_the_first_task_trains(tiny, history):
    tuned = history[0].trained.trainable["adapter"]
    assert np.abs(np.asarray(tuned["up"]["kernel"])).max() > 0
    for stage in history:
        jax.tree.map(np.testing.assert_array_equal, stage.ended.memory["adapter"], tuned)
    for task, stage in list(zip(tiny.tasks, history, strict=True))[1:]:
        with pytest.raises(ConfigError, match=f"trains nothing in task {task.index}"):
            qkd_jax.train_task(stage.begun, tiny.batch(task))
    for before, after in itertools.pairwise(history):
        old = np.asarray(before.ended.task_of_class) >= 0
        np.testing.assert_array_equal(
            before.ended.memory["rows"][old], after.ended.memory["rows"][old]
        )
    jax.tree.map(
        np.testing.assert_array_equal, tiny.backbone.params, history[-1].ended.backbone.params
    )


def test_what_happens_to_the_trainable_part_later_does_not_matter(tiny, history):
    """The slot is filled for good: a changed `trainable` leaves no trace after the first task."""
    stage, task = history[1], tiny.tasks[1]
    spoilt = jax.tree.map(lambda a: a + 1.0, stage.begun.trainable)
    batches = [tiny.batch(task, step) for step in range(2)]
    state = qkd_jax.end_task(stage.begun.replace(trainable=spoilt), batches)
    jax.tree.map(np.testing.assert_array_equal, state.memory, stage.ended.memory)


def test_predictions_do_not_depend_on_the_batch(tiny, history):
    state, images = history[2].ended, tiny.batch(tiny.tasks[2])["image"]
    scores, order = np.asarray(qkd_jax.predict(state, images)), np.array([3, 1, 0, 2])
    np.testing.assert_allclose(qkd_jax.predict(state, images[order]), scores[order], atol=BUDGET)
