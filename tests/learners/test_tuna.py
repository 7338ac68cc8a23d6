"""TUNA: fusion, overlap, margin and selection against plain NumPy float64, and three tasks of a
run.

Error budget: cosines of 12 numbers times the scale 20, soft-maxed: 20 * 10 eps = 2.4e-5 at most.
"""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qkd_jax
from qkd_jax.engine import verbs
from qkd_jax.errors import ConfigError
from qkd_jax.learners import tuna
from qkd_jax.learners.shape import Context, learner_of
from qkd_jax.nn.inputs import Raw

BUDGET = 3e-5
OWNER = [1, 0, 2, -1, 0, 2, -1]  # task of each class


@pytest.fixture(scope="module")
def config(tiny):
    changes = "method=tuna alignment.epochs=2 alignment.samples=6 tuna.orthogonality=0.5"
    return tiny.config(*changes.split(), "train.decay_leaves=kernel,bias,rows")


@pytest.fixture(scope="module")
def history(tiny, config):
    return tiny.run(tiny.backbone, config)


def softmax(z):
    e = np.exp(z - z.max())
    return e / e.sum()


def test_fusion_by_sign_and_magnitude():
    values = np.array(
        [
            [3.0, -1.0, 1.0, 0.0, 2.0, -5.0],
            [-1.0, -4.0, -1.0, 0.0, 1.0, 1.0],
            [-1.0, 2.0, 0.0, 0.0, 3.0, 1.0],
            [9.0, 9.0, 9.0, 9.0, 9.0, 9.0],  # not known
        ]
    )
    known = jnp.array([True, True, True, False])
    found = tuna.fused({"kernel": jnp.float32(values)}, known)["kernel"]
    # Mean 1/3: the largest positive; -1: the largest negative; 0 counts as negative: -1; and so on.
    np.testing.assert_array_equal(found, [3.0, -4.0, -1.0, 0.0, 3.0, -5.0])


def test_fusion_of_one_adapter_is_that_adapter(history):
    first = history[0].ended.memory
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a[0], b), first["adapters"], first["universal"]
    )


def test_overlap_against_loops(history):
    """Two old tasks: sizes of the mean of u_d . v_e over pairs of columns, meaned over blocks."""
    state, generator = history[2].trained, np.random.default_rng(0)
    mine, stored = generator.normal(size=(2, 3, 12)), generator.normal(size=(4, 2, 3, 12))
    adapters = jax.tree.map(lambda a: a, state.memory["adapters"])
    adapters["up"]["kernel"] = jnp.float32(stored)
    state = state.replace(memory={**state.memory, "adapters": adapters})
    expected = 0.0
    for task in range(2):
        for block in range(2):
            pairs = [
                u @ v / np.linalg.norm(u) / np.linalg.norm(v)
                for u in mine[block].T
                for v in stored[task, block].T
            ]
            expected += abs(np.mean(pairs)) / 2
    found = tuna.overlap(state, {"up": {"kernel": jnp.float32(mine)}})
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    # In the first task a new adapter has zeros there: no overlap, and no NaN in its gradient.
    first = history[0].begun
    value, gradient = jax.value_and_grad(lambda a: tuna.overlap(first, a))(
        first.trainable["adapter"]
    )
    assert value == 0.0
    assert all((np.asarray(g) == 0).all() for g in jax.tree.leaves(gradient))


def test_margin_by_hand(monkeypatch, tiny, history):
    """-log exp(s (cos_y - m)) / (exp(s (cos_y - m)) + sum of the others) for fixed features."""
    state = history[2].trained
    features = np.random.default_rng(1).normal(size=(4, 12)).astype(np.float32)
    monkeypatch.setattr(tuna, "encode_with", lambda *_: jnp.asarray(features))
    changed = qkd_jax.override(state.config, "tuna.scale=7.0", "tuna.margin=0.4")
    state = state.replace(config=changed)
    labels = np.array([5, 2, 2, 5])
    rows = Context(None, jnp.ones(4, bool), lambda x: x)
    terms = tuna.loss(state.trainable, state, None, {"label": jnp.asarray(labels)}, rows)
    weights = np.float64(state.trainable["head"]["rows"])
    for b in range(4):
        f = np.float64(features[b])
        cosine = weights @ f / np.linalg.norm(weights, axis=1) / np.linalg.norm(f)
        own = [5, 2].index(labels[b])
        logits = 7.0 * (cosine - 0.4 * (np.arange(2) == own))
        np.testing.assert_allclose(terms["loss_ce"][b], -np.log(softmax(logits)[own]), atol=BUDGET)
    expected = terms["loss_ce"] + 0.5 * np.exp(-3.0) * terms["loss_orthogonality"]
    np.testing.assert_allclose(terms["loss"], expected, rtol=1e-6)
    assert float(terms["loss_orthogonality"][0]) > 0


