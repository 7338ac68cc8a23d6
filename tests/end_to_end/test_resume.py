"""Killed at any moment and started again, a run ends with the same bytes as one never stopped.

The interrupted runs are real processes and real signals. Nothing inside them knows of the test: it
only waits until a file of the run appears. After each kill the folder is copied and also finished
in this process, so that every kill is judged alone.
"""

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import qkd_jax
from benchmarks.same_run import differences
from qkd_jax.cli import main
from qkd_jax.errors import CheckpointError
from qkd_jax.reports.ledger import Ledger, missing_files
from qkd_jax.runs.checkpoint import Checkpoints
from qkd_jax.runs.folder import STEPS_PER_TASK
from qkd_jax.runs.loop import run, run_folder
from qkd_jax.settings.config import override
from qkd_jax.settings.experiments import load_experiment
from qkd_jax.weights.load import load_backbone

pytestmark = pytest.mark.floor

SETTINGS = ("train.devices=1", "gate.encoding=angle", "train.checkpoint_every=3")
DEADLINE = 240  # seconds; a starved machine is slow, not wrong


def config():
    return override(load_experiment("smoke").get_config("qkd"), *SETTINGS)


def arguments(out, *more):
    chosen = [part for setting in SETTINGS for part in ("--set", setting)]
    return ["run", "smoke", *chosen, "--out", str(out), "--no-report", *more]


@pytest.fixture(scope="module")
def backbone():
    return load_backbone("tiny_random", image_size=32)


@pytest.fixture(scope="module")
def reference(compiled, backbone, tmp_path_factory):
    """The folder of a run that nothing interrupted."""
    out = tmp_path_factory.mktemp("reference")
    run(config(), backbone, out)
    return run_folder(out, config())


def start(out, compiled):
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": compiled,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "JAX_PLATFORMS": "cpu",
    }
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "qkd_jax", *arguments(out)]
    return subprocess.Popen(
        command,
        env=environment,
        cwd=root,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def wait_for(path, process=None):
    """Until `path` exists; fails if the process ends first."""
    end = time.monotonic() + DEADLINE
    while not path.exists():
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < end, f"{path} never appeared"
        time.sleep(0.0005)


def copy(folder, out):
    """The same run under another `out`."""
    target = run_folder(out, config())
    shutil.copytree(folder, target)
    return target


def check_equal(folder, reference):
    """Summary, log, predictions, matrix, order, parameters and optimiser state, to the byte."""
    assert json.loads((folder / "summary.json").read_text())["finished"] is True
    assert differences(folder, reference) == []


MOMENTS = {
    "mid_task": ("checkpoints/3", signal.SIGKILL),
    "evaluation": ("predictions/after_task_1.npz", signal.SIGKILL),
    "between_tasks": ("checkpoints/20000000", signal.SIGKILL),
    "terminated": ("checkpoints/20000003", signal.SIGTERM),
}


@pytest.mark.parametrize(
    "moments",
    [("mid_task",), pytest.param(tuple(MOMENTS), marks=pytest.mark.slow)],
)
def test_killed_again_and_again_ends_with_the_same_bytes(
    moments, reference, compiled, backbone, tmp_path
):
    """Each of the moments on the run that the one before it left."""
    folder = run_folder(tmp_path / "chain", config())
    for name in moments:
        path, number = MOMENTS[name]
        process = start(tmp_path / "chain", compiled)
        wait_for(folder / path, process)
        process.send_signal(number)
        _, errors = process.communicate(timeout=DEADLINE)
        if number == signal.SIGKILL:
            assert process.returncode == -signal.SIGKILL
        else:
            assert process.returncode == 130, errors
            assert f"saved in {folder}; the same command continues" in errors
        stored = folder / "summary.json"
        assert not (stored.exists() and json.loads(stored.read_text())["finished"]), name
        copy(folder, tmp_path / name)
    for name in moments[:-1]:
        run(config(), backbone, tmp_path / name)
        check_equal(run_folder(tmp_path / name, config()), reference)
    # The last one by the command line, in a process of its own.
    process = start(tmp_path / "chain", compiled)
    output, errors = process.communicate(timeout=DEADLINE)
    assert process.returncode == 0, errors
    task = int(Path(path).name) // STEPS_PER_TASK
    assert f"continuing after task {task}, step" in output and "after task" in output
    check_equal(folder, reference)


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_a_signal_saves_and_exits_130(reference, backbone, tmp_path, capsys, number):
    """In this process: the handlers are put back afterwards."""
    folder = run_folder(tmp_path, config())
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]

    def send():
        with contextlib.suppress(AssertionError):
            wait_for(folder / "checkpoints/10000003")
        os.kill(os.getpid(), number)

    sender = threading.Thread(target=send)
    sender.start()
    code = main(arguments(tmp_path))
    sender.join()
    told = capsys.readouterr()
    assert code == 130
    assert f"saved in {folder}; the same command continues" in told.err
    assert "stopping after this step" in told.out
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
    saved = int(checkpoints_of(folder)[-1].name)
    assert 1 <= saved // STEPS_PER_TASK <= 2
    run(config(), backbone, tmp_path)
    check_equal(folder, reference)


