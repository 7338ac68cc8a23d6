"""Files are whole or not there, on the disk, and written by several processes at once."""

import concurrent.futures
import os
import stat

import pytest

from qkd_jax.reports.writing import write_atomically


def write_often(path, letter, times=40):
    for _ in range(times):
        write_atomically(path, letter * 100_000)


def test_many_writers_of_one_file_never_fail_and_never_mix(tmp_path):
    path = tmp_path / "results.json"
    with concurrent.futures.ThreadPoolExecutor(3) as pool:  # as good as processes, and fast
        waiting = [pool.submit(write_often, path, letter) for letter in (b"a", b"b", b"c")]
        while not all(future.done() for future in waiting):
            if path.exists():
                content = path.read_bytes()
                assert len(content) == 100_000 and len(set(content)) == 1
        for future in waiting:
            future.result()
    assert os.listdir(tmp_path) == ["results.json"]


def test_what_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    write_atomically(path, b"old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as failed:
        write_atomically(path, b"new")
    assert failed.value.filename == str(path)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["summary.json"]


def test_a_read_only_file_system_is_told_with_the_name_of_the_file(tmp_path, monkeypatch):
    """Which refuses to remove what could not be written, too."""

    def refused(*_, **__):
        raise OSError(30, "Read-only file system", "another name")

    monkeypatch.setattr("builtins.open", refused)
    monkeypatch.setattr(os, "unlink", refused)
    with pytest.raises(OSError, match="Read-only") as failed:
        write_atomically(tmp_path / "summary.json", b"1")
    assert failed.value.filename == str(tmp_path / "summary.json")


@pytest.mark.parametrize("sync", [True, False])
def test_file_and_folder_are_synced_in_this_order_or_not_at_all(sync, tmp_path, monkeypatch):
    synced, fsync = [], os.fsync

    def noted(handle):
        kind = "folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file"
        synced.append((kind, (tmp_path / "a.json").exists()))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", noted)
    write_atomically(tmp_path / "a.json", b"1", sync=sync)
    # The name is there only in between.
    assert synced == ([("file", False), ("folder", True)] if sync else [])
    assert (tmp_path / "a.json").read_bytes() == b"1"


def test_others_may_read_what_the_umask_allows(tmp_path):
    before = os.umask(0o022)
    try:
        write_atomically(tmp_path / "a.json", b"1")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.json").stat().st_mode) == 0o644
