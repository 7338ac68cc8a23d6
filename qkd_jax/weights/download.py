"""Downloads one file over HTTP, continuing what an interruption left and never mixing two files."""

import http.client
import json
import os
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

TIMEOUT = 15  # seconds without an answer on a connection
_CHUNK = 1 << 20
_PAGE = (b"<!doctype html", b"<html")


class TransferError(Exception):
    """What is wrong with a server's answer, in words for a person."""


@contextmanager
def own_part(target: Path, say: Callable[[str], None]) -> Iterator[Path]:
    """The part file of `target`, for this process alone; its folder must exist.

    It is `<target>.part`, with what an interrupted process left in it. While another process holds
    it, this one waits. Where files cannot be locked (some network folders) it has a private name
    and is removed at the end. An empty part is removed as well.
    """
    path = target.with_name(target.name + ".part")
    lock = _lock(path, target.name, say)
    if lock is None:
        path = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        yield path
    finally:
        if lock is None:
            discard(path)
        else:
            with lock:
                if _is_at(lock, path) and not path.stat().st_size:
                    discard(path)


def _lock(path: Path, name: str, say: Callable[[str], None]) -> BinaryIO | None:
    """The locked file of a path, created if it is not there; None where there are no locks."""
    import fcntl

    while True:
        file = open(path, "ab")
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(f"{name}: another process is fetching it; waiting for that one.")
                fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            file.close()
            return None
        except BaseException:
            file.close()
            raise
        # Whoever held the lock before may have renamed or removed the file meanwhile.
        if _is_at(file, path):
            return file
        file.close()


def _is_at(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def discard(part: Path) -> None:
    """Removes a part file and the note of where it is from."""
    part.unlink(missing_ok=True)
    _note_of(part).unlink(missing_ok=True)


def accept(part: Path, target: Path) -> None:
    """Gives a complete part its name, once its bytes are on the disk."""
    with open(part, "rb") as file:
        os.fsync(file.fileno())
    os.replace(part, target)
    discard(part)


def download(url: str, part: Path, *, verified: bool) -> None:
    """Downloads the whole file of a URL to `part`, after the bytes that are already there.

    They are kept only if the server says that its file has not changed since (`If-Range` with the
    entity tag or the date of the first answer), or if the caller verifies the content. In every
    other case the file is downloaded from its beginning.

    Args:
      url: http or https.
      part: a file of this process alone; may be missing.
      verified: the caller compares the content with a known hash. If not, a server that does not
        say how long the file is cannot be trusted to have sent all of it.

    Raises:
      TransferError: no connection, or an answer that is not this file: another status, another
        range than was asked for, another length than was said, a web page. What has been received
        of the file itself stays in `part`.
      OSError: `part` cannot be written.
    """
    have = part.stat().st_size if part.exists() else 0
    mark = _mark_of(part, url)
    if have and (mark or verified):
        asked = {"Range": f"bytes={have}-"} | ({"If-Range": mark} if mark else {})
        with _answer(url, asked) as response:
            if _ends_at(response, have):
                return
            if response.status == 200:
                return _begin(response, url, part, verified)
            if _continues(response, have, mark):
                with open(part, "ab") as file:
                    return _receive(response, file, _length(response))
    with _answer(url, {}) as response:
        if response.status != 200:
            raise TransferError(f"expected the HTTP status 200, found {response.status}")
        _begin(response, url, part, verified)


def _begin(response: http.client.HTTPResponse, url: str, part: Path, verified: bool) -> None:
    """Receives a whole file."""
    length = _length(response)
    if length is None and not response.chunked and not verified:
        raise TransferError("expected an answer that states its length, found none")
    with open(part, "wb") as file:
        _note(part, url, response)
        _receive(response, file, length)


def _ends_at(response: http.client.HTTPResponse, have: int) -> bool:
    """Whether an answer says that the part of `have` bytes is the whole file."""
    total = response.headers.get("Content-Range", "").removeprefix("bytes */")
    return response.status == 416 and total == str(have)


def _continues(response: http.client.HTTPResponse, have: int, mark: str) -> bool:
    """Whether an answer is the rest of the file that a part is of, and nothing else."""
    first, last, total = _range(response)
    now = _validator(response)
    # An answer to If-Range with an entity tag must repeat it, one to a date need not.
    same = now == mark or not mark or (not now and not mark.startswith('"'))
    whole = first == have and last == total - 1 and _length(response) in (None, total - have)
    return response.status == 206 and whole and same


def _range(response: http.client.HTTPResponse) -> tuple[int, int, int]:
    """First and last byte of an answer and the size of the file; -1 where it states none."""
    stated = response.headers.get("Content-Range", "")
    found = re.fullmatch(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})", stated, re.ASCII)
    return tuple(int(number) for number in found.groups()) if found else (-1, -1, -1)