@pytest.fixture
def unfinished(reference, tmp_path):
    """A copy of the reference as a kill right after its last checkpoint but one would leave it."""
    folder = copy(reference, tmp_path)
    summary = json.loads((folder / "summary.json").read_text()) | {"finished": False}
    Ledger(folder).read().write({"summary.json": json.dumps(summary).encode()})
    return folder


def as_older_versions_wrote(folder):
    """Without a ledger."""
    (folder / "files.json").unlink()
    environment = json.loads((folder / "environment.json").read_text())
    (folder / "environment.json").write_text(json.dumps(environment | {"files": None}))


def cut(checkpoint):
    """The last byte of every array file."""
    files = [p for p in checkpoint.rglob("*") if p.is_file() and p.parent.name == "d"]
    assert files
    for path in files:
        path.write_bytes(path.read_bytes()[:-1])


def checkpoints_of(folder):
    paths = (path for path in (folder / "checkpoints").iterdir() if path.name.isdigit())
    return sorted(paths, key=lambda path: int(path.name))


@pytest.mark.parametrize("loss", ["cut", pytest.param("gone", marks=pytest.mark.slow)])
def test_a_finished_run_that_lost_its_last_task_learns_it_again(
    loss, reference, backbone, tmp_path, caplog
):
    """The checkpoint of the last task is truncated, or deleted; the summary says "finished"."""
    folder = copy(reference, tmp_path)
    newest = checkpoints_of(folder)[-1]
    cut(newest) if loss == "cut" else shutil.rmtree(newest)
    run(config(), backbone, tmp_path)
    if loss == "cut":
        assert f"checkpoint {newest.name} cannot be read (" in caplog.text
        assert (newest.parent / f"damaged-{newest.name}").is_dir()
    check_equal(folder, reference)
    again = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    assert run(config(), backbone, tmp_path)["finished"]  # and is finished now
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == again


def test_all_checkpoints_broken_says_what_to_do(unfinished, backbone, tmp_path):
    for checkpoint in checkpoints_of(unfinished):
        cut(checkpoint)
    with pytest.raises(CheckpointError, match="no checkpoint of this run can be read") as failed:
        run(config(), backbone, tmp_path)
    assert "delete the run folder to start again" in str(failed.value)


def test_torn_last_log_line_is_written_again(unfinished, reference, backbone, tmp_path):
    log = unfinished / "metrics.jsonl"
    shutil.rmtree(checkpoints_of(unfinished)[-1])
    log.write_bytes(log.read_bytes()[:-20])
    run(config(), backbone, tmp_path)
    check_equal(unfinished, reference)


def test_missing_files_are_written_anew_with_the_same_bytes(reference, backbone, tmp_path, caplog):
    """All that follow from settings, data and checkpoint, at once."""
    folder = copy(reference, tmp_path)
    names = ("class_order.json", "images.npz", "circuit.txt", "config.json", "matrix.json")
    for name in (*names, "summary.json"):
        (folder / name).unlink()
    run(config(), backbone, tmp_path)
    for name in names:
        assert (folder / name).read_bytes() == (reference / name).read_bytes(), name
    check_equal(folder, reference)
    assert "lost" not in caplog.text and missing_files(folder) == ()


