"""Checkpoints: whole or absent, byte for byte what was saved; if damaged, the one before it."""

import hashlib
import json
import logging
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkd_jax.engine import verbs
from qkd_jax.errors import CheckpointError
from qkd_jax.learners.optimiser import optimiser
from qkd_jax.protocol.tasks import Task
from qkd_jax.runs import checkpoint, manifest
from qkd_jax.runs.checkpoint import KEPT, Checkpoints
from qkd_jax.settings.config import Config, Shapes, override
from qkd_jax.weights.load import load_backbone

# When a read of a damaged checkpoint fails whose hashes are not known, orbax's other reads complain
# from their own threads.
pytestmark = [
    pytest.mark.floor,
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def state():
    """A finetune state in its first task, with numbers in every array."""
    shapes = Shapes(num_classes=4, max_tasks=2, max_task_classes=2)
    config = Config(method="finetune", shapes=shapes)
    config = override(config, "adapter.bottleneck=2", "backbone.image_size=32")
    empty = verbs.init_state(jax.random.key(0), load_backbone("tiny_random"), config)
    state = verbs.begin_task(empty, Task(0, (3, 1)), 10)
    return state.replace(trainable=jax.tree.map(lambda a: a + 0.25, state.trainable))


def at_step(state, step):
    return state.replace(step=jnp.int32(step))


def learned(state):
    scalars = (state.task, state.step, state.num_steps)
    rest = (state.task_classes, state.task_of_class, state.trainable, state.opt_state, state.memory)
    return (*scalars, *jax.tree.leaves(rest))


def damage(folder):
    """Cuts the last byte off every array file; returns how many."""
    files = [p for p in folder.rglob("*") if p.is_file() and p.parent.name == "d"]
    for path in files:
        path.write_bytes(path.read_bytes()[:-1])
    return len(files)


def flip(path, place):
    """Turns one bit over, at a place between 0 and 1."""
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 4
    path.write_bytes(content)


def as_older_versions_wrote(checkpoint):
    """Without a manifest."""
    shutil.rmtree(checkpoint / "manifest")
    notes = json.loads((checkpoint / "_CHECKPOINT_METADATA").read_text())
    del notes["item_handlers"]["manifest"]
    (checkpoint / "_CHECKPOINT_METADATA").write_text(json.dumps(notes))


def kept_in(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def saved(state, tmp_path_factory):
    """A folder with checkpoints 1 and 2, to be copied."""
    folder = tmp_path_factory.mktemp("saved")
    with Checkpoints(folder) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, at_step(state, step), {"step": step})
    return folder


@pytest.fixture
def two(saved, tmp_path):
    """A folder with checkpoints 1 and 2."""
    return shutil.copytree(saved, tmp_path / "two")


def test_restores_every_bit(state, tmp_path):
    meta = {"finished_tasks": 0, "correct": [[1, 2]], "confusion": None, "spent": {"wall": 1.5}}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, at_step(state, 3), meta)
    blank = jax.tree.map(lambda a: a, state).replace(
        trainable=jax.tree.map(jnp.zeros_like, state.trainable), step=jnp.int32(0)
    )
    with Checkpoints(tmp_path) as checkpoints:
        found, found_meta = checkpoints.restore(blank)
    assert found_meta == meta
    for a, b in zip(learned(found), learned(at_step(state, 3)), strict=True):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()
    assert jax.tree.structure(found) == jax.tree.structure(state)  # backbone and key stay


def test_an_empty_folder_has_none(state, tmp_path):
    with Checkpoints(tmp_path / "new") as checkpoints:
        assert checkpoints.restore(state) is None


def test_keeps_the_newest_and_the_one_before_it(state, tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, at_step(state, step), {})
    kept = sorted(int(p.name) for p in tmp_path.iterdir() if p.name.isdigit())
    assert kept == [2, 3] and KEPT == 2


