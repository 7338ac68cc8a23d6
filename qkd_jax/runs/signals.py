"""SIGINT and SIGTERM as a request to stop, after everything is saved."""

import signal
from collections.abc import Callable
from types import FrameType


class StopRequest:
    """A context manager in which the first signal sets `asked` and the second one stops at once.

    The earlier handlers are restored at its end.

    Args:
      tell: called when the first signal arrives.
    """

    def __init__(self, tell: Callable[[], None]):
        self.asked, self._tell, self._before = False, tell, {}

    def __enter__(self) -> "StopRequest":
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask)
        except ValueError:  # not in the main thread, as in some notebooks
            pass
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        self._tell()
