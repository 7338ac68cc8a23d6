"""MoTE against nested loops in NumPy float64.

Error budget: cosines of 12 numbers times 10 and softmaxes over at most 5 of them, below 100 eps =
1.2e-5. Inputs where two confidences lie closer than 1e-3 would be a coin toss; there are none.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qkd_jax
from qkd_jax.engine import verbs
from qkd_jax.errors import ConfigError

BUDGET = 2e-5
OWNER = [1, 0, 2, -1, 0, 2, -1]  # task of each class


@pytest.fixture(scope="module")
def history(tiny):
    return tiny.run(tiny.backbone, tiny.config("method=mote"))


def cosine(a, b):
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


def weights_of(features, rows, *, filtering, merge, others):
    """(expert weights of one image, how many were kept), features [T, D] of the learned experts."""
    seen = [c for c, t in enumerate(OWNER) if t >= 0]
    predicted, confidence = [], []
    for feature in features:
        logits = np.array([10 * cosine(feature, rows[c]) for c in seen])
        p = np.exp(logits) / np.exp(logits).sum()
        predicted.append(seen[int(p.argmax())])
        confidence.append(p.max())
    gaps = np.diff(np.sort(confidence))
    assert gaps.min() > 1e-3
    experts = list(range(len(features)))
    kept = [i for i in experts if OWNER[predicted[i]] == i] if filtering else experts
    found = len(kept)
    if not kept:
        kept = [int(np.argmax(confidence))]
    best = max(kept, key=lambda i: confidence[i])
    if not merge:
        kept = [best]
    loud = {i: confidence[i] * (1.0 if i == best else others) for i in kept}
    total = sum(np.exp(v) for v in loud.values())
    return np.array([np.exp(loud[i]) / total if i in loud else 0.0 for i in experts]), found


@pytest.mark.parametrize("filtering", [True, False])
@pytest.mark.parametrize("merge", [True, False])
def test_score_against_loops(history, filtering, merge):
    state = history[2].ended
    settings = (f"mote.filter={filtering}", f"mote.merge={merge}", "mote.others=0.3")
    state = state.replace(config=qkd_jax.override(state.config, *map(str.lower, settings)))
    generator = np.random.default_rng(2)
    rows = generator.normal(size=(1, 7, 12)).astype(np.float32)
    state = state.replace(memory={**state.memory, "rows": jnp.asarray(rows)})
    # Near a class of the expert's own task, near another one's, or far from all.
    features = generator.normal(size=(24, 4, 12)).astype(np.float32)
    for b, column in enumerate([4, 1, 0, 5, 2] * 3):
        features[b, b % 3] += (3.0 + 0.05 * b) * rows[0, column]
    scores, weights = verbs.one_device().score(state, jnp.asarray(features))
    assert weights.shape == (24, 4)
    sizes = set()
    for b in range(24):
        wide = np.float64(features[b, :3])
        expected, size = weights_of(
            wide, np.float64(rows[0]), filtering=filtering, merge=merge, others=0.3
        )
        sizes.add(size)
        np.testing.assert_allclose(weights[b, :3], expected, atol=BUDGET)
        assert weights[b, 3] == 0
        fused = expected @ wide
        for c, t in enumerate(OWNER):
            wanted = cosine(fused, rows[0, c]) if t >= 0 else -np.inf
            np.testing.assert_allclose(scores[b, c], wanted, atol=BUDGET)
    assert sizes >= {0, 1, 2} if filtering else sizes == {3}


def test_rows_are_means_under_the_adapter_of_the_own_task(tiny, history):
    state = history[2].ended
    assert state.memory["rows"].shape == (1, 7, 12)
    for task in tiny.tasks:
        images = np.concatenate([tiny.batch(task, s)["image"] for s in range(2)])
        labels = np.concatenate([tiny.batch(task, s)["label"] for s in range(2)])
        features = np.float64(verbs.slot_features(state, images))[:, task.index]
        for c in task.classes:
            expected = features[labels == c].mean(0)
            np.testing.assert_allclose(state.memory["rows"][0, c], expected, atol=BUDGET)


def test_old_adapters_and_rows_stay(tiny, history):
    for task in tiny.tasks[:2]:
        i, c, old = task.index, np.array(task.classes), history[task.index].ended.memory
        for later in history[i + 1 :]:
            new = later.ended.memory
            jax.tree.map(
                lambda a, b, i=i: np.testing.assert_array_equal(a[i], b[i]),
                old["adapters"],
                new["adapters"],
            )
            np.testing.assert_array_equal(old["rows"][0, c], new["rows"][0, c])
    jax.tree.map(
        np.testing.assert_array_equal, tiny.backbone.params, history[2].ended.backbone.params
    )


def test_the_first_task_has_one_expert(tiny, history):
    """With one expert there is nothing to weigh: the nearest mean under its adapter."""
    state, images = history[0].ended, tiny.batch(tiny.tasks[0], 5)["image"]
    scores, weights = qkd_jax.predict_with_relevance(state, images)
    np.testing.assert_array_equal(weights, np.eye(4)[[0] * len(images)])
    features = np.float64(verbs.slot_features(state, images))[:, 0]
    for b, feature in enumerate(features):
        for c in tiny.tasks[0].classes:
            expected = cosine(feature, np.float64(state.memory["rows"][0, c]))
            np.testing.assert_allclose(scores[b, c], expected, atol=BUDGET)


def test_predictions_do_not_depend_on_the_batch(tiny, history):
    state, images = history[2].ended, tiny.batch(tiny.tasks[2])["image"]
    scores = np.asarray(qkd_jax.predict(state, images))
    order = np.array([3, 1, 0, 2])
    np.testing.assert_allclose(qkd_jax.predict(state, images[order]), scores[order], atol=BUDGET)
    assert (scores[:, [3, 6]] == -np.inf).all() and np.isfinite(scores[:, [0, 1, 2, 4, 5]]).all()


@pytest.mark.parametrize("setting", ["mote.others=1.5", "mote.sharpness=0.0"])
def test_settings_out_of_range_are_named(tiny, setting):
    message = f"{setting.split('=')[0]}: expected (0|above)"
    with pytest.raises(ConfigError, match=message):
        tiny.config("method=mote", setting)
