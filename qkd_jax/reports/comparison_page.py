"""The page of a comparison, `report.html` of runs/<experiment>: table, curves and ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from qkd_jax.protocol.comparison import Interval
from qkd_jax.reports.charts import LineChart, line_chart
from qkd_jax.reports.facts import number
from qkd_jax.reports.ranks import rankable, ranking
from qkd_jax.reports.render import rendered
from qkd_jax.reports.tables import CALIBRATION, COLUMNS, COSTS, best_first, mean_and_sd, remarks
from qkd_jax.reports.taught import EXPLANATION, taught_table

NAMES = COLUMNS | COSTS | CALIBRATION
ACCURACIES = ("average_accuracy", "last_accuracy", "forgetting", "routing_accuracy")
ACCURACIES += ("routing_recall_at_2", "oracle_accuracy", *CALIBRATION)


def comparison_page(folder: Path, results: dict[str, Any]) -> bytes:
    """The page as HTML.

    Args:
      folder: runs/<experiment>; the experiments beside it are the other streams of the ranks.
      results: what results.json holds.
    """
    rows = best_first(results["methods"])
    return rendered(
        "comparison.html",
        {
            "title": f"{results['experiment']}: {len(rows)} methods compared",
            "words": _words(rows),
            "remarks": remarks(results),
            "accuracy": _table(rows, ACCURACIES),
            "costs": _table(rows, tuple(key for key in NAMES if key not in ACCURACIES)),
            "curves": _curves(rows),
            "taught": _taught(results.get("taught", {})),
            "explanation": EXPLANATION,
            "ranks": _ranks(folder, [name for name, _ in rows]),
        },
    )


def _words(rows: list[tuple[str, dict[str, Any]]]) -> str:
    scored = [(name, row["average_accuracy"]) for name, row in rows if "average_accuracy" in row]
    if not scored:
        return "No run is finished yet."
    (best, column), *others = scored
    words = f"{best} has the highest average accuracy, {column['mean']:.1f} %"
    if others:
        name, second = others[0]
        words += f", {column['mean'] - second['mean']:.1f} points ahead of {name}"
    return f"{words}. Mean ± standard deviation over n seeds; click on a head to sort."


def _table(rows: list[tuple[str, dict[str, Any]]], keys: tuple[str, ...]) -> dict[str, Any]:
    shown = [key for key in keys if any(key in row for _, row in rows)]

    def cell(key: str, row: dict[str, Any]) -> dict[str, Any]:
        value = row[key]["mean"] if key in row else ""
        return {"value": value, "text": mean_and_sd(key, row.get(key))}

    return {
        "heads": ("method", "n", *(NAMES[key] for key in shown)),
        "rows": [
            [name, number(row["n"], 0), *(cell(key, row) for key in shown)] for name, row in rows
        ],
    }


def _taught(taught: dict[str, Any]) -> dict[str, Any]:
    """The table of teachers and students, sorted by its numbers and not by their texts."""
    heads, rows = taught_table(taught)

    def cell(text: str) -> dict[str, Any]:
        return {"value": "" if text == "–" else float(text.removesuffix(" %")), "text": text}

    return {"heads": heads, "rows": [[row[0], *map(cell, row[1:])] for row in rows]}


def _curves(rows: list[tuple[str, dict[str, Any]]]) -> LineChart | None:
    """The mean curve over seeds of each method, best first."""
    curves = {
        name: np.mean(row["accuracy_curves"], axis=0).tolist()
        for name, row in rows
        if len({len(curve) for curve in row["accuracy_curves"]}) == 1
    }
    longest = max((len(curve) for curve in curves.values()), default=0)
    names = [f"after task {n}" for n in range(1, longest + 1)]
    # A method with one stage, such as joint training, has the same number all along.
    level = {n: c * longest if len(c) == 1 else c for n, c in curves.items()}
    return line_chart("Accuracy on all classes seen (%)", level, names, x_label="task")


def _ranks(folder: Path, methods: list[str]) -> dict[str, Any] | None:
    """Mean ranks over this stream and those beside it that have the same methods; None with fewer
    than two methods that can be ranked.
    """
    ranked = rankable(folder, methods)
    if len(ranked) < 2:
        return None
    others = [path for path in sorted(folder.parent.iterdir()) if path.is_dir() and path != folder]
    streams = [folder, *(other for other in others if rankable(other, ranked) == ranked)]
    found = ranking(streams, ranked)
    first = found["methods"][0]

    def cell(interval: Interval, digits: int) -> dict[str, Any]:
        value, low, high = (f"{end:.{digits}f}" for end in interval)
        return {"value": interval.value, "text": f"{value} [{low}, {high}]"}

    return {
        "left_out": [method for method in methods if method not in ranked],
        "critical": found["critical_difference"],
        "streams": found["streams"],
        "heads": (
            "method",
            "mean rank",
            *(f"{stream}: average accuracy (%)" for stream in found["streams"]),
            *(f"{stream}: points behind {first}" for stream in found["streams"]),
        ),
        "rows": [
            [
                method,
                cell(found["rank"][method], 2),
                *(cell(interval, 1) for interval in found["accuracy"][method]),
                *(cell(interval, 1) for interval in found["behind"][method]),
            ]
            for method in found["methods"]
        ],
    }
