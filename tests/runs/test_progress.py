"""Progress on a pipe, on a terminal and in a notebook, with a clock that the test turns."""

import io
import re
import sys
import types

import pytest

from qkd_jax.errors import ConfigError
from qkd_jax.runs import progress
from qkd_jax.runs.progress import NullProgress, Progress, duration


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


def train(bar, clock, tasks=2, steps=10, seconds=1.0):
    """`tasks` tasks of `steps` steps of 32 images, each step taking `seconds`."""
    for task in range(tasks):
        bar.start_task(task, tasks)
        for step in range(steps):
            clock.now += seconds
            bar.update(1, 32, {"loss": 1.5 - 0.1 * step}, epoch=step // 5, epochs=2)
        bar.end_task(f"task {task + 1}/{tasks}  classes {10 * (task + 1)}  accuracy 91.20")


def test_plain_lines_are_few_whole_and_free_of_control_characters():
    stream, clock = io.StringIO(), Clock()
    with Progress(20, 640, stream=stream, clock=clock, seconds_between=5.0) as bar:
        train(bar, clock)
    text = stream.getvalue()
    assert not re.search(r"[^\x20-\x7e\n]", text)
    assert text.splitlines() == [
        "task 1/2  epoch 1/2  step 5/20  loss 1.100  32 images/s  25 %  0:15 left",
        "task 1/2  epoch 2/2  step 10/20  loss 0.600  32 images/s  50 %  0:10 left",
        "task 1/2  classes 10  accuracy 91.20",
        "task 2/2  epoch 1/2  step 15/20  loss 1.100  32 images/s  75 %  0:05 left",
        "task 2/2  epoch 2/2  step 20/20  loss 0.600  32 images/s  100 %  0:00 left",
        "task 2/2  classes 20  accuracy 91.20",
    ]


def test_time_left_counts_pauses_and_speed_does_not():
    """30 s of evaluation between tasks: the rate in task 2 is still 32 images a second."""
    stream, clock = io.StringIO(), Clock()
    with Progress(20, 640, stream=stream, clock=clock) as bar:
        bar.start_task(0, 2)
        clock.now += 10
        bar.update(10, 320)
        clock.now += 30
        bar.start_task(1, 2)
        clock.now += 5
        bar.update(5, 160)
    # 45 s for 15 of 20 steps of 32 images: 15 s for the 5 left.
    assert (
        stream.getvalue().splitlines()[-1] == "task 2/2  step 15/20  32 images/s  75 %  0:15 left"
    )


def test_a_resumed_run_starts_where_it_stopped_and_times_only_itself():
    stream, clock = io.StringIO(), Clock()
    with Progress(100, 3200, done_steps=80, done_images=2560, stream=stream, clock=clock) as bar:
        bar.start_task(4, 5)
        clock.now += 10
        bar.update(10, 320)
    assert stream.getvalue() == "task 5/5  step 90/100  32 images/s  90 %  0:10 left\n"


def test_more_steps_than_announced_stay_at_the_end():
    stream, clock = io.StringIO(), Clock()
    with Progress(1, 32, stream=stream, clock=clock) as bar:
        bar.start_task(0, 1)
        clock.now += 6
        bar.update(3, 96)
    assert stream.getvalue().endswith("100 %  0:00 left\n")


def test_the_loss_is_fetched_only_when_it_is_drawn():
    class DeviceArray:
        fetched = 0

        def __float__(self):
            DeviceArray.fetched += 1
            return 2.0

    clock = Clock()
    with Progress(1000, 1000, stream=io.StringIO(), clock=clock) as bar:
        bar.start_task(0, 1)
        for _ in range(1000):
            clock.now += 0.01
            bar.update(1, 1, {"loss": DeviceArray()})
    assert 1 <= DeviceArray.fetched <= 2  # 10 s, a line every 5 s


def test_terminal_shows_a_bar_and_keeps_the_lines_of_tasks(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    stream, clock = Terminal(), Clock()
    with Progress(20, 640, stream=stream, clock=clock) as bar:
        bar.message("loaded [bold]weights[/bold]")
        train(bar, clock)
    text = stream.getvalue()
    assert "loaded [bold]weights[/bold]\n" in text  # markup is not interpreted
    assert text.count("accuracy 91.20") == 2
    assert "━" in text and "50 %" in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # the cursor is given back


def test_an_error_gives_the_terminal_back_and_passes_through(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    with pytest.raises(KeyboardInterrupt), Progress(2, 64, stream=stream, clock=Clock()):
        raise KeyboardInterrupt
    assert stream.getvalue().rindex("\x1b[?25h") > stream.getvalue().rindex("\x1b[?25l")


def test_notebook_updates_one_output_and_prints_kept_lines(monkeypatch, capsys):
    shown = []

    class Handle:
        def update(self, line):
            shown.append(line.data)

    def first(line, display_id):
        assert display_id is True
        shown.append(line.data)
        return Handle()

    display = types.SimpleNamespace(
        display=first, Pretty=lambda text: types.SimpleNamespace(data=text)
    )
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.setattr(progress, "_in_notebook", lambda: True)
    clock = Clock()
    with Progress(20, 640, clock=clock) as bar:
        train(bar, clock)
    assert len(shown) == 20
    assert shown[-1].startswith("█" * 24 + "  task 2/2")
    assert capsys.readouterr().out.splitlines() == [
        "task 1/2  classes 10  accuracy 91.20",
        "task 2/2  classes 20  accuracy 91.20",
    ]


def test_outside_of_a_kernel_it_is_no_notebook():
    assert progress._in_notebook() is False


def test_null_progress_takes_every_call_and_shows_nothing(capsys):
    with NullProgress() as bar:
        bar.message("hello")
        train(bar, Clock())
    assert capsys.readouterr() == ("", "")


def test_nothing_is_written_after_the_end(capsys):
    bar = Progress(20, 640, clock=Clock())
    with bar:
        pass
    bar.message("late")
    assert capsys.readouterr().out == ""


def test_impossible_counts_are_named():
    with pytest.raises(ConfigError, match="expected 0 to 10 steps done, found 11"):
        Progress(10, 320, done_steps=11)
    with pytest.raises(ConfigError, match="expected 0 to 320 images done, found -1"):
        Progress(10, 320, done_images=-1)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3723, "1:02:03")]
)
def test_durations_are_read_as_clocks(seconds, text):
    assert duration(seconds) == text
