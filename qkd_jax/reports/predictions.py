"""The predictions of a run for each test image, in a few kB: what paired tests, bootstrap, negative
log-likelihood and calibration need, without the images.
"""

from __future__ import annotations

import hashlib
import io
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qkd_jax.errors import DataError
from qkd_jax.npz import Fields
from qkd_jax.protocol import metrics
from qkd_jax.reports.files import STAGE, read_arrays, read_stage

PACKED = "predictions.npz"  # of a record
FOLDER = "predictions"  # of a run, with a file for each task
NONE = -1
# The arrays of a record, and of a run after one task, and those of newer versions too.
RECORD: Fields = {"images": ("U", 0), "label": ("i", 1), "task": ("i", 1), "predicted": ("i", 2)}
RECORD_TOO: Fields = {
    **{"within_task": ("i", 2), "routed": ("i", 2), "oracle": ("i", 1)},
    **{"log_probability": ("f", 1), "predicted_log_probability": ("f", 1)},
}
# Of what a run writes after one task, also these.
IN_STAGE: Fields = {**STAGE, "id": ("U", 1), "predicted": ("iu", 1)}


class Predictions(NamedTuple):
    """What a run predicted, for N test images in the order of their sorted ids, after T tasks.

    Two runs can be compared image by image if their `images` are equal.

    Attributes:
      images: SHA-256 of the sorted ids, each followed by a line feed.
      label, task: int [N], the true class, and the task that it was learned in.
      predicted: int [T, N], the predicted class after each task; -1 where the class of the image
        was not learned yet.
      within_task: int [T, N], the same if the true task is given. None for runs of versions that
        did not write it, and so for the three below.
      routed: int [T, N], the most relevant task (or slot) after each task; None for methods without
        relevance too.
      log_probability: float16 [N], the natural logarithm of the probability that the true class has
        after the last task, to 3 digits. The probability is the softmax of the scores over all
        classes: calibrated or not, as the method trained them; of cosines for methods that compare
        with class means.
      predicted_log_probability: float16 [N], the same of the predicted class.
      oracle: int [N], the class predicted after the last task if the method is told the task of the
        image; None for methods that choose no task too.
    """

    images: str
    label: np.ndarray
    task: np.ndarray
    predicted: np.ndarray
    within_task: np.ndarray | None
    routed: np.ndarray | None
    log_probability: np.ndarray | None
    predicted_log_probability: np.ndarray | None
    oracle: np.ndarray | None = None


def read_predictions(folder: str | Path) -> Predictions | None:
    """The predictions of a run, from its record or its run folder; None if there are none.

        a, b = (read_predictions(f"results/renditions/{name}/seed1993") for name in ("qkd", "mos"))
        assert a.images == b.images                                     # the same, in one order
        only_a = (a.predicted[-1] == a.label) & (b.predicted[-1] != b.label)

    Raises:
      DataError: the file is damaged, or that of a task is missing.
    """
    folder = Path(folder)
    if (folder / PACKED).is_file():
        held = _record(folder / PACKED)
        arrays = {name: held.get(name) for name in Predictions._fields}
        return Predictions(**arrays | {"images": str(held["images"])})
    files = {
        int(match.group(1)): path
        for path in ((folder / FOLDER).iterdir() if (folder / FOLDER).is_dir() else ())
        if (match := re.fullmatch(r"after_task_(\d+)\.npz", path.name))
    }
    if not files:
        return None
    for task in range(max(files)):
        if task not in files:
            raise DataError(
                f"{folder / FOLDER}: expected a file for each task, found none for task {task} "
                f"(after_task_{task}.npz); restore it from a copy"
            )
    return joined([read_stage(files[task], task, IN_STAGE) for task in sorted(files)])


