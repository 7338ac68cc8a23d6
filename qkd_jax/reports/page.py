"""The report of a finished or interrupted run: figures and one HTML page.

Everything is made from the files of a run folder, so a report can be made again at any time and on
any machine.
"""

from __future__ import annotations

import base64
import html
import json
from pathlib import Path
from typing import Any

import numpy as np

from qkd_jax.protocol import metrics
from qkd_jax.reports import figures
from qkd_jax.reports.files import RunFiles, read_run
from qkd_jax.reports.tables import format_number
from qkd_jax.reports.writing import save_figure, write_atomically

NUMBERS = {
    "average_accuracy": "mean over stages of the top-1 accuracy on all classes seen",
    "last_accuracy": "top-1 on all classes after the last task",
    "average_accuracy_task_mean": "the same average, every task counting the same",
    "last_accuracy_task_mean": "the same after the last task",
    "forgetting": "best before the final stage minus final, mean over old tasks",
    "forgetting_clipped": "best ever minus final (never negative)",
    "forgetting_just_learned": "just learned minus final",
    "bwt": "backward transfer: final minus just learned",
    "within_task_average_accuracy": "average accuracy when the task is given",
    "within_task_last_accuracy": "last accuracy when the task is given",
    "routing_accuracy": "images whose most relevant task is the true one",
    "trainable_parameters": "numbers optimised in one task",
    "wall_seconds": "seconds, everything included",
    "train_seconds": "seconds from the start of a task to its evaluation, all tasks",
    "training_images_per_second": "images per second in optimisation steps, without compilation",
    "inference_images_per_second": "new images per second by the final model",
    "peak_memory_mb": "largest resident memory of the process, MiB",
    "compilations": "compilations of the training step",
}


def write_report(run_folder: str | Path) -> Path:
    """Writes figures/*.png and report.html into a run folder; returns the path of the page.

    Works on interrupted runs too: what was not measured is left out.
    """
    run = read_run(run_folder)
    directory = run.folder / "figures"
    directory.mkdir(exist_ok=True)
    pictures = {}
    for name, figure in _draw(run).items():
        pictures[name] = save_figure(directory / f"{name}.png", figure)
    page = run.folder / "report.html"
    write_atomically(page, _page(run, pictures).encode("utf-8", "backslashreplace"))
    return page


def _routing(run: RunFiles) -> tuple[np.ndarray, np.ndarray] | None:
    """(mean relevance by true task, routing confusion), each [T, T]; None without relevance."""
    if "relevance" not in run.predictions:
        return None
    learned = int(run.predictions["after_task"]) + 1
    relevance, tasks = run.predictions["relevance"][:, :learned], run.predictions["task"]
    return (
        metrics.mean_relevance(relevance, tasks, learned),
        metrics.routing_confusion(tasks, relevance, learned),
    )


def _draw(run: RunFiles) -> dict[str, Any]:
    """The figures that the run's files allow, by file name."""
    drawn = {}
    name = " · ".join(
        str(run.summary[key]) for key in ("experiment", "method") if key in run.summary
    )
    suffix = f" — {name}" if name else ""
    if run.stages:
        taught = "student, " * ("teacher" in run.summary)
        curves = {
            f"{taught}all classes seen": metrics.accuracy_curve(run.correct, run.total).tolist()
        }
        if run.summary.get("within_task_accuracy_curve"):
            curves["task given (task-aware)"] = run.summary["within_task_accuracy_curve"]
        if teacher := run.summary.get("teacher"):
            curves["teacher, all classes seen"] = teacher["accuracy_curve"]
        drawn["accuracy_curve"] = figures.accuracy_curve(curves, f"Accuracy{suffix}")
        matrix = metrics.accuracy_matrix(run.correct, run.total)
        low = max(0.0, 10 * np.floor((np.nanmin(matrix) - 5) / 10))
        drawn["accuracy_matrix"] = figures.heat_map(
            matrix,
            "Accuracy by task",
            "evaluated task",
            "after task",
            "accuracy (%)",
            1,
            (low, 100.0),
        )
    if routing := _routing(run):
        relevance, confusion = routing
        drawn["relevance"] = figures.heat_map(
            relevance,
            "Mean relevance",
            "relevance given to task",
            "true task",
            "mean relevance",
            2,
            (0.0, min(1.0, max(2 / len(relevance), float(np.nanmax(relevance))))),
        )
        with np.errstate(invalid="ignore"):  # tasks without images: empty rows
            share = 100.0 * confusion / confusion.sum(axis=1, keepdims=True)
        drawn["routing"] = figures.heat_map(
            share,
            "Routing",
            "most relevant task",
            "true task",
            f"{_noun(run)} of the true task (%)",
            0,
            (0.0, 100.0),
        )
    if losses := figures.loss_curves(run.records, f"Training{suffix}", _noun(run)):
        drawn["loss"] = losses
    if run.circuit.strip():
        drawn["circuit"] = figures.circuit(run.circuit, "Circuit")
    return drawn


