"""SimpleCIL, plain and whitened, and finetune against direct NumPy in float64.

Error budget: means of 8 features near 1 and cosines of 12 numbers, below 100 eps = 1.2e-5; the
backbone itself is only compared with itself.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qkd_jax
from qkd_jax.engine import verbs
from qkd_jax.errors import ConfigError
from qkd_jax.learners.task_adapters import encode_with
from qkd_jax.nn.encode import encode
from qkd_jax.nn.inputs import Raw

BUDGET = 2e-5


def cosines(features, rows):
    features, rows = np.float64(features), np.float64(rows)
    lengths = np.linalg.norm(features, axis=1)[:, None] * np.linalg.norm(rows, axis=1)[None]
    return features @ rows.T / lengths


def all_of(tiny, task):
    batches = [tiny.batch(task, s) for s in range(2)]
    return (np.concatenate([b[name] for b in batches]) for name in ("image", "label"))


@pytest.fixture(scope="module")
def simple(tiny):
    return tiny.run(tiny.backbone, tiny.config("method=simplecil"))


@pytest.fixture(scope="module")
def tuned(tiny):
    return tiny.run(tiny.backbone, tiny.config("method=finetune"))


def test_simplecil_is_the_nearest_class_mean_of_the_frozen_feature(tiny, simple):
    frozen = jax.jit(lambda x: encode(tiny.backbone, Raw({"image": x}))[:, 0])
    means = {}
    for task in tiny.tasks:
        images, labels = all_of(tiny, task)
        features = np.float64(frozen(images))
        means |= {c: features[labels == c].mean(0) for c in task.classes}
    columns = sorted(means)
    queries = tiny.batch(tiny.tasks[0], 9)["image"]
    scores = np.asarray(qkd_jax.predict(simple[-1].ended, queries))
    expected = cosines(frozen(queries), np.stack([means[c] for c in columns]))
    np.testing.assert_allclose(scores[:, columns], expected, atol=BUDGET)
    assert (scores[:, [3, 6]] == -np.inf).all()


def test_simplecil_needs_no_class_order(tiny, simple):
    order = [tiny.tasks[i].classes for i in (2, 0, 1)]
    tasks = [qkd_jax.Task(i, classes) for i, classes in enumerate(order)]
    state = qkd_jax.init_state(jax.random.key(1), tiny.backbone, simple[-1].ended.config)
    by_class = {t.classes: t for t in tiny.tasks}
    for task in tasks:
        state = qkd_jax.begin_task(state, task)
        original = by_class[task.classes]
        state = qkd_jax.end_task(state, [tiny.batch(original, s) for s in range(2)])
    np.testing.assert_array_equal(state.memory["rows"], simple[-1].ended.memory["rows"])


@pytest.fixture(scope="module")
def whitened(tiny):
    config = tiny.config("method=simplecil", "classifier.kind=whitened", "classifier.shrinkage=0.3")
    return tiny.run(tiny.backbone, config)


def test_whitened_simplecil_compares_in_the_pooled_within_class_metric(tiny, simple, whitened):
    """S = 0.7 Sigma + 0.3 tr(Sigma) / D I over all images seen; cosines of S^-1/2 (x - centre).

    The metric multiplies the rounding of a feature by its condition, below 10 here.
    """
    for count in (1, 3):
        state, centred, means = whitened[count - 1].ended, [], {}
        for task in tiny.tasks[:count]:
            images, labels = all_of(tiny, task)
            features = np.float64(verbs.slot_features(state, images)[:, 0])
            means |= {c: features[labels == c].mean(0) for c in task.classes}
            centred.append(features - np.stack([means[c] for c in labels]))
        centred, columns = np.concatenate(centred), sorted(means)
        sigma = centred.T @ centred / len(centred)
        metric = 0.7 * sigma + 0.3 * np.trace(sigma) / 12 * np.eye(12)
        values, vectors = np.linalg.eigh(metric)
        root = vectors / np.sqrt(values) @ vectors.T
        assert np.sqrt(values[-1] / values[0]) < 10
        rows = np.stack([means[c] for c in columns])
        queries = tiny.batch(tiny.tasks[0], 9)["image"]
        features = np.float64(verbs.slot_features(state, queries)[:, 0])
        centre = rows.mean(0)
        expected = cosines((features - centre) @ root, (rows - centre) @ root)
        scores = np.asarray(qkd_jax.predict(state, queries))
        np.testing.assert_allclose(scores[:, columns], expected, atol=10 * BUDGET)
        np.testing.assert_array_equal(state.memory["rows"], simple[count - 1].ended.memory["rows"])
        assert (np.delete(scores, columns, axis=1) == -np.inf).all()


def test_whitened_simplecil_with_one_image_a_class(tiny, whitened):
    """No spread within classes is known: the metric is a multiple of the identity, nothing NaN."""
    state = qkd_jax.init_state(jax.random.key(0), tiny.backbone, whitened[0].ended.config)
    state = qkd_jax.begin_task(state, tiny.tasks[0])
    batch = tiny.batch(tiny.tasks[0], size=2)
    state = qkd_jax.end_task(state, [batch])
    features = np.float64(verbs.slot_features(state, batch["image"])[:, 0])
    offsets = features - features.mean(0)
    scores = np.asarray(qkd_jax.predict(state, batch["image"]))[:, list(tiny.tasks[0].classes)]
    # Two class means lie on opposite sides of their mean.
    np.testing.assert_allclose(scores, cosines(offsets, offsets), atol=10 * BUDGET)


def test_simplecil_trains_nothing(tiny, simple):
    with pytest.raises(ConfigError, match="trains nothing"):
        qkd_jax.train_task(simple[0].begun, tiny.batch(tiny.tasks[0]))
    assert jax.tree.leaves(simple[0].begun.trainable) == []


def test_finetune_scores_with_its_one_adapter_and_all_rows(tiny, tuned):
    state = tuned[-1].ended
    queries = tiny.batch(tiny.tasks[0], 9)["image"]
    scores = np.asarray(qkd_jax.predict(state, queries))
    adapter = state.trainable["adapter"]
    feature = jax.jit(lambda x: encode_with(state, adapter, Raw({"image": x})))(queries)
    columns, scale = [4, 1, 0, 5, 2], float(state.trainable["head"]["scale"])
    rows = np.stack(
        [
            np.asarray(stage.trained.trainable["head"]["rows"])[task.classes.index(c)]
            for task, stage in zip(tiny.tasks, tuned, strict=True)
            for c in task.classes
        ]
    )
    np.testing.assert_allclose(
        scores[:, columns], scale * cosines(feature, rows), atol=scale * BUDGET
    )
    assert (scores[:, [3, 6]] == -np.inf).all()


def test_finetune_goes_on_from_its_adapter_and_keeps_old_rows(tiny, tuned):
    for before, after in itertools.pairwise(tuned):
        jax.tree.map(
            np.testing.assert_array_equal,
            before.trained.trainable["adapter"],
            after.begun.trainable["adapter"],
        )
    first = np.array(tiny.tasks[0].classes)
    for later in tuned[1:]:
        np.testing.assert_array_equal(
            later.ended.memory["rows"][first], tuned[0].ended.memory["rows"][first]
        )
    jax.tree.map(
        np.testing.assert_array_equal, tiny.backbone.params, tuned[-1].ended.backbone.params
    )


def test_finetune_loss_is_cross_entropy_over_the_classes_of_the_task(tiny, tuned):
    """One class in the task: its only column has probability one, whatever the padding holds."""
    state, metrics = qkd_jax.train_task(tiny.copy(tuned[1].begun), tiny.batch(tiny.tasks[1]))
    assert float(metrics["loss"]) == 0.0 and float(metrics["train_accuracy"]) == 100.0
    assert set(metrics) == {"loss", "loss_ce", "train_accuracy", "learning_rate"}
    # Where the loss is constant nothing but decay can move the adapter.
    before, after = (s.trainable["adapter"]["up"]["bias"] for s in (tuned[1].begun, state))
    np.testing.assert_array_equal(before, after)


def test_a_step_is_that_of_its_real_rows_alone(tiny, tuned):
    """The mean is over real rows: two padded rows of four leave the step of a batch of two."""
    real = tiny.batch(tiny.tasks[0], size=2)
    padded = {name: np.concatenate([value] * 2) for name, value in real.items()}
    padded["mask"] = np.array([True, True, False, False])
    alone, metrics = qkd_jax.train_task(tiny.copy(tuned[0].begun), real)
    state, again = qkd_jax.train_task(tiny.copy(tuned[0].begun), padded)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=BUDGET),
        (alone.trainable, metrics),
        (state.trainable, again),
    )


def test_finetune_learns_a_separable_task(tiny, tuned):
    state, losses = tiny.copy(tuned[0].begun).replace(num_steps=jnp.int32(0)), []
    batch = tiny.batch(tiny.tasks[0])
    stacked = {name: np.stack([value] * 40) for name, value in batch.items()}
    state, metrics = qkd_jax.train_task(state, stacked)
    losses = np.asarray(metrics["loss"])
    assert losses[-5:].mean() < 0.5 * losses[:5].mean()
    assert float(metrics["train_accuracy"][-1]) == 100.0
