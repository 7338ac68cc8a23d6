"""What an evaluation counts, by hand, and how the rate of inference is measured."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from qkd_jax.runs import evaluation
from qkd_jax.runs.evaluation import Accuracies, inference_rate, joined, predictions

TASK_OF_CLASS = np.array([0, 1, 0, 1])  # classes 0 and 2 first, then 1 and 3
UNSEEN = -np.inf


def evaluated(accuracies, task, labels, scores, relevance=None, told=None):
    labels, scores = np.asarray(labels), np.asarray(scores, np.float32)
    told = None if told is None else np.asarray(told, np.float32)
    relevance = None if relevance is None else np.asarray(relevance)
    ids = np.array([f"image {n}" for n in range(len(labels))])
    found = predictions(ids, labels, scores, relevance, TASK_OF_CLASS, told)
    return accuracies.after(task, found, TASK_OF_CLASS), found


@pytest.fixture
def stages():
    """The counts after none, one and two tasks, without relevance."""
    none = Accuracies.none_yet(2)
    one, _ = evaluated(none, 0, [0, 2, 2], [[1, UNSEEN, 0, UNSEEN]] * 3)
    # Right, wrong in its own task, wrong but right when told the task, right.
    scores = [[3, 0, 1, 0], [3, 0, 1, 0], [1, 4, 2, 3], [0, 2, 0, 2]]
    two, _ = evaluated(one, 1, [0, 2, 2, 1], scores)
    return none, one, two


def test_counts_by_hand(stages):
    none, one, two = stages
    assert none.total.tolist() == [[0, 0], [0, 0]]
    assert one.correct.tolist() == [[1, 0], [0, 0]] and one.total.tolist() == [[3, 0], [0, 0]]
    assert two.correct.tolist() == [[1, 0], [1, 1]] and two.total.tolist() == [[3, 0], [3, 1]]
    assert two.within_task.tolist() == [[1, 0], [2, 1]]
    assert two.confusion is None


def test_what_is_shown_and_summarised(stages):
    _, one, two = stages
    assert one.line(0) == "accuracy 33.33" and two.line(1) == "accuracy 50.00"
    found = two.summary()
    assert found["accuracy_curve"] == [pytest.approx(100 / 3), 50.0]
    assert found["within_task_last_accuracy"] == 75.0
    assert found["routing_accuracy"] is None
    assert two.matrix() == {
        "orientation": "row = after task, column = evaluated task; counts of images",
        "correct": [[1, 0], [1, 1]],
        "total": [[3, 0], [3, 1]],
    }


def test_relevance_is_counted_by_its_largest(stages):
    *_, before = stages
    relevance = [[0.9, 0.1], [0.2, 0.8], [0.5, 0.5], [0.1, 0.9]]
    scores = [[3, 0, 1, 0]] * 4
    after, _ = evaluated(before, 1, [0, 2, 2, 1], scores, relevance)
    assert after.confusion.tolist() == [[2, 1], [0, 1]]  # a tie goes to the first task
    assert after.line(1) == "accuracy 25.00  routing 75.00"
    assert after.summary()["routing_accuracy"] == 75.0
    assert after.summary()["routing_recall_at_2"] == 100.0
    assert after.summary()["oracle_accuracy"] is None


def test_predictions_of_a_method_that_is_told_the_task_are_counted(stages):
    """It may still be wrong, in its own task and in others."""
    *_, before = stages
    told = [[9, 0, 0, 0], [9, 0, 0, 0], [0, 0, 9, 9], [0, 9, 0, 0]]
    after, found = evaluated(before, 1, [0, 2, 2, 1], [[3, 0, 1, 0]] * 4, told=told)
    assert found["oracle"].tolist() == [0, 0, 2, 1]
    assert after.summary()["oracle_accuracy"] == 75.0 and after.summary()["last_accuracy"] == 25.0


def test_a_checkpoint_keeps_all_of_it(stages):
    *_, two = stages
    scores = [[1, 0, 0, 0]] * 2
    routed, _ = evaluated(two, 1, [0, 1], scores, [[1.0, 0.0]] * 2, scores)
    for accuracies in (two, routed):
        kept = json.loads(json.dumps(accuracies.saved() | {"finished_tasks": 2}))
        restored = Accuracies.restored(kept)
        assert restored.saved() == accuracies.saved()
        assert restored.total.dtype == np.int64
        assert (restored.confusion is None) == (accuracies.confusion is None)
        assert restored.summary() == accuracies.summary()
    for name in ("second", "oracle"):  # of an earlier version
        kept.pop(name)
    assert Accuracies.restored(kept).summary()["oracle_accuracy"] is None


def test_predictions_rank_classes_and_ties_go_to_the_first():
    scores = [[0, 2, 2, 1], [UNSEEN, 5, UNSEEN, 6]]
    _, found = evaluated(Accuracies.none_yet(2), 1, [2, 3], scores, [[0.5, 0.5], [0.0, 1.0]])
    assert found["top5"].tolist() == [[1, 2, 3, 0], [3, 1, 0, 2]]
    assert found["predicted"].tolist() == [1, 3] and found["task"].tolist() == [0, 1]
    assert found["id"].tolist() == ["image 0", "image 1"] and found["label"].tolist() == [2, 3]
    assert found["relevance"].tolist() == [[0.5, 0.5], [0.0, 1.0]]
    _, found = evaluated(Accuracies.none_yet(2), 1, [2, 3], scores)
    assert "relevance" not in found


def test_probabilities_are_the_softmax_of_the_scores_of_seen_classes():
    """By hand: e^2 / (e^2 + e^1) of the second image; huge scores do not overflow."""
    scores = [[0, UNSEEN, 0, UNSEEN], [1, UNSEEN, 2, UNSEEN], [1000, UNSEEN, 0, UNSEEN]]
    _, found = evaluated(Accuracies.none_yet(2), 0, [2, 2, 2], scores)
    own = [np.log(1 / 2), -np.log1p(np.exp(-1)), -1000]
    best = [np.log(1 / 2), -np.log1p(np.exp(-1)), 0]
    # float32 holds 7 digits.
    np.testing.assert_allclose(found["log_probability"], own, rtol=1e-6)
    np.testing.assert_allclose(found["predicted_log_probability"], best, rtol=1e-6)
    assert found["log_probability"].dtype == np.float32


@pytest.mark.parametrize("size", [1, 2, 7, 300])
def test_halves_follow_from_the_seed_alone(size):
    chosen = evaluation.halves(size, 3)
    assert chosen.sum() == size // 2 and chosen.shape == (size,)
    assert (evaluation.halves(size, 3) == chosen).all()
    assert size < 7 or (evaluation.halves(size, 4) != chosen).any()


def test_padding_is_dropped_when_batches_are_joined():
    whole, part = np.array([True, True]), np.array([True, False])
    scores = np.arange(8.0).reshape(4, 2)
    found, relevance = joined([(scores[:2], None, whole), (scores[2:], None, part)])
    assert found.tolist() == scores[:3].tolist() and relevance is None
    _, relevance = joined([(scores[:2], scores[:2], whole), (scores[2:], scores[2:], part)])
    assert relevance.tolist() == scores[:3].tolist()


class Images:
    """As much of an image set as the rate needs."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def take(self, rows):
        return Images(self.rows[rows])


