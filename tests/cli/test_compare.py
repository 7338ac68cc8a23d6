"""A comparison runs what is missing, goes on after a failure, and ends in one table.

How processes are started, pinned, stopped and listed is tested with children of a few lines; one
comparison is real.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from qkd_jax.cli import arguments as cli_arguments
from qkd_jax.cli import compare, main, training
from qkd_jax.cli.main import new_parser
from qkd_jax.engine.engine import Engine
from qkd_jax.errors import ConfigError
from qkd_jax.learners.shape import learner_names
from qkd_jax.reports.ledger import Ledger
from qkd_jax.runs.loop import run, run_folder
from qkd_jax.settings.config import override
from qkd_jax.settings.experiments import load_experiment
from qkd_jax.weights.load import load_backbone

TINY = ("train.devices=1", "train.epochs=1", "train.checkpoint_every=2")
OPTIONS = [part for setting in TINY for part in ("--set", setting)]


def config(method, seed):
    return override(load_experiment("smoke").get_config(method), f"seed={seed}", *TINY)


def test_a_comparison_skips_continues_runs_and_lists(tmp_path, compiled, monkeypatch, capfd):
    backbone = load_backbone("tiny_random", image_size=32)
    folders = {(m, s): run_folder(tmp_path, config(m, s))
               for m in ("simplecil", "finetune") for s in (1, 2)}  # fmt: skip
    run(config("simplecil", 1), backbone, tmp_path)  # finished before
    kept = (folders["simplecil", 1] / "summary.json").stat().st_mtime_ns
    finish, ended = Engine.finish, []

    def stops_in_the_second_task(*arguments):
        ended.append(1)
        if len(ended) == 2:
            raise KeyboardInterrupt
        return finish(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Engine, "finish", stops_in_the_second_task)
        run(config("finetune", 1), backbone, tmp_path)
    # A folder that holds a run with other settings.
    shutil.copytree(folders["simplecil", 1], folders["simplecil", 2])
    values = json.loads((folders["simplecil", 2] / "config.json").read_text())
    values |= {"seed": 2, "classifier": values["classifier"] | {"kind": "rls"}}
    content = json.dumps(values).encode()
    Ledger(folders["simplecil", 2]).read().write({"config.json": content})

    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", compiled)
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    methods = ["--methods", "simplecil finetune", "--seeds", "1 2"]
    monkeypatch.chdir(Path(__file__).parents[2])
    arguments = ["compare", "smoke", *methods, *OPTIONS, "--out", str(tmp_path), "--no-report"]
    code = main(arguments)
    out, error = capfd.readouterr()
    assert code == 1
    assert (folders["simplecil", 1] / "summary.json").stat().st_mtime_ns == kept
    assert "1/4  simplecil seed 1: finished before, average" in out
    assert "2/4  finetune seed 1\n" in out and "continuing after task 1, step" in out
    assert "3/4  simplecil seed 2: failed" in out
    assert "4/4  finetune seed 2: average" in out
    assert "1 of 4 runs failed:\n  simplecil seed 2: " in error
    assert "classifier.kind: 'rls' -> 'own'" in error
    for seed in (1, 2):
        summary = json.loads((folders["finetune", seed] / "summary.json").read_text())
        assert summary["finished"] is True
        assert not (folders["finetune", seed] / "report.html").exists()
    rows = json.loads((tmp_path / "smoke/results.json").read_text())["methods"]
    assert rows["finetune"]["seeds"] == [1, 2]
    row = next(line for line in out.splitlines() if line.split()[:2] == ["finetune", "2"])
    assert f"{rows['finetune']['average_accuracy']['mean']:.2f}" in row


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["--methods", "qkd qdk"],
            ["method: expected one of", "found 'qdk'", "did you mean qkd", "ease"],
        ),
        (["--methods", "qkd", "--seeds", "one"], ["whole numbers"]),
        (["--methods", "qkd", "--set", "train.epoch=1"], ["train.epochs"]),
        (["--methods", "ease mos", "--set", "gate.kind=mlp"], ["ease or mos reads", "one of qkd"]),
        (["--methods", "ease mos", "--preset", "paper"], ["expected qkd among the methods"]),
        (["--methods", "qkd", "--jobs", "0"], ["--jobs: expected 1 to", "found 0"]),
    ],
)
def test_mistakes_are_named_before_anything_runs(capsys, tmp_path, arguments, expected):
    assert main(["compare", "smoke", *arguments, "--out", str(tmp_path)]) == 1
    out, error = capsys.readouterr()
    assert error.startswith("error: ") and not out
    assert all(part in error for part in expected)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("backbone", ["tiny_random", "tiny_random_text"])
def test_without_methods_all_that_the_backbone_allows_are_compared(tmp_path, monkeypatch, backbone):
    """Methods of texts alone are left out where the backbone reads images, and the reverse."""
    planned = []

    def remembered(configs, *_):
        planned.extend(config.method for config in configs)
        raise ConfigError("planned")

    monkeypatch.setattr(compare, "planned_runs", remembered)
    words = ["compare", "smoke", "--set", f"backbone.name={backbone}", "--out", str(tmp_path)]
    assert main(words) == 1
    of_texts = {"prog_prompt", "prompt_per_task", "q_tuning", "qd_llm"}
    left_out = of_texts if backbone == "tiny_random" else {"cdl"}
    assert set(planned) == set(learner_names()) - left_out


@pytest.mark.parametrize(
    ("method", "own"),
    [("qkd", ["--set=gate.rank=3", "--preset=paper"]), ("ease", ["--set=ease.alpha=0.2"])],
)
def test_each_run_is_given_what_its_method_reads(method, own):
    given = ("gate.rank=3", "ease.alpha=0.2", "train.epochs=1")
    chosen = [part for setting in given for part in ("--set", setting)]
    words = ["compare", "smoke", "--preset", "paper", *chosen]
    options = new_parser().parse_args(words)
    config = cli_arguments.config_of(options, method, 1, where_read=True)
    arguments = training._run_arguments(options, config)
    assert [a for a in arguments if a.startswith("--")] == [
        *("--method", "--seed", own[0], "--set=train.epochs=1", *own[1:], "--out", "--bare")
    ]
    # What the run makes of them is what the comparison planned.
    again = new_parser().parse_args(arguments)
    assert cli_arguments.config_of(again, method, 1) == config


def children(tmp_path, *programs):
    """Runs whose commands are small programs that leave a summary."""
    ending = "\nimport json, pathlib; p = pathlib.Path({!r}); p.mkdir(parents=True, exist_ok=True)"
    ending += "\n(p / 'summary.json').write_text(json.dumps({{'average_accuracy': 1.5}}))"
    return [
        compare.PlannedRun(
            f"m seed {n}",
            None,
            tmp_path / str(n),
            [sys.executable, "-c", program + ending.format(str(tmp_path / str(n)))],
        )
        for n, program in enumerate(programs)
    ]


def test_a_failure_is_noted_and_the_next_run_begins(tmp_path):
    lines, ended = [], []
    runs = children(
        tmp_path,
        "import sys; print('a warning\\nerror: no room\\n  at all', file=sys.stderr); sys.exit(1)",
        "1 / 0",
        "import os; os.kill(os.getpid(), 9)",
        "print('hello')",
    )
    done = compare.run_all(runs, runs, show=lines.append, finished=ended.append)
    assert done.failures == [
        ("m seed 0", "no room\n  at all"),
        ("m seed 1", "exit code 1: ZeroDivisionError: division by zero"),
        ("m seed 2", "killed by signal 9: no message"),
    ]
    assert ended == [runs[3]] and not done.stopped
    assert lines[-1].startswith("4/4  m seed 3: average 1.50, 0:0")


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no affinity here")
def test_jobs_run_at_once_on_cores_of_their_own(tmp_path):
    cores = os.sched_getaffinity(0)
    if len(cores) < 2:
        pytest.skip("one core")
    meet = "import os, time, pathlib\nmine, other = (pathlib.Path({!r}) / n for n in {!r})"
    meet += "\nmine.touch()\nwhile not other.exists(): time.sleep(0.01)"
    meet += "\nprint(sorted(os.sched_getaffinity(0)))"
    programs = [meet.format(str(tmp_path), names) for names in ("ab", "ba")]
    runs, lines = children(tmp_path, *programs), []
    assert compare.run_all(runs, runs, 2, show=lines.append) == ([], False)
    shares = [set(json.loads(line.split(" | ")[1])) for line in lines if " | " in line]
    assert len(shares) == 2 and shares[0].isdisjoint(shares[1])
    assert shares[0] | shares[1] == cores
    with pytest.raises(
        ConfigError, match=f"--jobs: expected 1 to {len(cores)}, .* found {len(cores) + 1}"
    ):
        compare.run_all([], [], len(cores) + 1)


def test_a_signal_lets_the_running_save_and_begins_nothing_more(tmp_path):
    program = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from qkd_jax.cli import compare
child = '''
import signal, sys, time, pathlib
def save(*_):
    pathlib.Path({str(tmp_path / "saved")!r}).touch()
    sys.exit(130)
signal.signal(signal.SIGINT, save)
pathlib.Path({str(tmp_path / "running")!r}).touch()
time.sleep(60)
'''
runs = [compare.PlannedRun(n, None, Path(n), [sys.executable, "-c", child]) for n in "ab"]
done = compare.run_all(runs, runs)
print(done.failures, done.stopped)
"""
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    guard = threading.Timer(60, parent.kill)
    guard.start()
    while not (tmp_path / "running").exists() and parent.poll() is None:
        time.sleep(0.01)
    parent.send_signal(signal.SIGTERM)
    out, _ = parent.communicate()
    guard.cancel()
    assert out.splitlines() == ["1/2  a", "[] True"]
    assert (tmp_path / "saved").exists()
