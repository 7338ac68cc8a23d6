"""The page of a finished or interrupted run, `report.html`, and its figures.

Everything is made from the files of a run folder, so a report can be made again at any time and on
any machine. The page holds all that it shows: it opens from disk, without a network.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np

from qkd_jax.protocol import metrics
from qkd_jax.reports import facts
from qkd_jax.reports.charts import HeatMap, LineChart, heat_map, line_chart
from qkd_jax.reports.files import RunFiles, read_json, read_run
from qkd_jax.reports.pictures import write_pictures
from qkd_jax.reports.render import rendered
from qkd_jax.reports.writing import write_atomically

LOSSES = {"loss": "total", "loss_ce": "cross-entropy", "loss_kd": "distillation"}
MOST_POINTS = 400  # of a curve over training steps; more are averaged in groups


def write_report(run_folder: str | Path) -> Path:
    """Writes figures/*.png and report.html into a run folder; returns the path of the page.

    Works on interrupted runs too: what was not measured is left out.

    Raises:
      DataError: as `read_run`.
    """
    run = read_run(run_folder)
    write_pictures(run)
    page = run.folder / "report.html"
    write_atomically(page, page_of(run))
    return page


def page_of(run: RunFiles) -> bytes:
    """The page as HTML."""
    return rendered("run.html", _contents(run))


def _contents(run: RunFiles) -> dict[str, Any]:
    """What the template shows of a run."""
    names = read_json(run.folder / "class_order.json").get("class_names", [])
    heads, numbers = facts.number_rows(run)
    command = run.environment.get("command")
    texts = [("configuration", run.config), ("environment", run.environment)]
    return {
        "title": facts.title_of(run),
        "noun": facts.noun_of(run),
        "warnings": facts.warnings_of(run),
        "headline": facts.headline_of(run),
        "curve": _curve(run),
        "maps": _maps(run),
        **_routing(run),
        "entropy": _over_steps(run, {"gate_entropy": "entropy of the relevance"}, "Gate entropy"),
        "tasks": facts.task_rows(run),
        "examples": facts.example_cards(run),
        "confusions": facts.confusion_rows(run, names),
        "classes": facts.class_rows(run, names),
        "losses": _over_steps(run, LOSSES, "Loss"),
        "number_heads": heads,
        "numbers": numbers,
        "circuit": run.circuit.strip("\n"),
        "command": shlex.join(command) if command else "",
        "files": [
            (name, json.dumps(value, indent=2, ensure_ascii=False))
            for name, value in texts
            if value
        ],
    }


def _curve(run: RunFiles) -> LineChart | None:
    if not run.stages:
        return None
    names = [f"after task {n}" for n in range(1, run.stages + 1)]
    return line_chart(
        "Accuracy on all classes seen (%)",
        facts.curves_of(run),
        names,
        x_label="task",
        digits=2,
    )


def _maps(run: RunFiles) -> list[HeatMap]:
    """Accuracy and forgetting, task by task."""
    if not run.stages:
        return []
    matrix = metrics.accuracy_matrix(run.correct, run.total)
    lost = facts.forgotten(matrix)
    hint = "task {column}, after task {row}: {value}"
    return [
        heat_map(
            "Accuracy by task (%)",
            matrix,
            "after task",
            "task",
            facts.accuracy_range(matrix),
            f"{hint} %",
        ),
        heat_map(
            "Points below the best of the task",
            lost,
            "after task",
            "task",
            (0.0, max(10.0, float(np.nanmax(lost)))),
            f"{hint} points below its best",
            kind="bad",
        ),
    ]


def _routing(run: RunFiles) -> dict[str, Any]:
    found = facts.routing_of(run)
    if found is None:
        return {"routing": [], "routing_words": ""}
    relevance, confusion = found
    noun = facts.noun_of(run)
    return {
        "routing": [
            heat_map(
                "Mean relevance",
                relevance,
                "true task",
                "relevance given to task",
                facts.relevance_range(relevance),
                "task {row}: relevance {value} for task {column}",
                digits=2,
            ),
            heat_map(
                f"Most relevant task (% of the {noun})",
                facts.routing_shares(confusion),
                "true task",
                "most relevant task",
                (0.0, 100.0),
                "task {row}: {value} % find task {column} most relevant",
                digits=0,
            ),
        ],
        "routing_words": (
            f"How much each learned task matters to the {noun} of a task, after the last task. On "
            "the diagonal they find their own."
        ),
    }


def _over_steps(run: RunFiles, keys: dict[str, str], title: str) -> LineChart | None:
    """Numbers of the training steps, averaged in groups if there are many; None without any."""
    records = run.records
    size = max(1, -(-len(records) // MOST_POINTS))
    groups = [records[n : n + size] for n in range(0, len(records), size)]

    def mean(group: list[dict[str, Any]], key: str) -> float | None:
        values = [r[key] for r in group if isinstance(r.get(key), int | float)]
        finite = [value for value in values if np.isfinite(value)]
        return float(np.mean(finite)) if finite else None

    lines = {name: [mean(group, key) for group in groups] for key, name in keys.items()}
    lines = {name: values for name, values in lines.items() if any(v is not None for v in values)}
    noun = facts.noun_of(run)
    return line_chart(
        title,
        lines,
        [_place(group[-1], noun) for group in groups],
        x=[group[-1]["images_seen"] for group in groups],
        x_label=f"{noun} seen",
        digits=3,
    )


def _place(record: dict[str, Any], noun: str) -> str:
    task = f"task {record['task'] + 1}, " if isinstance(record.get("task"), int) else ""
    return f"{task}{record['images_seen']:,} {noun}"
