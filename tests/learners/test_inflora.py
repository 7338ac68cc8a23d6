"""InfLoRA: its laws, the decompositions against NumPy in float64, and how it fits in a run.

Error budget of the decompositions: a few eps of the largest singular value over the gap at the cut,
which the matrices here keep above 0.02 of it: 50 eps / 0.02 = 3e-4 at most, 1e-4 here. The encoder
is compared with itself: 1e-5 on features of order 1.
"""

import itertools
import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qkd_jax
from qkd_jax.engine import verbs
from qkd_jax.engine.checks import check_batch
from qkd_jax.engine.engine import Engine
from qkd_jax.engine.sharding import engine_of
from qkd_jax.errors import ConfigError, DataError
from qkd_jax.learners import inflora
from qkd_jax.nn.inputs import Raw
from qkd_jax.nn.lora import free_directions, occupy
from qkd_jax.runs.loop import Interrupted, run, run_folder
from qkd_jax.settings.experiments import load_experiment
from qkd_jax.settings.sections import TrainConfig
from qkd_jax.weights.load import load_backbone

BUDGET, SUBSPACE_BUDGET = 1e-5, 1e-4
RANK = 2


@pytest.fixture(scope="module")
def config(tiny):
    return tiny.config("method=inflora", f"inflora.rank={RANK}", "train.learning_rate=0.5")


def survey_of(state, batches):
    return verbs.one_device().survey(state, (check_batch(state, batch) for batch in batches))


def batches_of(tiny, task, images=4):
    """Two batches of a task; rows from `images` on are padding."""
    mask = np.arange(4) < images
    return [{**tiny.batch(task, step), "mask": mask} for step in range(2)]


@pytest.fixture(scope="module")
def history(tiny, config):
    """(begun, trained, ended) of three tasks; the second has one class."""
    state, history = qkd_jax.init_state(jax.random.key(7), tiny.backbone, config), []
    for task in tiny.tasks:
        batches = batches_of(tiny, task)
        begun = qkd_jax.begin_task(state, task, num_steps=4, batches=batches)
        state = tiny.copy(begun)
        for batch in batches:
            state, _ = qkd_jax.train_task(state, batch)
        trained = tiny.copy(state)
        state = qkd_jax.end_task(state, batches)
        history.append((begun, trained, tiny.copy(state)))
    return history


def moment_of(seed, width=12, directions=12):
    """A second moment whose singular values fall by a quarter each, in random directions."""
    generator = np.random.default_rng(seed)
    basis = np.linalg.qr(generator.normal(size=(width, width)))[0][:, :directions]
    return (basis * 0.75 ** np.arange(directions)) @ basis.T


def left_vectors(moment, occupied):
    return np.linalg.svd(moment - occupied @ moment)[:2]


def projector(columns):
    columns = np.float64(columns)
    return columns @ columns.T


def rank_of(occupied):
    return int(np.round(np.trace(occupied)))


def grown(moment, occupied, threshold, below=False):
    """GPM by hand: add directions one by one until the occupied share reaches the threshold."""
    vectors, values = left_vectors(moment, occupied)
    total = np.sum(moment**2)
    share = 1.0 - np.sum(values**2) / total
    count = 0
    while share < threshold and count < len(values):
        share += values[count] ** 2 / total
        count += 1
    count = max(count - 1, 1) if below else count
    return occupied + projector(vectors[:, :count])


grow = jax.jit(occupy)
free = jax.jit(free_directions, static_argnums=2)


@pytest.mark.parametrize("seed", range(3))
def test_decompositions_against_numpy(seed):
    """Three tasks: from nothing occupied to more than half of the width (DualGPM's switch)."""
    occupied, expected = np.zeros((12, 12), np.float32), np.zeros((12, 12))
    for task, threshold in enumerate((0.6, 0.9, 0.97)):
        moment = moment_of([seed, task])
        found = np.asarray(free(np.float32(moment), occupied, 3))
        np.testing.assert_allclose(
            projector(found),
            projector(left_vectors(moment, expected)[0][:, :3]),
            atol=SUBSPACE_BUDGET,
        )
        np.testing.assert_allclose(found.T @ found, np.eye(3), atol=BUDGET)
        np.testing.assert_allclose(expected @ found, 0.0, atol=SUBSPACE_BUDGET)
        expected = grown(moment, expected, threshold)
        occupied = np.asarray(
            grow(np.float32(moment), occupied, jnp.float32(threshold), jnp.bool_(False))
        )
        np.testing.assert_allclose(occupied, expected, atol=SUBSPACE_BUDGET)
        np.testing.assert_allclose(occupied @ occupied, occupied, atol=BUDGET)
    assert rank_of(occupied) > 6


