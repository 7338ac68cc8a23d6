"""QKD: what stays frozen, what a step computes, what inference mixes.

Error budgets, eps = 1.2e-7: two evaluations of one loss differ by the order of their sums, about
100 eps of a loss below 20 (BUDGET); logits are 5 cosines wide.
"""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qkd_jax
from qkd_jax.engine import verbs
from qkd_jax.engine.checks import check_batch
from qkd_jax.errors import ConfigError
from qkd_jax.learners.optimiser import optimiser
from qkd_jax.learners.passes import shared_part
from qkd_jax.learners.qkd import gate
from qkd_jax.learners.qkd import learner as qkd
from qkd_jax.learners.state import split
from qkd_jax.learners.step import device_step
from qkd_jax.nn.whitening import shrunk_factor
from tests.learners.qkd.learner_cases import (
    BUDGET,
    METHOD,
    TOP,
    assert_close,
    assert_same_bytes,
    distance,
)

KEYS = {
    "loss",
    "loss_ce",
    "loss_kd",
    "loss_sparsity",
    "gate_entropy",
    "train_accuracy",
    "learning_rate",
}


def test_shapes_are_final_from_the_start(tiny, history):
    first = qkd_jax.init_state(jax.random.key(7), tiny.backbone, tiny.config(*METHOD))
    shapes = jax.tree.map(lambda a: (a.shape, a.dtype), first)
    for stage in history:
        for state in (stage.begun, stage.trained, stage.ended):
            assert jax.tree.map(lambda a: (a.shape, a.dtype), state) == shapes


@pytest.mark.parametrize(
    "prototypes, whiten, rows, metrics",
    [("drift", True, 4, 4), ("all", False, 4, 1), ("own", True, 1, 1), ("none", False, 1, 1)],
)
def test_rows_and_metrics_are_kept_for_the_slots_that_need_them(
    tiny, prototypes, whiten, rows, metrics
):
    config = tiny.config("method=qkd", f"head.prototypes={prototypes}", f"head.whiten={whiten}")
    memory = jax.eval_shape(lambda key: qkd.init(key, tiny.backbone, config)[1], jax.random.key(0))
    assert len(memory["rows"]) == rows
    parts = (memory["scatter"], memory["count"], *memory["metrics"])
    assert [len(part) for part in parts] == 4 * [metrics]


def test_the_backbone_is_never_written(tiny, history):
    jax.tree.map(assert_same_bytes, tiny.backbone.params, history[-1].ended.backbone.params)


def test_adapters_rows_and_states_of_old_tasks_stay_byte_identical(tiny, history):
    for task, stage in zip(tiny.tasks, history, strict=True):
        old, classes = stage.ended.memory, np.array(task.classes)
        jax.tree.map(
            lambda a, b, i=task.index: assert_same_bytes(a[i], b),
            old["adapters"],
            stage.trained.trainable["adapter"],
        )
        for later in history[task.index + 1 :]:
            for state in (later.begun, later.trained, later.ended):
                new = state.memory
                jax.tree.map(
                    lambda a, b, i=task.index: assert_same_bytes(a[i], b[i]),
                    old["adapters"],
                    new["adapters"],
                )
                assert_same_bytes(old["rows"][:, classes], new["rows"][:, classes])
                assert_same_bytes(old["class_means"][classes], new["class_means"][classes])
                assert_same_bytes(old["task_states"][task.index], new["task_states"][task.index])


def test_training_moves_adapter_head_and_gate(history):
    for stage in history:
        before, after = stage.begun.trainable, stage.trained.trainable
        assert distance(before["adapter"], after["adapter"]) > 1e-5
        assert distance(before["head"], after["head"]) > 1e-5
    # The gate hears nothing before two old tasks compete.
    for index in (0, 1):
        before, after = history[index].begun.trainable, history[index].trained.trainable
        assert distance(before["gate"], after["gate"]) < 1e-6
    before, after = history[2].begun.trainable["gate"], history[2].trained.trainable["gate"]
    assert distance(before["map"], after["map"]) > 1e-7


def test_unseen_classes_are_minus_infinity_after_every_task(tiny, history):
    images, seen = tiny.batch(tiny.tasks[0])["image"], set()
    for task, stage in zip(tiny.tasks, history, strict=True):
        seen |= set(task.classes)
        scores, alpha = qkd_jax.predict_with_relevance(stage.ended, images)
        finite = np.isfinite(np.asarray(scores))
        assert (finite == np.isin(np.arange(7), sorted(seen))[None]).all()
        assert (np.asarray(scores)[~finite] == -np.inf).all()
        np.testing.assert_allclose(np.asarray(alpha).sum(1), 1, atol=1e-6)
        assert (np.asarray(alpha)[:, task.index + 1 :] == 0).all()


