"""Tables of one run, and of all runs of an experiment with mean and sd over seeds."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qkd_jax.errors import ConfigError, DataError
from qkd_jax.protocol import metrics
from qkd_jax.reports.files import read_json, read_run
from qkd_jax.reports.ledger import NOTED, Ledger, lost_files, missing_files
from qkd_jax.reports.predictions import (
    PACKED,
    check_follows,
    packed,
    read_predictions,
)
from qkd_jax.reports.taught import taught_lines, taught_rows
from qkd_jax.reports.writing import save_figure, write_atomically
from qkd_jax.settings.config import changeable_settings, from_dict, to_dict

if TYPE_CHECKING:
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
# Hashes in environment.json that all rows of a table must share, those of weights and images.
SHARED = {
    "weights_fingerprint": "weights",
    "teacher_fingerprint": "weights of the teacher",
    "data_fingerprint": "data",
}
# The files of a run that `record_runs` copies, beside its predictions.
RECORDED = ("config.json", "environment.json", "matrix.json", "summary.json")
# Settings in which the seeds of one method may differ.
OWN_SETTINGS = ("seed", "out", "run_folder")


def write_results(experiment_folder: str | Path) -> Path:
    """Writes results.json, results.md and accuracy_curves.png of runs/<experiment>.

    There is one row for each folder, of a method or a variant such as `qkd-gate-cosine`: mean and
    standard deviation over its seeds (n - 1 in the denominator; none for one seed). Runs without
    `"finished": true` in their summary are listed, but not averaged; nor are those with a file that
    is not what the run wrote.

    Returns:
      The path of results.md.

    Raises:
      DataError: the folder does not exist.
    """
    folder = Path(experiment_folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: expected an experiment's folder, runs/<experiment>, found none")
    methods: dict[str, dict[str, Any]] = {}
    shared: dict[str, dict[str, list[str]]] = {name: {} for name in SHARED}
    unfinished: list[str] = []
    damaged: dict[str, str] = {}
    students: dict[str, dict[int, dict[str, Any]]] = {}
    for method in sorted(path for path in folder.iterdir() if path.is_dir()):
        finished: dict[int, dict[str, Any]] = {}
        configs = []
        for run, seed in _seed_folders(method):
            try:
                missing_files(run)
                summary = read_json(run / "summary.json")
                config = read_json(run / "config.json")
                environment = read_json(run / "environment.json")
            except DataError as error:
                damaged[f"{method.name}/{run.name}"] = str(error).removeprefix(f"{run}/")
                continue
            if summary.get("finished") is True:
                finished[seed] = summary
                configs.append({**_settings(config), "num_tasks": summary.get("num_tasks")})
                for name in SHARED.keys() & environment.keys():
                    same = shared[name].setdefault(environment[name], [])
                    same.append(f"{method.name}/{run.name}")
            else:
                unfinished.append(f"{method.name}/{run.name}")
        if finished:
            methods[method.name] = _over_seeds(finished) | {"differing": _differing(configs)}
            students[method.name] = finished
    mixed = {name: groups for name, groups in shared.items() if len(groups) > 1}
    results = {
        "experiment": folder.name,
        "methods": methods,
        "unfinished": unfinished,
        "mixed": mixed,
    }
    if damaged:
        results["damaged"] = damaged
    if taught := taught_rows(students):
        results["taught"] = taught
    encoded = json.dumps(results, indent=2, allow_nan=False) + "\n"
    write_atomically(folder / "results.json", encoded.encode())
    write_atomically(folder / "results.md", _markdown(results).encode("utf-8", "backslashreplace"))
    _draw_curves(folder, methods)
    return folder / "results.md"


def record_runs(experiment_folder: str | Path, target: str | Path) -> list[Path]:
    """Copies the small files of the finished runs of runs/<experiment> to `target`/<experiment>.

    They are settings, versions, matrix and summary, which are enough to make the tables again, and
    what was predicted of each test image (`read_predictions`). A record is there to be shown to
    others, so of a path on this machine only the last name is kept.

    Returns:
      The folders of the copies.

    Raises:
      DataError: the folder does not exist or holds no finished run, or a file of one is gone or not
        what the run wrote, or its matrix or summary does not follow from its predictions.
    """
    folder, copies = Path(experiment_folder), []
    if not folder.is_dir():
        raise DataError(f"{folder}: expected an experiment's folder, runs/<experiment>, found none")
    for method in sorted(path for path in folder.iterdir() if path.is_dir()):
        for run, _ in _seed_folders(method):
            if not (run / "summary.json").is_file():
                continue
            if read_json(run / "summary.json").get("finished") is not True:
                continue
            record = _record_of(run)
            copy = Path(target) / folder.name / method.name / run.name
            Ledger(copy).write(record)
            copies.append(copy)
    if not copies:
        raise DataError(f"{folder}: expected at least one finished run, found none")
    return copies


def _record_of(run: Path) -> dict[str, bytes]:
    """The files of a run's record, from which a reader can tell that they belong together."""
    gone = [*missing_files(run), *lost_files(run)]
    if needed := [n for n in gone if n in RECORDED or n.startswith("predictions/")]:
        raise DataError(
            f"{run / needed[0]} is gone, so that a record would be incomplete; restore it from a "
            "copy, or repeat the run with another --variant"
        )
    files, predictions = read_run(run), read_predictions(run)
    try:
        check_follows(predictions, files.correct, files.total, files.summary)
    except DataError as error:
        raise DataError(f"{run}: {error}") from None
    record = {} if predictions is None else {PACKED: packed(predictions)}
    for name in RECORDED:
        content = read_json(run / name)
        shown = without_paths(content) | (NOTED if name == "environment.json" else {})
        same = shown == content
        text = (run / name).read_bytes() if same else (json.dumps(shown, indent=1) + "\n").encode()
        record[name] = text
    return record


