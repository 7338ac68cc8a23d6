"""Kills runs at random moments, and compares what becomes of them: `make faults KILLS=100`.

A run of the smoke experiment is a process that gets SIGKILL up to five times. Each time the same
command continues it, and at the end it must equal a run that nothing stopped, byte for byte:
parameters, optimiser state, matrix, predictions, log and summary without times. The code that runs
knows of nothing; Python's faulthandler says in which function a process was when it was killed.

Moments are drawn from the seed: some anywhere in the time that a run takes, some near a moment that
is rare there, such as the one between the data of a checkpoint and the rename that makes it
visible. Where a process is at a moment depends on the machine, so the same seed does not repeat the
same places. The campaign is written down after every run and continues where it was stopped.
"""

import argparse
import contextlib
import faulthandler
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.same_run import differences
from qkd_jax.runs.provenance import provenance
from qkd_jax.runs.store import package_code

METHODS = ("qkd", "mos", "ranpac", "coda_prompt", "cdl")
SETTINGS = ("train.devices=1", "data.store_gib=0")
KILLS_OF_A_RUN = 5
SECONDS = 900  # that a process may take; more is a fault
POLL = 0.001  # seconds
TOLD = 5  # seconds in which a process says where it is; a busy machine may take long to let it
# How often a kill is drawn near which moment: anywhere, once a checkpoint is there, is begun, has
# its data, once predictions are there, or once the run is finished and its report is drawn.
MOMENTS = {"any": 0.35, "saved": 0.2, "checkpoint": 0.05, "manifest": 0.1}
MOMENTS |= {"predicted": 0.25, "report": 0.05}
# Where a process was, by the first function that is on its stack.
PLACES = (
    ("writing a checkpoint", "checkpoint.py", "save"),
    ("drawing the report", "page.py", "write_report"),
    ("evaluation", "learning.py", "evaluate|_record|inference_rate|draws_distance"),
    ("a step", "learning.py", "_train"),
    ("begin_task", "model.py", "open"),
    ("features before the steps", "learning.py", "_fill"),
    ("end_task", "learning.py", "learn"),
    ("restoring", "loop.py", "_restore"),
    ("writing a file of the run", "ledger.py", "write|grow"),
    ("before the first task", "loop.py", "run"),
)
# So that only the first run of a method compiles.
CACHED = {
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}
COMMIT = "between the data of a checkpoint and its name"  # told by the folder
DEEP = "deeper than a trace shows"  # a hundred calls, as in JAX's tracing
# From here on a process is its own; what it imports is there before, which saves half of the time.
IMPORTED = ("qkd_jax.cli.main", "qkd_jax.runs.loop", "qkd_jax.runs.checkpoint")


def has_manifest(checkpoint: Path) -> bool:
    """Whether only its name is missing to a checkpoint: it has all its data, and their hashes."""
    return "tmp" in checkpoint.name and any(checkpoint.glob("manifest*/sha256.json"))


def place_of(trace: str, folder: Path) -> str:
    """Where a run was killed, from what faulthandler printed and from its folder."""
    for name, file, functions in PLACES:
        if re.search(rf'/{file}", line \d+ in ({functions})$', trace, re.MULTILINE):
            named = any(has_manifest(path) for path in folder.glob("checkpoints/*"))
            return COMMIT if name == PLACES[0][0] and named else name
    return DEEP if "  ..." in trace else "elsewhere"


def command_line(arguments: list[str], trace: Path, errors: Path) -> None:
    """One command in a process of its own; SIGUSR1 writes down where it is."""
    for stream, path in ((sys.stdout, os.devnull), (sys.stderr, errors)):
        with open(path, "w") as file:
            os.dup2(file.fileno(), stream.fileno())
    faulthandler.register(signal.SIGUSR1, open(trace, "w"), all_threads=False)
    from qkd_jax.cli import main

    sys.exit(main(arguments))


