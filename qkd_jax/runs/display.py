"""Shows lines to people; a display that is broken never stops the work.

A pipe that nobody reads any more, a full device, a closed stream: what was to be shown is dropped.
Characters that the display does not have are written as \\xNN.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import RenderableType

BROKEN = (OSError, ValueError)  # ValueError: of a stream that is closed


def tell(text: str, stream: TextIO | None = None) -> None:
    """Shows a line on `stream`, by default standard output, or drops it."""
    stream = sys.stdout if stream is None else stream  # None if Python was started without one
    try:
        try:
            print(text, file=stream, flush=True)
        except UnicodeEncodeError:
            known = text.encode(stream.encoding, "backslashreplace").decode(stream.encoding)
            print(known, file=stream, flush=True)
    except BROKEN:
        mute(stream)
    except RuntimeError:  # a signal arrived within a write, and its handler tells something
        pass


def flush() -> None:
    """Writes what standard output still holds.

    Raises:
      OSError: it cannot be written; Python will not try again when it ends.
    """
    if sys.stdout is None:
        return
    try:
        sys.stdout.flush()
    except OSError:
        mute(sys.stdout)
        raise


def tell_table(table: RenderableType) -> None:
    """Shows something of rich on standard output, or drops it."""
    from rich.console import Console

    console = Console()
    with console.capture() as captured:
        console.print(table)
    tell(captured.get().removesuffix("\n"))


def tells_or_drops(stream: TextIO | None, draw: Callable[[], None]) -> bool:
    """Calls `draw`, which writes to `stream`; returns whether that worked."""
    try:
        draw()
    except BROKEN as error:
        if not isinstance(error, UnicodeEncodeError):
            mute(stream)
        return False
    return True


def mute(stream: TextIO | None) -> None:
    """Sends what a standard stream still holds, and all that follows, nowhere: Python would write
    it when it ends, and fail once more.
    """
    if stream is None or stream not in (sys.stdout, sys.stderr):
        return
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
    except BROKEN:  # no file is behind it
        pass
