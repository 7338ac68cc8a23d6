"""Changes valid files at random and reads them: `make fuzz INPUTS=100000 FUZZ_SEED=0`.

Every input is either accepted or answered by an error of this package (or by one of the disk).
Everything else is a crash: another exception, a hang of ten seconds, the end of the process, and
memory above a limit.
"""

import argparse
import json
import multiprocessing
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.fuzz_kinds import KINDS
from qkd_jax.errors import QkdError

MEMORY = 2 << 30  # bytes that a process may take beside what it has at the start
SECONDS = 10  # for one input
IN_MEMORY = Path("/dev/shm")  # a disk would take most of the time


def fuzz(name: str, inputs: int, seed: int) -> dict[str, Any]:
    """Reads `inputs` changed files of one kind; input k depends on the seed and k alone.

    Returns:
      Counts of accepted, answered and crashed inputs, the first crash of each sort with its number,
      the seconds, and by how many MiB the memory grew.
    """
    warnings.simplefilter("ignore")
    kind = KINDS[name]()
    counts: Counter[str] = Counter(accepted=0, answered=0, crashed=0)
    crashes: dict[str, str] = {}
    names = sorted(kind.examples)
    signal.signal(signal.SIGALRM, _too_long)
    _limit_memory()
    with tempfile.TemporaryDirectory(dir=IN_MEMORY if IN_MEMORY.is_dir() else None) as folder:
        for example in names:  # what is not changed must be read
            kind.read(example, kind.examples[example], Path(folder))
        begun, before = time.monotonic(), _peak()
        for number in range(inputs):
            rng = np.random.default_rng([seed, number])
            example = names[rng.integers(len(names))]
            data = kind.change(kind.examples[example], rng)
            signal.alarm(SECONDS)
            try:
                kind.read(example, data, Path(folder))
                counts["accepted"] += 1
            except QkdError:
                counts["answered"] += 1
            except Exception as error:
                counts["crashed"] += 1
                place = traceback.extract_tb(error.__traceback__)[-1]
                sort = f"{type(error).__name__} in {Path(place.filename).name}:{place.lineno}"
                crashes.setdefault(sort, f"input {number}, {example}: {str(error)[:200]}")
            finally:
                signal.alarm(0)
    seconds = round(time.monotonic() - begun, 1)
    grown = round((_peak() - before) / 1024)
    return dict(counts) | {"crashes": crashes, "seconds": seconds, "memory_mb": grown}


def _too_long(*_: Any) -> None:
    raise TimeoutError(f"more than {SECONDS} seconds")


def _limit_memory() -> None:
    pages = Path("/proc/self/statm")
    if pages.exists():
        used = int(pages.read_text().split()[0]) * resource.getpagesize()
        _, most = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, most))


def _peak() -> int:
    """KiB of memory that this process had at most; 0 where that is not known."""
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+)", status.read_text()) if status.exists() else None
    return int(found[1]) if found else 0


def main(arguments: list[str] | None = None) -> int:
    """Runs a campaign over kinds, each in a process of its own; returns 1 after a crash."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=", ".join(KINDS))
    parser.add_argument(
        "--inputs", type=int, default=10_000, help="of all kinds, an equal part of each"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--record",
        type=Path,
        help="a JSON for the counts; of the same campaign it keeps the kinds not tried now",
    )
    options = parser.parse_args(arguments)
    chosen = options.kinds or list(KINDS)
    if unknown := set(chosen) - KINDS.keys():
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(KINDS)}")
    found = {}
    spawn = multiprocessing.get_context("spawn")
    for name in chosen:
        with ProcessPoolExecutor(1, mp_context=spawn) as pool:
            task = pool.submit(fuzz, name, options.inputs // len(KINDS), options.seed)
            try:
                found[name] = task.result()
            except BrokenProcessPool:
                found[name] = {"crashed": 1, "crashes": {"the process ended": ""}}
        print(f"{name:12} {json.dumps(found[name])}", flush=True)
    campaign = {"inputs": options.inputs, "seed": options.seed, "kinds": found}
    if options.record:
        before = json.loads(options.record.read_text()) if options.record.exists() else {}
        if (before.get("inputs"), before.get("seed")) == (options.inputs, options.seed):
            both = before["kinds"] | found
            campaign["kinds"] = {name: both[name] for name in KINDS if name in both}
        options.record.write_text(json.dumps(campaign, indent=1) + "\n")
    return 1 if any(counts["crashed"] for counts in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