def test_backbone_is_not_in_it(state, tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
    size = sum(p.stat().st_size for p in tmp_path.rglob("*") if p.is_file())
    assert size < sum(leaf.nbytes for leaf in jax.tree.leaves(state.backbone.params))


@pytest.mark.parametrize("older_version", [False, True])
def test_a_damaged_one_gives_way_to_the_one_before(state, two, caplog, older_version):
    if older_version:
        for step in ("1", "2"):
            as_older_versions_wrote(two / step)
    assert damage(two / "2") > 0
    before = {p: p.read_bytes() for p in (two / "2").rglob("*") if p.is_file()}
    with caplog.at_level(logging.WARNING, logger="qkd_jax"), Checkpoints(two) as checkpoints:
        found, meta = checkpoints.restore(state)
        assert int(found.step) == 1 and meta == {"step": 1}
        assert "checkpoint 2 cannot be read (" in caplog.text
        assert f"renamed to {two / 'damaged-2'}" in caplog.text
        assert kept_in(two) == ["1", "damaged-2"]
        for path, content in before.items():
            assert (two / "damaged-2" / path.relative_to(two / "2")).read_bytes() == content
        checkpoints.save(2, at_step(state, 2), {"step": 2})  # the number is free again
        assert int(checkpoints.restore(state)[0].step) == 2
        damage(two / "2")
        assert int(checkpoints.restore(state)[0].step) == 1
    assert kept_in(two) == ["1", "damaged-2", "damaged-2-again"]


def test_a_flipped_bit_or_a_missing_file_gives_way_too(state, two, tmp_path):
    """Of every file; those that orbax does not read may also change nothing."""
    files = sorted(p.relative_to(two) for p in (two / "2").rglob("*") if p.is_file())
    assert {"2/manifest/sha256.json", "2/meta/metadata"} <= {p.as_posix() for p in files}
    marks = [name for name in files if name.name in ("commit_success.txt", manifest.NOTES)]
    data = [name for name in files if name.parts[1] in ("arrays", "meta")]
    for number, name in enumerate(files):
        for flips in (True, False):
            copy = shutil.copytree(two, tmp_path / f"{number}-{flips}")
            flip(copy / name, number / len(files)) if flips else (copy / name).unlink()
            with Checkpoints(copy, read_only=True) as checkpoints:
                if name not in data and name in marks:
                    assert int(checkpoints.restore(state)[0].step) in (1, 2)
                    continue
                found, meta = checkpoints.restore(state)
                assert int(found.step) == 1 and meta == {"step": 1}, (name, flips)
                (told,) = checkpoints.skipped
                assert name.name in told or "manifest" in str(name)
            assert kept_in(copy) == ["1", "2"]  # read-only


def test_an_edited_number_is_damage(state, two):
    """Plain JSON that is valid, but not what was written."""
    (two / "2/meta/metadata").write_text('{"step": 3}')
    with Checkpoints(two) as checkpoints:
        assert checkpoints.restore(state)[1] == {"step": 1}
        assert "2: meta/metadata is not as it was written" in checkpoints.skipped[0]


def test_a_manifest_that_is_lost_does_not_pass_for_an_older_version(state, two):
    """Nor one that orbax's notes no longer name."""
    unnamed = shutil.copytree(two, two.parent / "unnamed")
    shutil.rmtree(two / "2/manifest")
    notes = unnamed / "2/_CHECKPOINT_METADATA"
    notes.write_text(notes.read_text().replace('"manifest"', '"manifesu"'))
    flip(unnamed / "2/meta/metadata", 0.9)
    for folder in (two, unnamed):
        with Checkpoints(folder) as checkpoints:
            assert int(checkpoints.restore(state)[0].step) == 1


def test_without_a_manifest_a_whole_checkpoint_is_restored(state, two):
    as_older_versions_wrote(two / "2")
    with Checkpoints(two) as checkpoints:
        assert int(checkpoints.restore(state)[0].step) == 2


def test_a_mistake_in_this_code_is_not_taken_for_damage(state, two, monkeypatch):
    def mistaken(*_):
        raise TypeError("a mistake")

    monkeypatch.setattr(checkpoint, "_with_arrays", mistaken)
    with Checkpoints(two) as checkpoints, pytest.raises(TypeError, match="a mistake"):
        checkpoints.restore(state)
    assert kept_in(two) == ["1", "2"]


def test_what_cannot_be_read_is_told_and_kept(state, two, monkeypatch):
    """A file without permission, or on a disk that fails, is not damage that was seen."""

    def refused(*_, **__):
        raise PermissionError(13, "Permission denied", str(two / "2/meta/metadata"))

    monkeypatch.setattr(manifest, "_sha256", refused)
    with Checkpoints(two) as checkpoints, pytest.raises(CheckpointError) as failed:
        checkpoints.restore(state)
    assert f"{two / '2/meta/metadata'} cannot be read: Permission denied" in str(failed.value)
    assert kept_in(two) == ["1", "2"]


def test_the_manifest_names_every_file_of_what_was_saved(two):
    hashes = json.loads((two / "2/manifest/sha256.json").read_text())
    files = [p for part in ("arrays", "meta") for p in (two / "2" / part).rglob("*") if p.is_file()]
    own = {p.relative_to(two / "2").as_posix(): p.read_bytes() for p in files}
    told = {name: hashlib.sha256(content).hexdigest() for name, content in own.items()}
    assert hashes == told


def test_all_damaged_says_what_to_do(state, two):
    for step in (1, 2):
        damage(two / str(step))
    with Checkpoints(two) as checkpoints, pytest.raises(CheckpointError) as failed:
        checkpoints.restore(state)
    message = str(failed.value)
    assert str(two / "1") in message and str(two / "2") in message
    assert "delete the run folder" in message and kept_in(two) == ["1", "2"]


def test_what_a_kill_within_a_save_leaves_is_passed_over(state, tmp_path):
    """Orbax writes under another name and renames at the end."""
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, at_step(state, 1), {})
    half = tmp_path / "2.orbax-checkpoint-tmp"
    (half / "arrays").mkdir(parents=True)
    (half / "arrays/part").write_bytes(b"half of it")
    with Checkpoints(tmp_path) as checkpoints:
        assert int(checkpoints.restore(state)[0].step) == 1
        checkpoints.save(2, at_step(state, 2), {})
        assert int(checkpoints.restore(state)[0].step) == 2


