"""SSIAT against loops in NumPy float64.

Error budget: features of 12 numbers near 1, of which sums over 8 images are divided again: below
100 eps = 1.2e-5; the loss is 20 cosines, 20 times that.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qkd_jax
from qkd_jax.engine import verbs
from qkd_jax.errors import ConfigError
from qkd_jax.learners import ssiat
from qkd_jax.learners.shape import Context
from qkd_jax.learners.task_adapters import encode_with
from qkd_jax.learners.task_heads import aligned, alignment_loss, generator_of
from qkd_jax.nn.inputs import Raw

BUDGET = 2e-5
SETTINGS = (
    "method=ssiat",
    "ssiat.margin=0.2",
    "ssiat.kernel_width=0.5",
    "ssiat.kernel_floor=0.001",
    "alignment.epochs=2",
    "alignment.samples=8",
    "alignment.learning_rate=0.01",
    "alignment.jitter=0.001",
)


@pytest.fixture(scope="module")
def history(tiny):
    return tiny.run(tiny.backbone, tiny.config(*SETTINGS))


def images_of(tiny, task):
    batches = [tiny.batch(task, s) for s in range(2)]
    return (np.concatenate([b[name] for b in batches]) for name in ("image", "label"))


@pytest.fixture(scope="module")
def features_under(tiny):
    """(state, adapter, task) -> float64 features of the task's training images."""
    encode = jax.jit(lambda state, adapter, x: encode_with(state, adapter, x))

    def features(state, adapter, task):
        images, labels = images_of(tiny, task)
        return np.float64(encode(state, adapter, Raw({"image": images}))), labels

    return features


def test_means_move_with_the_adapter(tiny, history, features_under):
    """mu + sum_i w_i (g_i - f_i) / sum_i w_i for old classes; new ones get the mean of g."""
    for task, before, after in zip(tiny.tasks[1:], history, history[1:], strict=False):
        state = after.ended
        old, labels = features_under(state, before.ended.trainable["adapter"], task)
        new, _ = features_under(state, state.trainable["adapter"], task)
        means = np.float64(before.ended.memory["generator"].mean)
        found, moved = state.memory["generator"].mean, []
        for c in [c for t in tiny.tasks[: task.index] for c in t.classes]:
            weight = np.exp(-((old - means[c]) ** 2).sum(1) / (2 * 0.5**2)) + 0.001
            shift = weight @ (new - old) / weight.sum()
            moved.append(np.abs(shift).max())
            np.testing.assert_allclose(found[c], means[c] + shift, atol=BUDGET)
        # A task of one class has no loss: only decay moves the adapter.
        assert (max(moved) > 20 * BUDGET) == (len(task.classes) > 1)
        for c in task.classes:
            np.testing.assert_allclose(found[c], new[labels == c].mean(0), atol=BUDGET)


def test_factors_of_old_classes_stay(tiny, history):
    first = np.array(tiny.tasks[0].classes)
    old, new = (h.ended.memory["generator"].factor for h in (history[0], history[2]))
    np.testing.assert_array_equal(old[first], new[first])
    assert np.abs(old[first]).sum() > 0 and not np.asarray(old[5]).any()


def test_unpaired_and_no_shift(tiny, history, features_under):
    """mean(g) - sum_i w_i f_i / sum_i w_i; or zero. Padding rows may hold anything."""
    task, state = tiny.tasks[2], history[2].trained
    old, labels = features_under(state, state.memory["previous"], task)
    new, _ = features_under(state, state.trainable["adapter"], task)
    features = np.full((12, 4, 12), np.nan, np.float32)
    features[:8, 1], features[:8, 2] = old, new
    label, mask = np.resize(labels, 12), np.arange(12) < 8
    config = qkd_jax.override(state.config, "ssiat.shift=unpaired")
    other = state.replace(config=config)
    sums = verbs.one_device()._accumulate(
        other, ssiat.statistics(config, 4, 12), features, label, mask
    )
    found, expected = ssiat.shifts(other, sums), np.zeros((7, 12))
    for c in (0, 1, 4):
        mean = np.float64(state.memory["generator"].mean[c])
        weight = np.exp(-((old - mean) ** 2).sum(1) / (2 * 0.5**2)) + 0.001
        expected[c] = new.mean(0) - weight @ old / weight.sum()
    np.testing.assert_allclose(found, expected, atol=BUDGET)
    none = state.replace(config=qkd_jax.override(config, "ssiat.shift=none"))
    assert not np.asarray(ssiat.shifts(none, sums)).any()


def test_the_adapter_goes_on_and_slots_name_the_two_last(tiny, history):
    images = tiny.batch(tiny.tasks[0], 5)["image"]
    for before, after in itertools.pairwise(history):
        kept = before.ended.trainable["adapter"]
        for other in (after.begun.trainable["adapter"], after.ended.memory["previous"]):
            jax.tree.map(np.testing.assert_array_equal, kept, other)
        slot = int(before.ended.task)
        then = verbs.slot_features(before.ended, images, (slot,))[:, slot]
        now = verbs.slot_features(after.ended, images, (slot, slot + 1))
        np.testing.assert_array_equal(now[:, slot], then)
    assert np.abs(now[:, 2] - now[:, 1]).max() > 20 * BUDGET
    jax.tree.map(
        np.testing.assert_array_equal, tiny.backbone.params, history[2].ended.backbone.params
    )