@contextmanager
def _answer(url: str, headers: dict[str, str]) -> Iterator[http.client.HTTPResponse]:
    """The answer to a request, 416 among them; what goes wrong in it becomes a TransferError."""
    try:
        try:
            response = urllib.request.urlopen(
                urllib.request.Request(url, headers=headers), timeout=TIMEOUT
            )
        except urllib.error.HTTPError as error:
            if error.code != 416 or not headers:
                error.close()
                raise
            response = error
    # ValueError: addresses to which a server redirects are parsed, lengths as well.
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise TransferError(_told(error)) from error
    with response:
        kind = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        coding = response.headers.get("Content-Encoding", "identity").strip().lower()
        if response.status != 416 and kind in ("text/html", "application/xhtml+xml"):
            raise TransferError("expected a file, found a web page (is a login needed?)")
        if response.status != 416 and coding not in ("identity", ""):
            raise TransferError(f"expected the file itself, found it encoded as {coding!r}")
        yield response


def _told(error: Exception) -> str:
    """The text of an error, of which parts may be the server's own words."""
    text = str(error) or type(error).__name__
    return "".join(letter if letter.isprintable() else "?" for letter in text[:200])


def _length(response: http.client.HTTPResponse) -> int | None:
    """The length that an answer states; None if it states none."""
    if response.headers.get("Transfer-Encoding") is not None:
        return None
    stated = set(response.headers.get_all("Content-Length", []))
    if not stated:
        return None
    length = stated.pop().strip()
    if stated or not re.fullmatch(r"\d{1,18}", length, re.ASCII):
        raise TransferError(f"expected a length in bytes, found Content-Length {length!r}")
    return int(length)


def _receive(response: http.client.HTTPResponse, file: BinaryIO, length: int | None) -> None:
    """Appends the body of an answer to a file; `length` bytes if that is known."""
    received = 0
    while True:
        try:
            chunk = response.read(_CHUNK)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise TransferError(f"{_told(error)}; run it again") from error
        if file.tell() == 0 and chunk.lstrip()[:20].lower().startswith(_PAGE):
            raise TransferError("expected a file, found a web page (is a login needed?)")
        if not chunk:
            break
        file.write(chunk)
        received += len(chunk)
    if length is not None and received != length:
        raise TransferError(
            f"the connection ended after {received} of {length} bytes; run it again"
        )


def _validator(response: http.client.HTTPResponse) -> str:
    """What `If-Range` may hold: a strong entity tag, or else the date of the last change."""
    tag = response.headers.get("ETag", "").strip()
    # A weak tag (W/"...") may stay the same while bytes change.
    return tag if tag.startswith('"') else response.headers.get("Last-Modified", "").strip()


def _note_of(part: Path) -> Path:
    return part.with_name(part.name + ".json")


def _note(part: Path, url: str, response: http.client.HTTPResponse) -> None:
    """Records which file a part is of, before its first byte."""
    note = {"url": url, "validator": _validator(response)}
    _note_of(part).write_text(json.dumps(note), encoding="utf-8")


def _mark_of(part: Path, url: str) -> str:
    """The validator that was recorded for a part of this URL; empty if there is none."""
    try:
        note = json.loads(_note_of(part).read_bytes())
    except (OSError, ValueError, RecursionError):
        return ""
    if not isinstance(note, dict) or note.get("url") != url:
        return ""
    mark = note.get("validator")
    printable = isinstance(mark, str) and mark.isascii() and mark.isprintable()
    return mark if printable else ""
