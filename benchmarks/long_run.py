"""A run of a hundred tasks, watched from outside: what grows with the tasks?

    python -m benchmarks.long_run [--tasks 100] [--write]

QKD on a tiny random transformer and 200 synthetic classes, two for each task. After each task: the
memory, open files and threads of the process, and the time of a step where it was fastest,
which a busy machine disturbs least. Then the same again with one arena of glibc's allocator: by
default it has several, each with its own holes, and memory that was given back stays in them.
`--write` records and draws both.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from qkd_jax.data.packaged import synthetic
from qkd_jax.reports.writing import save_figure
from qkd_jax.runs.provenance import provenance

RESULTS = Path(__file__).parent / "results"
POLL = 0.02  # seconds
IN_A_ROW = 4  # of the steps of a task
ONE_ARENA = {"MALLOC_ARENA_MAX": "1"}
SHOWN = {
    "memory_mib": "memory, MiB",
    "open_files": "open files",
    "threads": "threads",
    "step_ms": "a step, ms",
}


def write_images(folder: Path, num_classes: int) -> None:
    """Writes a folder of synthetic images, 10 to train on and 4 to test for each class."""
    for part, images in zip(("train", "test"), synthetic(num_classes, 10, 4), strict=True):
        for number, pixels in enumerate(images.fetch(range(len(images)))):
            path = folder / part / f"class {images.labels[number]}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)


def command(data: Path, out: Path) -> list[str]:
    """The command of the run."""
    settings = (
        *("data.source=folder", f"data.path={data}", "data.num_classes=0"),
        *("train.devices=1", "data.store_gib=0"),
        *("data.augment=false", "train.checkpoint_every=1000", "train.eval_batch_size=64"),
        "train.epochs=16",
    )
    chosen = [part for setting in settings for part in ("--set", setting)]
    return [sys.executable, "-m", "qkd_jax", "run", "smoke", *chosen, "--out", str(out), "--bare"]


def of_process(pid: int) -> dict[str, float]:
    """What a process holds now (Linux)."""
    process = Path("/proc") / str(pid)
    status = (process / "status").read_text()
    memory, threads = (
        int(re.search(rf"{name}:\s+(\d+)", status)[1]) for name in ("VmRSS", "Threads")
    )
    return {
        "memory_mib": memory / 1024,
        "open_files": len(list((process / "fd").iterdir())),
        "threads": threads,
    }


def fastest_steps(log: str) -> list[float]:
    """Milliseconds of a step in each task, from the lines of metrics.jsonl: the least of all means
    over `IN_A_ROW` steps in a row, since the log has whole milliseconds.
    """
    lines = [json.loads(line) for line in log.splitlines()]
    tasks = max(line["task"] for line in lines) + 1
    times = [np.array([n["wall_s"] for n in lines if n["task"] == task]) for task in range(tasks)]
    return [1000 * float((t[IN_A_ROW:] - t[:-IN_A_ROW]).min()) / IN_A_ROW for t in times]


def watched(num_tasks: int, environment: Mapping[str, str]) -> list[dict[str, float]]:
    """What the process of a run held after each task, with these variables beside ours.

    Raises:
      RuntimeError: the run ended with an error.
    """
    out = Path(tempfile.mkdtemp())
    folder, found = out / "smoke/qkd/seed1993", []
    try:
        write_images(out / "images", 2 * num_tasks)
        process = subprocess.Popen(
            command(out / "images", out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )
        while len(found) < num_tasks and process.poll() is None:
            if (folder / f"predictions/after_task_{len(found)}.npz").exists():
                found.append(of_process(process.pid))
            time.sleep(POLL)
        errors = process.communicate()[1]
        if process.returncode:
            raise RuntimeError(errors)
        steps = fastest_steps((folder / "metrics.jsonl").read_text())
        return [each | {"step_ms": step} for each, step in zip(found, steps, strict=True)]
    finally:
        shutil.rmtree(out, ignore_errors=True)


def growth(found: list[dict[str, float]]) -> dict[str, tuple[float, float]]:
    """The medians over the second tenth of the tasks, when all is compiled, and over the last."""
    tenth = max(1, len(found) // 10)
    early, late = found[tenth : 2 * tenth], found[-tenth:]
    return {
        name: tuple(float(np.median([each[name] for each in part])) for part in (early, late))
        for name in SHOWN
    }


def drawn(found: list[dict[str, float]], one_arena: list[dict[str, float]]) -> Any:
    """The figure: one panel for each quantity, against the task."""
    import matplotlib
    from matplotlib.figure import Figure

    from qkd_jax.reports.figures import COLORS, STYLE

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8, 5), layout="constrained")
        for panel, (name, label) in zip(figure.subplots(2, 2).flat, SHOWN.items(), strict=True):
            for color, run, title in (
                (COLORS[0], found, "as it comes"),
                (COLORS[1], one_arena, "one arena of the allocator"),
            ):
                values = [each[name] for each in run]
                tasks = range(1, len(run) + 1)
                panel.plot(tasks, values, ".", markersize=4, color=color, label=title)
            panel.set(title=label, xlabel="after task")
            panel.set_ylim(0, 1.25 * panel.get_ylim()[1])
            if name == "memory_mib":
                panel.legend(loc="lower right", frameon=False)
    return figure


def main(arguments: list[str] | None = None) -> None:
    """Watches a run, and prints the growth of each quantity."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", type=int, default=100)
    parser.add_argument("--write", action="store_true", help="record and draw what was found")
    options = parser.parse_args(arguments)
    before = provenance()
    found, one_arena = (watched(options.tasks, variables) for variables in ({}, ONE_ARENA))
    record = {
        **before,
        "growth": growth(found),
        "growth_one_arena": growth(one_arena),
        "after_task": found,
        "after_task_one_arena": one_arena,
    }
    for title in ("growth", "growth_one_arena"):
        print(title.replace("_", " "))
        for name, (early, late) in record[title].items():
            print(f"  {SHOWN[name]:20} {early:8.1f} -> {late:8.1f}")
    if options.write:
        (RESULTS / "long_run.json").write_text(json.dumps(record, indent=1) + "\n")
        save_figure(RESULTS / "long_run.png", drawn(found, one_arena), dpi=120)


if __name__ == "__main__":
    main()
