"""The figures of a run as PNG files, for papers and talks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qkd_jax.protocol import metrics
from qkd_jax.reports import figures
from qkd_jax.reports.facts import (
    accuracy_range,
    curves_of,
    noun_of,
    relevance_range,
    routing_of,
    routing_shares,
)
from qkd_jax.reports.files import RunFiles
from qkd_jax.reports.writing import save_figure


def write_pictures(run: RunFiles) -> list[Path]:
    """Writes figures/*.png into the run's folder, those that its files allow; returns the paths."""
    directory = run.folder / "figures"
    directory.mkdir(exist_ok=True)
    paths = []
    for name, figure in _draw(run).items():
        paths.append(directory / f"{name}.png")
        save_figure(paths[-1], figure)
    return paths


def _draw(run: RunFiles) -> dict[str, Any]:
    """The figures by file name."""
    drawn = {}
    name = " · ".join(
        str(run.summary[key]) for key in ("experiment", "method") if key in run.summary
    )
    suffix = f" — {name}" if name else ""
    if run.stages:
        drawn["accuracy_curve"] = figures.accuracy_curve(curves_of(run), f"Accuracy{suffix}")
        matrix = metrics.accuracy_matrix(run.correct, run.total)
        drawn["accuracy_matrix"] = figures.heat_map(
            matrix,
            "Accuracy by task",
            "evaluated task",
            "after task",
            "accuracy (%)",
            1,
            accuracy_range(matrix),
        )
    if routing := routing_of(run):
        relevance, confusion = routing
        drawn["relevance"] = figures.heat_map(
            relevance,
            "Mean relevance",
            "relevance given to task",
            "true task",
            "mean relevance",
            2,
            relevance_range(relevance),
        )
        drawn["routing"] = figures.heat_map(
            routing_shares(confusion),
            "Routing",
            "most relevant task",
            "true task",
            f"{noun_of(run)} of the true task (%)",
            0,
            (0.0, 100.0),
        )
    if losses := figures.loss_curves(run.records, f"Training{suffix}", noun_of(run)):
        drawn["loss"] = losses
    if run.circuit.strip():
        drawn["circuit"] = figures.circuit(run.circuit, "Circuit")
    return drawn
