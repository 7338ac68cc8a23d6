"""A run folder belongs to one process that trains in it, or to any number that read it."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from qkd_jax.errors import CheckpointError

logger = logging.getLogger("qkd_jax")


@contextmanager
def exclusive(folder: Path, locks: bool = True) -> Iterator[None]:
    """Locks a run folder for one process; of several hosts only the first one does so."""
    if not locks:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        _lock(lock, folder, alone=True)
        for left in (*folder.glob(".*.part"), *folder.glob("*/.*.part")):
            left.unlink(missing_ok=True)  # what a kill within a write left
        yield


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Locks a run folder for reading, against a process that trains in it.

    Several processes may read at once. Nothing is written; a copy without a lock file is read
    without a lock.
    """
    try:
        lock = open(folder / ".lock")
    except OSError:
        yield
        return
    with lock:
        _lock(lock, folder, alone=False)
        yield


def _lock(lock: TextIO, folder: Path, alone: bool) -> None:
    import fcntl

    try:
        fcntl.flock(lock, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        does = "running in" if not alone else "running in or reading"
        raise CheckpointError(
            f"another process is {does} {folder}; stop it (what it learned is saved) or wait"
        ) from None
    except OSError as error:  # some network and cloud folders have no locks
        logger.warning("%s cannot be locked (%s); start no second process there", folder, error)
