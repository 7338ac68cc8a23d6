"""Accuracy on all classes seen, after each task, and the speed of inference."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qkd_jax.data.examples import Examples
from qkd_jax.data.streams import epoch_order
from qkd_jax.engine import hosts
from qkd_jax.learners.shape import learner_of
from qkd_jax.learners.state import LearnerState
from qkd_jax.protocol import metrics
from qkd_jax.protocol.calibration import log_softmax
from qkd_jax.runs.slot_features import SlotFeatures

# Inference is timed on new images for at least this long, or until the test set ends.
INFERENCE_SECONDS = 2.0

# Features of a class that are drawn, to be compared with those of test images.
DRAWN = 200

SHOWN, SHOWN_WRONG = 12, 9  # test examples on the report's page


@dataclass(frozen=True)
class Accuracies:
    """Counts of correct predictions so far, from which every accuracy of a run follows.

    Attributes:
      correct, total: int64 [T, T], row = after task, column = evaluated task.
      within_task: `correct` if the task of each image is given.
      confusion: int64 [T, T], (true task, most relevant task) after the last evaluation; None for
        methods without relevance.
      second: int64 [], in the last evaluation, images whose true task is among the two most
        relevant; None as above.
      oracle: int64 [], in the evaluation after the last task, correct predictions if the method is
        told the task of each image (`Learner.score_with_task`); None before, and for methods that
        choose no task.
    """

    correct: np.ndarray
    total: np.ndarray
    within_task: np.ndarray
    confusion: np.ndarray | None = None
    second: np.ndarray | None = None
    oracle: np.ndarray | None = None

    @classmethod
    def none_yet(cls, num_tasks: int) -> "Accuracies":
        """The counts before anything is evaluated."""
        correct, total = metrics.empty_matrix(num_tasks)
        return cls(correct, total, np.zeros_like(correct))

    @classmethod
    def restored(cls, saved: dict[str, Any]) -> "Accuracies":
        """The counts from what `saved` gave, in an earlier version perhaps without the last ones;
        other keys are ignored.
        """
        counts = (saved.get(field.name) for field in dataclasses.fields(cls))
        return cls(*(None if count is None else np.asarray(count, np.int64) for count in counts))

    def saved(self) -> dict[str, Any]:
        """What a checkpoint keeps, as plain JSON."""
        counts = vars(self).items()
        return {name: None if count is None else count.tolist() for name, count in counts}

    def after(
        self,
        task: int,
        predicted: dict[str, np.ndarray],
        task_of_class: np.ndarray,
    ) -> "Accuracies":
        """The counts with the evaluation after `task`, of which `predictions` gave the result.

        Raises:
          DataError: see `metrics.record`.
        """
        labels, relevance = predicted["label"], predicted.get("relevance")
        correct, total = metrics.record(
            self.correct, self.total, task, labels, predicted["predicted"], task_of_class
        )
        within_task, _ = metrics.record(
            self.within_task, total, task, labels, predicted["within_task"], task_of_class
        )
        confusion, second, oracle = self.confusion, self.second, None
        if relevance is not None:
            confusion = metrics.routing_confusion(predicted["task"], relevance, len(total))
            second = np.int64(metrics.routing_recall(relevance, predicted["task"], 2))
        if "oracle" in predicted:
            oracle = np.sum(predicted["oracle"] == labels)
        return Accuracies(correct, total, within_task, confusion, second, oracle)

    def line(self, task: int) -> str:
        """The line to show after `task`, in percent."""
        return "  ".join(f"{name} {value:.2f}" for name, value in self.after_task(task).items())

    def after_task(self, task: int) -> dict[str, float]:
        """The accuracy on all classes seen after `task` and, where it is measured, that of routing;
        in percent.
        """
        images = self.total[task].sum()
        found = {"accuracy": 100.0 * self.correct[task].sum() / images}
        if self.confusion is not None:
            found["routing"] = 100.0 * np.trace(self.confusion) / images
        return found

    def matrix(self) -> dict[str, Any]:
        """The content of matrix.json."""
        return {
            "orientation": "row = after task, column = evaluated task; counts of images",
            "correct": self.correct.tolist(),
            "total": self.total.tolist(),
        }

    def summary(self) -> dict[str, Any]:
        """The part of summary.json that follows from the counts."""
        unknown = ("routing_accuracy", "routing_recall_at_2", "oracle_accuracy")
        return dict.fromkeys(unknown) | metrics.summarise(
            self.correct,
            self.total,
            within_task_correct=self.within_task,
            confusion=self.confusion,
            second=self.second,
            oracle=self.oracle,
        )


def joined(
    batches: Iterable[tuple[Any, Any, np.ndarray]],
) -> tuple[np.ndarray, np.ndarray | None]:
    """(scores [N, C], relevance [N, T] or None) of all images.

    `batches` are (scores, relevance or None, mask); rows where the mask is False are padding.
    """
    scores, relevance = [], []
    for values, weights, mask in batches:
        scores.append(np.asarray(values)[mask])
        if weights is not None:
            relevance.append(np.asarray(weights)[mask])
    return np.concatenate(scores), np.concatenate(relevance) if relevance else None


def predictions(
    ids: np.ndarray,
    labels: np.ndarray,
    scores: np.ndarray,
    relevance: np.ndarray | None,
    task_of_class: np.ndarray,
    scores_with_task: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """The content of predictions/after_task_<t>.npz, from which all accuracies follow.

    Args:
      ids, labels: [N], of the test images of all classes seen.
      scores: [N, C]. The first of equal scores is predicted.
      relevance: [N, T], or None.
      task_of_class: int [C].
      scores_with_task: [N, C], of a learner that is told the task of each image, or None.
    """
    top5 = np.argsort(-scores, axis=1, kind="stable")[:, :5]
    rows, log_p = np.arange(len(labels)), log_softmax(scores)
    saved = {
        "id": ids,
        "label": labels,
        "task": task_of_class[labels],
        "predicted": top5[:, 0],
        "within_task": metrics.task_masked_predictions(scores, labels, task_of_class),
        "top5": top5,
        "log_probability": log_p[rows, labels].astype(np.float32),
        "predicted_log_probability": log_p[rows, top5[:, 0]].astype(np.float32),
    }
    if relevance is not None:
        saved["relevance"] = relevance
    if scores_with_task is not None:
        saved["oracle"] = scores_with_task.argmax(axis=1)
    return saved


def halves(size: int, seed: int) -> np.ndarray:
    """bool [size]: a half of the test images, the same for all methods with one seed."""
    chosen = np.zeros(size, bool)
    chosen[epoch_order(size, seed, 0, 0)[: size // 2]] = True
    return chosen


def shown_examples(examples: Examples, rows: np.ndarray, predicted: dict) -> list[dict[str, Any]]:
    """Some test examples with what was predicted, for the report: mostly mistakes.

    Up to `SHOWN_WRONG` mistakes, then right answers up to `SHOWN` in all, are taken from all
    classes in turn.

    Args:
      examples: the test set.
      rows: of the examples that were predicted.
      predicted: the result of `predictions` for these.
    """
    labels, relevance = predicted["label"], predicted.get("relevance")
    wrong = predicted["predicted"] != labels
    shown = []
    for members, total in ((wrong, SHOWN_WRONG), (~wrong, SHOWN)):
        members = np.flatnonzero(members)
        # How many of the same class came before.
        turn = [np.sum(labels[members[:at]] == labels[row]) for at, row in enumerate(members)]
        for row in members[np.lexsort((labels[members], turn))][: total - len(shown)]:
            names = examples.class_names
            entry = {"id": str(examples.ids[rows[row]]), "class": names[labels[row]]}
            entry |= {"predicted": names[predicted["predicted"][row]]}
            if relevance is not None:
                entry |= {"task": int(predicted["task"][row]) + 1}
                entry |= {"most_relevant_task": int(relevance[row].argmax()) + 1}
            shown.append(entry | examples.shown(int(rows[row])))
    return shown


def draws_distance(state: LearnerState, features: np.ndarray, labels: np.ndarray) -> float | None:
    """The mean over classes of the energy distance between what a learner draws of a class
    (`Learner.draw`) and features [N, D] of that class in slot 0. A class with fewer than two
    features is left out; None if all are.
    """
    draw, distances = jax.jit(learner_of(state.config).draw), []
    for label in np.unique(labels):
        own = features[labels == label]
        if len(own) < 2:
            continue
        key = jax.random.fold_in(jax.random.fold_in(state.key, 5), int(label))
        drawn = draw(state, key, jnp.full(DRAWN, label, jnp.int32))
        distances.append(metrics.energy_distance(np.asarray(drawn), own))
    return float(np.mean(distances)) if distances else None


def inference_rate(
    images: Examples,
    batch_size: int,
    slots: Sequence[int],
    features_of: Callable[[Examples], SlotFeatures],
    classify: Callable[[SlotFeatures, Sequence[int]], None],
    now: Callable[[], float],
) -> float:
    """Images per second of `classify`, one batch at a time, with nothing kept between batches.

    Decoding is not counted. Programs are compiled on one slot before the clock starts.

    Args:
      images: the test set.
      batch_size: images to classify at once, if there are that many.
      slots: the slots that `classify` reads.
      features_of: a set of images -> its features, none computed yet.
      classify: (features, slots) -> None; returns when the scores of all images are computed.
      now: seconds on a clock that never goes back.
    """
    size, done, seconds = min(batch_size, len(images)), 0, 0.0
    for start in range(0, len(images) - size + 1, size):
        batch = images.take(np.arange(start, start + size))
        if not done:
            classify(features_of(batch), slots[:1])
        features = features_of(batch)
        features.fields(np.arange(size))
        began = now()
        classify(features, slots)
        seconds += now() - began
        done += size
        if hosts.any_of(seconds >= INFERENCE_SECONDS):
            break
    return done / seconds
