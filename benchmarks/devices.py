"""The same run on one device twice, on eight devices, and as two processes: what differs?

    python -m benchmarks.devices [--methods qkd mos] [--record benchmarks/results/devices.json]

Runs of the smoke experiment, with simulated devices of this processor. The same input on the same
device must give the same bytes. Sums over more devices are added up in another order, so there
parameters differ by rounding, and an image that lies between two classes may be given the other
one: those are counted.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.same_run import differences
from qkd_jax.runs.load import load_run
from qkd_jax.runs.provenance import provenance

METHODS = ("qkd", "mos", "ranpac", "coda_prompt")
# name -> (processes, devices of each)
PLACES = {"one device": (1, 1), "again": (1, 1), "eight devices": (1, 8), "two processes": (2, 1)}
DEVICES = "--xla_force_host_platform_device_count="


def run_of(method: str, out: Path, processes: int, devices: int) -> Path:
    """The folder of a run on `processes` * `devices` devices.

    Raises:
      RuntimeError: a process ends with an error.
    """
    settings = ("data.store_gib=0", f"train.devices={devices if processes == 1 else 0}")
    command = [sys.executable, "-m", "qkd_jax", "run", "smoke", "--method", method, "--bare"]
    command += [*(f"--set={setting}" for setting in settings), "--out", str(out)]
    hosts: list[list[str]] = [[]]
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        joined = [f"--coordinator={address}", f"--num-hosts={processes}"]
        hosts = [[*joined, f"--host-id={number}"] for number in range(processes)]
    environment = os.environ | {"XLA_FLAGS": f"{DEVICES}{devices}", "JAX_PLATFORMS": "cpu"}
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    started = [subprocess.Popen([*command, *more], env=environment, **streams) for more in hosts]
    errors = [process.communicate()[1] for process in started]
    if any(process.returncode for process in started):
        raise RuntimeError(f"{method} on {processes} x {devices} devices: {errors}")
    return out / "smoke" / method / "seed1993"


def compared(one: Path, other: Path) -> dict[str, Any]:
    """How far two runs are from each other.

    Returns:
      `trained`, `stored`: the distances of the trained parameters, and of what the finished tasks
        left in memory, relative to their length;
      `predictions`, `different`: how many there are after all tasks, and of these how many differ;
      `log_probability`: the largest difference, of any image's own class.
    """
    states = [load_run(folder).state for folder in (one, other)]
    trained, stored = (
        _distance(*(map(part, states)))
        for part in (lambda s: s.trainable, lambda s: (s.memory, s.classifier))
    )
    total, different, largest = 0, 0, 0.0
    for path in sorted((one / "predictions").glob("*.npz")):
        with np.load(path) as a, np.load(other / "predictions" / path.name) as b:
            if not np.array_equal(a["id"], b["id"]):
                raise ValueError(f"{path.name}: expected the same images, found others")
            total += len(a["id"])
            different += int(np.sum(a["predicted"] != b["predicted"]))
            gaps = np.abs(np.float64(a["log_probability"]) - b["log_probability"])
            largest = max(largest, float(gaps.max()))
    found = {"trained": trained, "stored": stored, "log_probability": largest}
    return found | {"predictions": total, "different": different}


def _distance(arrays: Any, others: Any) -> float:
    """|a - b| / |a| over all float arrays of two trees; 0 without any."""
    one, other = (
        np.concatenate(
            [
                [0.0],
                *(
                    np.float64(leaf).ravel()
                    for leaf in jax.tree.leaves(tree)
                    if np.issubdtype(leaf.dtype, np.floating)
                ),
            ]
        )
        for tree in (arrays, others)
    )
    length = np.linalg.norm(one)
    return float(np.linalg.norm(one - other) / length) if length else 0.0


def measured(method: str, work: Path) -> dict[str, Any]:
    """What differs between the runs of one method."""
    folders = {
        name: run_of(method, work / method / name.replace(" ", "-"), *where)
        for name, where in PLACES.items()
    }
    one = folders.pop("one device")
    again = differences(folders.pop("again"), one)
    return {"again": again} | {name: compared(one, folder) for name, folder in folders.items()}


def table(methods: dict[str, dict[str, Any]]) -> str:
    """The record as a table of docs/reliability.md."""
    lines = [
        "| method | again | | trained | stored | log-probability | predictions that differ |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for method, found in methods.items():
        same = "the same bytes" if not found["again"] else f"{len(found['again'])} differ"
        for name in list(PLACES)[2:]:
            gap = found[name]
            lines.append(
                f"| {method} | {same} | {name} | {gap['trained']:.0e} | {gap['stored']:.0e} | "
                f"{gap['log_probability']:.0e} | {gap['different']} of {gap['predictions']} |"
            )
            method = same = ""
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Measures the methods, prints the table; returns 1 if the same run gave other bytes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--record", type=Path, help="a file for what was found, as JSON")
    options = parser.parse_args(arguments)
    record: dict[str, Any] = {**provenance(), "jax": jax.__version__, "methods": {}}
    with tempfile.TemporaryDirectory() as work:
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{work}/compiled")
        for method in options.methods:
            record["methods"][method] = measured(method, Path(work))
            if options.record:
                options.record.write_text(json.dumps(record, indent=1) + "\n")
    print(table(record["methods"]))
    return 1 if any(found["again"] for found in record["methods"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