class Session:
    """One process of a run in the folder `out`, which is at work when this is made."""

    def __init__(self, method: str, out: Path, *arguments: str):
        self.folder = folder_of(method, out)
        self._trace, self._errors = out / "trace", out / "errors"
        out.mkdir(parents=True, exist_ok=True)
        self._trace.unlink(missing_ok=True)
        chosen = [part for setting in SETTINGS for part in ("--set", setting)]
        command = ["run", "smoke", "--method", method, *chosen, "--out", str(out), *arguments]
        server = multiprocessing.get_context("forkserver")
        server.set_forkserver_preload(list(IMPORTED))
        files = self._trace, self._errors
        self._process = server.Process(target=command_line, args=(command, *files))
        began = time.time_ns()
        self._process.start()
        self._spent = 0.0
        lock = self.folder / ".lock"
        self._wait(lambda: lock.exists() and lock.stat().st_mtime_ns >= began)

    def _wait(self, here: Callable[[], Any]) -> bool:
        """Until something is there or the process has ended; whether it is there."""
        end = time.monotonic() + SECONDS
        while self._process.is_alive():
            if here():
                return True
            if time.monotonic() > end:
                self._process.kill()
                raise TimeoutError(f"{self.folder}: nothing for {SECONDS} s\n{self.errors()}")
            time.sleep(POLL)
        return False

    def errors(self) -> str:
        """What the process wrote to stderr."""
        return self._errors.read_text(errors="replace")

    def end(self) -> int:
        """Waits until the process ends; returns its exit status."""
        self._process.join(SECONDS)
        if self._process.exitcode is None:
            self._process.kill()
        return self._process.exitcode

    def spent(self) -> float:
        """Processor seconds of the process so far: on a busy machine the clock says little."""
        try:
            fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):  # it has just ended
            return self._spent
        self._spent = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        return self._spent

    def finished(self) -> bool:
        """Whether the run is: what is left to do is its report."""
        summary = self.folder / "summary.json"
        return summary.exists() and b'"finished": true' in summary.read_bytes()

    def reaches(self, moment: str, seconds: float = 0.0) -> bool:
        """Waits for a moment of the run, and then until the process has spent some more seconds;
        whether it still lives.
        """
        before, predicted = set(self._checkpoints()), set(self.folder.glob("predictions/*.npz"))

        def new(is_wanted: Callable[[Path], bool]) -> bool:
            found = self._checkpoints()
            return any(is_wanted(found[each]) for each in found.keys() - before)

        here = {
            "any": lambda: True,
            "checkpoint": lambda: new(lambda path: "tmp" in path.name),
            "manifest": lambda: new(has_manifest),
            "saved": lambda: new(lambda path: path.name.isdigit()),
            "predicted": lambda: set(self.folder.glob("predictions/*.npz")) - predicted,
            "report": self.finished,
        }
        if not self._wait(here[moment]):
            return False
        end = self.spent() + seconds
        return self._wait(lambda: self.spent() >= end)

    def _checkpoints(self) -> dict[tuple[str, int], Path]:
        """Folders by their name and number on the disk: what a kill left may be made again."""
        try:
            entries = list(os.scandir(self.folder / "checkpoints"))
        except FileNotFoundError:
            return {}
        return {(entry.name, entry.inode()): Path(entry.path) for entry in entries}

    def kill(self) -> str | None:
        """Kills the process; returns where it was, or None if it had ended."""
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.kill(self._process.pid, signal.SIGUSR1)
        known, end = 0, time.monotonic() + TOLD
        while time.monotonic() < end:  # until the trace is whole
            time.sleep(POLL / 5)
            size = self._trace.stat().st_size
            if size and size == known:
                break
            known = size
        self._process.kill()
        self._process.join()
        if self._process.exitcode != -signal.SIGKILL:
            return None
        return place_of(self._trace.read_text(), self.folder)


def folder_of(method: str, out: Path) -> Path:
    """The folder of a run of the smoke experiment."""
    return out / "smoke" / method / "seed1993"


def progress_of(folder: Path) -> int:
    """The number of the newest checkpoint of a run."""
    names = (path.name for path in (folder / "checkpoints").glob("*"))
    return max((int(name) for name in names if name.isdigit()), default=0)


