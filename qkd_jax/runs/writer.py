"""How the files of a run are written: whole, and noted in the run's ledger."""

import io
import json
import os
from typing import Any, TextIO

import numpy as np

from qkd_jax.reports.ledger import Ledger


def encoded_json(value: Any) -> bytes:
    """The content of a JSON file."""
    return (json.dumps(value, indent=1) + "\n").encode()


def encoded_arrays(arrays: dict[str, np.ndarray]) -> bytes:
    """The content of a compressed npz file: the same bytes for the same arrays."""
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


def trimmed_log(text: str, task: int, step: int) -> str:
    """A log without the lines after the restored state, which will be written again."""
    kept = []
    for line in text.splitlines():
        try:
            record = json.loads(line)
            seen = (record["task"], record["step"]) <= (task, step)
        except (ValueError, KeyError, TypeError, RecursionError):
            break  # a line cut off by a kill
        if seen:
            kept.append(line)
    return "".join(line + "\n" for line in kept)


class Writer:
    """Writes the files of one learner of a run; on all hosts but the first it writes nothing.

    Args:
      ledger: of the run.
      name: of the learner's own folder in that of the run; "" for none.
    """

    def __init__(self, ledger: Ledger, name: str = "", writes: bool = True):
        self._ledger, self._name, self.writes = ledger, name, writes

    def write(self, contents: dict[str, bytes]) -> None:
        """Writes files, each of them whole or not at all."""
        if self.writes:
            self._ledger.write({self._own(name): part for name, part in contents.items()})

    def has(self, name: str) -> bool:
        return (self._ledger.folder / self._own(name)).exists()

    def log(self, name: str) -> TextIO:
        """A file to append lines to, each of which is written at once."""
        if not self.writes:
            return open(os.devnull, "a")
        path = self._ledger.folder / self._own(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        return open(path, "a", buffering=1)

    def keep_log(self, name: str) -> None:
        """Makes sure of what was appended to a log so far."""
        if self.writes:
            self._ledger.grow(self._own(name))

    def trim_log(self, name: str, task: int, step: int) -> None:
        """Drops lines of a log after the restored state."""
        if self.writes and self.has(name):
            path = self._ledger.folder / self._own(name)
            text = trimmed_log(path.read_text(errors="replace"), task, step)
            self.write({name: text.encode()})

    def _own(self, name: str) -> str:
        return f"{self._name}/{name}" if self._name else name
