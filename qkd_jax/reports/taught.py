"""Teachers beside their students, taught and alone."""

from typing import Any

import numpy as np


def taught_rows(rows: dict[str, dict[int, dict[str, Any]]]) -> dict[str, Any]:
    """For each row of students: teacher, student alone, student taught, and how much of the gap
    between the first two the third closes, over the seeds that have all.

    Args:
      rows: name -> seed -> summary. The student alone is a run of the same `student` without
        `teacher`.
    """
    alone = {
        (summary["student"], seed): summary
        for summaries in rows.values()
        for seed, summary in summaries.items()
        if "student" in summary and "teacher" not in summary
    }
    found = {}
    for name, summaries in rows.items():
        taught = {seed: summary for seed, summary in summaries.items() if "teacher" in summary}
        if not taught:
            continue
        pairs = [(s, alone.get((s["student"], seed))) for seed, s in taught.items()]
        row: dict[str, Any] = {"n": len(taught)}
        for key in ("average_accuracy", "last_accuracy"):
            values = [
                {
                    "teacher": summary["teacher"][key],
                    "alone": None if one is None else one[key],
                    "taught": summary[key],
                }
                for summary, one in pairs
            ]
            row[key] = {
                part: _mean([value[part] for value in values])
                for part in ("teacher", "alone", "taught")
            }
            whole = [value for value in values if value["alone"] is not None]
            # Of the means: single seeds may have a teacher that is hardly better.
            means = [_mean([value[part] for value in whole]) for part in row[key]]
            if whole and means[0] > means[1]:
                row[key]["closed"] = 100 * (means[2] - means[1]) / (means[0] - means[1])
        found[name] = row
    return found


EXPLANATION = (
    "Mean accuracies (%) over n seeds of the teacher, of the student that learns alone (a run with "
    "the same settings and seeds, where there is one), and of the student that is taught; closed: "
    "the share of the gap between the first two that the third closes, of the means over seeds "
    "that have all three."
)


def taught_table(taught: dict[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """(heads, rows) of the table of teachers and students; `EXPLANATION` says what they are."""
    kinds = {"average_accuracy": "average", "last_accuracy": "last"}
    parts = ("teacher", "alone", "taught", "closed")
    heads = [f"{part}, {kind}" for kind in kinds.values() for part in parts]
    rows = []
    for name, row in taught.items():
        cells = [
            "–" if value is None else f"{value:.0f} %" if part == "closed" else f"{value:.2f}"
            for kind in kinds
            for part, value in ((part, row[kind].get(part)) for part in parts)
        ]
        rows.append((name, str(row["n"]), *cells))
    return ("method", "n", *heads), rows


def taught_lines(taught: dict[str, Any]) -> list[str]:
    """The table and its explanation, as Markdown."""
    heads, rows = taught_table(taught)
    lines = [f"| {' | '.join(heads)} |", "| --- |" + " ---: |" * (len(heads) - 1)]
    return [*lines, *(f"| {' | '.join(row)} |" for row in rows), "", EXPLANATION]


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
