"""A run read back from its folder predicts what the run itself recorded."""

import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

import qkd_jax
from qkd_jax.engine import verbs
from qkd_jax.errors import CheckpointError
from qkd_jax.reports.ledger import Ledger
from qkd_jax.runs import load
from qkd_jax.runs.checkpoint import Checkpoints
from qkd_jax.runs.lock import exclusive, reading
from qkd_jax.runs.loop import plan, run, run_folder
from qkd_jax.settings.config import override
from qkd_jax.settings.experiments import load_experiment
from qkd_jax.weights.load import load_backbone

pytestmark = pytest.mark.floor


@pytest.fixture(scope="module")
def config():
    smoke = load_experiment("smoke").get_config("qkd")
    # Two devices: the run must be loadable on one.
    settings = ("train.devices=2", "train.epochs=1", "data.num_classes=4")
    return override(smoke, *settings, "train.checkpoint_every=1000")  # at the end of tasks only


@pytest.fixture(scope="module")
def folder(config, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    run(config, load_backbone("tiny_random", image_size=32), out)
    return run_folder(out, config)


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def test_predicts_what_the_run_recorded(config, folder):
    trained = qkd_jax.load_run(folder)
    planned = plan(config)
    assert trained.config == planned.config
    assert trained.class_names == planned.data.train.class_names
    test = planned.data.test
    images = test.load(range(len(test)), trained.state.backbone)["image"]
    scores, relevance = qkd_jax.predict_with_relevance(trained.state, images)
    with np.load(folder / "predictions" / "after_task_1.npz") as saved:
        assert saved["id"].tolist() == test.ids.tolist()
        # The run computes features batch by batch on two devices; float32 sums in another order
        # differ by some 1e-6 here, and only a closer race may change its winner.
        best = np.sort(np.asarray(scores), axis=1)
        clear = best[:, -1] - best[:, -2] > 1e-3
        assert clear.mean() > 0.9
        predicted = np.asarray(scores).argmax(axis=1)
        np.testing.assert_array_equal(predicted[clear], saved["predicted"][clear])
        np.testing.assert_allclose(relevance, saved["relevance"], atol=1e-4)


def test_knows_that_every_task_is_learned(folder):
    state = qkd_jax.load_run(folder).state
    with pytest.raises(qkd_jax.ProtocolError, match="expected an index below max_tasks=2"):
        qkd_jax.begin_task(state, qkd_jax.Task(2, (0,)))


def test_refuses_another_backbone(copy):
    environment = json.loads((copy / "environment.json").read_text())
    other = json.dumps(environment | {"weights_fingerprint": "0" * 16})
    Ledger(copy).read().write({"environment.json": other.encode()})
    with pytest.raises(CheckpointError, match="another backbone"):
        qkd_jax.load_run(copy)


@pytest.mark.parametrize("name", ["config.json", "class_order.json", "environment.json"])
@pytest.mark.parametrize("content", [None, "{}", '{"seed": '])
@pytest.mark.parametrize("older_version", [False, True])
def test_names_a_missing_or_damaged_file(copy, name, content, older_version):
    if older_version:  # without a ledger
        (copy / "files.json").unlink()
        environment = json.loads((copy / "environment.json").read_text())
        (copy / "environment.json").write_text(json.dumps(environment | {"files": None}))
    (copy / name).unlink()
    if content is not None:
        (copy / name).write_text(content)
    with pytest.raises(CheckpointError, match=name):
        qkd_jax.load_run(copy)


def test_refuses_unknown_settings(copy):
    settings = json.loads((copy / "config.json").read_text()) | {"learning_rat": 1}
    Ledger(copy).read().write({"config.json": json.dumps(settings).encode()})
    with pytest.raises(CheckpointError, match="learning_rat"):
        qkd_jax.load_run(copy)


def test_refuses_a_folder_without_checkpoints(copy):
    shutil.rmtree(copy / "checkpoints")
    with pytest.raises(CheckpointError, match="nothing was saved"):
        qkd_jax.load_run(copy)
    assert not (copy / "checkpoints").exists()
    (copy / "checkpoints").mkdir()
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        qkd_jax.load_run(copy)


def test_refuses_half_a_task(copy, config):
    shutil.rmtree(copy / "checkpoints")
    planned = plan(config)
    backbone = load_backbone("tiny_random", image_size=32)
    state = verbs.init_state(jax.random.key(config.seed), backbone, planned.config)
    state = verbs.begin_task(state, planned.tasks[0], 5)
    with Checkpoints(copy / "checkpoints") as checkpoints:
        checkpoints.save(3, state, {"finished_tasks": 0})
    with pytest.raises(CheckpointError, match="middle of task 1"):
        qkd_jax.load_run(copy)


def everything_in(folder):
    return {path: (path.stat().st_mtime_ns, path.is_file() and path.read_bytes())
            for path in folder.rglob("*")}  # fmt: skip


def test_a_damaged_checkpoint_is_told_and_nothing_is_changed(copy):
    """The newest is cut: an error, or on demand the one before it; the folder stays as it was."""
    newest = max((copy / "checkpoints").glob("[0-9]*"), key=lambda path: int(path.name))
    for path in newest.rglob("d/*"):
        path.write_bytes(path.read_bytes()[:-1])
    before = everything_in(copy)
    with pytest.raises(CheckpointError, match="newest checkpoint of") as told:
        qkd_jax.load_run(copy)
    assert f"{newest}: " in str(told.value) and "allow_older=True" in str(told.value)
    assert len(str(told.value)) < 1500  # what tensorstore writes is cut
    assert everything_in(copy) == before
    trained = qkd_jax.load_run(copy, allow_older=True)
    assert int(trained.state.task) == 0
    assert everything_in(copy) == before


def test_fewer_tasks_than_the_summary_reports_are_told(copy):
    """As after the newest checkpoint was deleted, or a run folder was copied in part."""
    shutil.rmtree(copy / "checkpoints/20000000")
    before = everything_in(copy)
    with pytest.raises(CheckpointError, match="expected a checkpoint of the 2 tasks") as told:
        qkd_jax.load_run(copy)
    assert "found one of 1" in str(told.value) and "learns the lost tasks again" in str(told.value)
    assert int(qkd_jax.load_run(copy, allow_older=True).state.task) == 0
    assert everything_in(copy) == before


def test_reading_changes_nothing(copy):
    before = everything_in(copy)
    qkd_jax.load_run(copy)
    assert everything_in(copy) == before


def test_a_folder_that_is_being_trained_in_is_refused(copy):
    with exclusive(copy), pytest.raises(CheckpointError, match="another process is running in"):
        qkd_jax.load_run(copy)
    with reading(copy):  # two may read
        qkd_jax.load_run(copy)
    with reading(copy), pytest.raises(CheckpointError, match="running in or reading"):
        with exclusive(copy):
            raise AssertionError("two processes in one folder")


def test_a_copy_without_its_lock_is_just_read(copy):
    (copy / ".lock").unlink()
    qkd_jax.load_run(copy)
    assert not (copy / ".lock").exists()


@pytest.mark.parametrize("locks", ["exclusive", "reading"])
def test_a_file_system_without_locks_is_told_and_used(copy, monkeypatch, caplog, locks):
    def no_locks(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with {"exclusive": exclusive, "reading": reading}[locks](copy):
        pass
    assert "cannot be locked" in caplog.text and "start no second process" in caplog.text


def test_import_stays_light():
    """`import qkd_jax` brings load_run, but neither orbax nor anything else that is heavy."""
    code = (
        "import sys, qkd_jax\n"
        "assert callable(qkd_jax.load_run)\n"
        "heavy = {'orbax', 'tensorflow', 'torch', 'matplotlib', 'pennylane', 'onnx'}\n"
        "print(sorted(heavy & {name.split('.')[0] for name in sys.modules}))\n"
        "import qkd_jax.runs.load\n"
        "assert callable(qkd_jax.load_run)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_one_encoder_is_loaded_for_both(monkeypatch):
    """Wherever its file is: a moved one is given once. A teacher of another kind is loaded too."""
    given = []

    def loaded(config, weights):
        given.append(weights)
        return object()

    monkeypatch.setattr(load, "backbone_of", loaded)
    config = load_experiment("glosses").get_config("qd_llm")
    backbone, teacher = load.backbones_of(config, "moved")
    assert teacher is backbone and given == ["moved"]
    other = load_experiment("renditions").get_config("cdl")
    load.backbones_of(other, "student", "teacher")
    assert given == ["moved", "student", "teacher"]
    assert load.backbones_of(load_experiment("glosses").get_config("ease"))[1] is None