def test_predict_has_no_task_argument():
    assert list(inspect.signature(qkd_jax.predict).parameters) == ["state", "images"]


def test_scores_of_an_image_do_not_depend_on_the_batch(tiny, history):
    state, images = history[-1].ended, tiny.batch(tiny.tasks[2])["image"]
    columns = np.array([4, 1, 0, 5, 2])
    scores = np.asarray(qkd_jax.predict(state, images))[:, columns]
    order = np.array([2, 0, 3, 1])
    permuted = np.asarray(qkd_jax.predict(state, images[order]))[:, columns]
    repeated = np.asarray(qkd_jax.predict(state, images[[1, 1, 1, 1]]))[:, columns]
    alone = np.asarray(qkd_jax.predict(state, images[1:2]))[:, columns]
    for found, expected in (
        (permuted, scores[order]),
        (repeated, scores[[1] * 4]),
        (alone, scores[1:2]),
    ):
        np.testing.assert_allclose(found, expected, atol=BUDGET, rtol=0)
        assert (found.argmax(1) == expected.argmax(1)).all()


def test_uint8_images_are_the_same_as_their_fractions(tiny, history):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8)
    a = qkd_jax.predict(history[-1].ended, pixels)
    b = qkd_jax.predict(history[-1].ended, pixels.astype(np.float32) / 255)
    assert_close(jnp.where(jnp.isinf(a), 0.0, a), jnp.where(jnp.isinf(b), 0.0, b))


def test_scores_against_float64(history):
    """z = sum_i alpha_i z^(i): cosines of slot features with their own rows, written out.

    Both are whitened by F^-1 (x - centre) of their slot first; F is well conditioned by its
    which multiplies the rounding of a cosine.
    """
    state = history[-1].ended
    features = np.random.default_rng(3).normal(size=(5, 4, 12)).astype(np.float32)
    scores, alpha = verbs.one_device().score(state, jnp.asarray(features))
    rows, scale = np.float64(state.memory["rows"]), float(state.trainable["head"]["scale"])
    memory, expected = state.memory, np.zeros((5, 7))
    for i in range(3):
        factor = shrunk_factor(memory["scatter"][i], memory["count"][i], 0.6)
        factor, centre = np.float64(factor), np.float64(memory["metrics"].centre[i])
        assert np.linalg.cond(factor) < 100
        for b in range(5):
            for c in (4, 1, 0, 5, 2):
                f = np.linalg.solve(factor, np.float64(features[b, i]) - centre)
                r = np.linalg.solve(factor, rows[i, c] - centre)
                cosine = f @ r / np.linalg.norm(f) / np.linalg.norm(r)
                expected[b, c] += float(alpha[b, i]) * scale * cosine
    expected[:, [3, 6]] = -np.inf
    np.testing.assert_allclose(scores, expected, atol=BUDGET)


def test_what_a_finished_task_leaves(tiny, history):
    """Rows, class means, pooled scatter and task state against direct formulas."""
    stage, task = history[1], tiny.tasks[1]
    images = np.concatenate([tiny.batch(task, s)["image"] for s in range(2)])
    features = np.float64(verbs.slot_features(stage.ended, images))
    memory, index, c = stage.ended.memory, task.index, task.classes[0]
    means = features.mean(0)
    np.testing.assert_allclose(memory["class_means"][c], means[0], atol=BUDGET)
    np.testing.assert_allclose(memory["rows"][:2, c], means[:2], atol=BUDGET)
    # Later slots borrow the row of the task's own slot.
    np.testing.assert_allclose(memory["rows"][2:, c], np.stack([means[1]] * 2), atol=BUDGET)
    centred, older = features - means, np.asarray(history[0].ended.memory["scatter"][0])
    # Both slots have both tasks: slot 1 the first one's as that was in slot 0; later ones nothing.
    for slot in range(2):
        expected = older + centred[:, slot].T @ centred[:, slot]
        np.testing.assert_allclose(memory["scatter"][slot], expected, atol=BUDGET)
    np.testing.assert_array_equal(memory["count"], [16.0, 16.0, 0.0, 0.0])
    assert not np.asarray(memory["scatter"])[2:].any()
    embedding = gate.task_embedding(
        stage.trained.trainable["adapter"],
        stage.begun.trainable["adapter"],
        stage.ended.config.gate,
    )
    np.testing.assert_allclose(memory["task_states"][index], embedding, atol=BUDGET)


