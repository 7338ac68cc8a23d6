"""Writes files so that neither a kill, a power failure nor another process leaves half of one."""

from __future__ import annotations

import contextlib
import io
import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_atomically(path: Path, content: bytes, *, sync: bool = True) -> None:
    """Writes a file so that readers see the old or the new content, never a part, whatever dies and
    whoever else writes it; the new one is on the disk when this returns.

    Without `sync` a power failure may leave an empty or partial file, which costs no wait for the
    disk: for files with a checksum that can be computed again.
    """
    # Not tempfile's, whose files only their owner may read.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):  # a read-only file system refuses this too
            temporary.unlink()
        if isinstance(error, OSError) and error.errno:
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise
    if sync:
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder last through a power failure, where its file system can."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:  # some network folders cannot
        pass
    finally:
        os.close(handle)


def save_figure(path: Path, figure: Figure, **options: Any) -> bytes:
    """Writes a figure in the form of the file's suffix; returns the content."""
    file = io.BytesIO()
    figure.savefig(file, format=path.suffix[1:], **options)
    write_atomically(path, file.getvalue())
    return file.getvalue()
