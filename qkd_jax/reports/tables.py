"""Tables of one run and of all runs of an experiment: for the console and as Markdown."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from qkd_jax.protocol import metrics
from qkd_jax.reports.taught import taught_lines

if TYPE_CHECKING:
    import numpy as np
    from rich.console import RenderableType

COLUMNS = {
    "average_accuracy": "average accuracy",
    "last_accuracy": "last accuracy",
    "forgetting": "forgetting",
    "routing_accuracy": "routing accuracy",
    "trainable_parameters": "trainable parameters",
    "training_images_per_second": "training images/s",
    "inference_images_per_second": "inference images/s",
    "peak_memory_mb": "peak memory, MiB",
    "wall_seconds": "wall seconds",
}
# Of a second table, for runs that have them.
COSTS = {
    "oracle_accuracy": "last accuracy, oracle routing",
    "routing_recall_at_2": "routing recall at 2",
    "passes_per_image": "passes per image",
    "inference_milliseconds": "ms per image",
    "kept_bytes_per_class": "kept per class, bytes",
    "kept_bytes_per_task": "kept per task, bytes",
    "kept_bytes_constant": "kept besides, bytes",
    "kept_bytes": "kept in all, bytes",
}
ROUTING_AND_COST = (
    "Of runs that measured it. Oracle routing: the true task takes the place of the method's "
    "choice of a task; a dash where none is chosen. Recall at 2: images whose true task is among "
    "the two most relevant. Passes: of a new image through the transformer, after the last task. "
    "Kept: what is carried from task to task beside the frozen model; an array that grows with "
    "classes and tasks counts in both columns."
)
# Of a third one.
CALIBRATION = {
    "nll": "NLL, nats",
    "ece": "ECE",
    "nll_tempered": "NLL, tempered",
    "ece_tempered": "ECE, tempered",
}
HOW_CALIBRATED = (
    "After the last task, of runs that measured it. NLL: mean of -log p of the true class. ECE: "
    "expected calibration error, 15 bins of equal width, percentage points. Tempered: after one "
    "temperature, which is fitted on the labels of the other half of the test images: a "
    "diagnostic, not a setting."
)
# Hashes in environment.json that all rows of a table must share, those of weights and images.
SHARED = {
    "weights_fingerprint": "weights",
    "teacher_fingerprint": "weights of the teacher",
    "data_fingerprint": "data",
}


def best_first(methods: dict[str, dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """(name, row), by mean average accuracy, best first."""
    return sorted(
        methods.items(),
        key=lambda item: (-item[1].get("average_accuracy", {}).get("mean", -math.inf), item[0]),
    )


def markdown(results: dict[str, Any]) -> str:
    """The page results.md, with the best average accuracy first."""
    rows = best_first(results["methods"])
    lines = [
        f"# {results['experiment']}",
        "",
        *_table(rows, COLUMNS),
        "",
        "Mean ± standard deviation over n seeds (n - 1 in the denominator; one seed has none). "
        "Accuracies and routing are percentages, forgetting percentage points: best before the "
        "final stage minus final, mean over old tasks. Images/s: optimisation steps alone, and the "
        "final model on new images, both without compilation; memory of the run's process.",
    ]
    for text in remarks(results):
        lines += ["", text]
    if measured := [(name, row) for name, row in rows if "passes_per_image" in row]:
        lines += ["", "## Routing and cost", "", *_table(measured, COSTS), "", ROUTING_AND_COST]
    if measured := [(name, row) for name, row in rows if "nll" in row]:
        lines += ["", "## Calibration", "", *_table(measured, CALIBRATION), "", HOW_CALIBRATED]
    if "taught" in results:
        lines += ["", "## Teachers and students", "", *taught_lines(results["taught"])]
    if results["unfinished"]:
        lines += ["", "Not finished, not counted:", ""]
        lines += [f"- {run}" for run in results["unfinished"]]
    if damaged := results.get("damaged"):
        lines += ["", "Damaged, not counted:", ""]
        lines += [f"- {run}: {message}" for run, message in damaged.items()]
    return "\n".join(lines) + "\n"


def _table(rows: list[tuple[str, dict[str, Any]]], columns: dict[str, str]) -> list[str]:
    """A table of some columns of the rows (name, row)."""
    lines = [
        "| method | n | " + " | ".join(columns.values()) + " |",
        "| --- |" + " ---: |" * (len(columns) + 1),
    ]
    for name, row in rows:
        cells = [mean_and_sd(key, row.get(key)) for key in columns]
        lines.append(f"| {name} | {row['n']} | " + " | ".join(cells) + " |")
    return lines


def remarks(results: dict[str, Any]) -> list[str]:
    """What a reader of the table must know: rows that are not of one kind, as Markdown."""
    found = []
    for name, groups in results["mixed"].items():
        smaller = sorted(groups.values(), key=len)[:-1]
        others = ", ".join(run for runs in smaller for run in runs)
        found.append(f"**Not all runs have the same {SHARED[name]}**; others than most: {others}.")
    for name, row in best_first(results["methods"]):
        if row["differing"]:
            settings = ", ".join(f"`{key}`" for key in row["differing"])
            found.append(f"**{name}: seeds differ in {settings}**, so their mean mixes settings.")
    return found


def mean_and_sd(key: str, column: dict[str, Any] | None) -> str:
    if column is None:
        return "–"
    mean = format_number(key, column["mean"])
    exact = key in ("trainable_parameters", "passes_per_image") or key.startswith("kept_bytes")
    if column["sd"] is None or (exact and column["sd"] == 0):
        return mean
    return f"{mean} ± {format_number(key, column['sd'])}"


def format_number(key: str, value: float) -> str:
    """The number as text: percentages with two decimals, likelihoods with three, times and rates
    with one, others whole.
    """
    whole = ("trainable_parameters", "peak_memory_mb", "compilations", "num_tasks", "n")
    if key in whole or key.startswith("kept_bytes"):
        return f"{value:,.0f}"
    if key.startswith("nll"):
        return f"{value:.3f}"
    if key.endswith(("seconds", "per_second")):  # "milliseconds" too
        return f"{value:,.1f}"
    return f"{value:.2f}"


def comparison_table(results: dict[str, Any], names: set[str], width: int) -> RenderableType:
    """The rows `names` of results.json, as a rich table for a console of `width` columns.

    Narrow consoles show only the first columns; results.md has all.
    """
    from rich import box
    from rich.table import Table

    columns = list(COLUMNS)[: None if width >= 160 else 5 if width >= 90 else 4]
    table = Table(
        box=box.SIMPLE_HEAD,
        title=f"{results['experiment']}: mean ± sd over n seeds, accuracies in %",
        title_justify="left",
        pad_edge=False,
        padding=(0, 0, 0, 1),
    )
    table.add_column("method", no_wrap=True)
    for header in ("n", *(COLUMNS[key] for key in columns)):
        table.add_column(header, justify="right")
    for name, row in best_first(results["methods"]):
        if name in names:
            cells = [mean_and_sd(key, row.get(key)) for key in columns]
            table.add_row(name, str(row["n"]), *cells)
    return table


def console_table(
    summary: dict[str, Any], correct: np.ndarray, total: np.ndarray
) -> RenderableType:
    """The accuracies after each task, and below them the numbers of the run, for a rich console.

    Up to ten tasks have their own columns; with more, old tasks are averaged.
    """
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    matrix, curve = metrics.accuracy_matrix(correct, total), metrics.accuracy_curve(correct, total)
    # One decimal per task, so that ten tasks fit into 80 columns.
    table = Table(
        box=box.SIMPLE_HEAD,
        title="accuracy (%) on all classes seen and on each task",
        title_justify="left",
        pad_edge=False,
        padding=(0, 0, 0, 1),
    )
    single = len(total) <= 10
    headers = [f"t{j + 1}" for j in range(len(matrix))] if single else ["new", "old, mean"]
    for header in ["after", "all", *headers]:
        table.add_column(header, justify="right", style="bold" if header == "all" else None)
    for i, row in enumerate(matrix):
        cells = row[: i + 1] if single else [row[i], *([row[:i].mean()] if i else [])]
        shown = [f"{value:.1f}" for value in cells]
        table.add_row(f"t{i + 1}", f"{curve[i]:.2f}", *shown)
    parts = [
        f"{name} {format_number(key, summary[key])}"
        for key, name in (
            ("average_accuracy", "average"),
            ("last_accuracy", "last"),
            ("forgetting", "forgetting"),
            ("routing_accuracy", "routing"),
        )
        if summary.get(key) is not None
    ]
    return Group(table, Text("   ".join(parts), style="bold"))
