"""Seconds from the command line to the first step of a run, with nothing compiled and with all.

    python -m benchmarks.start [--experiment renditions] [--repeats 5]

`python -m qkd_jax run renditions` in a process of its own and a new folder each time; the clock
stops when the first line of metrics.jsonl is there, which the first step writes. The weights have
been fetched (their hash is compared in every run). In the first run the folder of compiled programs
is empty; later ones find there what it kept. One more run, not timed, tells where the seconds go.
"""

import argparse
import functools
import importlib
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.pairs import Row, table

GOAL = 6.0  # seconds on two cores
WAIT = 600.0  # seconds until a run without a first step has failed
# Functions that the run calls one after the other, in this order, and what they do.
STAGES = {
    "qkd_jax.weights.load.load_backbone": "weights",
    "qkd_jax.runs.loop.plan": "data",
    "qkd_jax.runs.loop.read_contents": "fingerprint of the data",
    "qkd_jax.engine.verbs.init_state": "first state",
    "qkd_jax.runs.loop.verify": "check of every image",
    "qkd_jax.runs.loop.begin_folder": "folder",
    "qkd_jax.runs.checkpoint.Checkpoints.restore": "look for checkpoints",
    "qkd_jax.engine.engine.Engine.open_task": "opening the task",
    "qkd_jax.engine.engine.Engine.step": "first step",
}
STEP = "jit(_counted_step)"
# Parts of the first step, by jax's own clock.
COMPILING = {
    "/jax/core/compile/jaxpr_trace_duration": "tracing",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "lowering",
    "/jax/core/compile/backend_compile_duration": "loading",
}


def to_first_step(experiment: str, cache: Path) -> float:
    """Seconds of one run, which then ends."""
    with tempfile.TemporaryDirectory() as out, open(Path(out, "said"), "w+") as said:
        command = [sys.executable, "-m", "qkd_jax", "run", experiment, "--out", out]
        began = time.monotonic()
        run = subprocess.Popen(command, env=_environment(cache), stdout=said, stderr=said)
        try:
            while not any(log.stat().st_size for log in Path(out).rglob("metrics.jsonl")):
                if run.poll() is not None or time.monotonic() - began > WAIT:
                    said.seek(0)
                    raise RuntimeError(f"no first step: {said.read()[-2000:]}")
                time.sleep(0.005)
            return time.monotonic() - began
        finally:
            run.kill()
            run.wait()


def where_they_go(experiment: str, cache: Path) -> str:
    """The seconds of each stage of another run."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-m", "benchmarks.start", "--traced", str(time.monotonic())]
        command += ["--experiment", experiment, "--out", out]
        done = subprocess.run(
            command, env=_environment(cache), check=True, capture_output=True, text=True
        )
    return done.stdout.splitlines()[-1]


def _environment(cache: Path) -> dict[str, str]:
    left_out = ("JAX_COMPILATION_CACHE_DIR", "QKD_JAX_WEIGHTS")
    kept = {name: value for name, value in os.environ.items() if name not in left_out}
    return {**kept, "QKD_JAX_CACHE": str(cache)}


def trace(began: float, experiment: str, out: str) -> None:
    """Runs to the first step in this process; prints the seconds of its stages and ends."""
    import jax

    from qkd_jax.cli import main as command_line

    spans: list[tuple[str, float, float]] = []
    compiling: dict[str, float] = {}

    def listen(event: str, seconds: float, **about) -> None:
        if event in COMPILING and about.get("fun_name") in (STEP, STEP[4:-1]):
            compiling[COMPILING[event]] = seconds

    jax.monitoring.register_event_duration_secs_listener(listen)

    def watched(function, stage: str):
        @functools.wraps(function)
        def call(*arguments, **named):
            started = time.monotonic()
            found = function(*arguments, **named)
            if stage == "first step":
                jax.block_until_ready(found)
            if threading.current_thread() is threading.main_thread():
                spans.append((stage, started, time.monotonic()))
            if stage == "first step":
                print(told(began, spans, compiling), flush=True)
                os._exit(0)
            return found

        return call

    for path, stage in STAGES.items():
        owner, name = owner_of(path)
        setattr(owner, name, watched(getattr(owner, name), stage))
    sys.exit(command_line(["run", experiment, "--out", out]))


def owner_of(path: str) -> tuple[object, str]:
    """(the module or class, the name in it) of a dotted path."""
    parent, _, name = path.rpartition(".")
    try:
        return importlib.import_module(parent), name
    except ModuleNotFoundError:
        module, _, owner = parent.rpartition(".")
        return getattr(importlib.import_module(module), owner), name


def told(began: float, spans: list[tuple[str, float, float]], compiling: dict[str, float]) -> str:
    """One sentence. Before the first stage is importing, before the last one the first batch."""
    parts, last, between = [], began, 0.0
    for stage, start, end in spans:
        if last == began:
            parts.append(f"imports and settings {start - last:.2f}")
        elif stage == "first step":
            parts.append(f"first batch up to the first adapter {start - last:.2f}")
        else:
            between += start - last
        parts.append(f"{stage} {end - start:.2f}")
        last = end
    inside = [f"{name} {seconds:.2f}" for name, seconds in compiling.items()]
    parts += [f"in between {between:.2f}; of the step"]
    return ", ".join(parts) + " " + ", ".join(inside)


def rows(experiment: str, repeats: int) -> Iterator[Row]:
    from qkd_jax.settings.experiments import load_experiment
    from qkd_jax.weights.fetch import fetch
    from qkd_jax.weights.load import TINY_RANDOM

    weights = load_experiment(experiment).get_config().backbone.name
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder)
        if weights != TINY_RANDOM:
            fetched = fetch(weights)
            (cache / fetched.name).symlink_to(fetched)
        first = to_first_step(experiment, cache)
        later = [to_first_step(experiment, cache) for _ in range(repeats)]
        stages = where_they_go(experiment, cache)
    second = statistics.median(later)
    name = f"from the command to the first step, {experiment}"
    yield Row(
        f"{name}, second run",
        second,
        GOAL,
        "the goal, on two cores",
        "s",
        GOAL / second,
        1.0,
        f"median of {repeats}; seconds of one more: {stages}",
    )
    yield Row(
        f"{name}, first run",
        first,
        second,
        "the second run",
        "s",
        second / first,
        0.0,
        "one run; nothing was compiled before",
    )


def main(arguments: list[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experiment", default="renditions")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--traced", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.traced is not None:
        trace(options.traced, options.experiment, options.out)
    found = list(rows(options.experiment, options.repeats))
    print(table(found), flush=True)
    return found


if __name__ == "__main__":
    main()