def _page(run: RunFiles, pictures: dict[str, bytes]) -> str:
    summary = run.summary
    if run.stages:  # stored numbers add what does not follow from the matrix
        summary = {**metrics.summarise(run.correct, run.total), **summary}
    title = (
        " · ".join(
            str(summary[key]) for key in ("experiment", "variant", "method") if summary.get(key)
        )
        or run.folder.name
    )
    if "seed" in summary:
        title += f" · seed {summary['seed']}"
    state = "".join(f"<p class=warning>{html.escape(text)}</p>" for text in _warnings(run))
    # A teacher has no numbers of the whole process.
    columns = {"value": summary}
    if "teacher" in summary:
        columns = {"student": summary, "teacher": summary["teacher"]}
    numbers = [
        (key, *(_number(key, values) for values in columns.values()), meaning)
        for key, meaning in ((k, m.replace("images", _noun(run))) for k, m in NUMBERS.items())
        if isinstance(summary.get(key), int | float)
    ]
    heads = ("number", *columns, "meaning")
    images = "".join(
        f'<img alt="{name.replace("_", " ")}" src="data:image/png;base64,'
        f'{base64.b64encode(data).decode()}">'
        for name, data in pictures.items()
    )
    sections = [
        ("Summary", _table(heads, numbers) if numbers else ""),
        ("Figures", f"<div class=figures>{images}</div>" if images else ""),
        ("Tasks", _task_table(run) if run.stages else ""),
        ("Examples", _examples(run.examples)),
        ("Configuration", _settings(run.config)),
        ("Environment", _settings(run.environment)),
    ]
    body = "".join(f"<h2>{name}</h2>{content}" for name, content in sections if content)
    heading = html.escape(title)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{heading}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{CSS}</style></head>'
        f"<body><h1>{heading}</h1>{state}{body}</body></html>\n"
    )


def _number(key: str, values: dict[str, Any]) -> str:
    value = values.get(key)
    return format_number(key, value) if isinstance(value, int | float) else "–"


def _noun(run: RunFiles) -> str:
    """What the run learned from, "images" or "texts"."""
    return run.environment.get("examples", "images")


def _warnings(run: RunFiles) -> list[str]:
    """Warnings about the run, to read before the numbers."""
    warnings = []
    if not run.summary.get("finished"):
        warnings.append(f"This run is not finished: {run.stages} tasks were evaluated.")
    if leaked := run.environment.get("leaked_test_images"):
        warnings.append(
            f"{_noun(run).capitalize()} that are both trained and tested on: {len(leaked)}, the "
            f"first of them {' = '.join(leaked[0])}. The accuracies count them as right answers "
            "although they were learned by heart."
        )
    if cut := run.environment.get("cut_texts"):
        warnings.append(
            f"Texts that are longer than the backbone reads were cut: {cut[0]} to train on and "
            f"{cut[1]} to test on."
        )
    if removed := run.environment.get("removed_images"):
        warnings.append(
            f"{_noun(run).capitalize()} that were removed between sessions of the run: "
            f"{len(removed)}, the first of them {removed[0]}. The run cannot be repeated exactly."
        )
    return warnings


