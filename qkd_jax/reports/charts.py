"""Charts of a page: numbers in, positions in a drawing out. The templates draw them as SVG.

A chart is 720 by 300 units wherever it is shown. Hovering, touching or the arrow keys choose a
place on its horizontal axis, and the page's script shows the numbers of all lines there.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 720.0, 300.0
LEFT, RIGHT, TOP, BOTTOM = 52.0, 14.0, 14.0, 44.0
# A larger heat map is a drawing, since a page with ten thousand cells is slow and fits no window.
MOST_ROWS, SHADES = 30, 20


@dataclass(frozen=True)
class Line:
    """One line: its name, its SVG path, its last point, and its numbers for the script."""

    name: str
    path: str
    end: tuple[float, float] | None
    values: tuple[float | None, ...]


@dataclass(frozen=True)
class LineChart:
    """Lines over a common horizontal axis.

    Attributes:
      title, x_label: what it shows, in words.
      lines: the most important first; the style has 32 looks, which then begin again.
      x_ticks, y_ticks: (position, text).
      places: the horizontal position of each value.
      names: what stands at each place, such as "after task 3".
      digits: after the decimal point of the shown numbers.
    """

    title: str
    x_label: str
    lines: tuple[Line, ...]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    places: tuple[float, ...]
    names: tuple[str, ...]
    digits: int = 2

    @property
    def data(self) -> str:
        """What the page's script reads, as JSON."""
        lines = [{"name": line.name, "values": line.values} for line in self.lines]
        return json.dumps(
            {"places": self.places, "names": self.names, "lines": lines, "digits": self.digits}
        )


def line_chart(
    title: str,
    lines: dict[str, Sequence[float | None]],
    names: Sequence[str],
    *,
    x: Sequence[float] | None = None,
    x_label: str = "",
    digits: int = 2,
) -> LineChart | None:
    """A chart of lines that have a value for each of `names`; None if there is nothing to draw.

    A value that is None or not finite leaves a gap.

    Args:
      lines: values by the line's name; a shorter line ends earlier.
      names: what stands at each place.
      x: the place of each value on the axis; 1, 2, ... if not given.
    """
    x = list(range(1, len(names) + 1)) if x is None else list(x)
    known = {name: [_number(v) for v in values] for name, values in lines.items()}
    numbers = [v for values in known.values() for v in values if v is not None]
    if not numbers or not x:
        return None
    ticks = nice_ticks(min(numbers), max(numbers))
    low, high = ticks[0], ticks[-1]
    first, last = min(x), max(x)

    def across(value: float) -> float:
        share = 0.5 if last == first else (value - first) / (last - first)
        return round(LEFT + share * (WIDTH - LEFT - RIGHT), 1)

    def up(value: float) -> float:
        return round(HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM), 1)

    places = [across(value) for value in x]
    drawn = []
    for name, values in known.items():
        points = [None if v is None else (p, up(v)) for p, v in zip(places, values, strict=False)]
        ends = [point for point in points if point is not None]
        drawn.append(Line(name, _path(points), ends[-1] if ends else None, tuple(values)))
    marks = x if len(set(x)) <= 12 else [t for t in nice_ticks(first, last) if first <= t <= last]
    return LineChart(
        title,
        x_label,
        tuple(drawn),
        tuple((across(value), f"{value:,.10g}") for value in marks),
        tuple((up(tick), f"{tick:,.10g}") for tick in ticks),
        tuple(places),
        tuple(names),
        digits,
    )


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers, steps of 1, 2 or 5 times a power of ten, around [low, high]."""
    if high <= low:
        low, high = low - 0.5, high + 0.5
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(step for step in (1, 2, 5, 10) if step * power >= rough * (1 - 1e-9)) * power
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(n * step, 12) for n in range(first, last + 1)]


def _number(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


def _path(points: list[tuple[float, float] | None]) -> str:
    """SVG path data through the points, lifted at gaps; a lone point is a dot of no length."""
    pieces, drawing = [], False
    for n, point in enumerate(points):
        if point is None:
            drawing = False
            continue
        pieces.append(f"{'L' if drawing else 'M'}{point[0]:g} {point[1]:g}")
        if not drawing and (n + 1 == len(points) or points[n + 1] is None):
            pieces.append("h0")
        drawing = True
    return "".join(pieces)


@dataclass(frozen=True)
class Cell:
    """One number of a heat map: as text, as a share of the range, and what a hover says."""

    text: str
    share: float | None
    hint: str


@dataclass(frozen=True)
class HeatMap:
    """A matrix as a table whose cells are shaded, or as a drawing if it is large.

    Attributes:
      rows: of `Cell`s; none if it is drawn.
      dense: too many columns for numbers, which then show on hovering alone.
      kind: "good" where more is better, "bad" where less is.
      size: rows and columns.
      shades: of the drawing: (share of the range, SVG path of all cells with it).
      ticks: of the drawing: the numbers at its edges.
    """

    title: str
    row_label: str
    column_label: str
    rows: tuple[tuple[Cell, ...], ...]
    dense: bool
    kind: str
    size: int
    shades: tuple[tuple[float, str], ...] = ()
    ticks: tuple[int, ...] = ()


def heat_map(
    title: str,
    matrix: Sequence[Sequence[float]],
    row_label: str,
    column_label: str,
    value_range: tuple[float, float],
    hint: str,
    *,
    digits: int = 1,
    kind: str = "good",
) -> HeatMap:
    """A heat map of a matrix; NaN leaves a cell empty.

    Args:
      value_range: the numbers that get no shade and the full one.
      hint: what hovering says, with {row}, {column} (from 1) and {value}.
    """
    low, high = value_range

    def share(value: float) -> float | None:
        if not math.isfinite(value):
            return None
        return min(1.0, max(0.0, (value - low) / (high - low) if high > low else 0.0))

    def cell(row: int, column: int, value: float) -> Cell:
        if (part := share(value)) is None:
            return Cell("", None, "")
        text = f"{value:.{digits}f}"
        return Cell(text, round(part, 3), hint.format(row=row, column=column, value=text))

    size = len(matrix)
    if size > MOST_ROWS:
        shares = [[share(float(value)) for value in values] for values in matrix]
        step = next(n for n in (5, 10, 20, 50, 100, 200, 500, size) if size <= 10 * n)
        ticks = tuple(range(step, size + 1, step))
        shades = _shades(shares)
        return HeatMap(title, row_label, column_label, (), True, kind, size, shades, ticks)
    rows = tuple(
        tuple(cell(i, j, float(value)) for j, value in enumerate(values, 1))
        for i, values in enumerate(matrix, 1)
    )
    return HeatMap(title, row_label, column_label, rows, size > 12, kind, size)


def _shades(shares: Sequence[Sequence[float | None]]) -> tuple[tuple[float, str], ...]:
    """For each of `SHADES` the path of all cells that are nearest to it; equal neighbours in a row
    are one rectangle.
    """
    paths: dict[int, list[str]] = {}
    for row, values in enumerate(shares):
        levels = [None if value is None else round(value * SHADES) for value in values]
        column = 0
        for level, group in itertools.groupby(levels):
            width = len(list(group))
            if level is not None:
                paths.setdefault(level, []).append(f"M{column} {row}h{width}v1h-{width}z")
            column += width
    return tuple((level / SHADES, "".join(paths[level])) for level in sorted(paths))
