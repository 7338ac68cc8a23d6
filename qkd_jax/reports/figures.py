"""Figures of one run: arrays in, matplotlib figures out. Nothing here reads a file.

matplotlib is imported inside the functions, and figures are made without pyplot, so that no
backend is chosen and no figure stays in memory.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, GRID = "#1f2933", "#7b8794", "#e4e7eb"
# After Okabe and Ito: distinct for any colour vision, and in this order also by lightness.
COLORS = (
    *("#0072b2", "#d55e00", "#009e73", "#a6417f"),
    *("#4f4f4f", "#c98a00", "#3f9fd9", "#7a4b12"),
)
# (dash, marker, marker in text) of the first eight lines, of the next eight, and so on.
LINES = (
    ("-", "o", "●"),
    ((0, (4, 1.5)), "s", "■"),
    ((0, (1.2, 1.2)), "^", "▲"),
    ((0, (5, 1, 1, 1)), "D", "◆"),
)
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 12,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
}
MAX_ANNOTATED_TASKS = 12
LOSS_NAMES = {"loss": "total", "loss_ce": "cross-entropy", "loss_kd": "distillation"}


def _styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Runs a drawing function in the common style of all figures."""

    @functools.wraps(draw)
    def styled(*args: Any, **kwargs: Any) -> Figure:
        import matplotlib

        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return styled


@_styled
def accuracy_curve(curves: dict[str, list[float]], title: str) -> Figure:
    """Accuracy after each task, one line per name, labelled with name and last value at its end.

    Colours repeat after eight names, with another dash and marker. A single value among longer
    curves (joint training) becomes a dashed line over the whole width.

    Args:
      curves: name -> percentages [T].
      title: of the figure.
    """
    from matplotlib.ticker import MaxNLocator

    num_tasks = max(len(values) for values in curves.values())
    low = min(min(values) for values in curves.values())
    bottom = max(0.0, 10 * np.floor((low - 2) / 10))
    top = 101.0
    height = max(4.0, 0.24 * len(curves) + 1.0)
    figure, axes = _figure(6.8 + 0.075 * max(map(len, curves)), height)
    ends = []
    lines = cycle((color, *line) for line in LINES for color in COLORS)
    for name, values in curves.items():
        if len(values) == 1 < num_tasks:
            axes.axhline(values[0], color=INK, lw=1.3, ls=(0, (6, 3)), zorder=2)
            ends.append((values[0], num_tasks, name, INK))
            continue
        color, dash, marker, sign = next(lines)
        options = {"lw": 1.9, "ls": dash, "marker": marker, "ms": 5, "mec": "white", "mew": 0.7}
        stages = np.arange(1, len(values) + 1)
        axes.plot(stages, values, color=color, zorder=3, clip_on=False, **options)
        label = f"{sign} {name}" if len(curves) > len(COLORS) else name
        ends.append((values[-1], len(values), label, color))
    axes.set_ylim(bottom, top)
    axes.yaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12, min_n_ticks=1))
    axes.set(title=title, xlabel="tasks learned", ylabel="top-1 accuracy on classes seen (%)")
    axes.set_xlim((0.5, 1.5) if num_tasks == 1 else (1 - 0.03 * num_tasks, num_tasks))
    axes.grid(axis="y", color=GRID)
    _label_ends(axes, ends, 0.155 / (height - 1.0) * (top - bottom))
    return figure


def _label_ends(axes: Axes, ends: list[tuple[float, int, str, str]], gap: float) -> None:
    """Writes `ends` (value, stage, name, color) right of the axes, by value, `gap` apart.

    A thin line connects the end of a curve with its label.
    """
    ends = sorted(ends)
    heights = _spread([value for value, *_ in ends], gap, *axes.get_ylim())
    right = axes.get_xlim()[1]
    for (value, stage, name, color), height in zip(ends, heights, strict=True):
        axes.annotate(
            f"{name}  {value:.2f}" if len(ends) > 1 else f"{value:.2f}",
            (stage, value),
            xytext=(right, height),
            textcoords=_right_of(axes, 22 if len(ends) > 1 else 12),
            color=color,
            va="center",
            fontsize=9.5,
            fontweight="bold",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": color,
                "lw": 0.7,
                "alpha": 0.7,
                "shrinkA": 1,
                "shrinkB": 3,
                "relpos": (0.0, 0.5),
            },
        )


def _right_of(axes: Axes, points: float) -> Any:
    """Data coordinates, shifted to the right by some points."""
    from matplotlib.transforms import offset_copy

    return offset_copy(axes.transData, axes.figure, x=points, units="points")


