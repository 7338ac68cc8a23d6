"""What a run's files say, in words and tables: the contents of its page, without any markup."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np

from qkd_jax.protocol import metrics
from qkd_jax.reports.files import RunFiles
from qkd_jax.reports.tables import format_number

NUMBERS = {
    "average_accuracy": "mean over stages of the top-1 accuracy on all classes seen",
    "last_accuracy": "top-1 on all classes after the last task",
    "average_accuracy_task_mean": "the same average, every task counting the same",
    "last_accuracy_task_mean": "the same after the last task",
    "forgetting": "best before the final stage minus final, mean over old tasks",
    "forgetting_clipped": "best ever minus final (never negative)",
    "forgetting_just_learned": "just learned minus final",
    "bwt": "backward transfer: final minus just learned",
    "within_task_average_accuracy": "average accuracy when the task is given",
    "within_task_last_accuracy": "last accuracy when the task is given",
    "routing_accuracy": "images whose most relevant task is the true one",
    "routing_recall_at_2": "images whose true task is among the two most relevant",
    "oracle_accuracy": "last accuracy when the true task takes the place of the method's choice",
    "nll": "negative log-likelihood of the true class after the last task, nats",
    "ece": "expected calibration error after the last task, 15 bins",
    "nll_tempered": "the same after one temperature, fitted on the other half of the test set",
    "ece_tempered": "the calibration error after that temperature",
    "trainable_parameters": "numbers optimised in one task",
    "wall_seconds": "seconds, everything included",
    "train_seconds": "seconds from the start of a task to its evaluation, all tasks",
    "training_images_per_second": "images per second in optimisation steps, without compilation",
    "inference_images_per_second": "new images per second by the final model",
    "passes_per_image": "passes through the transformer for a new image after the last task",
    "kept_bytes": "bytes carried from task to task, beside the frozen model",
    "kept_bytes_per_class": "of these, what grows with classes, for each class",
    "kept_bytes_per_task": "of these, what grows with tasks, for each task",
    "kept_bytes_constant": "of these, what grows with neither",
    "peak_memory_mb": "largest resident memory of the process, MiB",
    "compilations": "compilations of the training step",
}
MOST_CONFUSIONS = 20


def noun_of(run: RunFiles) -> str:
    """What the run learned from, "images" or "texts"."""
    return run.environment.get("examples", "images")


def numbers_of(run: RunFiles) -> dict[str, Any]:
    """The summary, with what follows from the matrix where the summary does not say it."""
    if not run.stages:
        return run.summary
    said = {key: value for key, value in run.summary.items() if value is not None}
    return run.summary | metrics.summarise(run.correct, run.total) | said


def title_of(run: RunFiles) -> str:
    """Experiment, variant, method and seed."""
    named = [
        run.summary[key] for key in ("experiment", "variant", "method") if run.summary.get(key)
    ]
    seed = f" · seed {run.summary['seed']}" if "seed" in run.summary else ""
    return (" · ".join(map(str, named)) or run.folder.name) + seed


def warnings_of(run: RunFiles) -> list[str]:
    """What a reader must know before the numbers."""
    warnings = []
    noun = noun_of(run)
    if not run.summary.get("finished"):
        warnings.append(f"This run is not finished: {run.stages} tasks were evaluated.")
    if leaked := run.environment.get("leaked_test_images"):
        warnings.append(
            f"{noun.capitalize()} that are both trained and tested on: {len(leaked)}, the "
            f"first of them {' = '.join(leaked[0])}. The accuracies count them as right answers "
            "although they were learned by heart."
        )
    if cut := run.environment.get("cut_texts"):
        warnings.append(
            f"Texts that are longer than the backbone reads were cut: {cut[0]} to train on and "
            f"{cut[1]} to test on."
        )
    if removed := run.environment.get("removed_images"):
        warnings.append(
            f"{noun.capitalize()} that were removed between sessions of the run: "
            f"{len(removed)}, the first of them {removed[0]}. The run cannot be repeated exactly."
        )
    return warnings


def headline_of(run: RunFiles) -> dict[str, Any] | None:
    """The few numbers that count, and two or three sentences; None before the first evaluation."""
    if not run.stages:
        return None
    found, noun = numbers_of(run), noun_of(run)
    tested, tasks = int(run.total[run.stages - 1].sum()), run.stages
    last = found["last_accuracy"]
    error = 100 * math.sqrt(max(last / 100 * (1 - last / 100), 0.0) / tested)
    over = f"after {tasks} tasks" if tasks > 1 else "after one task"
    numbers = [("last_accuracy", f"of {tested:,} test {noun} right {over}")]
    words = [
        f"The standard error of this share is {error:.1f} points, since {tested:,} {noun} were "
        "tested: smaller differences between methods mean little."
    ]
    if tasks > 1:
        numbers.append(("average_accuracy", "right on average over the tasks"))
        numbers.append(("forgetting", "points forgotten of the best on older tasks"))
        gained = found["forgetting"] < 0
        words.append(
            f"On older tasks the accuracy {'rose' if gained else 'fell'} by "
            f"{abs(found['forgetting']):.1f} points from its best before the last task."
        )
    if _is_number(found.get("within_task_last_accuracy")) and tasks > 1:
        words.append(
            f"If the task of each of the {noun} were given, "
            f"{found['within_task_last_accuracy']:.1f} % would be right: the rest of the mistakes "
            f"({found['within_task_last_accuracy'] - last:.1f} points) are between tasks."
        )
    if _is_number(found.get("routing_accuracy")):
        numbers.append(
            ("routing_accuracy", f"routed to the true task (chance: {100 / tasks:.0f} %)")
        )
    if _is_number(found.get("oracle_accuracy")):
        words.append(
            f"With the true task in the place of its own choice it would be right for "
            f"{found['oracle_accuracy']:.1f} %: that is what a perfect route is worth."
        )
    if _is_number(found.get("trainable_parameters")):
        words.append(f"{found['trainable_parameters']:,.0f} numbers were trained for each task.")
    shown = [
        {"text": _headline_number(key, found[key]), "meaning": meaning}
        for key, meaning in numbers
        if _is_number(found.get(key))
    ]
    return {"numbers": shown, "words": words}


def _headline_number(key: str, value: float) -> str:
    return f"{value:.1f}" if key == "forgetting" else f"{value:.1f} %"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def number_rows(run: RunFiles) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """(heads, rows) of every number of the summary, with a teacher's beside them."""
    summary = numbers_of(run)
    # A teacher has no numbers of the whole process.
    columns = {"value": summary}
    if "teacher" in summary:
        columns = {"student": summary, "teacher": summary["teacher"]}

    def text(key: str, values: dict[str, Any]) -> str:
        value = values.get(key)
        return format_number(key, value) if isinstance(value, int | float) else "–"

    rows = [
        (key, *(text(key, values) for values in columns.values()), meaning)
        for key, meaning in ((k, m.replace("images", noun_of(run))) for k, m in NUMBERS.items())
        if isinstance(summary.get(key), int | float)
    ]
    return ("number", *columns, "meaning"), rows


