"""The two ends of the scale: a head on frozen features task by task, and all classes at once.

Error budget: cosines of 12 numbers times a scale of 5, below 100 eps times 5; losses and gradients
of four rows with them likewise: 1e-4 in all.
"""

import itertools

import jax
import numpy as np
import pytest

import qkd_jax
from qkd_jax.engine import verbs
from qkd_jax.learners import finetune
from qkd_jax.learners.shape import learner_of
from qkd_jax.nn.encode import encode
from qkd_jax.nn.inputs import Raw
from qkd_jax.protocol import metrics
from qkd_jax.protocol import tasks as protocol
from qkd_jax.runs.plan import plan

BUDGET = 1e-4


@pytest.fixture(scope="module", params=["cosine", "linear"])
def probe(tiny, request):
    """One head of each kind, without decay, so that one step is minus the gradient."""
    config = tiny.config(
        "method=linear_probe", f"head.kind={request.param}", "train.weight_decay=0.0"
    )
    return tiny.run(tiny.backbone, config)


def logits_of(kind, feature, rows, scale):
    feature, rows = np.float64(feature), np.float64(rows)
    if kind == "linear":
        return feature @ rows.T
    lengths = np.linalg.norm(feature, axis=1)[:, None] * np.linalg.norm(rows, axis=1)[None]
    return scale * (feature @ rows.T) / lengths


def test_scores_use_all_rows_on_the_frozen_feature(tiny, probe):
    state = probe[-1].ended
    queries = tiny.batch(tiny.tasks[0], 9)["image"]
    feature = jax.jit(lambda x: encode(tiny.backbone, Raw({"image": x}))[:, 0])(queries)
    rows = {
        c: np.asarray(stage.trained.trainable["head"]["rows"])[i]
        for task, stage in zip(tiny.tasks, probe, strict=True)
        for i, c in enumerate(task.classes)
    }
    seen = sorted(rows)
    scale = float(state.trainable["head"]["scale"])
    expected = logits_of(state.config.head.kind, feature, np.stack([rows[c] for c in seen]), scale)
    scores = np.asarray(qkd_jax.predict(state, queries))
    np.testing.assert_allclose(scores[:, seen], expected, atol=BUDGET)
    assert (scores[:, [3, 6]] == -np.inf).all()
    for before, after in itertools.pairwise(probe):
        old = np.asarray(before.ended.task_of_class) >= 0
        np.testing.assert_array_equal(
            before.ended.memory["rows"][old], after.ended.memory["rows"][old]
        )


def test_a_step_is_that_of_softmax_regression(tiny, probe):
    """Loss and rows after one step, with and without the features that a run keeps."""
    begun, batch = probe[0].begun, tiny.batch(tiny.tasks[0])
    kind, head = begun.config.head.kind, begun.trainable["head"]
    feature = np.float64(verbs.slot_features(begun, batch["image"], (0,))[:, 0])
    onto = np.array([tiny.tasks[0].classes.index(c) for c in batch["label"]])

    def mean_loss(rows):
        logits = logits_of(kind, feature, rows, float(head["scale"]))
        log_sum = np.log(np.exp(logits).sum(1))
        return np.mean(log_sum - logits[np.arange(4), onto])

    rows, gradient, h = np.float64(head["rows"]), np.zeros((2, 12)), 1e-6
    for index in np.ndindex(2, 12):
        step = np.zeros((2, 12))
        step[index] = h
        gradient[index] = (mean_loss(rows + step) - mean_loss(rows - step)) / (2 * h)
    kept = {**batch, "features": np.asarray(feature[:, None], np.float32)}
    for given in (batch, kept):
        state, found = qkd_jax.train_task(tiny.copy(begun), given)
        np.testing.assert_allclose(found["loss"], mean_loss(rows), atol=BUDGET)
        np.testing.assert_allclose(
            state.trainable["head"]["rows"], rows - 0.05 * gradient, atol=BUDGET
        )
    moved = {**kept, "features": kept["features"] + 1.0}
    _, other = qkd_jax.train_task(tiny.copy(begun), moved)
    assert abs(float(other["loss"]) - float(found["loss"])) > 1e-4


def test_a_task_of_one_class_teaches_nothing(tiny, probe):
    before, after = probe[1].begun.trainable, probe[1].trained.trainable
    jax.tree.map(np.testing.assert_array_equal, before, after)


def test_joint_is_finetune_with_all_classes_in_one_task():
    learner = learner_of(qkd_jax.Config(method="joint"))
    assert learner._replace(name="finetune") == finetune.LEARNER
    settings = ("data.source=synthetic", "data.num_classes=6", "protocol.increment=2")
    settings += ("backbone.image_size=32",)
    joint, apart = (
        plan(qkd_jax.override(qkd_jax.Config(method=method), *settings))
        for method in ("joint", "finetune")
    )
    assert len(apart.tasks) == 3 and apart.config.shapes.max_task_images * 3 == len(
        apart.data.train
    )
    assert joint.tasks == (protocol.Task(0, tuple(int(c) for c in joint.order)),)
    np.testing.assert_array_equal(joint.order, apart.order)
    found = joint.config.shapes
    assert (found.max_tasks, found.max_task_classes, found.num_classes) == (1, 6, 6)
    assert found.max_task_images == len(joint.data.train)
    ease = qkd_jax.override(qkd_jax.Config(method="ease"), *settings, "protocol.kind=joint")
    assert plan(ease).tasks == joint.tasks
    assert plan(qkd_jax.override(joint.config, "protocol.kind=incremental")).tasks == apart.tasks


def test_joint_learns_all_classes_at_once(tiny):
    classes = (4, 1, 0, 5, 2)
    config = tiny.config("method=joint", "max_tasks=1", "max_task_classes=5")
    task = qkd_jax.Task(0, classes)
    state = qkd_jax.begin_task(qkd_jax.init_state(jax.random.key(7), tiny.backbone, config), task)
    batch = tiny.batch(task, size=10)
    stacked = {name: np.stack([value] * 60) for name, value in batch.items()}
    state, found = qkd_jax.train_task(state, stacked)
    losses = np.asarray(found["loss"])
    assert losses[-5:].mean() < 0.5 * losses[:5].mean()
    state = qkd_jax.end_task(state, [batch])
    scores = np.asarray(qkd_jax.predict(state, batch["image"]))
    assert np.mean(scores.argmax(1) == batch["label"]) >= 0.9  # of five classes
    assert (scores[:, [3, 6]] == -np.inf).all()


def test_one_stage_has_numbers_for_everything():
    """Average is last accuracy; there is no old task to forget."""
    summary = metrics.summarise(np.array([[3]]), np.array([[4]]), within_task_correct=[[3]])
    assert summary["average_accuracy"] == summary["last_accuracy"] == 75.0
    names = ("forgetting", "forgetting_clipped", "forgetting_just_learned", "bwt")
    assert [summary[name] for name in names] == [0.0] * 4
    assert summary["within_task_last_accuracy"] == 75.0