def test_what_an_earlier_version_kept_is_passed_by(state, tmp_path):
    """In what trains and in the optimiser's own arrays; what is left is put in its place."""
    trainable = {**state.trainable, "since_removed": jnp.ones(3)}
    older = state.replace(
        trainable=trainable, opt_state=optimiser(state.config.train).init(trainable)
    )
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, older, {"told": 1})
    with Checkpoints(tmp_path) as checkpoints:
        blank = jax.tree.map(jnp.zeros_like, (state.trainable, state.memory))
        found, meta = checkpoints.restore(state.replace(trainable=blank[0], memory=blank[1]))
        assert meta == {"told": 1}
        jax.tree.map(np.testing.assert_array_equal, found.trainable, state.trainable)
        jax.tree.map(np.testing.assert_array_equal, found.memory, state.memory)
        assert jax.tree.structure(found.opt_state) == jax.tree.structure(state.opt_state)


def test_what_an_earlier_version_called_otherwise_is_found(state, tmp_path):
    """Of mos, tuna and ssiat, whose Gaussians are one of several generators now."""
    kept = {"mean": jnp.arange(3.0), "factor": jnp.ones((3, 2))}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, state.replace(memory={**state.memory, "gaussians": kept}), {})
    today = {**state.memory, "generator": jax.tree.map(jnp.zeros_like, kept)}
    with Checkpoints(tmp_path) as checkpoints:
        found, _ = checkpoints.restore(state.replace(memory=today))
    assert set(found.memory) == set(today)
    for name, array in kept.items():
        np.testing.assert_array_equal(found.memory["generator"][name], array)


def test_the_checkpoint_of_a_later_version_says_so(state, tmp_path):
    newer = state.replace(trainable={**state.trainable, "since_added": jnp.zeros(())})
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        with pytest.raises(CheckpointError, match="the version that began the run can continue"):
            checkpoints.restore(newer)


def test_other_shapes_are_refused(state, tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        wider = state.replace(trainable=jax.tree.map(lambda a: jnp.stack([a, a]), state.trainable))
        with pytest.raises(CheckpointError, match=r"expected \(2, 3, 2\) .* found \(3, 2\)"):
            checkpoints.restore(wider)
    assert kept_in(tmp_path) == ["1"]  # it is not damaged


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_state_that_is_not_finite_is_never_saved(state, tmp_path, bad):
    broken = state.replace(trainable={**state.trainable, "head": {**state.trainable["head"]}})
    broken.trainable["head"]["scale"] = jnp.float32(bad)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, at_step(state, 1), {})
        with pytest.raises(CheckpointError, match=r"trainable\.head\.scale .*task 1, step 7"):
            checkpoints.save(2, at_step(broken, 7), {})
        assert int(checkpoints.restore(state)[0].step) == 1


def test_a_disk_that_refuses_is_one_clear_error(state, tmp_path, monkeypatch):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, at_step(state, 1), {})

        def full(*_, **__):
            raise ValueError("RESOURCE_EXHAUSTED: No space left on device\nand a long story")

        with monkeypatch.context() as patch:
            patch.setattr(checkpoints._manager, "save", full)
            with pytest.raises(CheckpointError) as failed:
                checkpoints.save(2, at_step(state, 2), {})
        assert "No space left on device" in str(failed.value)
        assert "long story" not in str(failed.value) and "Make room" in str(failed.value)
        assert int(checkpoints.restore(state)[0].step) == 1


def test_late_complaints_of_a_failed_save_are_left_out_and_nothing_else(monkeypatch):
    """A thread that finishes a write finds orbax's event loop closed, and Python prints a trace."""
    shown, timers = [], []

    def before(kind, error, trace):
        shown.append(str(error))

    class Timer:
        def __init__(self, seconds, call):
            self.call = call
            timers.append(self)

        def start(self):
            assert self.daemon

    monkeypatch.setattr(sys, "excepthook", before)
    monkeypatch.setattr(checkpoint.threading, "Timer", Timer)
    with checkpoint._without_late_complaints():
        pass
    assert sys.excepthook is before and not timers
    for _ in range(2):
        with pytest.raises(OSError), checkpoint._without_late_complaints():
            raise OSError("full")
    for error in (RuntimeError("Event loop is closed"), RuntimeError("a mistake")):
        sys.excepthook(type(error), error, None)
    assert shown == ["a mistake"]
    timers[0].call()  # of the first failure, when the second one needs it longer
    assert sys.excepthook is not before
    timers[1].call()
    assert sys.excepthook is before
