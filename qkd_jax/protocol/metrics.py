"""Every summary number that follows from an accuracy matrix, each with its formula.

The raw material is two matrices of counts, `correct` and `total`, int64 [T, T]: row i = after
learning task i, column j = test images of task j, filled for j <= i, zero where nothing was
measured yet. a(i, j) = 100 * correct[i, j] / total[i, j], in percent. Indices count from 0, so the
final stage of T stages is T-1. Counts are kept, and nothing is rounded, until the last division.

Literature uses at least six definitions of forgetting; each one here has its own key, and
`forgetting` is that of Chaudhry et al. 2018 (arXiv 1801.10112).
"""

from typing import Any

import numpy as np

from qkd_jax.errors import DataError


def empty_matrix(num_tasks: int) -> tuple[np.ndarray, np.ndarray]:
    """(correct, total) before anything is measured: two int64 [T, T] of zeros."""
    return np.zeros((num_tasks, num_tasks), np.int64), np.zeros((num_tasks, num_tasks), np.int64)


def record(
    correct: np.ndarray,
    total: np.ndarray,
    row: int,
    labels: np.ndarray,
    predictions: np.ndarray,
    task_of_class: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """New (correct, total) whose row `row` holds this evaluation; the arguments stay unchanged.

    Args:
      correct, total: int [T, T].
      row: index of the task learned last.
      labels, predictions: int [N], classes in the numbering that `task_of_class` uses.
      task_of_class: int [C], task index of each class.

    Raises:
      DataError: shapes differ, a label of a task not learned yet, or a task without test images.

    Example:
      >>> correct, total = empty_matrix(num_tasks=2)
      >>> labels, predictions, task_of_class = [0, 0, 1], [0, 1, 1], np.array([0, 0])
      >>> correct, total = record(correct, total, 0, labels, predictions, task_of_class)
      >>> int(correct[0, 0]), int(total[0, 0])
      (2, 3)
    """
    correct, total = np.array(correct, np.int64), np.array(total, np.int64)  # copies
    labels, predictions = np.asarray(labels), np.asarray(predictions)
    if labels.ndim != 1 or labels.shape != predictions.shape:
        raise DataError(
            f"labels and predictions: expected two flat arrays of one length, found shapes "
            f"{labels.shape} and {predictions.shape}"
        )
    if not 0 <= row < len(total):
        raise DataError(f"row: expected 0 to {len(total) - 1} for {len(total)} tasks, found {row}")
    tasks = true_tasks(labels, task_of_class)
    if np.any(tasks > row):
        raise DataError(
            f"labels: expected classes of tasks 0 to {row}, found {np.sum(tasks > row)} images of "
            "later tasks; evaluate on the classes learned so far only"
        )
    total[row] = np.bincount(tasks, minlength=len(total))
    correct[row] = np.bincount(tasks[predictions == labels], minlength=len(total))
    _check_row(total, row)
    return correct, total


def true_tasks(labels: np.ndarray, task_of_class: np.ndarray) -> np.ndarray:
    """Task of each label, int64 [N].

    Raises:
      DataError: a label outside 0..C-1, or of a class that is in no task.

    Example:
      >>> true_tasks([2, 0], task_of_class=np.array([1, 0, 0]))
      array([0, 1])
    """
    labels, task_of_class = np.asarray(labels), np.asarray(task_of_class)
    outside = (labels < 0) | (labels >= len(task_of_class))
    if np.any(outside):
        raise DataError(
            f"labels: expected classes 0 to {len(task_of_class) - 1}, found {labels[outside][0]}"
        )
    tasks = task_of_class[labels].astype(np.int64)
    if np.any(tasks < 0):
        raise DataError(f"labels: expected classes of a task, found {labels[tasks < 0][0]}")
    return tasks


def accuracy_curve(correct: np.ndarray, total: np.ndarray) -> np.ndarray:
    """A(i) = 100 * sum_j correct[i, j] / sum_j total[i, j], float64 [stages measured].

    Sample-weighted top-1 over all classes seen: every test image counts the same.

    Example:
      >>> correct, total = [[9, 0], [6, 8]], [[10, 0], [10, 10]]
      >>> accuracy_curve(correct, total)
      array([90., 70.])
    """
    correct, total = _measured(correct, total)
    return 100.0 * correct.sum(axis=1) / total.sum(axis=1)


def accuracy_curve_task_mean(correct: np.ndarray, total: np.ndarray) -> np.ndarray:
    """M(i) = mean over j <= i of a(i, j), float64 [stages measured]: every task counts the same.

    Example:
      >>> accuracy_curve_task_mean([[9, 0], [6, 4]], [[10, 0], [10, 5]])  # of 60 and 80 percent
      array([90., 70.])
    """
    return np.array([row[: i + 1].mean() for i, row in enumerate(accuracy_matrix(correct, total))])


def accuracy_matrix(correct: np.ndarray, total: np.ndarray) -> np.ndarray:
    """a(i, j) in percent, float64 [stages measured, stages measured]; NaN above the diagonal.

    Example:
      >>> correct, total = [[9, 0], [6, 8]], [[10, 0], [10, 10]]
      >>> accuracy_matrix(correct, total)
      array([[90., nan],
             [60., 80.]])
    """
    correct, total = _measured(correct, total)
    matrix = np.full(correct.shape, np.nan)
    lower = np.tril_indices(len(correct))
    matrix[lower] = 100.0 * correct[lower] / total[lower]
    return matrix


def forgetting(correct: np.ndarray, total: np.ndarray) -> float:
    """F = 1/(T-1) sum_{j<T-1} ( max_{j<=i<T-1} a(i, j) - a(T-1, j) ), percentage points.

    Best before the final stage minus final (Chaudhry et al. 2018; Continuum). Negative when old
    tasks improved. One stage has no old task: 0.

    Example:
      >>> correct, total = [[9, 0], [6, 8]], [[10, 0], [10, 10]]
      >>> forgetting(correct, total)  # 90 before the final stage, 60 after it
      30.0
    """
    matrix = accuracy_matrix(correct, total)
    return _mean([max(matrix[j:-1, j]) - matrix[-1, j] for j in range(len(matrix) - 1)])


def forgetting_clipped(correct: np.ndarray, total: np.ndarray) -> float:
    """1/(T-1) sum_{j<T-1} ( max_{j<=i<=T-1} a(i, j) - a(T-1, j) ), percentage points.

    Best ever, the final stage included, minus final (PILOT, PyCIL, Mammoth, l2p): never negative.
    One stage: 0.

    Example:
      >>> forgetting_clipped([[6, 0], [9, 8]], [[10, 0], [10, 10]])  # better than ever: none
      0.0
    """
    matrix = accuracy_matrix(correct, total)
    return _mean([max(matrix[j:, j]) - matrix[-1, j] for j in range(len(matrix) - 1)])


def forgetting_just_learned(correct: np.ndarray, total: np.ndarray) -> float:
    """1/(T-1) sum_{j<T-1} ( a(j, j) - a(T-1, j) ), percentage points (Avalanche). One stage: 0.

    Example:
      >>> correct, total = [[9, 0], [6, 8]], [[10, 0], [10, 10]]
      >>> forgetting_just_learned(correct, total)
      30.0
    """
    matrix = accuracy_matrix(correct, total)
    return _mean([matrix[j, j] - matrix[-1, j] for j in range(len(matrix) - 1)])


def bwt(correct: np.ndarray, total: np.ndarray) -> float:
    """Backward transfer 1/(T-1) sum_{j<T-1} ( a(T-1, j) - a(j, j) ), percentage points.

    Lopez-Paz and Ranzato 2017 (arXiv 1706.08840); minus `forgetting_just_learned`. One stage: 0.

    Example:
      >>> correct, total = [[9, 0], [6, 8]], [[10, 0], [10, 10]]
      >>> bwt(correct, total)
      -30.0
    """
    matrix = accuracy_matrix(correct, total)
    return _mean([matrix[-1, j] - matrix[j, j] for j in range(len(matrix) - 1)])


def task_masked_predictions(
    scores: np.ndarray, labels: np.ndarray, task_of_class: np.ndarray
) -> np.ndarray:
    """Best class inside the true task of each image, int64 [N] (task-incremental, "task-aware").

    All other classes are masked with -inf. A mask of 0 would beat negative cosine scores.

    Args:
      scores: [N, C], the same scores that class-incremental predictions are the argmax of.
      labels: int [N].
      task_of_class: int [C].

    Example:
      >>> scores = np.array([[0.1, 0.5, 0.9]])  # class 2 wins, but the image is of task 0
      >>> task_masked_predictions(scores, labels=[0], task_of_class=np.array([0, 0, 1]))
      array([1])
    """
    scores, task_of_class = np.asarray(scores), np.asarray(task_of_class)
    inside = task_of_class[None, :] == true_tasks(labels, task_of_class)[:, None]
    return np.where(inside, scores, -np.inf).argmax(axis=1)


def routing_confusion(tasks: np.ndarray, routed: np.ndarray, num_tasks: int) -> np.ndarray:
    """Counts of (true task, chosen task), int64 [T, T]: row = true task, column = chosen task.

    Args:
      tasks: int [N], true tasks.
      routed: int [N], chosen tasks; or relevance [N, T], of which the largest is chosen (the
        first one if tied, so uniform relevance chooses task 0).
      num_tasks: T.
    """
    tasks, routed = np.asarray(tasks), np.asarray(routed)
    if routed.ndim == 2:
        routed = routed.argmax(axis=1)
    if tasks.shape != routed.shape or tasks.ndim != 1:
        raise DataError(
            f"true and routed tasks: expected the same number of images, found shapes "
            f"{tasks.shape} and {routed.shape}"
        )
    for name, values in (("true", tasks), ("routed", routed)):
        if values.size and not 0 <= values.min() <= values.max() < num_tasks:
            raise DataError(
                f"{name} tasks: expected 0 to {num_tasks - 1}, found {values.min()} to "
                f"{values.max()}"
            )
    flat = tasks.astype(np.int64) * num_tasks + routed.astype(np.int64)
    return np.bincount(flat, minlength=num_tasks**2).reshape(num_tasks, num_tasks)


def routing_summary(confusion: np.ndarray) -> dict[str, Any]:
    """Routing accuracies in percent, from `routing_confusion`.

    routing_accuracy = 100 * trace / all images (sample-weighted);
    routing_accuracy_per_task = 100 * diagonal / row sums, None for a task without images;
    routing_accuracy_task_mean = mean of the per-task values that exist.

    Example:
      >>> confusion = routing_confusion(tasks=[0, 0, 1], routed=[0, 1, 1], num_tasks=2)
      >>> routing_summary(confusion)["routing_accuracy_per_task"]
      [50.0, 100.0]
    """
    confusion = np.asarray(confusion)
    images, hits = confusion.sum(axis=1), np.diagonal(confusion)
    if not images.sum():
        raise DataError("routing confusion matrix: expected at least one image, found none")
    per_task = [100.0 * int(h) / int(n) if n else None for h, n in zip(hits, images, strict=True)]
    return {
        "routing_accuracy": float(100.0 * hits.sum() / images.sum()),
        "routing_accuracy_per_task": per_task,
        "routing_accuracy_task_mean": _mean([value for value in per_task if value is not None]),
    }


def routing_recall(relevance: np.ndarray, tasks: np.ndarray, k: int) -> int:
    """The number of images whose true task is among the k most relevant ones.

    Of equally relevant tasks the first comes first, as in `routing_confusion`, so that with k = 1
    this is its trace. A task without relevance is never the second: where one task is chosen, all k
    give the same.

    Args:
      relevance: [N, T], not negative.
      tasks: int [N], true tasks.
      k: at least 1.

    Example:
      >>> relevance = np.array([[0.6, 0.3, 0.1], [0.1, 0.6, 0.3]])
      >>> routing_recall(relevance, tasks=[1, 0], k=2)
      1
    """
    relevance, tasks = np.asarray(relevance), np.asarray(tasks)
    ranked = np.argsort(-relevance, axis=1, kind="stable")[:, :k]
    chosen = np.take_along_axis(relevance, ranked, axis=1) > 0
    chosen[:, 0] = True
    return int(np.sum((ranked == tasks[:, None]) & chosen))


def mean_relevance(relevance: np.ndarray, tasks: np.ndarray, num_tasks: int) -> np.ndarray:
    """Mean relevance of each task (column) over the images of each true task (row), [T, T].

    Rows of tasks without images are NaN. `relevance` [N, T'] may hold padding columns T' > T,
    which are dropped.

    Example:
      >>> relevance = np.array([[0.75, 0.25], [0.25, 0.75]])
      >>> mean_relevance(relevance, tasks=[0, 0], num_tasks=1)
      array([[0.5]])
    """
    relevance, tasks = np.asarray(relevance, np.float64)[:, :num_tasks], np.asarray(tasks)
    rows = [
        relevance[tasks == task].mean(axis=0)
        if np.any(tasks == task)
        else np.full(relevance.shape[1], np.nan)
        for task in range(num_tasks)
    ]
    return np.stack(rows)


def energy_distance(x: np.ndarray, y: np.ndarray) -> float:
    """2 E|x - y| - E|x - x'| - E|y - y'| of two samples: 0 in expectation if their laws are equal,
    else above (Szekely and Rizzo, "Energy statistics", 2013).

    Args:
      x, y: [N, D] and [M, D]; pairs of a vector with itself are left out, so that the estimate is
        unbiased and can be negative.

    Raises:
      DataError: a sample with fewer than two vectors.

    Example:
      >>> energy_distance(np.array([[0.0], [1.0]]), np.array([[4.0], [5.0]]))
      6.0
    """
    if min(len(x), len(y)) < 2:
        raise DataError(f"energy distance: expected two vectors or more, found {len(x)}, {len(y)}")

    def total(a, b):
        return sum(float(np.linalg.norm(row - b, axis=1).sum()) for row in a)

    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    n, m = len(x), len(y)
    own = total(x, x) / (n * (n - 1)) + total(y, y) / (m * (m - 1))
    return 2 * total(x, y) / (n * m) - own


def summarise(
    correct: np.ndarray,
    total: np.ndarray,
    *,
    within_task_correct: np.ndarray | None = None,
    confusion: np.ndarray | None = None,
    second: int | None = None,
    oracle: int | None = None,
) -> dict[str, Any]:
    """Every summary number of a run, JSON-ready; a run cut short counts up to its last stage.

    Args:
      correct, total: int [T, T], see the module docstring.
      within_task_correct: int [T, T], `correct` recorded from `task_masked_predictions`.
      confusion: int [T, T], `routing_confusion` at the last stage.
      second: `routing_recall` with k = 2 at the last stage.
      oracle: correct predictions at the last stage if the method is told the true tasks.

    Returns:
      average_accuracy = mean_i A(i) and last_accuracy = A(T-1) with accuracy_curve = A; the same
      three for M, ending in `_task_mean`; last_accuracy_per_task = a(T-1, :); forgetting,
      forgetting_clipped, forgetting_just_learned, bwt; with `within_task_correct` also
      within_task_{accuracy_curve, average_accuracy, last_accuracy}; with `confusion` also the keys
      of `routing_summary`; with `second` and `oracle` also `routing_recall_at_2` and
      `oracle_accuracy`, their shares of the images in percent.

    Raises:
      DataError: no stage was measured, or the counts are impossible.

    Example:
      >>> correct, total = [[9, 0], [6, 8]], [[10, 0], [10, 10]]
      >>> {key: summarise(correct, total)[key] for key in ("average_accuracy", "last_accuracy")}
      {'average_accuracy': 80.0, 'last_accuracy': 70.0}
    """
    summary = _accuracies(correct, total)
    task_mean = accuracy_curve_task_mean(correct, total)
    summary |= {
        "accuracy_curve_task_mean": task_mean.tolist(),
        "average_accuracy_task_mean": float(task_mean.mean()),
        "last_accuracy_task_mean": float(task_mean[-1]),
        "last_accuracy_per_task": accuracy_matrix(correct, total)[-1].tolist(),
        "forgetting": forgetting(correct, total),
        "forgetting_clipped": forgetting_clipped(correct, total),
        "forgetting_just_learned": forgetting_just_learned(correct, total),
        "bwt": bwt(correct, total),
    }
    if within_task_correct is not None:
        within = _accuracies(within_task_correct, total)
        summary |= {f"within_task_{name}": value for name, value in within.items()}
    if confusion is not None:
        summary |= routing_summary(confusion)
    images = _measured(correct, total)[1][-1].sum()
    for name, count in (("routing_recall_at_2", second), ("oracle_accuracy", oracle)):
        if count is not None:
            summary[name] = float(100.0 * count / images)
    return summary


def _accuracies(correct: np.ndarray, total: np.ndarray) -> dict[str, Any]:
    curve = accuracy_curve(correct, total)
    return {
        "accuracy_curve": curve.tolist(),
        "average_accuracy": float(curve.mean()),
        "last_accuracy": float(curve[-1]),
    }


def _mean(values: list[float]) -> float:
    return float(np.mean(values)) if values else 0.0


def _check_row(total: np.ndarray, row: int) -> None:
    empty = np.flatnonzero(total[row, : row + 1] == 0)
    if len(empty):
        raise DataError(
            f"task {empty[0]}: expected at least one test image evaluated after task {row}, found "
            "none, so its accuracy is undefined"
        )


def _measured(correct: np.ndarray, total: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The square lower triangle of the stages measured so far, after checking the counts."""
    correct, total = np.asarray(correct), np.asarray(total)
    if total.ndim != 2 or total.shape[0] != total.shape[1] or correct.shape != total.shape:
        raise DataError(
            f"correct and total: expected both [T, T], found {correct.shape} and {total.shape}"
        )
    filled = total.sum(axis=1) > 0
    stages = int(filled.sum())
    if not stages:
        raise DataError("accuracy matrix: expected at least one evaluated stage, found none")
    if not filled[:stages].all():
        raise DataError(
            f"stage {int(np.argmin(filled))}: expected counts, since a later stage was evaluated, "
            "found none"
        )
    if np.any(correct < 0) or np.any(correct > total):
        raise DataError("correct: expected counts from 0 to the total counts, found others")
    for row in range(stages):
        _check_row(total, row)
    return np.tril(correct[:stages, :stages]), np.tril(total[:stages, :stages])