def undisturbed(method: str, work: Path) -> tuple[Path, float, float]:
    """The folder of a run that nothing stopped, and its seconds of learning and of drawing.

    It is made twice; the second one finds its programs compiled.

    Raises:
      RuntimeError: a run ends with an error, or both differ.
    """
    first, again = work / method / "first", work / method / "again"
    told = again / "seconds.json"
    if not told.exists():
        shutil.rmtree(work / method, ignore_errors=True)
        for out in (first, again):
            session = Session(method, out)
            session.reaches("report")
            learning = session.spent()
            session.reaches("report", float("inf"))
            seconds = learning, session.spent() - learning
            if session.end() != 0:
                raise RuntimeError(session.errors())
        if differ := differences(folder_of(method, first), folder_of(method, again)):
            raise RuntimeError(f"{method}: two undisturbed runs differ in {differ}")
        told.write_text(json.dumps(seconds))
    return folder_of(method, again), *json.loads(told.read_text())


def killed_run(method: str, number: int, seed: int, work: Path, kills: int) -> dict[str, Any]:
    """Kills run `number` of a method up to `kills` times and ends it; returns what happened."""
    reference, learning, drawing = undisturbed(method, work)
    rng = np.random.default_rng([seed, METHODS.index(method), number])
    out, folder = work / "killed", folder_of(method, work / "killed")
    shutil.rmtree(out, ignore_errors=True)
    places, faults = [], []
    for moment in rng.choice(list(MOMENTS), kills, p=list(MOMENTS.values())):
        left = 1 - progress_of(folder) / progress_of(reference)
        longest = {
            "any": learning * left + drawing,
            "saved": learning / 6,
            "checkpoint": 0.05,
            "manifest": 0.0,
            "predicted": 0.0,
            "report": drawing,
        }
        session = Session(method, out)
        alive = session.reaches(moment, rng.uniform(0, longest[moment]))
        place = session.kill() if alive else None
        if place is None:  # it ended by itself
            if code := session.end():
                faults.append(f"a continued run ended with {code}: {session.errors()[-500:]}")
            break
        places.append(place)
        if session.finished():
            break
    session = Session(method, out, "--no-report")
    if code := session.end():
        faults.append(f"the last session ended with {code}: {session.errors()[-500:]}")
    else:
        faults += [f"{name} differs" for name in differences(folder, reference)]
    return {"method": method, "number": number, "places": places, "faults": faults}


def counted(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Kills and faults of a campaign, by method and by place."""
    by_method = {
        method: {
            "runs": len(own),
            "kills": sum(len(run["places"]) for run in own),
            "with_faults": sum(bool(run["faults"]) for run in own),
        }
        for method in METHODS
        if (own := [run for run in runs if run["method"] == method])
    }
    places = Counter(place for run in runs for place in run["places"])
    return {
        "kills": places.total(),
        "runs_with_faults": sum(bool(run["faults"]) for run in runs),
        "by_method": by_method,
        "by_place": dict(places.most_common()),
    }


def main(arguments: list[str] | None = None) -> int:
    """Runs a campaign, or what is left of it; returns 1 after a fault."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100, help="of all methods together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--record", type=Path, default=Path("runs/faults.json"), help="also says what is done"
    )
    options = parser.parse_args(arguments)
    work = Path(tempfile.gettempdir()) / "qkd_jax_faults" / package_code()[:16]
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(work / "compiled"))
    os.environ |= CACHED
    here = {"seed": options.seed, "settings": list(SETTINGS), **provenance()}
    campaign = {"runs": []}
    if options.record.exists():
        campaign = json.loads(options.record.read_text())
        if (campaign["seed"], campaign["code"]) != (here["seed"], here["code"]):
            parser.error(f"{options.record} is of another seed or version; give another --record")
    runs = campaign["runs"]
    while (kills := counted(runs)["kills"]) < options.kills:
        method = METHODS[len(runs) % len(METHODS)]
        most = min(KILLS_OF_A_RUN, options.kills - kills)
        run = killed_run(method, len(runs) // len(METHODS), options.seed, work, most)
        print(json.dumps(run), flush=True)
        runs.append(run)
        options.record.parent.mkdir(parents=True, exist_ok=True)
        options.record.write_text(
            json.dumps(here | counted(runs) | {"runs": runs}, indent=1) + "\n"
        )
    print(json.dumps(counted(runs), indent=1))
    return 1 if counted(runs)["runs_with_faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
