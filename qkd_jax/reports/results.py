"""All runs of an experiment as one table with mean and sd over seeds, one page and one figure."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from qkd_jax.errors import ConfigError, DataError
from qkd_jax.reports.comparison_page import comparison_page
from qkd_jax.reports.files import read_json
from qkd_jax.reports.ledger import missing_files
from qkd_jax.reports.tables import CALIBRATION, COLUMNS, COSTS, SHARED, markdown
from qkd_jax.reports.taught import taught_rows
from qkd_jax.reports.writing import save_figure, write_atomically
from qkd_jax.settings.config import changeable_settings, from_dict, to_dict

# Settings in which the seeds of one method may differ.
OWN_SETTINGS = ("seed", "out", "run_folder")


def write_results(experiment_folder: str | Path) -> Path:
    """Writes results.json, results.md, report.html and accuracy_curves.png of runs/<experiment>.

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
        for run, seed in seed_folders(method):
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
    write_atomically(folder / "results.md", markdown(results).encode("utf-8", "backslashreplace"))
    _draw_curves(folder, methods)
    write_atomically(folder / "report.html", comparison_page(folder, results))
    return folder / "results.md"


def seed_folders(method: Path) -> list[tuple[Path, int]]:
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
    rates = [summary.get("inference_images_per_second") for summary in summaries.values()]
    for key in COLUMNS | COSTS | CALIBRATION:
        values = [summary.get(key) for summary in summaries.values()]
        if key == "inference_milliseconds" and "passes_per_image" in row and all(rates):
            values = [1000.0 / rate for rate in rates]
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