def curves_of(run: RunFiles) -> dict[str, list[float]]:
    """Accuracy after each task, by what was asked of whom."""
    taught = "student, " * ("teacher" in run.summary)
    curves = {f"{taught}all classes seen": metrics.accuracy_curve(run.correct, run.total).tolist()}
    if run.summary.get("within_task_accuracy_curve"):
        curves["task given (task-aware)"] = run.summary["within_task_accuracy_curve"]
    if teacher := run.summary.get("teacher"):
        curves["teacher, all classes seen"] = teacher["accuracy_curve"]
    return curves


def forgotten(matrix: np.ndarray) -> np.ndarray:
    """Points that each task (column) has lost after each (row) since its best until then; [T, T],
    NaN where a task was not learned yet. Zero where it stands at its best.
    """
    best = np.fmax.accumulate(matrix, axis=0)
    return best - matrix


def routing_of(run: RunFiles) -> tuple[np.ndarray, np.ndarray] | None:
    """(mean relevance by true task, routing confusion), each [T, T]; None without relevance."""
    if "relevance" not in run.predictions:
        return None
    learned = int(run.predictions["after_task"]) + 1
    relevance, tasks = run.predictions["relevance"][:, :learned], run.predictions["task"]
    return (
        metrics.mean_relevance(relevance, tasks, learned),
        metrics.routing_confusion(tasks, relevance, learned),
    )


def accuracy_range(matrix: np.ndarray) -> tuple[float, float]:
    """The accuracies with no shade and with the full one in a heat map, in percent."""
    return max(0.0, 10 * float(np.floor((np.nanmin(matrix) - 5) / 10))), 100.0


def relevance_range(relevance: np.ndarray) -> tuple[float, float]:
    """The same for mean relevance [T, T]: up to its largest, or at least twice a uniform one."""
    return 0.0, min(1.0, max(2 / len(relevance), float(np.nanmax(relevance))))


def routing_shares(confusion: np.ndarray) -> np.ndarray:
    """Rows in percent; NaN for a task without images."""
    with np.errstate(invalid="ignore"):
        return 100.0 * confusion / confusion.sum(axis=1, keepdims=True)


