"""What is read from a long run: the time of a step, and growth between early and late tasks."""

import json
import os

import pytest

from benchmarks import long_run


def test_the_time_of_a_step_is_that_of_the_fastest_steps_in_a_row():
    """Four steps of 2 ms within slower ones; the log has whole milliseconds."""
    seconds = [0.020] * 7 + [0.002] * 4 + [0.030] * 3
    lines, wall = [], 0.0
    for task in (0, 1):
        for step, one in enumerate(seconds):
            wall += one * (task + 1)
            lines.append(json.dumps({"task": task, "step": step + 1, "wall_s": round(wall, 3)}))
    found = long_run.fastest_steps("\n".join(lines))
    assert found == pytest.approx([2.0, 4.0], abs=0.25)


def test_growth_is_from_the_second_tenth_of_the_tasks_to_the_last():
    found = [{name: float(task) for name in long_run.SHOWN} for task in range(40)]
    found[0] = dict.fromkeys(long_run.SHOWN, 1e9)  # compiling counts for nothing
    assert set(long_run.growth(found).values()) == {(5.5, 37.5)}


def test_a_process_is_seen_from_outside():
    before = long_run.of_process(os.getpid())
    with open(os.devnull):
        during = long_run.of_process(os.getpid())
    assert during["open_files"] == before["open_files"] + 1
    assert during["memory_mib"] > 10 and during["threads"] >= 1