def _spread(values: list[float], gap: float, low: float, high: float) -> list[float]:
    """Heights near ascending `values` and at least `gap` apart, within the limits if they fit.

    Neighbours that are too close form a group around the mean of their values, as in isotonic
    regression of value - place * gap.
    """
    groups: list[list[float]] = []  # values less their places
    for place, value in enumerate(values):
        groups.append([value - place * gap])
        while len(groups) > 1 and np.mean(groups[-2]) > np.mean(groups[-1]):
            groups[-2:] = [groups[-2] + groups[-1]]
    shifted = [float(np.mean(group)) for group in groups for _ in group]
    ceiling = max(high - (len(values) - 1) * gap, low)
    return [min(max(value, low), ceiling) + place * gap for place, value in enumerate(shifted)]


@_styled
def heat_map(
    matrix: np.ndarray,
    title: str,
    xlabel: str,
    ylabel: str,
    unit: str,
    decimals: int,
    limits: tuple[float, float],
) -> Figure:
    """A matrix over tasks, [rows, columns]; NaN cells stay empty, small matrices show numbers.

    Args:
      unit: label of the colour bar.
      decimals: of the numbers in the cells.
      limits: values of the lightest and the darkest colour.
    """
    from matplotlib.colors import LinearSegmentedColormap

    rows, columns = matrix.shape
    side = float(np.clip(0.52 * max(rows, columns), 3.6, 6.0))
    figure, axes = _figure(side + 1.5, side + 0.5)
    colors = LinearSegmentedColormap.from_list(
        "sheet", ["#f5f8fc", "#c7dbf0", "#7fb0d9", "#3a78b8", "#17407c"]
    )
    image = axes.imshow(matrix, cmap=colors, vmin=limits[0], vmax=limits[1], aspect="equal")
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    every = int(np.ceil(max(rows, columns) / 20))
    axes.set_xticks(range(0, columns, every), range(1, columns + 1, every))
    axes.set_yticks(range(0, rows, every), range(1, rows + 1, every))
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.set_xticks(np.arange(columns + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(rows + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", lw=1.2)
    axes.tick_params(which="minor", length=0)
    if max(rows, columns) <= MAX_ANNOTATED_TASKS:
        middle = limits[0] + 0.55 * (limits[1] - limits[0])
        for (i, j), value in np.ndenumerate(matrix):
            if np.isfinite(value):
                axes.text(
                    j,
                    i,
                    f"{value:.{decimals}f}",
                    ha="center",
                    va="center",
                    fontsize=8.5,
                    color="white" if value > middle else INK,
                )
    bar = figure.colorbar(image, ax=axes, fraction=0.045, pad=0.03)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0)
    bar.set_label(unit)
    return figure


@_styled
def noise_curves(measured: dict[str, Any]) -> Figure:
    """Accuracy of circuits against shots, for each readout error, and against errors of gates.

    Lines are means over runs, bands reach from the least accurate run to the most accurate. Where
    routing was measured it has a second row.

    Args:
      measured: of `cli.measure_noise`.
    """
    noun = "text" if "num_texts" in measured else "fidelity"
    rows = [("accuracy", "test accuracy (%)", measured["exact"], measured["num_classes"])]
    if "exact_routing" in measured:
        routing = measured["exact_routing"], measured["num_tasks"]
        rows.append(("routing", "routing accuracy (%)", *routing))
    height = 3.9 if len(rows) == 1 else 3.1 * len(rows)
    figure, grid = _figure(9.6, height, nrows=len(rows), ncols=2, sharey="row", squeeze=False)
    for (left, right), (name, label, exact, choices) in zip(grid, rows, strict=True):
        for axes in (left, right):
            mean = float(np.mean(exact))
            axes.axhline(mean, color=INK, lw=1.2, ls=(0, (6, 3)), label="exact expectations")
            axes.axhline(100 / choices, color=MUTED, lw=1.2, ls=(0, (1.2, 1.2)), label="chance")
            axes.grid(axis="y", color=GRID)
        left.set_ylabel(label)
        _shot_curves(left, measured, name)
        _gate_curve(right, measured, name)
        left.set_ylim(bottom=0)
    grid[0, 0].set_title("Finite shots")
    grid[0, 1].set_title("Depolarising gates")
    grid[-1, 0].set_xlabel(f"shots for each {noun}")
    grid[-1, 1].set_xlabel("errors after a two-qubit gate")
    for axes in grid[0]:
        axes.legend(fontsize=8.5)
    return figure


def _shot_curves(axes: Axes, measured: dict[str, Any], name: str) -> None:
    for kind, color in zip(measured["readout"], COLORS, strict=False):
        label = f"{kind['probability']:.0%} of the measured bits flipped"
        _band(axes, measured["shots"], np.array(kind[name]), color, label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(measured["shots"], [str(shots) for shots in measured["shots"]])


def _gate_curve(axes: Axes, measured: dict[str, Any], name: str) -> None:
    noisy = [kind for kind in measured["gates"] if kind["probability"] > 0]
    _band(
        axes,
        [kind["probability"] for kind in noisy],
        np.array([kind[name] for kind in noisy]).T,
        COLORS[0],
        f"{measured['shots'][-1]} shots",
    )
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda probability, _: f"{100 * probability:g}%")


def _band(axes: Axes, x: list[float], values: np.ndarray, color: str, label: str) -> None:
    """The mean over rows of values [R, X] as a line, and what they span as a band."""
    axes.fill_between(x, values.min(0), values.max(0), color=color, alpha=0.15, lw=0)
    axes.plot(x, values.mean(0), color=color, lw=1.9, marker="o", ms=4.5, mec="white", label=label)


@_styled
def loss_curves(records: list[dict[str, Any]], title: str, noun: str = "images") -> Figure | None:
    """Losses, and below them each logged entropy, against training images (or texts) seen.

    Args:
      records: lines of metrics.jsonl in order, with `images_seen`; other fields are optional.
        Thin lines are as logged, thick ones running means within a task; at grey lines a task
        begins.

    Returns:
      None if no record holds a finite loss.
    """
    from matplotlib.ticker import EngFormatter

    names = {"loss": None} | {name: None for record in records for name in record}
    curves = {name: _by_task(records, name) for name in names}
    losses = [name for name in names if name.startswith("loss") and curves[name]]
    if {"loss", "loss_ce"} <= set(losses) and all(
        np.array_equal(a, b) for a, b in zip(curves["loss"], curves["loss_ce"], strict=False)
    ):
        losses.remove("loss_ce")  # equals the total
    panels = [("loss", losses)] if losses else []
    if not panels:
        return None
    entropies = [name for name in names if name.endswith("_entropy") and curves[name]]
    panels += [(f"{name.replace('_', ' ')} (nats)", [name]) for name in entropies]
    figure, grid = _figure(
        6.8,
        2.6 + 1.4 * len(panels),
        nrows=len(panels),
        sharex=True,
        squeeze=False,
        gridspec_kw={"height_ratios": [2.4] + [1.0] * len(entropies)},
    )
    for axes, (label, keys) in zip(grid[:, 0], panels, strict=True):
        smooth = np.concatenate(
            [_plot(axes, curves[key], key, color) for key, color in zip(keys, cycle(COLORS))]
        )
        span = np.ptp(smooth) or 1.0
        axes.set_ylim(smooth.min() - 0.08 * span, smooth.max() + 0.2 * span)
        axes.set_ylabel(label)
        axes.grid(axis="y", color=GRID)
        if len(keys) > 1:
            axes.legend(loc="upper right", ncols=min(len(keys), 5), fontsize=9, handlelength=1.2)
    _mark_tasks(grid[:, 0], records)
    grid[0, 0].set_title(title, pad=22)
    grid[-1, 0].set_xlabel(f"training {noun} seen")
    grid[-1, 0].xaxis.set_major_formatter(EngFormatter(sep=""))
    return figure


def _by_task(records: list[dict], key: str) -> list[np.ndarray]:
    """(images_seen, value) of one key, float64 [2, n] for each task with finite numbers."""
    points = np.array(
        [
            (record.get("task", 0), record["images_seen"], record[key])
            for record in records
            if isinstance(record.get(key), int | float) and np.isfinite(record[key])
        ]
    ).reshape(-1, 3)
    return [points[points[:, 0] == task, 1:].T for task in np.unique(points[:, 0])]


def _plot(axes: Axes, tasks: list[np.ndarray], key: str, color: str) -> np.ndarray:
    """Draws one key, each task as a line of its own; returns all smoothed values."""
    label = LOSS_NAMES.get(key, key.removeprefix("loss_").replace("_", " "))
    smoothed = []
    for images, values in tasks:
        smooth = _running_mean(values, max(1, len(values) // 25))
        axes.plot(images, values, color=color, lw=0.7, alpha=0.28)
        axes.plot(
            images, smooth, color=color, lw=1.9, label=None if smoothed else label,
            marker="o" if len(values) == 1 else None, ms=3,
        )  # fmt: skip
        smoothed.append(smooth)
    return np.concatenate(smoothed)


def _running_mean(values: np.ndarray, radius: int) -> np.ndarray:
    """Centred mean over up to 2 radius + 1 values; at the ends over those that exist."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    start = np.maximum(np.arange(len(values)) - radius, 0)
    stop = np.minimum(np.arange(len(values)) + radius + 1, len(values))
    return (sums[stop] - sums[start]) / (stop - start)


def _mark_tasks(panels: np.ndarray, records: list[dict]) -> None:
    begins: dict[int, float] = {}
    for record in records:
        begins.setdefault(record.get("task", 0), record["images_seen"])
    if len(begins) < 2:
        return
    every = int(np.ceil(len(begins) / 15))
    for number, (task, images) in enumerate(sorted(begins.items())):
        for axes in panels:
            axes.axvline(images, color="#cbd2d9", lw=0.9, zorder=0)
        if number % every == 0:
            panels[0].annotate(
                f"task {task + 1}" if number == 0 else f"{task + 1}",
                (images, 1.0),
                xycoords=("data", "axes fraction"),
                xytext=(2, 3),
                textcoords="offset points",
                fontsize=8.5,
                color=MUTED,
            )


CONNECTORS, CONTROLS, TARGETS = "╭├╰│┼┤╮╯", "●", "X⊕"
WORD = re.compile(r"[^\s─━╭├╰│┼┤╮╯]+(?: [^\s─━╭├╰│┼┤╮╯]+)*")


@_styled
def circuit(text: str, title: str) -> Figure:
    """A circuit drawn as text (as PennyLane's `draw`), redrawn with wires and gate boxes.

    Characters keep their places on a grid: rules become wires, `╭├╰│` vertical lines, `●` and `X`
    after them control and target, every other word on a wire a box.
    """
    lines = [line.rstrip() for line in text.strip("\n").splitlines()]
    width = max((len(line) for line in lines), default=1)
    scale = 0.105
    figure, axes = _figure(max(3.0, width * scale + 0.4), max(1.2, 0.36 * len(lines) + 0.6))
    axes.set_axis_off()
    axes.set(xlim=(-1, width), ylim=(len(lines) - 0.4, -0.6))
    axes.set_title(title)
    places = _gate_places(lines)
    for row, line in enumerate(lines):
        _draw_wire_line(axes, line, row, places)
    return figure


def _gate_places(lines: list[str]) -> dict[tuple[int, int], float]:
    """{(row, column): x}: the characters of vertical lines, and where their gates are centred."""
    places, width = {}, max((len(line) for line in lines), default=0)
    for column in range(width):
        downwards = "".join(line.ljust(width)[column] for line in lines)
        for match in re.finditer("╭[├│]*╰", downwards):
            rows = range(*match.span())
            words = [WORD.match(lines[row], column + 1) for row in rows]
            widest = max(len(word.group()) if word else 1 for word in words)
            centre = column + 1 + (widest - 1) / 2
            places |= {(row, column): centre for row in rows}
    return places


def _draw_wire_line(axes: Axes, line: str, row: int, places: dict[tuple[int, int], float]) -> None:
    text = {"ha": "center", "va": "center", "fontsize": 8.5, "zorder": 4}
    wires = [m.start() for m in re.finditer("[─━]", line)]
    if wires:
        axes.plot([wires[0] - 0.5, wires[-1] + 0.5], [row, row], color=INK, lw=1.1, zorder=1)
    for column, character in enumerate(line):
        if character in CONNECTORS[:4]:
            up = 0.5 * (character != "╭")
            down = 0.5 * (character != "╰")
            # PennyLane puts the symbol one place to the right; brackets behind the wires have none.
            inside = wires and column < wires[-1]
            place = places.get((row, column), column + 1) if inside else column
            axes.plot([place] * 2, [row - up, row + down], color=COLORS[0], lw=1.4, zorder=2)
    for match in WORD.finditer(line):
        start, value = match.start(), match.group()
        joined = start > 0 and line[start - 1] in CONNECTORS[:4]
        centre = start + (len(value) - 1) / 2
        if joined:
            centre = places.get((row, start - 1), centre)
        if joined and value in CONTROLS:
            axes.plot(centre, row, "o", ms=5.5, color=COLORS[0], zorder=4)
        elif joined and value in TARGETS:
            axes.plot(centre, row, "o", ms=11, mfc="white", mec=COLORS[0], mew=1.4, zorder=3)
            axes.plot(centre, row, "+", ms=10, color=COLORS[0], mew=1.4, zorder=4)
        elif wires and wires[0] < start < wires[-1]:
            box = {"boxstyle": "round,pad=0.32", "fc": "#eaf1fa", "ec": COLORS[0], "lw": 1.0}
            axes.text(centre, row, value, bbox=box, **text)
        else:
            axes.text(start, row, value, **{**text, "ha": "left"})


def _figure(width: float, height: float, **subplots: Any) -> tuple[Figure, Any]:
    """A figure with its axes; sizes in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=160, layout="constrained")
    return figure, figure.subplots(**subplots)
