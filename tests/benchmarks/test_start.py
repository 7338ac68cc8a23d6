"""The stages that `benchmarks.start` names are there, and a run is followed to its first step."""

import subprocess

import pytest

from benchmarks import start


def test_every_stage_is_a_function_of_the_package():
    for path in start.STAGES:
        owner, name = start.owner_of(path)
        assert callable(getattr(owner, name)), path


def test_what_lies_between_stages_is_told_too():
    spans = [("weights", 2.0, 3.0), ("data", 3.5, 4.0), ("first step", 5.0, 7.0)]
    assert start.told(1.0, spans, {"tracing": 0.5, "loading": 0.25}) == (
        "imports and settings 1.00, weights 1.00, data 0.50, first batch up to the first adapter "
        "1.00, first step 2.00, in between 0.50; of the step tracing 0.50, loading 0.25"
    )


def test_a_run_that_fails_says_why(tmp_path):
    with pytest.raises(RuntimeError, match=r"experiment: expected one of .* found 'nowhere'"):
        start.to_first_step("nowhere", tmp_path)


@pytest.mark.slow
def test_the_clock_stops_at_the_first_step(tmp_path, monkeypatch):
    """And the process is gone; another one tells of every stage, and of the step's parts."""
    monkeypatch.delenv("XLA_FLAGS")  # one device, as on a machine
    begun, popen = [], subprocess.Popen

    def remembered(*arguments, **named):
        begun.append(popen(*arguments, **named))
        return begun[-1]

    monkeypatch.setattr(start.subprocess, "Popen", remembered)
    seconds = start.to_first_step("smoke", tmp_path)
    assert 0.5 < seconds < 120 and begun[0].poll() is not None
    stages = start.where_they_go("smoke", tmp_path)
    for name in (*start.STAGES.values(), *start.COMPILING.values()):
        assert f"{name} " in stages
    assert list((tmp_path / "compiled").rglob("*counted_step*"))