def _task_table(run: RunFiles) -> str:
    matrix = metrics.accuracy_matrix(run.correct, run.total)
    last, routing = len(matrix) - 1, _routing(run)
    per_task = metrics.routing_summary(routing[1])["routing_accuracy_per_task"] if routing else []
    labels, tasks = (run.predictions.get(name) for name in ("label", "task"))
    rows = []
    for j in range(len(matrix)):
        classes = len(np.unique(labels[tasks == j])) if labels is not None else None
        routed = per_task[j] if j < len(per_task) else None
        shown = [
            matrix[j, j],
            np.max(matrix[j:, j]),
            matrix[last, j],
            matrix[j, j] - matrix[last, j],
            routed,
        ]
        counts = ["–" if classes is None else classes, run.total[last, j]]
        rows.append((j + 1, *counts, *("–" if v is None else f"{v:.2f}" for v in shown)))
    headers = ("task", "classes", f"test {_noun(run)}", "just learned (%)", "best (%)", "last (%)")
    return _table((*headers, "just learned − last", "routing (%)"), rows)


def _examples(examples: list[dict[str, Any]]) -> str:
    """Some test examples, mistakes first, with what was predicted."""
    rows = []
    for shown in examples:
        text, image = html.escape(shown.get("text", "")), shown.get("image", "")
        if image.startswith("data:image/"):
            text = f'<img alt="{html.escape(shown["id"])}" src="{html.escape(image)}">'
        right = shown["predicted"] == shown["class"]
        cells = [html.escape(shown[name]) for name in ("class", "predicted")]
        if "most_relevant_task" in shown:
            cells += [str(shown["task"]), str(shown["most_relevant_task"])]
        inner = "".join(f"<td>{cell}</td>" for cell in cells)
        rows.append(f"<tr class={'right' if right else 'wrong'}><td>{text}</td>{inner}</tr>")
    if not rows:
        return ""
    names = ["test example", "class", "predicted"]
    if "most_relevant_task" in examples[0]:
        names += ["task", "most relevant task"]
    head = "".join(f"<th>{name}</th>" for name in names)
    return f"<div class=scroll><table class=examples><tr>{head}</tr>{''.join(rows)}</table></div>"


def _table(headers: tuple[str, ...], rows: list[tuple]) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in headers)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>"
        for row in rows
    )
    return f"<div class=scroll><table><tr>{head}</tr>{body}</table></div>"


def _settings(settings: dict[str, Any]) -> str:
    if not settings:
        return ""
    text = json.dumps(settings, indent=2, ensure_ascii=False)
    return f"<details><summary>show</summary><pre>{html.escape(text)}</pre></details>"


CSS = """
:root{color-scheme:light}
body{font:15px/1.5 system-ui,sans-serif;color:#1f2933;max-width:1080px;margin:2rem auto;
padding:0 1rem;background:#fff}
h1{font-size:1.5rem;margin-bottom:.3rem}
h2{font-size:1.1rem;margin-top:2.2rem;border-bottom:1px solid #e4e7eb;padding-bottom:.3rem}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.3rem .8rem .3rem 0;text-align:left;border-bottom:1px solid #e4e7eb}
th{color:#52606d;font-weight:600}
.scroll{overflow-x:auto}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(440px,100%),1fr));gap:1.2rem;
align-items:start}
.figures img{width:100%;height:auto}
.examples td{vertical-align:middle}
.examples .wrong td:nth-child(3){color:#b42318}
.examples img{max-width:96px;display:block}
.warning{background:#fff4e0;border-left:4px solid #d9822b;padding:.5rem .8rem}
pre{background:#f5f7fa;padding:1rem;overflow-x:auto;font-size:13px}
summary{cursor:pointer;color:#2557a7}
"""
