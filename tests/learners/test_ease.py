"""EASE against nested loops in NumPy float64.

Error budget: cosines of 12 numbers, a softmax over at most 5 of them and a mean of rows near 1:
below 100 eps = 1.2e-5.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qkd_jax
from qkd_jax.engine import verbs
from qkd_jax.learners.task_adapters import complemented, means_in_slots

BUDGET = 2e-5
OWNER = [1, 0, 2, -1, 0, 2, -1]  # task of each class


@pytest.fixture(scope="module")
def history(tiny):
    config = tiny.config("method=ease", "ease.alpha=0.1", "ease.complement=true")
    return tiny.run(tiny.backbone, config)


def cosine(a, b):
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


def brute_force_complement(rows, owner, last):
    """rows[d, c] = sum_k softmax_k(cos(rows[i, c], rows[i, k])) rows[d, k], i = task of c < d.

    k runs over all classes of tasks d and later. Independent of the library: plain loops.
    """
    rows, out = np.float64(rows), np.float64(rows)
    for d in range(last + 1):
        later = [k for k, t in enumerate(owner) if t >= d]
        for c, i in enumerate(owner):
            if 0 <= i < d:
                similarity = np.array([cosine(rows[i, c], rows[i, k]) for k in later])
                weights = np.exp(similarity) / np.exp(similarity).sum()
                out[d, c] = sum(w * rows[d, k] for w, k in zip(weights, later, strict=True))
    return out


def test_complement_against_nested_loops(history):
    state = history[2].ended
    np.testing.assert_array_equal(state.task_of_class, OWNER)
    rows = np.random.default_rng(0).normal(size=(4, 7, 12)).astype(np.float32)
    found = jax.jit(complemented)(jnp.asarray(rows), state)
    expected = brute_force_complement(rows, OWNER, last=2)
    np.testing.assert_allclose(found, expected, atol=BUDGET)
    # A class's own slot and earlier ones hold real means and stay bit-identical, so does slot 3.
    for c, i in enumerate(OWNER):
        kept = range(4) if i < 0 else [*range(i + 1), 3]
        np.testing.assert_array_equal(np.asarray(found)[list(kept), c], rows[list(kept), c])


def test_drift_against_nested_loops(history):
    """rows[i, c] + sum_k w_k (rows[d, k] - rows[i, k]), w = softmax(20 cos) over classes slot d
    saw.
    """
    state = history[2].ended
    rows = np.random.default_rng(1).normal(size=(4, 7, 12)).astype(np.float32)
    found = jax.jit(lambda r: complemented(r, state, sharpness=20.0, drift=True))(rows)
    wide = np.float64(rows)
    expected = wide.copy()
    for c, i in enumerate(OWNER):
        for d in range(i + 1, 3) if i >= 0 else ():
            later = [k for k, j in enumerate(OWNER) if j >= d]
            weights = np.array([np.exp(20 * cosine(wide[i, c], wide[i, k])) for k in later])
            moved = [wide[d, k] - wide[i, k] for k in later]
            expected[d, c] = wide[i, c] + weights @ moved / weights.sum()
    # The softmax of 20 cos carries 20 roundings of a cosine.
    np.testing.assert_allclose(found, expected, atol=20 * BUDGET)


def test_rows_of_a_run(tiny, history):
    """Class means of the task's images in every filled slot, then the complement of old classes."""
    previous = history[1].ended
    state, task = history[2].ended, tiny.tasks[2]
    images = np.concatenate([tiny.batch(task, s)["image"] for s in range(2)])
    labels = np.concatenate([tiny.batch(task, s)["label"] for s in range(2)])
    features = np.float64(verbs.slot_features(state, images))
    rows = np.float64(previous.memory["rows"])
    for c in task.classes:
        rows[:, c] = features[labels == c].mean(0)
        rows[3, c] = rows[2, c]
    expected = brute_force_complement(rows, OWNER, last=2)
    np.testing.assert_allclose(state.memory["rows"][:3], expected[:3], atol=2e-4)


def test_score_against_loops(history):
    """cos(f_i, row[i, c]) + alpha / t * sum over j != i of cos(f_j, row[j, c]), t = 2."""
    state = history[2].ended
    features = np.random.default_rng(1).normal(size=(5, 4, 12)).astype(np.float32)
    scores, relevance = verbs.one_device().score(state, jnp.asarray(features))
    assert relevance is None
    rows, expected = np.float64(state.memory["rows"]), np.full((5, 7), -np.inf)
    for b in range(5):
        for c, i in enumerate(OWNER):
            if i >= 0:
                parts = [cosine(np.float64(features[b, j]), rows[j, c]) for j in range(3)]
                others = sum(parts[j] for j in range(3) if j != i)
                expected[b, c] = parts[i] + 0.1 / 2 * others
    np.testing.assert_allclose(scores, expected, atol=BUDGET)


def test_old_adapters_stay_and_own_rows_stay(tiny, history):
    for task in tiny.tasks[:2]:
        i, c, old = task.index, np.array(task.classes), history[task.index].ended.memory
        for later in history[i + 1 :]:
            new = later.ended.memory
            jax.tree.map(
                lambda a, b, i=i: np.testing.assert_array_equal(a[i], b[i]),
                old["adapters"],
                new["adapters"],
            )
            # The prototype in the class's own subspace; only later subspaces are guessed anew.
            np.testing.assert_array_equal(old["rows"][: i + 1, c], new["rows"][: i + 1, c])
    jax.tree.map(
        np.testing.assert_array_equal, tiny.backbone.params, history[2].ended.backbone.params
    )


def test_without_the_complement_rows_are_borrowed():
    means = jnp.arange(4 * 2 * 3, dtype=jnp.float32).reshape(4, 2, 3)
    found = means_in_slots(means, jnp.int32(1))
    np.testing.assert_array_equal(found, means[jnp.array([0, 1, 1, 1])])


def test_predictions_do_not_depend_on_the_batch(tiny, history):
    state, images = history[2].ended, tiny.batch(tiny.tasks[2])["image"]
    scores = np.asarray(qkd_jax.predict(state, images))
    order = np.array([3, 1, 0, 2])
    np.testing.assert_allclose(qkd_jax.predict(state, images[order]), scores[order], atol=BUDGET)
    assert (scores[:, [3, 6]] == -np.inf).all() and np.isfinite(scores[:, [0, 1, 2, 4, 5]]).all()
