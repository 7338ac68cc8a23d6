"""Reads the files of a run folder, as far as they exist."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qkd_jax.errors import DataError
from qkd_jax.npz import DamagedArchive, Fields, read_npz
from qkd_jax.reports.forms import problem, problem_of_line
from qkd_jax.reports.ledger import missing_files

# The file with ids, classes and digests of the examples that a run began with.
IMAGES = "images.npz"


@dataclass(frozen=True)
class RunFiles:
    """The contents of one run folder; missing parts are empty."""

    folder: Path
    summary: dict[str, Any]
    config: dict[str, Any]
    environment: dict[str, Any]
    records: list[dict[str, Any]]
    correct: np.ndarray
    total: np.ndarray
    predictions: dict[str, np.ndarray]
    examples: list[dict[str, Any]]
    circuit: str

    @property
    def stages(self) -> int:
        """Number of tasks evaluated so far."""
        return int((self.total.sum(axis=1) > 0).sum())


def read_run(folder: str | Path) -> RunFiles:
    """Reads a run folder.

    Raises:
      DataError: the folder does not exist, or a file in it is damaged, or not what the run wrote.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(
            f"{folder}: expected a run folder, runs/<name>/<method>/seed<k>, found none"
        )
    missing_files(folder)
    matrix = read_json(folder / "matrix.json")
    correct, total = (
        np.asarray(matrix.get(name) or np.zeros((0, 0)), np.int64) for name in ("correct", "total")
    )
    if correct.shape != total.shape or correct.ndim != 2 or len(set(correct.shape)) > 1:
        raise DataError(
            f"{folder / 'matrix.json'}: expected two square matrices of one size, found shapes "
            f"{correct.shape} and {total.shape}"
        )
    if (correct > total).any():
        row, column = np.argwhere(correct > total)[0].tolist()
        raise DataError(
            f"{folder / 'matrix.json'}: expected at most total[{row}][{column}] = "
            f"{total[row, column]} correct, found {correct[row, column]}"
        )
    circuit = folder / "circuit.txt"
    return RunFiles(
        folder=folder,
        summary=read_json(folder / "summary.json"),
        config=read_json(folder / "config.json"),
        environment=read_json(folder / "environment.json"),
        records=read_records(folder / "metrics.jsonl"),
        correct=correct,
        total=total,
        predictions=_last_predictions(folder / "predictions"),
        examples=read_json(folder / "examples.json").get("test", []),
        circuit=circuit.read_text("utf-8", "replace") if circuit.is_file() else "",
    )


def read_json(path: Path) -> dict[str, Any]:
    """One JSON object, of the form that a file of this name has; {} if there is no such file.

    Raises:
      DataError: the file cannot be read, or is not valid JSON or of another form (`forms.problem`).
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path}: expected valid JSON, found {error}; delete it or run again"
        ) from error
    if not isinstance(value, dict):
        raise DataError(f"{path}: expected a JSON object, found a {type(value).__name__}")
    if wrong := problem(path.name, value):
        raise DataError(f"{path}: {wrong}; restore it from a copy, or delete it and run again")
    return value


def read_records(path: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl that have `images_seen`, ordered by step.

    If a resumed run wrote a step twice, the later line counts. A last line that was cut off by a
    crash is left out.

    Raises:
      DataError: another line is not valid JSON, or of another form.
    """
    if not path.is_file():
        return []
    lines = path.read_bytes().splitlines()
    records: dict[Any, dict[str, Any]] = {}
    for number, line in enumerate(lines):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            if number == len(lines) - 1:
                break
            raise DataError(
                f"{path}, line {number + 1}: expected valid JSON, found {error}"
            ) from error
        if wrong := problem_of_line(record):
            raise DataError(f"{path}, line {number + 1}: {wrong}; delete the line")
        if "images_seen" in record:
            step = (record.get("task"), record["step"]) if "step" in record else ("line", number)
            records[step] = record
    return sorted(records.values(), key=lambda record: record["images_seen"])


def _last_predictions(folder: Path) -> dict[str, np.ndarray]:
    """The arrays of the last after_task_<t>.npz, with t as `after_task`.

    Raises:
      DataError: the file is damaged, or its arrays are not those of t + 1 tasks.
    """
    found = {
        int(match.group(1)): path
        for path in (folder.iterdir() if folder.is_dir() else ())
        if (match := re.fullmatch(r"after_task_(\d+)\.npz", path.name))
    }
    if not found:
        return {}
    newest = max(found)
    return {**read_stage(found[newest], newest), "after_task": np.asarray(newest)}


# Arrays of after_task_<t>.npz: kinds of dtype and number of axes.
STAGE = {"label": ("iu", 1), "task": ("iu", 1)}
ALSO_IN_STAGE = {
    "id": ("U", 1),
    "predicted": ("iu", 1),
    "within_task": ("iu", 1),
    "top5": ("iu", 2),
    "relevance": ("f", 2),
    "oracle": ("iu", 1),
    "log_probability": ("f", 1),
    "predicted_log_probability": ("f", 1),
}


def read_stage(path: Path, task: int, needed: Fields = STAGE) -> dict[str, np.ndarray]:
    """What was predicted after a task, arrays of N images; those of `needed` are there.

    Raises:
      DataError: the file is damaged, or its arrays are not those of N images and task + 1 tasks.
    """
    arrays = read_arrays(path, needed, ALSO_IN_STAGE)
    named = {name: array for name, array in arrays.items() if name in STAGE | ALSO_IN_STAGE}
    tasks = arrays["task"]
    if len({len(array) for array in named.values()}) > 1:
        found = ", ".join(f"{name} {list(array.shape)}" for name, array in named.items())
        raise DataError(f"{path}: expected arrays of the same images, found {found}")
    if tasks.size and not 0 <= tasks.min() <= tasks.max() <= task:
        raise DataError(
            f"{path}: expected images of tasks 0 to {task}, found {tasks.min()} to {tasks.max()}"
        )
    relevance = arrays.get("relevance")
    if relevance is not None and not (relevance.shape[1] > task and np.isfinite(relevance).all()):
        raise DataError(
            f"{path}: expected finite relevance [images, {task + 1} tasks or more], found "
            f"{list(relevance.shape)}"
        )
    return arrays


def read_arrays(path: Path, fields: Fields, optional: Fields) -> dict[str, np.ndarray]:
    """`read_npz`, with a DataError for a damaged file."""
    try:
        return read_npz(path, fields, optional)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    except DamagedArchive as error:
        raise DataError(f"{error}; restore it from a copy") from error
