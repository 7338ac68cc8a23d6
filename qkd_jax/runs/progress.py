"""Progress of a run: one live line, and one line that stays for each finished task.

A terminal gets a bar (rich), a notebook one line that is updated in place, and anything else (a log
file, a pipe) a plain line from time to time. The run loop calls the same methods in all cases.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Protocol, Self, TextIO

from qkd_jax.errors import ConfigError
from qkd_jax.runs.display import BROKEN, mute, tell, tells_or_drops


class NullProgress:
    """Shows nothing; defines the interface of `Progress`."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Removes the live line, also after an error or Ctrl-C."""

    def start_task(self, index: int, num_tasks: int, learner: str = "") -> None:
        """Task `index` (from 0) of `num_tasks` begins, for one of several learners."""

    def update(
        self,
        steps: int,
        images: int,
        metrics: Mapping[str, Any] | None = None,
        epoch: int = 0,
        epochs: int = 0,
    ) -> None:
        """Counts `steps` and `images` trained since the last call; epoch counts from 0.

        Of `metrics` only "loss" is shown. It may be an array on a device, which is fetched only to
        be drawn, at most a few times per second.
        """

    def message(self, text: str) -> None:
        """Shows a line that stays."""

    def end_task(self, line: str) -> None:
        """The task is finished; shows `line`, which stays."""


class _Screen(Protocol):
    """Where text is shown: one live line, and lines that stay."""

    seconds_between: float

    def live(self, text: str, fraction: float) -> None: ...
    def keep(self, text: str) -> None: ...
    def close(self) -> None: ...


class Progress(NullProgress):
    """Progress of a whole run: task, epoch, loss, images per second, time left.

    Args:
      total_steps, total_images: over all tasks.
      done_steps, done_images: those done before a run was resumed.
      noun: what is counted as images, such as "text".
      stream: where to write; standard output by default.
      seconds_between: the least time between two plain lines.
      clock: seconds, monotonic.

    Raises:
      ConfigError: a count below 0, or more done than there is.
    """

    def __init__(
        self,
        total_steps: int,
        total_images: int,
        *,
        done_steps: int = 0,
        done_images: int = 0,
        noun: str = "image",
        stream: TextIO | None = None,
        seconds_between: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        for name, done, total in (
            ("steps", done_steps, total_steps),
            ("images", done_images, total_images),
        ):
            if not 0 <= done <= total:
                raise ConfigError(f"progress: expected 0 to {total} {name} done, found {done}")
        self._total_steps, self._done_steps = total_steps, done_steps
        self._total_images, self._done_images = total_images, done_images
        self._first_image, self._noun = done_images, noun
        self._stream, self._seconds_between, self._clock = stream, seconds_between, clock
        self._screen: _Screen | None = None
        self._task = ""
        self._began = self._task_began = self._drawn = clock()
        self._task_images = 0

    def __enter__(self) -> Self:
        self._screen = _screen(self._stream or sys.stdout, self._seconds_between)
        self._began = self._task_began = self._drawn = self._clock()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._screen is not None:
            self._screen.close()
        self._screen = None

    def start_task(self, index: int, num_tasks: int, learner: str = "") -> None:
        self._task = told_task(index, num_tasks, learner)
        self._task_began, self._task_images = self._clock(), 0

    def update(
        self,
        steps: int,
        images: int,
        metrics: Mapping[str, Any] | None = None,
        epoch: int = 0,
        epochs: int = 0,
    ) -> None:
        self._done_steps += steps
        self._done_images += images
        self._task_images += images
        now = self._clock()
        if self._screen is None or now - self._drawn < self._screen.seconds_between:
            return
        self._drawn = now
        fraction = min(1.0, self._done_images / max(1, self._total_images))
        self._screen.live(self._line(now, dict(metrics or {}), epoch, epochs, fraction), fraction)

    def message(self, text: str) -> None:
        if self._screen is not None:
            self._screen.keep(text)

    def end_task(self, line: str) -> None:
        self.message(line)

    def _line(
        self, now: float, metrics: dict[str, Any], epoch: int, epochs: int, fraction: float
    ) -> str:
        parts = [self._task]
        if epochs:
            parts.append(f"epoch {epoch + 1}/{epochs}")
        parts.append(f"step {self._done_steps}/{self._total_steps}")
        if "loss" in metrics:
            parts.append(f"loss {float(metrics['loss']):.3f}")
        rate = self._task_images / max(now - self._task_began, 1e-9)
        parts.append(f"{rate:,.0f} {self._noun}s/s")
        parts.append(f"{100 * fraction:.0f} %")
        images = self._done_images - self._first_image  # by this process; evaluation takes time too
        if images > 0:
            left = max(0, self._total_images - self._done_images)
            parts.append(f"{duration((now - self._began) * left / images)} left")
        return "  ".join(parts)


def told_task(index: int, num_tasks: int, learner: str = "") -> str:
    """A task as lines show it, with the name of the learner where there are several."""
    return f"{learner}{': ' if learner else ''}task {index + 1}/{num_tasks}"


@contextmanager
def counting(what: str, total: int, shows: bool = True) -> Iterator[Callable[[int], None]]:
    """Progress of a pass over `total` images; yields a function to call with the number just done.

    A pass of less than a second or two shows nothing.
    """
    if not shows:
        yield lambda count: None
        return
    screen, clock = None, time.monotonic
    began = drawn = clock()
    done = 0

    def advance(count: int) -> None:
        nonlocal screen, drawn, done
        done += count
        now = clock()
        if now - drawn < (screen.seconds_between if screen else 1.0):
            return
        drawn, screen = now, screen or _screen(sys.stdout, 5.0)
        left = duration((now - began) * (total - done) / max(done, 1))
        screen.live(f"{what} image {done:,} of {total:,}  {left} left", done / max(total, 1))

    try:
        yield advance
    finally:
        if screen:
            screen.close()


def duration(seconds: float) -> str:
    """Seconds as 1:02:03, or as 2:03 below an hour."""
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02d}:{second:02d}" if hour else f"{minute}:{second:02d}"