def test_the_start_of_a_task_survives_the_donation(history):
    """`start` and the trainable adapter begin equal; donating one must not take the other."""
    stage = history[1]
    jax.tree.map(assert_same_bytes, stage.trained.memory["start"], stage.begun.trainable["adapter"])
    assert distance(stage.trained.memory["start"], stage.trained.trainable["adapter"]) > 1e-5


def test_step_reports_its_terms(tiny, history):
    _, metrics = qkd_jax.train_task(tiny.copy(history[2].begun), tiny.batch(tiny.tasks[2]))
    assert set(metrics) == KEYS
    values = {name: float(value) for name, value in metrics.items()}
    assert all(np.isfinite(v) for v in values.values())
    c = history[2].begun.config
    total = (
        values["loss_ce"]
        + c.distillation.weight * values["loss_kd"]
        + c.sparsity.weight * values["loss_sparsity"]
    )
    assert abs(values["loss"] - total) < BUDGET
    assert 0 <= values["gate_entropy"] <= np.log(2) + 1e-6 and values["loss_kd"] >= 0


def test_a_scan_of_steps_equals_single_steps(tiny, history):
    task, begun = tiny.tasks[2], history[2].begun
    batches = [tiny.batch(task, s) for s in range(3)]
    one, losses = tiny.copy(begun), []
    for batch in batches:
        one, metrics = qkd_jax.train_task(one, batch)
        losses.append(float(metrics["loss"]))
    stacked = {name: np.stack([b[name] for b in batches]) for name in batches[0]}
    many, metrics = qkd_jax.train_task(tiny.copy(begun), stacked)
    assert metrics["loss"].shape == (3,)
    np.testing.assert_allclose(metrics["loss"], losses, atol=BUDGET)
    assert int(many.step) == int(one.step) == 3
    assert_close(one.trainable, many.trainable)


def test_a_repeated_step_is_bit_identical_and_the_seed_matters(tiny, history):
    batch = tiny.batch(tiny.tasks[2])
    begun = history[2].begun
    a, _ = qkd_jax.train_task(tiny.copy(begun), batch)
    b, _ = qkd_jax.train_task(tiny.copy(begun), batch)
    jax.tree.map(assert_same_bytes, a.trainable, b.trainable)
    # Dropout is drawn from the state's key.
    c, _ = qkd_jax.train_task(tiny.copy(begun).replace(key=jax.random.key(8)), batch)
    assert distance(a.trainable, c.trainable) > 1e-6


def test_only_what_moves_is_donated(tiny, history):
    state = tiny.copy(history[2].begun)
    qkd_jax.train_task(state, tiny.batch(tiny.tasks[2]))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.trainable))
    held = (state.backbone, state.memory, state.task, state.task_of_class)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(held))


def test_cached_features_give_the_same_step(tiny, history):
    batch, begun = tiny.batch(tiny.tasks[2]), history[2].begun
    features = np.array(verbs.slot_features(history[1].ended, batch["image"]))
    features[:, 2:] = 3.0  # slots that are not filled yet must not matter
    plain, metrics = qkd_jax.train_task(tiny.copy(begun), batch)
    cached, again = qkd_jax.train_task(tiny.copy(begun), {**batch, "features": features})
    for name in metrics:
        np.testing.assert_allclose(metrics[name], again[name], atol=BUDGET)
    assert float(metrics["loss_kd"]) > 0
    # One step of SGD from equal states: equal parameters are equal gradients times the rate.
    assert_close(plain.trainable, cached.trainable, atol=0.05 * BUDGET)


def test_padded_rows_change_nothing_whatever_they_hold(tiny, history):
    real, begun = tiny.batch(tiny.tasks[2], size=2), history[2].begun
    results = []
    for filling in (0.0, 1.0, np.nan):
        image = np.concatenate([real["image"], np.full((2, 8, 8, 3), filling, np.float32)])
        label = np.concatenate([real["label"], [999, -5]])
        mask = np.array([True, True, False, False])
        state, metrics = qkd_jax.train_task(
            tiny.copy(begun), {"image": image, "label": label, "mask": mask}
        )
        results.append((state.trainable, metrics))
    for other in results[1:]:
        jax.tree.map(assert_same_bytes, results[0], other)