def test_margin_loss_against_numpy(tiny, history, features_under):
    """-log softmax(20 (cos - 0.2 [own class]))[own class]; one class alone costs nothing."""
    keys = Context(jax.random.split(jax.random.key(0), 8), jnp.ones(8, bool), lambda x: x)
    loss = jax.jit(lambda s, x, y: ssiat.loss(s.trainable, s, x, {"label": y}, keys)["loss"])
    config = qkd_jax.override(history[0].trained.config, "adapter.dropout=0.0")
    for stage, task in ((history[0], tiny.tasks[0]), (history[1], tiny.tasks[1])):
        state = stage.trained.replace(config=config)
        features, labels = features_under(stage.trained, state.trainable["adapter"], task)
        images = Raw({"image": next(images_of(tiny, task))})
        found = loss(state, images, jnp.asarray(labels))
        rows = np.float64(state.trainable["head"]["rows"])[: len(task.classes)]
        lengths = np.linalg.norm(features, axis=1)[:, None] * np.linalg.norm(rows, axis=1)
        own = np.stack([labels == c for c in task.classes], axis=1)
        logits = 20 * (features @ rows.T / lengths - 0.2 * own)
        expected = np.log(np.exp(logits).sum(1)) - logits[own]
        np.testing.assert_allclose(found, expected, atol=20 * BUDGET)


def test_alignment_moves_all_rows_from_the_second_task_on(tiny, history):
    rows = [np.asarray(h.ended.memory["rows"]) for h in history]
    first = np.array(tiny.tasks[0].classes)
    np.testing.assert_array_equal(rows[0][first], history[0].trained.trainable["head"]["rows"])
    for c in (0, 1, 4):
        assert np.abs(rows[1][c] - rows[2][c]).max() > 0
    assert not rows[2][[3, 6]].any()


def test_alignment_lowers_its_loss_and_can_be_left_out(history):
    state = history[2].ended
    gaussians = state.memory["generator"]
    start = 0.02 * jax.random.normal(jax.random.key(1), state.memory["rows"].shape)
    config = qkd_jax.override(state.config, "alignment.epochs=20", "alignment.learning_rate=0.001")
    drawn = ssiat.scaled(state, gaussians)

    @jax.jit
    def run(s):
        def logits_of(rows, features):
            return ssiat.logits_of(s, features, rows)

        return aligned(s, jax.random.key(0), start, logits_of, generator_of(config), drawn)

    @jax.jit
    def cost_of(rows, s, features, labels):
        return alignment_loss(s, ssiat.logits_of(s, features, rows), labels)

    seen = jnp.array([4, 1, 0, 5, 2])
    draws = jnp.repeat(gaussians.mean[seen], 2, axis=0)
    cost = [
        float(cost_of(rows, state, draws, jnp.repeat(seen, 2)))
        for rows in (start, run(state.replace(config=config)))
    ]
    assert cost[1] < 0.5 * cost[0]
    without = history[2].trained
    without = without.replace(config=qkd_jax.override(without.config, "alignment.epochs=0"))
    statistics = ssiat.statistics(without.config, 4, 12)
    rows = np.asarray(verbs.one_device()._finish(without, statistics).memory["rows"])
    kept = [0, 1, 4]
    np.testing.assert_array_equal(rows[kept], np.asarray(without.memory["rows"])[kept])
    np.testing.assert_array_equal(rows[[5, 2]], without.trainable["head"]["rows"])


def test_old_classes_are_drawn_around_a_part_of_their_mean(history):
    state = history[2].ended
    gaussians = state.memory["generator"].replace(mean=jnp.ones((7, 12)))
    factors = ssiat.scaled(state, gaussians).mean[:, 0]
    share = np.array([2, 1, 3, 3, 1, 3, 3]) / 3
    seen = np.array([0, 1, 2, 4, 5])
    np.testing.assert_allclose(factors[seen], 0.9 + 0.1 * share[seen], rtol=1e-6)


def test_predictions_do_not_depend_on_the_batch(tiny, history):
    state, images = history[2].ended, tiny.batch(tiny.tasks[2])["image"]
    scores = np.asarray(qkd_jax.predict(state, images))
    order = np.array([3, 1, 0, 2])
    again = qkd_jax.predict(state, images[order])
    np.testing.assert_allclose(again, scores[order], atol=20 * BUDGET)
    assert (scores[:, [3, 6]] == -np.inf).all() and np.isfinite(scores[:, [0, 1, 2, 4, 5]]).all()


@pytest.mark.parametrize(
    "setting",
    ["scale=0.0", "margin=-0.1", "kernel_width=0.0", "kernel_floor=0.0", "mean_decay=1.0"],
)
def test_settings_out_of_range_are_named(tiny, setting):
    with pytest.raises(ConfigError, match=f"ssiat.{setting.split('=')[0]}: expected (0|above)"):
        tiny.config("method=ssiat", "ssiat." + setting)