def test_first_basis_of_the_code_is_one_direction_short():
    moment, empty = moment_of(5), np.zeros((12, 12), np.float32)
    for threshold in (0.1, 0.7, 0.95):
        ranks = []
        for below in (False, True):
            found = grow(np.float32(moment), empty, jnp.float32(threshold), jnp.bool_(below))
            expected = grown(moment, np.float64(empty), threshold, below)
            np.testing.assert_allclose(found, expected, atol=SUBSPACE_BUDGET)
            ranks.append(rank_of(found))
        assert ranks[1] == max(ranks[0] - 1, 1)


def test_a_first_basis_past_half_of_the_width_leaves_only_the_rest_free():
    """The reference stops with an assertion here, or at half frees exactly what is occupied."""
    moment, empty = np.float32(moment_of(3)), np.zeros((12, 12), np.float32)
    occupied = grow(moment, empty, jnp.float32(0.995), jnp.bool_(False))
    assert 6 < rank_of(occupied) < 12
    left = np.asarray(free(np.float32(moment_of(4)), occupied, 3))
    assert np.abs(left).max() > 0.1
    np.testing.assert_allclose(np.asarray(occupied) @ left, 0.0, atol=BUDGET)


def test_directions_without_energy_are_zero_and_are_never_occupied():
    """Two directions of twelve have energy: a branch of rank four reads two, memory takes two."""
    moment, empty = np.float32(moment_of(1, directions=2)), np.zeros((12, 12), np.float32)
    found = np.asarray(free(moment, empty, 4))
    assert (found[:, 2:] == 0).all()
    np.testing.assert_allclose(np.linalg.norm(found[:, :2], axis=0), 1.0, atol=BUDGET)
    occupied = grow(moment, empty, jnp.float32(1.0), jnp.bool_(False))
    assert rank_of(occupied) == 2
    assert (np.asarray(free(moment, occupied, 4)) == 0).all()
    everything = jnp.eye(12)
    assert (np.asarray(free(np.float32(moment_of(2)), everything, 4)) == 0).all()
    again = grow(np.float32(moment_of(2)), everything, jnp.float32(1.0), jnp.bool_(False))
    np.testing.assert_array_equal(again, everything)


def test_a_new_branch_reads_only_free_directions(history):
    for (_, _, before), (begun, _, _) in itertools.pairwise(history):
        down = begun.memory["down"][:, :, int(begun.task)]
        inside = np.asarray(before.memory["occupied"]) @ np.asarray(down)
        np.testing.assert_allclose(inside, 0.0, atol=BUDGET)
        # Columns have length 1 / sqrt(3), or are zero where the tiny model has nothing left.
        lengths = np.sum(np.square(down), axis=1)
        assert np.logical_or(np.abs(lengths - 1 / 3) < BUDGET, lengths == 0).all()
        assert (lengths > 0).any()


def test_memory_grows_by_the_rising_threshold(tiny, history):
    """From 0.95 by (1 - 0.95) task / tasks, on the moments under the trained model."""
    occupied = np.zeros((2, 12, 12))
    for task, (_, _, ended) in zip(tiny.tasks, history, strict=True):
        batches = batches_of(tiny, task)
        moments = np.float64(inflora.moments_of(survey_of(ended, batches)))
        threshold = 0.95 + 0.05 * task.index / 4
        occupied = np.stack(
            [grown(m, p, threshold) for m, p in zip(moments, occupied, strict=True)]
        )
        np.testing.assert_allclose(ended.memory["occupied"], occupied, atol=SUBSPACE_BUDGET)
    assert [rank_of(p) for p in occupied] != [12, 12]