def task_rows(run: RunFiles) -> dict[str, Any]:
    """One row for each task: its size, its accuracies over time, its route and its seconds."""
    if not run.stages:
        return {"heads": (), "rows": []}
    matrix = metrics.accuracy_matrix(run.correct, run.total)
    last, routing = len(matrix) - 1, routing_of(run)
    per_task = metrics.routing_summary(routing[1])["routing_accuracy_per_task"] if routing else []
    labels, tasks = (run.predictions.get(name) for name in ("label", "task"))
    seconds = seconds_of_tasks(run)
    rows = []
    for j in range(len(matrix)):
        classes = len(np.unique(labels[tasks == j])) if labels is not None else None
        routed = per_task[j] if j < len(per_task) else None
        shown = [
            matrix[j, j],
            np.max(matrix[j:, j]),
            matrix[last, j],
            matrix[j, j] - matrix[last, j],
            routed,
        ]
        rows.append(
            [
                number(j + 1, 0),
                number(classes, 0),
                number(run.total[last, j], 0),
                *(number(value, 2) for value in shown),
                number(seconds.get(j), 1),
            ]
        )
    heads = ("task", "classes", f"test {noun_of(run)}", "just learned (%)", "best (%)", "last (%)")
    return {
        "heads": (*heads, "just learned − last", "routing (%)", "seconds of its steps"),
        "rows": rows,
    }


def seconds_of_tasks(run: RunFiles) -> dict[int, float]:
    """Seconds from the first to the last optimisation step of each task, as far as one session
    made them: a run that was stopped within a task has no such time of it.
    """
    times: dict[int, list[float]] = {}
    for record in run.records:
        if _is_number(record.get("wall_s")) and "task" in record:
            times.setdefault(int(record["task"]), []).append(float(record["wall_s"]))
    return {
        task: found[-1] - found[0]
        for task, found in times.items()
        if len(found) > 1 and all(a <= b for a, b in itertools.pairwise(found))
    }


def number(value: Any, digits: int) -> dict[str, Any]:
    """A cell that is sorted by its value; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return {"value": "", "text": "–"}
    return {"value": float(value), "text": f"{value:,.{digits}f}"}


def class_rows(run: RunFiles, names: list[str]) -> dict[str, Any]:
    """One row for each class, worst first: its accuracy and what it is most often taken for."""
    found = run.predictions
    if not {"label", "predicted", "task"} <= found.keys():
        return {"heads": (), "rows": [], "words": ""}
    label, predicted, task = found["label"], found["predicted"], found["task"]
    rows = []
    for index in np.unique(label):
        mine = label == index
        wrong, counts = np.unique(predicted[mine & (predicted != index)], return_counts=True)
        right = 100.0 * float(np.mean(predicted[mine] == index))
        worst = ""
        if len(wrong):
            most = int(np.argmax(counts))
            worst = f"{_name(names, wrong[most])} ({counts[most]})"
        cells = [_name(names, index), number(int(task[mine][0]) + 1, 0), number(int(mine.sum()), 0)]
        rows.append((right, [*cells, number(right, 1), worst]))
    rows.sort(key=lambda row: row[0])
    perfect = sum(right == 100 for right, _ in rows)
    never = sum(right == 0 for right, _ in rows)
    return {
        "heads": ("class", "task", f"test {noun_of(run)}", "right (%)", "most often taken for"),
        "rows": [cells for _, cells in rows],
        "words": f"Of {len(rows)} classes {perfect} are always named rightly and {never} never.",
    }


def confusion_rows(run: RunFiles, names: list[str]) -> list[list[Any]]:
    """The pairs of classes that are confused most often: true class, predicted, how often, and
    whether both were learned in one task.
    """
    found = run.predictions
    if not {"label", "predicted", "task"} <= found.keys():
        return []
    label, predicted = found["label"].astype(int), found["predicted"].astype(int)
    task_of = dict(zip(label.tolist(), found["task"].tolist(), strict=True))
    wrong = label != predicted
    pairs, counts = np.unique(
        np.stack([label[wrong], predicted[wrong]], axis=1).reshape(-1, 2),
        axis=0,
        return_counts=True,
    )
    order = np.argsort(-counts, kind="stable")[:MOST_CONFUSIONS]
    return [
        [
            _name(names, pairs[i, 0]),
            _name(names, pairs[i, 1]),
            number(int(counts[i]), 0),
            "yes" if task_of.get(int(pairs[i, 0])) == task_of.get(int(pairs[i, 1])) else "no",
        ]
        for i in order
    ]


def _name(names: list[str], index: int) -> str:
    return names[int(index)] if 0 <= int(index) < len(names) else f"class {int(index)}"


def example_cards(run: RunFiles) -> list[dict[str, Any]]:
    """Some test examples, mistakes first, with what was predicted."""
    cards = []
    for shown in run.examples:
        image = shown.get("image", "")
        route = ""
        if "most_relevant_task" in shown:
            route = f"task {shown['task']}, most relevant {shown['most_relevant_task']}"
        cards.append(
            {
                "name": shown["id"],
                "text": shown.get("text", ""),
                "image": image if image.startswith("data:image/") else "",
                "true": shown["class"],
                "predicted": shown["predicted"],
                "right": shown["predicted"] == shown["class"],
                "route": route,
            }
        )
    return cards
