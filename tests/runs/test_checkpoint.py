"""Checkpoints: whole or absent, byte for byte what was saved; if damaged, the one before it."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkd_jax.engine import verbs
from qkd_jax.errors import CheckpointError
from qkd_jax.learners.optimiser import optimiser
from qkd_jax.protocol.tasks import Task
from qkd_jax.runs.checkpoint import KEPT, Checkpoints
from qkd_jax.settings.config import Config, Shapes, override
from qkd_jax.weights.load import load_backbone

# When a read of a damaged checkpoint fails, orbax's other reads complain from their own threads.
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


def test_a_damaged_one_gives_way_to_the_one_before(state, tmp_path, caplog):
    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, at_step(state, step), {"step": step})
    assert damage(tmp_path / "2") > 0
    with caplog.at_level(logging.WARNING, logger="qkd_jax"), Checkpoints(tmp_path) as checkpoints:
        found, meta = checkpoints.restore(state)
        assert int(found.step) == 1 and meta == {"step": 1}
        assert "checkpoint 2 cannot be read" in caplog.text
        checkpoints.save(2, at_step(state, 2), {"step": 2})  # the number is free again
        assert int(checkpoints.restore(state)[0].step) == 2


def test_missing_files_give_way_too(state, tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, at_step(state, step), {})
    (tmp_path / "2/meta/metadata").unlink()
    with Checkpoints(tmp_path) as checkpoints:
        assert int(checkpoints.restore(state)[0].step) == 1


def test_all_damaged_says_what_to_do(state, tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, at_step(state, step), {})
    for step in (1, 2):
        damage(tmp_path / str(step))
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(CheckpointError) as failed:
        checkpoints.restore(state)
    message = str(failed.value)
    assert str(tmp_path / "1") in message and str(tmp_path / "2") in message
    assert "delete the run folder" in message


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
        with pytest.raises(CheckpointError, match="no checkpoint of this run can be read"):
            checkpoints.restore(wider)


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
