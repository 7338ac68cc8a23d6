"""Killed while a teacher or its student learns, while a generator is fitted, or while a classifier
in closed form is solved, a run ends with the same bytes as one that was never stopped. Real
processes and SIGKILL.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.same_run import files_of
from qkd_jax.cli import main

ROOT = Path(__file__).parents[2]
DEADLINE = 240  # seconds; a starved machine is slow, not wrong
RUNS = {
    "cdl": ("cdl", ("cdl.host=apt", "teacher.image_size=48")),
    "cdl with queries": (
        "cdl",
        ("cdl.host=coda_prompt", "teacher.image_size=48", "coda_prompt.pool=6"),
    ),
    "qd_llm": (
        "qd_llm",
        ("backbone.name=tiny_random_text", "backbone.num_tokens=12", "qd_llm.qubits=5"),
    ),
    "replay": (
        "replay",
        ("alignment.generator=drifting", "drift.steps=1500", "drift.hidden=128"),
    ),
    "classifier": ("simplecil", ("classifier.kind=anacp", "classifier.projection_dim=2000")),
}
# The file that is waited for, and how many seconds more.
MOMENTS = {
    # Turns are counted: the first task's teacher and student, the second task's teacher, ...
    ("cdl", "teacher"): ("checkpoints/20000004", 0.0),
    ("cdl", "student"): ("checkpoints/30000004", 0.0),
    ("cdl with queries", "student"): ("checkpoints/30000004", 0.0),
    ("qd_llm", "teacher"): ("checkpoints/4", 0.0),
    ("qd_llm", "student"): ("checkpoints/10000004", 0.0),
    ("replay", "fit"): ("checkpoints/10000000", 1.0),
    ("classifier", "solve"): ("checkpoints/10000000", 1.0),
}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for part, count in (("train", 16), ("test", 4)):
        (folder / part).mkdir()
        for kind in ("bird", "tool", "song"):
            lines = [f"the {kind} number {n} of the {part}" for n in range(count)]
            (folder / part / f"{kind}.txt").write_text("\n".join(lines))
    return folder


def arguments(name, out, texts):
    method, settings = RUNS[name]
    if method == "qd_llm":
        settings += ("data.source=texts", f"data.path={texts}", "data.num_classes=0")
    chosen = ("train.devices=1", "data.store_gib=0", *settings)
    if method not in ("replay", "simplecil"):
        chosen += ("train.checkpoint_every=4",)
    pairs = [part for setting in chosen for part in ("--set", setting)]
    return ["run", "smoke", "--method", method, *pairs, "--out", str(out), "--bare"]


def started(name, out, texts, compiled):
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": compiled, "JAX_PLATFORMS": "cpu"}
    environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    environment |= {"JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}
    return subprocess.Popen(
        [sys.executable, "-m", "qkd_jax", *arguments(name, out, texts)],
        env=environment,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow  # the default suite stops a run in each phase: runs/test_teacher.py
@pytest.mark.parametrize("name, phase", MOMENTS)
def test_killed_in_a_phase_it_ends_with_the_same_bytes(name, phase, texts, compiled, tmp_path):
    assert main(arguments(name, tmp_path / "whole", texts)) == 0
    method, (file, seconds) = RUNS[name][0], MOMENTS[name, phase]
    whole, killed = (tmp_path / out / "smoke" / method / "seed1993" for out in ("whole", "killed"))
    process, end = started(name, tmp_path / "killed", texts, compiled), time.monotonic() + DEADLINE
    while not (killed / file).exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, f"{file} never appeared"
        time.sleep(0.001)
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=DEADLINE)
    assert process.returncode == -signal.SIGKILL
    stored = killed / "summary.json"
    assert not (stored.exists() and json.loads(stored.read_text())["finished"])
    newest = max(int(p.name) for p in (killed / "checkpoints").iterdir() if p.name.isdigit())
    assert newest == int(Path(file).name)  # nothing was saved since: the phase was not over
    assert main(arguments(name, tmp_path / "killed", texts)) == 0
    assert files_of(killed) == files_of(whole)
