"""Reads the files of a run folder, as far as they exist."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qkd_jax.errors import DataError
from qkd_jax.npz import read_npz
from qkd_jax.reports.ledger import missing_files


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
        circuit=circuit.read_text(encoding="utf-8") if circuit.is_file() else "",
    )


def read_json(path: Path) -> dict[str, Any]:
    """One JSON object; {} if there is no such file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise DataError(
            f"{path}: expected valid JSON, found {error}; delete it or run again"
        ) from error
    if not isinstance(value, dict):
        raise DataError(f"{path}: expected a JSON object, found a {type(value).__name__}")
    return value


def read_records(path: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl that have `images_seen`, ordered by step.

    If a resumed run wrote a step twice, the later line counts. A last line that was cut off by a
    crash is left out.
    """
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    records: dict[Any, dict[str, Any]] = {}
    for number, line in enumerate(lines):
        try:
            record = json.loads(line)
        except ValueError as error:
            if number == len(lines) - 1:
                break
            raise DataError(
                f"{path}, line {number + 1}: expected valid JSON, found {error}"
            ) from error
        if "images_seen" in record:
            step = (record.get("task"), record["step"]) if "step" in record else ("line", number)
            records[step] = record
    return sorted(records.values(), key=lambda record: record["images_seen"])


def _last_predictions(folder: Path) -> dict[str, np.ndarray]:
    """The arrays of the last after_task_<t>.npz, with t as `after_task`."""
    found = {
        int(match.group(1)): path
        for path in (folder.iterdir() if folder.is_dir() else ())
        if (match := re.fullmatch(r"after_task_(\d+)\.npz", path.name))
    }
    if not found:
        return {}
    newest = max(found)
    return {**read_npz(found[newest]), "after_task": np.asarray(newest)}
