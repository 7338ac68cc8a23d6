"""The ledger of a run folder: what was written is what is read, or the file is named."""

import json

import pytest

from qkd_jax.errors import DataError
from qkd_jax.reports.ledger import LEDGER, Ledger, lost_files, missing_files, needs_ledger


@pytest.fixture
def ledger(tmp_path):
    found = Ledger(tmp_path)
    found.write({"matrix.json": b"[1]", "predictions/after_task_0.npz": b"many bytes"})
    found.write({"environment.json": b'{"files": "files.json"}'})
    return found


def refused(folder):
    with pytest.raises(DataError) as failed:
        missing_files(folder)
    return str(failed.value)


def test_files_as_written_agree_and_others_are_not_looked_at(ledger, tmp_path):
    (tmp_path / "figures").mkdir()
    (tmp_path / "report.html").write_text("drawn again at any time")
    assert missing_files(tmp_path) == ()
    assert (tmp_path / "matrix.json").read_bytes() == b"[1]"


@pytest.mark.parametrize("name", ["matrix.json", "predictions/after_task_0.npz"])
@pytest.mark.parametrize("content", [b"[2]", b"", b"[1]\n"])
def test_other_content_is_one_error_that_names_the_file(ledger, tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    told = refused(tmp_path)
    assert told.startswith(f"{tmp_path / name}: expected what the run wrote")
    assert "delete it and give the command" in told  # which the run can do without


def test_what_a_run_cannot_do_without_is_to_be_restored(ledger, tmp_path):
    (tmp_path / "environment.json").write_text("{}")
    told = refused(tmp_path)
    assert told.endswith("restore it from a copy")


def test_a_kill_at_any_write_leaves_files_that_agree(tmp_path, monkeypatch):
    """The ledger comes first, with both contents: after each of the writes that replace two files
    the folder agrees. An older content than the last two does not.
    """
    from qkd_jax.reports import ledger as module

    names = ("matrix.json", "summary.json")
    seen, whole = [], module.write_atomically

    def checked(path, content):
        whole(path, content)
        seen.append((path.name, missing_files(tmp_path)))

    ledger = Ledger(tmp_path)
    ledger.write(dict.fromkeys(names, b"first"))
    monkeypatch.setattr(module, "write_atomically", checked)
    for content in (b"second", b"third", b"second"):
        ledger.write(dict.fromkeys(names, content))
    assert seen == [(LEDGER, ()), ("matrix.json", ()), ("summary.json", ())] * 3
    Ledger(tmp_path).read().write({})  # whoever goes on
    (tmp_path / "matrix.json").write_bytes(b"third")
    assert "matrix.json" in refused(tmp_path)


def test_a_log_may_only_grow(tmp_path):
    ledger, log = Ledger(tmp_path), tmp_path / "metrics.jsonl"
    ledger.grow("metrics.jsonl")  # a method without steps
    assert missing_files(tmp_path) == ()
    for lines in ("a\n", "b\n", "c\n"):
        with open(log, "a") as file:
            file.write(lines)
        ledger.grow("metrics.jsonl")
        with open(log, "a") as file:
            file.write("not known yet")
        assert missing_files(tmp_path) == ()
        log.write_text(log.read_text().removesuffix("not known yet"))
    for lost in ("a\nb\n", "a\nB\nc\n", "b\nc\nd\n"):
        log.write_text(lost)
        assert missing_files(tmp_path) == ("metrics.jsonl",)  # no result follows from it
    ledger.write({"metrics.jsonl": b"a\n"})  # trimmed
    with open(log, "a") as file:
        file.write("d\n")
    ledger.grow("metrics.jsonl")
    assert missing_files(tmp_path) == () and Ledger(tmp_path).read().agrees(
        "metrics.jsonl", b"a\nd\n"
    )


def test_missing_files_are_named_until_they_are_known_to_be_lost(ledger, tmp_path):
    (tmp_path / "predictions/after_task_0.npz").unlink()
    assert missing_files(tmp_path) == ("predictions/after_task_0.npz",)
    ledger.lose("predictions/after_task_0.npz")
    assert missing_files(tmp_path) == ()
    assert lost_files(tmp_path) == ("predictions/after_task_0.npz",)
    ledger.write({"predictions/after_task_0.npz": b"again"})
    assert lost_files(tmp_path) == ()


@pytest.mark.parametrize("change", ["flipped", "cut", "other", "gone"])
def test_the_ledger_itself_is_held_to_account(ledger, tmp_path, change):
    path = tmp_path / LEDGER
    content = json.loads(path.read_text())
    if change == "flipped":
        content["files"]["matrix.json"][0][1] = "0" * 64
        path.write_text(json.dumps(content))
    elif change == "cut":
        path.write_bytes(path.read_bytes()[:-20])
    elif change == "other":
        path.write_text("[]")
    else:
        path.unlink()
    assert needs_ledger(tmp_path) == (change == "gone")
    told = refused(tmp_path)
    assert told.startswith(f"{path} is ") and "takes the files as they are" in told


def test_a_run_of_an_older_version_has_none(tmp_path):
    (tmp_path / "environment.json").write_text('{"backbone": "clip_vit_b16"}')
    (tmp_path / "matrix.json").write_text("[1]")
    assert missing_files(tmp_path) == () and not needs_ledger(tmp_path)
    ledger = Ledger(tmp_path).read()
    ledger.adopt("matrix.json")
    (tmp_path / "matrix.json").write_text("[2]")
    assert "matrix.json" in refused(tmp_path)