def test_padded_rows_do_not_reach_the_statistics(tiny, history):
    trained, batch = verbs.one_device().freeze(history[2].trained), tiny.batch(tiny.tasks[2])
    features = np.array(verbs.slot_features(trained, batch["image"]))
    plain = {"label": batch["label"], "features": features, "mask": np.ones(4, bool)}
    plain = verbs.one_device().finish(trained, [plain])
    padded = {
        "label": np.concatenate([batch["label"], [2, 2]]),
        "features": np.concatenate([features, np.full((2, 4, 12), np.nan, np.float32)]),
        "mask": np.arange(6) < 4,
    }
    again = verbs.one_device().finish(trained, [padded])
    # Sums over 4 and over 6 rows round differently; inverting the factor multiplies that by its
    # condition number (below 100).
    inverted = ("metrics", "whitened_rows")
    for name, value in plain.memory.items():
        assert_close(value, again.memory[name], atol=1e-3 if name in inverted else 1e-5)


def test_the_way_from_a_kept_stem_equals_that_from_the_images(tiny, history):
    """With no adapter in block 0, training can start from what all adapters share."""
    state, batch = history[2].begun, tiny.batch(tiny.tasks[2])
    spec = dataclasses.replace(state.config.adapter, first_block=1)
    memory = jax.tree.map(lambda a: a[:, 1:], state.memory["adapters"])
    adapter = jax.tree.map(lambda a: a[1:], history[2].trained.trainable["adapter"])
    trainable = {**state.trainable, "adapter": adapter}
    state = state.replace(
        config=state.config.replace(adapter=spec),
        memory={**state.memory, "adapters": memory},
        trainable=trainable,
        opt_state=optimiser(state.config.train).init(trainable),
    )
    arrays = jax.tree.map(jnp.asarray, check_batch(state, batch))
    stem = shared_part(state, arrays["inputs"])
    assert stem.residual.shape == (4, 1, 12) and stem.block == 1
    step, (held, moving) = jax.jit(device_step), split(state)
    images, metrics = step(held, moving, arrays)
    kept, again = step(held, moving, {**arrays, "inputs": stem})
    assert_close(metrics, again)
    assert_close(images.trainable, kept.trainable, atol=0.05 * BUDGET)
    assert distance(kept.trainable["adapter"], adapter) > 1e-6 and metrics["loss_kd"] > 0


def test_adapters_on_the_host_are_the_same_and_stay_there(tiny, history):
    """Learning, and answers of all slots and routed, with adapters that a pass fetches. This is a
    CPU, whose two memories are one: what is tested is that every program keeps to the right one.
    Two teachers of at most two old adapters are all of them.
    """
    kinds = set()
    stages = tiny.run(tiny.backbone, tiny.config(*METHOD, "adapter.memory=host", TOP(2)))
    for stage, expected in zip(stages, history, strict=True):
        for state in (stage.begun, stage.trained, stage.ended):
            kinds |= {
                leaf.sharding.memory_kind for leaf in jax.tree.leaves(state.memory["adapters"])
            }
            others = {n: v for n, v in state.memory.items() if n != "adapters"}
            assert "pinned_host" not in {a.sharding.memory_kind for a in jax.tree.leaves(others)}
        assert_close(stage.trained.trainable, expected.trained.trainable)
        assert_close(stage.ended.memory["adapters"], expected.ended.memory["adapters"])
    assert kinds == {"pinned_host"}
    images = tiny.batch(tiny.tasks[2])["image"]
    for kind in ("fusion.kind=logits", "fusion.kind=routed"):
        found, expected = (
            qkd_jax.predict(s.replace(config=qkd_jax.override(s.config, kind)), images)
            for s in (stages[-1].ended, history[-1].ended)
        )
        np.testing.assert_allclose(found, expected, atol=BUDGET)


def test_adapters_on_the_host_are_refused_where_all_are_needed_at_once(tiny):
    config = tiny.config(*METHOD, "adapter.memory=host", "fusion.kind=block_mix")
    with pytest.raises(ConfigError, match=r"adapter\.memory: expected device, since fusion\.kind"):
        qkd_jax.init_state(jax.random.key(0), tiny.backbone, config)


def test_a_class_that_is_a_task_of_its_own_has_a_direction(tiny, history):
    """Its slot has seen no other class: centred at its own mean, its row would be zero, and its
    logit zero for every image, until the next task.
    """
    memory, (label,) = history[1].ended.memory, tiny.tasks[1].classes
    row = np.asarray(memory["whitened_rows"])[1, label]
    others = np.asarray(memory["whitened_rows"])[1, list(tiny.tasks[0].classes)]
    assert np.linalg.norm(row) > 0.1 * np.linalg.norm(others, axis=1).max()
    seen = [*tiny.tasks[0].classes, label]  # the centre is the mean of all rows of the slot
    centre = np.asarray(memory["rows"])[1, seen].mean(0)
    np.testing.assert_allclose(memory["metrics"].centre[1], centre, atol=1e-6)
