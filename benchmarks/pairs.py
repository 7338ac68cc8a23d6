"""Paired timings: ours and a peer's in turn, so that what else the machine does hits both.

A row is one comparison. Its ratio is the median over pairs of peer / ours, so that above 1 we are
faster; the times beside it are medians too. Nothing here decides what is good: `goal` is printed
next to what was measured, and losing rows stay.
"""

import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

RESULTS = Path(__file__).parent / "results"
# Whose versions the numbers depend on.
PACKAGES = (
    *("jax", "numpy", "pillow", "torch", "pennylane", "pennylane-lightning"),
    *("tensorcircuit-ng", "qujax", "transformers", "debyecalculator"),
)
# A measurement repeats its call until it takes this long: clocks and wake-ups then do not count.
LEAST_SECONDS = 0.05


class Row(NamedTuple):
    """One comparison, in the form of `results/latest.json`.

    Attributes:
      name: what is done, with its sizes.
      ours, peer: medians, in `unit`; less is better.
      peer_name: who the peer is, and whether compiled or eager.
      ratio: median of peer / ours over the pairs; NaN where the peer could not be measured.
      goal: the ratio that was aimed at; 0 where there is none.
      note: how the numbers came to be, where that is not plain timing.
    """

    name: str
    ours: float
    peer: float
    peer_name: str
    unit: str
    ratio: float
    goal: float
    note: str = ""


def seconds(call: Callable[[], object], times: int) -> float:
    """Seconds of one of `times` calls in a row."""
    began = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - began) / times


def enough(call: Callable[[], object]) -> int:
    """How many calls in a row take `LEAST_SECONDS`; the first, which compiles, is not timed."""
    call()
    return calls_in_a_row(seconds(call, 1))


def calls_in_a_row(one: float) -> int:
    """How many calls of `one` second each a measurement repeats."""
    return max(1, round(LEAST_SECONDS / max(one, 1e-6)))


def median_seconds(call: Callable[[], object], repeats: int) -> float:
    """Of one call, after a first one that compiles."""
    times = enough(call)
    return statistics.median(seconds(call, times) for _ in range(repeats))


def compare(
    name: str,
    ours: Callable[[], object],
    peer: Callable[[], object],
    peer_name: str,
    goal: float,
    *,
    pairs: int = 7,
    peer_share: float = 1.0,
    warm: bool = False,
    note: str = "",
) -> Row:
    """Times two calls that block until they are done, in turn.

    Args:
      pairs: how many pairs are measured after one call of each for warming up.
      peer_share: the part of the whole work that one call of the peer does; its time is divided by
        it, and `note` should say so.
      warm: both have been called before, so that nothing is left to compile.
    """
    if not warm:
        ours(), peer()
    first = seconds(ours, 1), seconds(peer, 1)
    counts = [calls_in_a_row(one) for one in first]
    # A call that is long by itself was measured already.
    measured = [first] if counts == [1, 1] else []
    while len(measured) < pairs:
        measured.append((seconds(ours, counts[0]), seconds(peer, counts[1])))
    mine = statistics.median(a for a, _ in measured)
    theirs = statistics.median(b for _, b in measured) / peer_share
    ratio = statistics.median(b / a for a, b in measured) / peer_share
    return Row(name, 1e3 * mine, 1e3 * theirs, peer_name, "ms", ratio, goal, note)


def check(name: str, found: Any, expected: Any, tolerance: float = 1e-3) -> None:
    """A peer that computes something else is no peer: leaves agree to `tolerance` of their largest
    entry.

    Raises:
      AssertionError: they do not, or something is not a number.
    """
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        gap = np.max(np.abs(np.subtract(a, b))) / max(1e-3, np.max(np.abs(b)))
        if not gap < tolerance:
            raise AssertionError(f"{name}: ours and the peer's differ by {gap:.1e}")


def table(rows: Sequence[Row]) -> str:
    """The rows as Markdown; a goal that was not reached is marked."""
    lines = [
        "| what | ours | peer | | ratio | goal |",
        "| --- | ---: | ---: | --- | ---: | ---: |",
    ]
    for row in rows:
        goal = f"{row.goal:g}" if row.goal else "–"
        missed = " **missed**" if row.goal and row.ratio < row.goal else ""
        if math.isnan(row.ratio):  # the note says why
            missed = " **not measured**"
        note = f" ({row.note})" if row.note else ""
        lines.append(
            f"| {row.name} | {row.ours:.3g} {row.unit} | {row.peer:.3g} {row.unit} | "
            f"{row.peer_name}{note} | {row.ratio:.2f} | {goal}{missed} |"
        )
    return "\n".join(lines)


def machine() -> dict[str, object]:
    """What the numbers belong to."""
    names = [line.split(":")[1].strip() for line in _cpu_facts() if line.startswith("model name")]
    affinity = getattr(os, "sched_getaffinity", None)  # Linux
    return {
        "platform": f"{platform.system()} {platform.machine()}",
        "processor": names[0] if names else platform.processor(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "python": platform.python_version(),
    }


def _cpu_facts() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def versions(names: Sequence[str]) -> dict[str, str]:
    """Of the packages that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


class Timed(NamedTuple):
    """The rows of one subject, and what they belong to.

    Attributes:
      machine: of `machine`.
      versions: of the `PACKAGES` that were installed.
      rows: in order.
    """

    machine: dict[str, object]
    versions: dict[str, str]
    rows: list[Row]


def timed_here(rows: list[Row]) -> Timed:
    """Rows that were timed on this machine with what is installed."""
    return Timed(machine(), versions(PACKAGES), rows)


def write(subjects: dict[str, Timed], path: Path) -> None:
    """Every subject with its machine, versions and rows as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    value = {
        name: {**timed._asdict(), "rows": [row._asdict() for row in timed.rows]}
        for name, timed in subjects.items()
    }
    path.write_text(json.dumps(value, indent=1) + "\n")


def read(path: Path) -> dict[str, Timed]:
    """What `write` left; nothing where there is no file."""
    if not path.exists():
        return {}
    return {
        name: Timed(entry["machine"], entry["versions"], [Row(**row) for row in entry["rows"]])
        for name, entry in json.loads(path.read_text()).items()
    }