def test_only_the_branch_and_the_head_of_the_task_are_trained(tiny, history):
    for begun, trained, ended in history:
        jax.tree.map(np.testing.assert_array_equal, begun.memory, trained.memory)
        np.testing.assert_array_equal(begun.memory["down"], ended.memory["down"])
    # A task of one class has a constant loss; the others move keys and values.
    moved = [
        [np.any(leaf) for leaf in trained.trainable["up"].values()] for _, trained, _ in history
    ]
    assert moved == [[True, True], [False, False], [True, True]]


def test_old_branches_and_heads_stay_as_they_were(tiny, history):
    for index, (_, _, before) in enumerate(history):
        for _, _, after in history[index + 1 :]:
            old = slice(0, index + 1)
            for leaf in ("down", "up"):
                axis = (slice(None),) * (2 if leaf == "down" else 1) + (old,)
                jax.tree.map(
                    lambda a, b, axis=axis: np.testing.assert_array_equal(a[axis], b[axis]),
                    before.memory[leaf],
                    after.memory[leaf],
                )
            classes = np.array(tiny.tasks[index].classes)
            for leaf in ("rows", "bias"):
                np.testing.assert_array_equal(
                    before.memory[leaf][classes], after.memory[leaf][classes]
                )
    jax.tree.map(
        np.testing.assert_array_equal, tiny.backbone.params, history[-1][2].backbone.params
    )


def test_a_branch_that_is_not_trained_changes_nothing(tiny, history):
    """Its up-projection is zero: the feature before the first step is that of the task before."""
    extract = jax.jit(lambda state, x: inflora.extract(state, Raw({"image": x}), 0, None))
    images = tiny.batch(tiny.tasks[0], 9)["image"]
    for (_, _, before), (begun, _, after) in itertools.pairwise(history):
        np.testing.assert_array_equal(extract(before, images), extract(begun, images))
        assert after.task == begun.task
    first, last = history[0][2], history[-1][2]
    assert np.abs(extract(first, images) - extract(last, images)).max() > 1e-4


def test_scores_of_an_image_do_not_depend_on_the_batch(tiny, history):
    state, images = history[-1][2], tiny.batch(tiny.tasks[0], 9)["image"]
    scores = np.asarray(qkd_jax.predict(state, images))
    assert (scores[:, [3, 6]] == -np.inf).all()
    assert np.isfinite(scores[:, [4, 1, 0, 5, 2]]).all()
    turned = np.asarray(qkd_jax.predict(state, images[::-1]))[::-1]
    np.testing.assert_array_equal(scores, turned)
    other = np.concatenate([images[:1], np.ones_like(images[1:])])
    np.testing.assert_array_equal(scores[0], np.asarray(qkd_jax.predict(state, other))[0])


def test_a_survey_leaves_padding_out_on_one_and_on_eight_devices(tiny, history):
    """Sums of 8 images x 5 tokens in another order: 1e-5 of the largest entry; NaN in padding."""
    state, task = history[-1][2], tiny.tasks[0]
    images = tiny.batch(task, 0, size=16)["image"]
    mask = np.arange(16) < 11
    padded = np.where(mask[:, None, None, None], images, np.float32(np.nan))
    alone = survey_of(
        state.replace(task_classes=jnp.asarray(task.classes)),
        [{"image": images[:11], "label": tiny.batch(task, 0, size=16)["label"][:11]}],
    )
    assert float(alone["tokens"]) == 11 * 5
    scale, labels = np.abs(alone["moments"]).max(), np.resize(task.classes, 16)
    for devices in (1, 8):
        engine = engine_of(TrainConfig(devices=devices))
        halves = [
            {"inputs": Raw({"image": padded[h]}), "label": labels[h], "mask": mask[h]}
            for h in (slice(0, 8), slice(8, 16))
        ]
        found = engine.survey(engine.place(state), halves)
        np.testing.assert_allclose(found["moments"], alone["moments"], atol=BUDGET * scale)
        assert float(found["tokens"]) == 11 * 5