def without_paths(value: Any) -> Any:
    """Plain JSON where each text that is an absolute path or leads upwards, also behind
    `setting=`, is the last name of that path.
    """
    if isinstance(value, dict):
        return {name: without_paths(part) for name, part in value.items()}
    if isinstance(value, list):
        return [without_paths(part) for part in value]
    if not isinstance(value, str):
        return value
    key, equals, path = value.rpartition("=")
    return key + equals + Path(path).name if path.startswith(("/", "../")) else value


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
    for name, row in _best_first(results["methods"]):
        if name in names:
            cells = [_mean_and_sd(key, row.get(key)) for key in columns]
            table.add_row(name, str(row["n"]), *cells)
    return table


def _draw_curves(folder: Path, methods: dict[str, dict[str, Any]]) -> None:
    """Writes accuracy_curves.png: the mean curve over seeds of each method, without variants."""
    from qkd_jax.reports import figures

    curves = {
        name: list(np.mean(row["accuracy_curves"], axis=0))
        for name, row in methods.items()
        if "-" not in name and len({len(curve) for curve in row["accuracy_curves"]}) == 1
    }
    if curves:
        best_first = sorted(curves.items(), key=lambda item: -np.mean(item[1]))
        figure = figures.accuracy_curve(dict(best_first), f"{folder.name}: accuracy on all classes")
        save_figure(folder / "accuracy_curves.png", figure)


def _seed_folders(method: Path) -> list[tuple[Path, int]]:
    found = [
        (path, int(match.group(1)))
        for path in method.iterdir()
        if path.is_dir() and (match := re.fullmatch(r"seed(\d+)", path.name))
    ]
    return sorted(found, key=lambda item: item[1])


def _over_seeds(summaries: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """Mean, sd and values over seeds of each column that all of them have."""
    row: dict[str, Any] = {"n": len(summaries), "seeds": list(summaries)}
    row["accuracy_curves"] = [summary.get("accuracy_curve", []) for summary in summaries.values()]
    for key in COLUMNS:
        values = [summary.get(key) for summary in summaries.values()]
        if all(isinstance(value, int | float) and math.isfinite(value) for value in values):
            sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
            row[key] = {"mean": float(np.mean(values)), "sd": sd, "values": values}
    return row


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    """Each setting that the method of a run reads, by its current path.

    If a method or a setting is unknown, all settings are as in the file.
    """
    try:
        return _flatten(to_dict(from_dict(config)))
    except ConfigError:
        return _flatten(config)


def _flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Each setting by its whole path, such as "train.epochs"."""
    flat = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        elif key not in OWN_SETTINGS:
            flat[prefix + key] = value
    return flat


def _differing(configs: list[dict[str, Any]]) -> list[str]:
    """Settings that differ between the seeds of one row, whose mean would mix them."""
    keys = sorted({key for config in configs for key in config} - changeable_settings())
    return [
        key for key in keys if any(config.get(key) != configs[0].get(key) for config in configs)
    ]


def _best_first(methods: dict[str, dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """(name, row), by mean average accuracy, best first."""
    return sorted(
        methods.items(),
        key=lambda item: (-item[1].get("average_accuracy", {}).get("mean", -math.inf), item[0]),
    )


def _markdown(results: dict[str, Any]) -> str:
    """The page results.md, with the best average accuracy first."""
    rows = _best_first(results["methods"])
    lines = [
        f"# {results['experiment']}",
        "",
        "| method | n | " + " | ".join(COLUMNS.values()) + " |",
        "| --- |" + " ---: |" * (len(COLUMNS) + 1),
    ]
    for name, row in rows:
        cells = [_mean_and_sd(key, row.get(key)) for key in COLUMNS]
        lines.append(f"| {name} | {row['n']} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "Mean ± standard deviation over n seeds (n - 1 in the denominator; one seed has none). "
        "Accuracies and routing are percentages, forgetting percentage points: best before the "
        "final stage minus final, mean over old tasks. Images/s: optimisation steps alone, and the "
        "final model on new images, both without compilation; memory of the run's process.",
    ]
    for name, groups in results["mixed"].items():
        smaller = sorted(groups.values(), key=len)[:-1]
        others = ", ".join(run for runs in smaller for run in runs)
        lines += ["", f"**Not all runs have the same {SHARED[name]}**; others than most: {others}."]
    for name, row in rows:
        if row["differing"]:
            settings = ", ".join(f"`{key}`" for key in row["differing"])
            lines += ["", f"**{name}: seeds differ in {settings}**, so their mean mixes settings."]
    if "taught" in results:
        lines += ["", "## Teachers and students", "", *taught_lines(results["taught"])]
    if results["unfinished"]:
        lines += ["", "Not finished, not counted:", ""]
        lines += [f"- {run}" for run in results["unfinished"]]
    if damaged := results.get("damaged"):
        lines += ["", "Damaged, not counted:", ""]
        lines += [f"- {run}: {message}" for run, message in damaged.items()]
    return "\n".join(lines) + "\n"


def _mean_and_sd(key: str, column: dict[str, Any] | None) -> str:
    if column is None:
        return "–"
    mean = format_number(key, column["mean"])
    if column["sd"] is None or (key == "trainable_parameters" and column["sd"] == 0):
        return mean
    return f"{mean} ± {format_number(key, column['sd'])}"


def format_number(key: str, value: float) -> str:
    """The number as text: percentages with two decimals, times and rates with one, others whole."""
    if key in ("trainable_parameters", "peak_memory_mb", "compilations", "num_tasks", "n"):
        return f"{value:,.0f}"
    if key.endswith(("seconds", "per_second")):
        return f"{value:,.1f}"
    return f"{value:.2f}"


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