def _screen(stream: TextIO | None, seconds_between: float) -> _Screen:
    if stream is not None and stream is sys.stdout and _in_notebook():
        return _Notebook()
    try:
        if stream is not None and stream.isatty():
            return _Forgiving(_Terminal(stream), stream)
    except BROKEN:
        mute(stream)
    return _Plain(stream, seconds_between)


def _in_notebook() -> bool:
    """Whether this is a Jupyter kernel, where IPython is already imported."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and hasattr(shell, "kernel")


class _Forgiving:
    """A screen that gives way to plain lines once it cannot be drawn."""

    def __init__(self, screen: _Screen, stream: TextIO) -> None:
        self.screen, self.stream, self.seconds_between = screen, stream, screen.seconds_between

    def live(self, text: str, fraction: float) -> None:
        if not tells_or_drops(self.stream, lambda: self.screen.live(text, fraction)):
            self.screen = _Plain(self.stream, self.seconds_between)

    def keep(self, text: str) -> None:
        if not tells_or_drops(self.stream, lambda: self.screen.keep(text)):
            self.screen = _Plain(self.stream, self.seconds_between)
            self.screen.keep(text)

    def close(self) -> None:
        tells_or_drops(self.stream, self.screen.close)


class _Plain:
    """Plain lines without control characters."""

    def __init__(self, stream: TextIO | None, seconds_between: float) -> None:
        self.stream, self.seconds_between = stream, seconds_between

    def live(self, text: str, fraction: float) -> None:
        self.keep(text)

    def keep(self, text: str) -> None:
        tell(text, self.stream)

    def close(self) -> None:
        pass


class _Notebook:
    """One output line updated in place, without widgets; lines that stay are printed."""

    seconds_between = 0.5

    def __init__(self) -> None:
        self.handle: Any = None

    def live(self, text: str, fraction: float) -> None:
        from IPython.display import Pretty, display

        filled = round(24 * fraction)
        line = Pretty("█" * filled + "░" * (24 - filled) + "  " + text)
        if self.handle is None:
            self.handle = display(line, display_id=True)
        else:
            self.handle.update(line)

    def keep(self, text: str) -> None:
        tell(text)

    def close(self) -> None:
        pass


def _broken_pipe() -> None:
    raise BrokenPipeError


class _Terminal:
    """A rich bar at the bottom; lines that stay scroll above it."""

    seconds_between = 0.2

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bar

        self.console = Console(file=stream)
        self.console.on_broken_pipe = _broken_pipe  # rich would end the process
        self.bar = Bar(
            BarColumn(bar_width=24),
            TextColumn("{task.description}", markup=False),
            console=self.console,
            transient=True,
            auto_refresh=False,
        )
        self.task = self.bar.add_task("starting", total=1.0)
        self.bar.start()

    def live(self, text: str, fraction: float) -> None:
        self.bar.update(self.task, description=text, completed=fraction, refresh=True)

    def keep(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        self.bar.stop()