def test_a_task_of_one_image(tiny, history, config):
    """Five tokens span five of twelve directions; the rest of the batch is padding."""
    batch = batches_of(tiny, tiny.tasks[1], images=1)[0]
    state = qkd_jax.init_state(jax.random.key(1), tiny.backbone, config)
    state = qkd_jax.begin_task(state, qkd_jax.Task(0, (0,)), batches=[batch])
    state, metrics = qkd_jax.train_task(state, batch)
    assert float(metrics["loss"]) == 0.0 and float(metrics["train_accuracy"]) == 100.0
    state = qkd_jax.end_task(state, [batch])
    ranks = [rank_of(p) for p in np.asarray(state.memory["occupied"])]
    assert all(1 <= rank <= 5 for rank in ranks)
    scores = np.asarray(qkd_jax.predict(state, batch["image"]))
    assert np.isfinite(scores[:, 0]).all() and np.isinf(scores[:, 1:]).all()


def test_errors(tiny, config, history):
    state = qkd_jax.init_state(jax.random.key(1), tiny.backbone, config)
    with pytest.raises(ConfigError, match="batches: expected the task's images"):
        qkd_jax.begin_task(state, tiny.tasks[0])
    with pytest.raises(DataError, match="expected images for inflora, found none"):
        qkd_jax.begin_task(state, tiny.tasks[0], batches=[])
    with pytest.raises(DataError, match="expected classes of task 0"):
        qkd_jax.begin_task(state, tiny.tasks[0], batches=[tiny.batch(tiny.tasks[1])])
    with pytest.raises(ConfigError, match=r"inflora.rank: expected at most .* 12, found 13"):
        wide = tiny.config("method=inflora", "inflora.rank=13")
        qkd_jax.init_state(jax.random.key(1), tiny.backbone, wide)
    for setting, expected in (
        ("rank=0", "at least 1"),
        ("lamb=-0.1", "inflora.lamb: expected 0 to 1, found -0.1"),
        ("lame=0.5", r"inflora.lamb: expected at most inflora.lame \(0.5\), found 0.95"),
        ("lame=1.5", "inflora.lame: expected 0 to 1, found 1.5"),
        ("first_basis=all", "reach, below"),
    ):
        with pytest.raises(ConfigError, match=expected):
            tiny.config("method=inflora", f"inflora.{setting}")


@pytest.mark.slow  # the default suite stops it between tasks: end_to_end/test_every_method.py
@pytest.mark.usefixtures("compiled")
def test_a_run_stopped_within_a_task_ends_with_the_same_numbers(tmp_path, monkeypatch):
    """The checkpoint of a begun task holds its down-projection: the images are not surveyed again
    before it goes on."""
    config = qkd_jax.override(
        load_experiment("smoke").get_config("inflora"),
        "train.devices=1",
        "inflora.rank=3",
        "train.optimizer=adam",
        "train.learning_rate=0.005",
    )
    backbone = load_backbone("tiny_random", image_size=32)
    whole = run(config, backbone, tmp_path / "whole")
    steps, step = itertools.count(1), Engine.step
    surveys, survey = [], Engine.survey

    def interrupted(self, *arguments):
        if next(steps) == 14:  # the second task's fourth step of ten
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *arguments)

    def counted(self, *arguments):
        surveys.append(1)
        return survey(self, *arguments)

    monkeypatch.setattr(Engine, "step", interrupted)
    with pytest.raises(Interrupted):
        run(config, backbone, tmp_path / "cut")
    monkeypatch.setattr(Engine, "survey", counted)
    resumed = run(config, backbone, tmp_path / "cut")
    # The second task's second survey, and two of the third task.
    assert len(surveys) == 3
    assert resumed["compilations"] == 1
    assert whole["extracted_features"] == resumed["extracted_features"]
    folders = [run_folder(tmp_path / part, config) for part in ("whole", "cut")]
    for task in range(3):
        one, two = (np.load(f / f"predictions/after_task_{task}.npz") for f in folders)
        for leaf in one.files:
            np.testing.assert_array_equal(one[leaf], two[leaf])
    one, two = map(losses_of, folders)
    assert len(one) == 30 and one == two


def losses_of(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]
