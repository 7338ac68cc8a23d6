"""Runs many methods and seeds of one experiment, each in a process of its own.

In its own process a run has its own peak memory, returns the memory of compiled programs, and does
not stop others if it crashes; starting one takes a few seconds. This process never uses a device,
so that runs can use the accelerator. Finished runs are recognised by their settings and data.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

from qkd_jax.data.contents import SplitContents, read_contents
from qkd_jax.errors import ConfigError, QkdError
from qkd_jax.reports.files import read_json
from qkd_jax.reports.tables import format_number
from qkd_jax.runs.folder import begun_run, run_folder
from qkd_jax.runs.plan import Plan, plan
from qkd_jax.runs.progress import counting, duration
from qkd_jax.settings.config import Config
from qkd_jax.settings.sections import DataConfig

SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]


class PlannedRun(NamedTuple):
    """One method with one seed: its folder, and the command that runs or continues it."""

    name: str  # "ease seed 1994"
    config: Config
    folder: Path
    command: list[str]


class Outcome(NamedTuple):
    """The failures as (name of the run, message), and whether a signal stopped the runs."""

    failures: list[tuple[str, str]]
    stopped: bool


def planned_runs(
    configs: Sequence[Config], out: Path, variant: str, arguments: Callable[[Config], list[str]]
) -> list[PlannedRun]:
    """One run for each config; `arguments` gives the arguments of `python -m qkd_jax`."""
    return [
        PlannedRun(
            f"{config.method} seed {config.seed}",
            config,
            run_folder(out, config, variant),
            [sys.executable, "-m", "qkd_jax", *arguments(config)],
        )
        for config in configs
    ]


def without_finished(
    runs: Sequence[PlannedRun], show: Callable[[str], None], *, allow_removed: bool = False
) -> tuple[list[PlannedRun], list[tuple[str, str]]]:
    """(runs with work to do, failures for folders with other runs)."""
    plans: dict[Config, Plan] = {}
    contents: dict[DataConfig, SplitContents] = {}
    left, failures = [], []
    for number, run in enumerate(runs, 1):
        if not (run.folder / "summary.json").exists():
            left.append(run)
            continue
        of_any_seed = dataclasses.replace(run.config, seed=0)
        try:
            if of_any_seed not in plans:
                plans[of_any_seed] = plan(of_any_seed)
            planned, data = plans[of_any_seed], run.config.data
            if data not in contents:
                num_images = len(planned.data.train) + len(planned.data.test)
                with counting("reading", num_images) as advance:
                    contents[data] = read_contents(planned.data, advance)
            config = dataclasses.replace(planned.config, seed=run.config.seed)
            planned = planned._replace(config=config)
            begun = begun_run(run.folder, planned, contents[data], allow_removed=allow_removed)
        except QkdError as error:
            failures.append((run.name, str(error)))
            show(f"{_place(number, runs)}{run.name}: failed")
            continue
        if begun is None or begun.summary is None:
            left.append(run)
        else:
            show(f"{_place(number, runs)}{run.name}: finished before, {_result(run)}")
    return left, failures


def run_all(
    runs: Sequence[PlannedRun],
    left: Sequence[PlannedRun],
    jobs: int = 1,
    *,
    show: Callable[[str], None] = print,
    finished: Callable[[PlannedRun], None] = lambda run: None,
) -> Outcome:
    """Runs those of `runs` that are `left`, `jobs` at a time, each on its share of the cores.

    If a run fails the next one begins. SIGINT, SIGTERM and SIGHUP are passed on to the running
    ones, which save and stop, and no more are begun.

    Args:
      jobs: with 1, runs write to this process's standard output, so that their bars are seen; with
        more, their lines are shown with the name of the run in front.
      show: prints a line.
      finished: called after each run that succeeded.

    Raises:
      ConfigError: `jobs` is below 1, or more than this process has cores.
    """
    shares = core_shares(jobs)
    waiting, failures = list(left), []
    live: dict[int, _Child] = {}  # by index among the shares
    with _forwarded(live) as stop:
        while live or (waiting and not stop):
            for place in set(range(jobs)) - live.keys():
                if waiting and not stop:
                    run = waiting.pop(0)
                    show(f"{_place(runs.index(run) + 1, runs)}{run.name}")
                    live[place] = _Child(run, shares[place], show, jobs > 1)
            time.sleep(0.05)
            for place, child in list(live.items()):
                if child.process.poll() is None:
                    continue
                message = child.end()
                del live[place]
                number = _place(runs.index(child.run) + 1, runs)
                if message and not stop:
                    failures.append((child.run.name, message))
                    show(f"{number}{child.run.name}: failed")
                elif not message:
                    took = duration(time.monotonic() - child.began)
                    show(f"{number}{child.run.name}: {_result(child.run)}, {took}")
                    finished(child.run)
    return Outcome(failures, bool(stop))


def core_shares(jobs: int) -> list[set[int] | None]:
    """Disjoint sets of this process's cores, one per job; None = all of them.

    Raises:
      ConfigError: fewer cores than jobs.
    """
    affinity = getattr(os, "sched_getaffinity", None)  # Linux
    cores = sorted(affinity(0)) if affinity else list(range(os.cpu_count() or 1))
    if not 1 <= jobs <= len(cores):
        raise ConfigError(
            f"--jobs: expected 1 to {len(cores)}, the cores that this process may use, found {jobs}"
        )
    if jobs == 1 or affinity is None:
        return [None] * jobs
    return [set(cores[len(cores) * i // jobs : len(cores) * (i + 1) // jobs]) for i in range(jobs)]


class _Child:
    """The process of a run."""

    def __init__(self, run, cores, show, prefixed):
        self.run, self.began = run, time.monotonic()
        self.errors: IO[bytes] = tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            run.command,
            stdout=subprocess.PIPE if prefixed else None,
            stderr=self.errors,
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # a terminal's Ctrl-C reaches it once, through us
        )
        if cores:  # before it has threads
            os.sched_setaffinity(self.process.pid, cores)
        self.reader = threading.Thread(target=self._relay, args=(show,)) if prefixed else None
        if self.reader:
            self.reader.start()

    def _relay(self, show):
        for line in self.process.stdout:
            show(f"{self.run.name} | {line.decode(errors='replace').rstrip()}")

    def end(self) -> str:
        """Cleans up; returns the message of a failure, or an empty text."""
        if self.reader:
            self.reader.join()
            self.process.stdout.close()
        self.errors.seek(0)
        text = self.errors.read().decode(errors="replace").strip()
        self.errors.close()
        code = self.process.returncode
        if code == 0:
            return ""
        if "error: " in text:  # of the command line, after warnings
            return text[text.index("error: ") + len("error: ") :]
        last = text.splitlines()[-1] if text else "no message"
        return f"exit code {code}: {last}" if code > 0 else f"killed by signal {-code}: {last}"


@contextmanager
def _forwarded(live: dict[int, _Child]) -> Iterator[list[int]]:
    """Passes signals on to the live children; yields a list of the signals received."""
    stop: list[int] = []

    def forward(number, _):
        stop.append(number)
        for child in list(live.values()):
            if child.process.poll() is None:
                child.process.send_signal(signal.SIGINT)

    try:
        before = {number: signal.signal(number, forward) for number in SIGNALS}
    except ValueError:  # not in the main thread
        before = {}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for child in live.values():  # after an error of our own
            child.process.kill()
            child.process.wait()


def _place(number: int, runs: Sequence[PlannedRun]) -> str:
    return f"{number:>{len(str(len(runs)))}}/{len(runs)}  "


def _result(run: PlannedRun) -> str:
    summary = read_json(run.folder / "summary.json")
    names = {"average_accuracy": "average", "last_accuracy": "last"}
    return ", ".join(
        f"{name} {format_number(key, summary[key])}"
        for key, name in names.items()
        if key in summary
    )
