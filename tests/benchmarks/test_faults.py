"""The campaign of kills: it sees differences, and says where a process was."""

import json

import numpy as np
import pytest

from benchmarks import faults
from benchmarks.same_run import files_of


def trace(*calls):
    """What faulthandler prints of a stack, the innermost call first."""
    lines = [f'  File "/x/{file}", line 7 in {function}' for file, function in calls]
    return "\n".join(["Current thread 0x1 (most recent call first):", *lines, ""])


@pytest.mark.parametrize(
    "calls, expected",
    [
        ([("json.py", "dumps"), ("learning.py", "_train"), ("learning.py", "learn")], "a step"),
        ([("model.py", "finish"), ("learning.py", "learn"), ("loop.py", "run")], "end_task"),
        ([("model.py", "open"), ("learning.py", "learn")], "begin_task"),
        ([("x.py", "f"), ("learning.py", "evaluate"), ("loop.py", "run")], "evaluation"),
        ([("checkpoint.py", "save"), ("learning.py", "_train")], "writing a checkpoint"),
        ([("page.py", "write_report"), ("main.py", "main")], "drawing the report"),
        ([("scan.py", "scan"), *[("core.py", "bind")] * 9, ("  ...", "")], faults.DEEP),
        ([("images.py", "read")], "elsewhere"),
    ],
)
def test_the_place_of_a_kill_is_the_first_known_function(calls, expected, tmp_path):
    told = trace(*calls).replace('  File "/x/  ...", line 7 in ', "  ...")
    assert faults.place_of(told, tmp_path) == expected


def test_a_checkpoint_that_has_all_but_its_name_is_told_by_the_folder(tmp_path):
    told = trace(("checkpoint.py", "save"), ("loop.py", "run"))
    (tmp_path / "checkpoints/3").mkdir(parents=True)
    manifest = tmp_path / "checkpoints/4.orbax-checkpoint-tmp/manifest.tmp/sha256.json"
    assert faults.place_of(told, tmp_path) == "writing a checkpoint"
    manifest.parent.mkdir(parents=True)
    manifest.write_text("{}")
    assert faults.place_of(told, tmp_path) == faults.COMMIT
    assert faults.place_of(trace(("learning.py", "_train")), tmp_path) == "a step"


def test_only_what_a_session_says_of_itself_may_differ(tmp_path):
    """Times in summary, log and teacher; every other number and byte counts."""
    summary = {"last_accuracy": 50.0, "wall_seconds": 1.0, "teacher": {"eval_seconds": 2.0}}
    line = {"step": 1, "loss": 0.5, "wall_s": 0.1}
    np.savez(tmp_path / "after_task_0.npz", label=np.arange(3))

    def written(summary, line, predictions):
        (tmp_path / "summary.json").write_text(json.dumps(summary))
        (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        np.savez(tmp_path / "after_task_0.npz", label=predictions)
        (tmp_path / "report.html").write_text(str(summary))
        return files_of(tmp_path)

    whole = written(summary, line, np.arange(3))
    others = summary | {"wall_seconds": 9.0, "teacher": {"eval_seconds": 9.0}}
    assert written(others, line | {"wall_s": 9.0}, np.arange(3)) == whole
    assert written(summary | {"last_accuracy": 49.9}, line, np.arange(3)) != whole
    assert written(summary, line | {"loss": 0.51}, np.arange(3)) != whole
    assert written(summary, line, np.arange(3)[::-1]) != whole


def test_a_campaign_goes_on_where_it_was_stopped_and_counts_faults(tmp_path, monkeypatch):
    asked = []

    def killed_run(method, number, seed, work, kills):
        asked.append((method, number, kills))
        if len(asked) == 3:
            raise KeyboardInterrupt
        found = ["matrix.json differs"] if (method, number) == ("mos", 1) else []
        return {"method": method, "number": number, "places": ["a step"] * kills, "faults": found}

    monkeypatch.setattr(faults, "killed_run", killed_run)
    for name in ("JAX_COMPILATION_CACHE_DIR", *faults.CACHED):
        monkeypatch.setenv(name, "")  # what the campaign sets is taken back
    command = ["--kills", "33", "--record", str(tmp_path / "faults.json")]
    with pytest.raises(KeyboardInterrupt):
        faults.main(command)
    assert faults.main(command) == 1
    expected = [(method, number, 5) for number in (0, 1) for method in faults.METHODS][:7]
    expected[-1] = ("mos", 1, 3)
    assert asked == [*expected[:3], *expected[2:]]
    record = json.loads((tmp_path / "faults.json").read_text())
    assert record["kills"] == 33 and record["by_place"] == {"a step": 33}
    assert record["runs_with_faults"] == record["by_method"]["mos"]["with_faults"] == 1
    assert record["by_method"]["qkd"] == {"runs": 2, "kills": 10, "with_faults": 0}
    with pytest.raises(SystemExit):
        faults.main([*command, "--seed", "1"])


@pytest.mark.slow
def test_a_short_campaign_finds_no_fault(tmp_path, monkeypatch):
    monkeypatch.setattr(faults, "METHODS", ("qkd",))
    monkeypatch.setattr(faults.tempfile, "gettempdir", lambda: str(tmp_path))
    assert faults.main(["--kills", "3", "--record", str(tmp_path / "faults.json")]) == 0
