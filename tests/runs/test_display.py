"""Lines on displays that are broken in every way that is known."""

import io
import os
import subprocess
import sys

import pytest

from qkd_jax.runs import progress
from qkd_jax.runs.display import tell
from qkd_jax.runs.progress import Progress, counting


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Broken(Terminal):
    """Takes some writes, then none."""

    def __init__(self, error, good=0):
        super().__init__()
        self.error, self.good = error, good

    def write(self, text):
        self.good -= 1
        if self.good < 0:
            raise self.error
        return super().write(text)


def closed():
    stream = io.StringIO()
    stream.close()
    return stream


ERRORS = [BrokenPipeError(32, "Broken pipe"), OSError(28, "No space left"), ValueError("closed")]


@pytest.mark.parametrize("error", [*ERRORS, RuntimeError("reentrant call")], ids=str)
def test_a_line_that_cannot_be_written_is_dropped(error):
    tell("a line", Broken(error))


def test_without_any_stream_nothing_is_told(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    tell("a line")
    with Progress(2, 2) as bar, counting("reading", 5) as advance:
        bar.end_task("task 1/2")
        advance(5)
    tell("a line", closed())


def test_characters_that_the_display_does_not_have_are_spelled_out():
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, "ascii")
    tell("läufe/✓", stream)
    assert raw.getvalue() == b"l\\xe4ufe/\\u2713\n"


@pytest.mark.parametrize("good", [0, 1, 5])
@pytest.mark.parametrize("error", ERRORS, ids=str)
@pytest.mark.parametrize("terminal", [True, False])
def test_progress_goes_on_without_its_screen(error, good, terminal):
    stream, times = Broken(error, good), iter(range(0, 10_000, 10))
    if not terminal:
        stream.isatty = lambda: False
    with Progress(4, 4, stream=stream, clock=lambda: next(times)) as bar:
        for task in (0, 1):
            bar.start_task(task, 2)
            for _ in range(2):
                bar.update(1, 1, {"loss": 1.0})
            bar.end_task(f"task {task + 1}/2")
        bar.message("the end")


def test_a_bar_that_a_terminal_cannot_show_becomes_plain_lines():
    class Ascii(Terminal):
        encoding = "ascii"

        def write(self, text):
            text.encode("ascii")
            return super().write(text)

    stream, times = Ascii(), iter(range(0, 10_000, 10))
    with Progress(4, 4, stream=stream, clock=lambda: next(times)) as bar:
        bar.start_task(0, 1)
        bar.update(1, 1)
        bar.message("läufe")
        bar.end_task("task 1/1  accuracy 91.20")
    assert "l\\xe4ufe" in stream.getvalue() and "accuracy 91.20" in stream.getvalue()


def test_a_pass_over_images_goes_on(monkeypatch):
    times = iter(range(0, 10_000, 10))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(times))
    monkeypatch.setattr(sys, "stdout", Broken(ERRORS[0]))
    with counting("reading", 4) as advance:
        for _ in range(4):
            advance(1)


def test_what_a_broken_pipe_held_is_not_written_again_at_the_end():
    reads, writes = os.pipe()
    os.close(reads)
    code = "from qkd_jax.runs.display import tell\ntell('one')\ntell('two')\nprint('three')"
    done = subprocess.run([sys.executable, "-c", code], stdout=writes, stderr=subprocess.PIPE)
    os.close(writes)
    assert (done.returncode, done.stderr) == (0, b"")