def test_what_cannot_be_made_anew_is_told_once(reference, backbone, tmp_path, caplog):
    folder = copy(reference, tmp_path)
    lost = ("predictions/after_task_0.npz", "metrics.jsonl")
    log = folder / "metrics.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[4:]))
    (folder / lost[0]).unlink()
    matrix = (folder / "matrix.json").read_bytes()
    assert run(config(), backbone, tmp_path)["finished"]
    for name in lost:
        told = f"{folder / name} is lost; what was learned and measured is kept"
        assert caplog.text.count(told) == 1
    assert (folder / "matrix.json").read_bytes() == matrix
    run(config(), backbone, tmp_path)
    assert caplog.text.count("is lost") == 2


def test_a_disk_that_is_full_within_a_run_is_one_error_and_the_run_goes_on_later(
    reference, tmp_path, monkeypatch, capsys
):
    """The system refuses every file above a size, from a checkpoint in the second task on."""
    save = Checkpoints.save
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def into_little_room(self, number, *given):
        if number > STEPS_PER_TASK:
            resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))
        save(self, number, *given)

    folder = run_folder(tmp_path, config())
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", into_little_room)
        try:
            assert main(arguments(tmp_path)) == 1
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    told = capsys.readouterr().err
    assert told.startswith(f"error: cannot save a checkpoint in {folder / 'checkpoints'}: ")
    assert "Make room" in told and told.count("\n") == 1
    assert checkpoints_of(folder)[-1].name == str(STEPS_PER_TASK)
    assert main(arguments(tmp_path)) == 0
    check_equal(folder, reference)


def test_a_run_of_a_newer_version_is_refused_with_the_setting_that_is_unknown(
    unfinished, tmp_path, capsys
):
    settings = json.loads((unfinished / "config.json").read_text()) | {"since_added": 1}
    Ledger(unfinished).read().write({"config.json": json.dumps(settings).encode()})
    assert main(arguments(tmp_path)) == 1
    told = capsys.readouterr().err
    assert told.startswith(f"error: {unfinished / 'config.json'} cannot be used: ")
    assert "setting 'since_added': expected a known name" in told


def test_a_deleted_config_lets_no_run_continue_under_other_settings(unfinished, backbone, tmp_path):
    (unfinished / "config.json").unlink()
    other = override(config(), "train.learning_rate=0.123")
    with pytest.raises(CheckpointError, match=r"config\.json is missing; restore it"):
        run(other, backbone, tmp_path)


def test_a_deleted_ledger_is_told_and_made_anew(unfinished, backbone, tmp_path, caplog):
    (unfinished / "files.json").unlink()
    with pytest.raises(CheckpointError, match=r"files\.json is missing"):
        qkd_jax.load_run(unfinished)
    run(config(), backbone, tmp_path)
    assert "files.json is gone; its files are taken as they are" in caplog.text
    (unfinished / "matrix.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"matrix.json: expected what the run wrote"):
        qkd_jax.load_run(unfinished)


@pytest.mark.parametrize(
    "name", ["config.json", "environment.json", "summary.json", "matrix.json", "class_order.json"]
)
def test_an_edited_file_is_one_clear_error(unfinished, tmp_path, capsys, name):
    """Also if it is good JSON; what the run can write anew may be deleted."""
    (unfinished / name).write_text("{}")
    assert main(arguments(tmp_path)) == 1
    told = capsys.readouterr().err
    assert told.startswith(f"error: {unfinished / name}: expected what the run wrote")
    assert ("or delete it and give" in told) == (name not in ("config.json", "environment.json"))
    assert told.count("\n") == 1


@pytest.mark.parametrize("name", ["config.json", "environment.json", "summary.json", "matrix.json"])
@pytest.mark.parametrize("content", ["", '{"cut', "[1, 2]", "\udcff"])
def test_damaged_files_are_one_clear_error(reference, tmp_path, capsys, name, content):
    """Of a finished run of an older version, whose summary and matrix are still to be shown."""
    folder = copy(reference, tmp_path)
    as_older_versions_wrote(folder)
    (folder / name).write_bytes(content.encode(errors="surrogateescape"))
    code = main(arguments(tmp_path))
    told = capsys.readouterr().err
    assert code == 1
    assert told.startswith("error: ") and name in told and told.count("\n") <= 2