@pytest.mark.parametrize("seconds, batches", [(0.5, 3), (1.0, 2), (9.0, 1)])
def test_inference_is_timed_without_decoding_and_without_the_warm_up(seconds, batches):
    """Of 14 images in batches of 4, three whole ones are timed, or as many as take 2 seconds."""
    time, calls = [0.0], []

    def passes(seconds):
        time[0] += seconds

    def features_of(images):
        return SimpleNamespace(set=images, fields=lambda rows: passes(1000.0))

    def classify(features, slots):
        calls.append((features.set.rows.tolist(), list(slots)))
        passes(seconds if len(slots) > 1 else 50.0)

    rate = inference_rate(
        Images(np.arange(14)), 4, range(3), features_of, classify, lambda: time[0]
    )
    assert rate == 4 / seconds
    timed = [(list(range(4 * n, 4 * n + 4)), [0, 1, 2]) for n in range(batches)]
    assert calls == [(list(range(4)), [0]), *timed]
    assert evaluation.INFERENCE_SECONDS == 2.0


def test_a_test_set_smaller_than_a_batch_is_one_batch():
    times = iter([0.0, 0.5])
    features_of = lambda images: SimpleNamespace(fields=lambda rows: None)  # noqa: E731
    rate = inference_rate(
        Images(np.arange(3)), 8, (), features_of, lambda *_: None, lambda: next(times)
    )
    assert rate == 6.0