def joined(stages: list[dict[str, np.ndarray]]) -> Predictions:
    """The predictions from what a run wrote after each task, in the order of tasks."""
    # All of them: images that were removed between two sessions are missing from later stages.
    ids = np.unique(np.concatenate([stage["id"] for stage in stages]))
    places = [np.searchsorted(ids, stage["id"]) for stage in stages]

    def of_images(name: str) -> np.ndarray:
        values = np.full(len(ids), NONE, np.int32)
        for stage, place in zip(stages, places, strict=True):
            values[place] = stage[name]
        return _small(values)

    def of_stages(name: str, choose=lambda values: values) -> np.ndarray | None:
        if any(name not in stage for stage in stages):
            return None
        values = np.full((len(stages), len(ids)), NONE, np.int32)
        for row, stage, place in zip(values, stages, places, strict=True):
            row[place] = choose(stage[name])
        return _small(values)

    def of_last(name: str) -> np.ndarray | None:
        if name not in stages[-1]:
            return None
        values = np.full(len(ids), np.nan, np.float16)
        # Rather a huge finite number than one that float16 does not hold.
        values[places[-1]] = np.maximum(stages[-1][name], np.finfo(np.float16).min)
        return values

    def told() -> np.ndarray | None:
        if "oracle" not in stages[-1]:
            return None
        values = np.full(len(ids), NONE, np.int32)
        values[places[-1]] = stages[-1]["oracle"]
        return _small(values)

    return Predictions(
        images=hashlib.sha256("".join(f"{name}\n" for name in ids).encode()).hexdigest(),
        label=of_images("label"),
        task=of_images("task"),
        predicted=of_stages("predicted"),
        within_task=of_stages("within_task"),
        routed=of_stages("relevance", lambda relevance: relevance.argmax(axis=1)),
        log_probability=of_last("log_probability"),
        predicted_log_probability=of_last("predicted_log_probability"),
        oracle=told(),
    )


def packed(predictions: Predictions) -> bytes:
    """The content of a record's predictions.npz: the same bytes for the same predictions."""
    file = io.BytesIO()
    arrays = {name: value for name, value in predictions._asdict().items() if value is not None}
    np.savez_compressed(file, **arrays)
    return file.getvalue()


def check_follows(
    predictions: Predictions | None, correct: np.ndarray, total: np.ndarray, summary: dict[str, Any]
) -> None:
    """Compares matrix and summary of a run with its predictions, and the summary with the matrix,
    number for number.

    Raises:
      DataError: names the first number that does not follow from the others.
    """
    within = confusion = oracle = None
    if predictions is not None:
        found = _counted(predictions, predictions.predicted, len(total))
        for name, count, own in zip(("correct", "total"), (correct, total), found, strict=True):
            if not np.array_equal(count, own):
                i, j = np.argwhere(count != own)[0]
                raise DataError(
                    f"matrix.json: expected {name}[{i}][{j}] = {own[i, j]}, which follows from the "
                    f"predictions, found {count[i, j]}"
                )
    if predictions is not None and predictions.within_task is not None:
        within, _ = _counted(predictions, predictions.within_task, len(total))
    if predictions is not None and predictions.routed is not None:
        tested = predictions.routed[-1] != NONE
        confusion = metrics.routing_confusion(
            predictions.task[tested], predictions.routed[-1, tested], len(total)
        )
    if predictions is not None and predictions.oracle is not None:
        oracle = int(np.sum(predictions.oracle == predictions.label))
    follows = metrics.summarise(
        correct, total, within_task_correct=within, confusion=confusion, oracle=oracle
    )
    for name, value in follows.items():
        if name in summary and summary[name] != value:
            raise DataError(
                f"summary.json: expected {name} {value}, which follows from the matrix and the "
                f"predictions, found {summary[name]}"
            )


def _counted(predictions: Predictions, chosen: np.ndarray, num_tasks: int):
    """(correct, total), int64 [T, T], of the classes `chosen` [T, N]."""
    correct, total = metrics.empty_matrix(num_tasks)
    task_of_class = np.full(int(predictions.label.max()) + 1, NONE)
    task_of_class[predictions.label] = predictions.task
    for stage, row in enumerate(chosen):
        tested = row != NONE
        labels = predictions.label[tested]
        correct, total = metrics.record(correct, total, stage, labels, row[tested], task_of_class)
    return correct, total


def _small(values: np.ndarray) -> np.ndarray:
    """As int16, if that holds them."""
    return values.astype(np.int16) if values.max(initial=0) < 2**15 else values


def _record(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a record's file, for one number of images along the last axis.

    Raises:
      DataError: the file is damaged.
    """
    held = read_arrays(path, RECORD, RECORD_TOO)
    arrays = {n: a for n, a in held.items() if n in {**RECORD, **RECORD_TOO} and a.ndim}
    lengths = {name: array.shape[-1] for name, array in arrays.items()}
    if len(set(lengths.values())) != 1:
        raise DataError(f"{path}: expected arrays of one number of images, found {lengths}")
    return held
