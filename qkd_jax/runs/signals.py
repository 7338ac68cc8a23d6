"""SIGINT and SIGTERM as a request to stop, which a run follows when all is saved."""

import signal
from collections.abc import Callable
from types import FrameType


class StopRequest:
    """While in use as a context manager, the first signal sets `asked` and the second one stops at
    once; afterwards the handlers are those of before.

    Args:
      tell: is called when the first signal arrives.
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