def test_selection_against_loops(history):
    """The least entropy of tasks 0 to 2 speaks; slots 0, 2, 4 are theirs, slot 5 is universal."""
    state, generator = history[2].ended, np.random.default_rng(2)
    features = generator.normal(size=(20, 8, 12)).astype(np.float32)
    rows, seen = np.float64(state.memory["rows"]), np.array(OWNER) >= 0
    scores, relevance = jax.tree.map(
        np.asarray, verbs.one_device().score(state, jnp.asarray(features))
    )
    length = np.maximum(np.linalg.norm(rows, axis=1), 1e-12)
    chosen_tasks = set()
    for image in range(20):
        f = np.float64(features[image])
        z = 20.0 * f @ rows.T / length / np.linalg.norm(f, axis=1)[:, None]
        spoken = np.array([softmax(np.where(seen, z[s], -np.inf)) for s in range(8)])
        doubt = [-(p[seen] * np.log(p[seen])).sum() for p in spoken[[0, 2, 4]]]
        chosen = int(np.argmin(doubt))
        chosen_tasks.add(chosen)
        expected = spoken[2 * chosen] + spoken[5]
        np.testing.assert_allclose(scores[image][seen], expected[seen], atol=BUDGET)
        np.testing.assert_array_equal(relevance[image], np.eye(4)[chosen])
    assert chosen_tasks == {0, 1, 2}
    assert (scores[:, ~seen] == -np.inf).all()


def test_slots_of_a_run(tiny, history, config):
    """Task slots under their adapters, the universal one under the fused; literal: the newest."""
    state, images = history[1].ended, tiny.batch(tiny.tasks[1])["image"]
    assert learner_of(config).slots.score(1) == (0, 2, 3)
    assert learner_of(config).num_slots(config) == 8
    # Two steps hardly tell the adapters apart.
    universal = jax.tree.map(lambda a: a + 0.1, state.memory["universal"])
    state = state.replace(memory={**state.memory, "universal": universal})
    features = verbs.slot_features(state, images)
    tried = tuna.encode_with(state, state.memory["universal"], Raw({"image": jnp.asarray(images)}))
    np.testing.assert_allclose(features[:, 3], tried, atol=BUDGET)
    assert np.abs(features[:, 3] - features[:, 2]).max() > 100 * BUDGET
    assert not np.asarray(features[:, jnp.array([1, 4, 5, 6, 7])]).any()
    newest = state.replace(config=qkd_jax.override(config, "tuna.universal=newest"))
    for chunk in (1, 2, 8):  # slot 3 is the newest adapter's, whatever is extracted beside it
        chunked = qkd_jax.override(newest.config, f"train.task_chunk={chunk}")
        found = verbs.slot_features(newest.replace(config=chunked), images)
        np.testing.assert_allclose(found[:, [2, 3]], features[:, [2, 2]], atol=BUDGET)


def test_means_are_scaled_by_age(history):
    state = history[2].ended

    def factors(kind):
        changed = qkd_jax.override(state.config, f"tuna.mean_decay={kind}")
        return np.asarray(tuna.mean_factors(state.replace(config=changed)))

    seen = np.array(OWNER) >= 0
    np.testing.assert_array_equal(factors("none"), np.ones(7))
    old = [0.9 + 0.1 * (i + 1) / 3 for i in OWNER]
    np.testing.assert_allclose(factors("old")[seen], np.array(old)[seen], rtol=1e-6)
    # Classes came in the order 4, 1, 0, 5, 2 and the last task has 2.
    place = {4: 0, 1: 1, 0: 2, 5: 3, 2: 4}
    new = [0.9 + 0.1 * (place.get(c, 0) // -2 + 1) / 3 for c in range(7)]
    np.testing.assert_allclose(factors("new")[seen], np.array(new)[seen], rtol=1e-6)


def test_what_a_task_leaves_stays(tiny, history):
    for task in tiny.tasks[:2]:
        i, c, old = task.index, np.array(task.classes), history[task.index].ended.memory
        for later in history[i + 1 :]:
            new = later.ended.memory
            jax.tree.map(
                lambda a, b, i=i: np.testing.assert_array_equal(a[i], b[i]),
                old["adapters"],
                new["adapters"],
            )
            jax.tree.map(
                lambda a, b, c=c: np.testing.assert_array_equal(a[c], b[c]),
                old["generator"],
                new["generator"],
            )
    for last, now in pairwise(history):
        jax.tree.map(
            np.testing.assert_array_equal,
            last.trained.trainable["adapter"],
            now.begun.trainable["adapter"],
        )


def test_the_head_is_aligned_from_the_second_task(history):
    first = history[0].ended.memory["rows"]
    np.testing.assert_array_equal(
        first[jnp.array([4, 1])], history[0].trained.trainable["head"]["rows"]
    )
    moved = np.asarray(history[1].ended.memory["rows"] - first).any(axis=1)
    np.testing.assert_array_equal(moved, [True, True, False, False, True, False, False])


def test_predictions_do_not_depend_on_the_batch(tiny, history):
    state, images = history[2].ended, tiny.batch(tiny.tasks[2])["image"]
    scores, relevance = verbs.predict_with_relevance(state, images)
    order = np.array([3, 1, 0, 2])
    again, relevance_again = verbs.predict_with_relevance(state, images[order])
    np.testing.assert_allclose(again, np.asarray(scores)[order], atol=BUDGET)
    np.testing.assert_array_equal(relevance_again, np.asarray(relevance)[order])
    scores = np.asarray(scores)
    assert (scores[:, [3, 6]] == -np.inf).all() and np.isfinite(scores[:, [0, 1, 2, 4, 5]]).all()


@pytest.mark.parametrize("setting", ["scale=0.0", "margin=-0.1", "orthogonality=-1.0"])
def test_settings_that_do_not_fit_are_refused(tiny, setting):
    with pytest.raises(ConfigError, match=f"tuna.{setting.partition('=')[0]}: expected (0|above)"):
        tiny.config("method=tuna", f"tuna.{setting}")
