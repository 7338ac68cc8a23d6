"""MOS: merging, orthogonality and retrieval against plain NumPy float64, and three tasks of a run.

Error budget: similarities of 12 numbers of order 1 and their log-sum-exp stay below 50 eps = 6e-6;
powers of 0.9 and means of three adapters below 1e-6. Two devices sum in another order than one:
1e-5 of a parameter.
"""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qkd_jax
from qkd_jax.engine import verbs
from qkd_jax.errors import ConfigError
from qkd_jax.learners import mos, step
from qkd_jax.learners.shape import learner_of
from qkd_jax.learners.state import split
from qkd_jax.learners.step import device_step
from qkd_jax.nn.inputs import Raw

BUDGET = 1e-5
OWNER = [1, 0, 2, -1, 0, 2, -1]  # task of each class


@pytest.fixture(scope="module")
def config(tiny):
    changes = "method=mos alignment.epochs=2 alignment.samples=6 train.head_rate=0.1"
    return tiny.config(*changes.split(), "train.decay_leaves=kernel,bias,rows")


@pytest.fixture(scope="module")
def history(tiny, config):
    return tiny.run(tiny.backbone, config)


def softmax(z):
    e = np.exp(z - z.max())
    return e / e.sum()


def test_orthogonality_against_loops(history):
    """Rows of the means of old classes 0, 1 and 4 and of the batch; padding is no row at all."""
    state = history[2].trained
    features = np.random.default_rng(0).normal(size=(6, 12)).astype(np.float32)
    real = np.array([1, 1, 0, 1, 1, 0], bool)
    means = np.random.default_rng(1).normal(size=(7, 12)).astype(np.float32)
    stored = state.memory["generator"].replace(mean=jnp.asarray(means))
    state = state.replace(memory={**state.memory, "generator": stored})
    rows = np.concatenate([means[[0, 1, 4]], features[real]]).astype(np.float64)
    expected = np.mean([-np.log(softmax(rows @ r / 0.8)[i]) for i, r in enumerate(rows)])
    found = mos.orthogonality(state, jnp.asarray(features), jnp.asarray(real))
    np.testing.assert_allclose(found, expected, rtol=BUDGET)
    other = np.where(real[:, None], features, 1e3).astype(np.float32)
    assert found == mos.orthogonality(state, jnp.asarray(other), jnp.asarray(real))


def test_merging_is_a_walk_towards_the_mean_of_older_adapters(history, config):
    assert learner_of(config).project is mos.project
    state = history[2].trained
    adapter, stored = state.trainable["adapter"], state.memory["adapters"]
    found = mos.merged(state, adapter, jnp.array([1.0, 3.0]))  # block 0 once, block 1 three times

    def walk(own, older):
        own, mean = np.float64(own), np.float64(older[:2]).mean(0)
        for block, times in enumerate((1, 3)):
            for _ in range(times):
                own[block] = 0.9 * own[block] + 0.1 * mean[block]
        return own

    expected = jax.tree.map(walk, adapter, stored)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, expected)
    # In the first task there is nothing to merge with.
    first = history[0].trained
    same = mos.project(first.trainable, first)
    jax.tree.map(np.testing.assert_array_equal, same, first.trainable)


def test_two_devices_see_the_whole_batch(monkeypatch, tiny, history):
    """A step on rows with padding, on one device and as two shares of an axis. The transformer
    is replaced by a cheap function of image and adapter: what is tested is how rows are coupled.
    """

    def encode(state, adapter, inputs, keys):
        images = inputs.fields["image"]
        x = images.reshape(len(images), -1)[:, :12]
        return x + jnp.tile(x @ adapter["down"]["kernel"][0], (1, 4))

    monkeypatch.setattr(mos, "encode_with", encode)
    monkeypatch.setattr(step, "shared_part", lambda state, inputs: inputs)
    held, moving = split(history[2].begun)
    # Nearly all of the gradient comes from the coupled rows.
    held = held.replace(config=qkd_jax.override(held.config, "mos.orthogonality=10.0"))
    batch = tiny.batch(tiny.tasks[2], size=6)
    batch["mask"] = np.array([1, 1, 1, 0, 1, 0], bool)
    batch["image"][~batch["mask"]] = 7.0
    batch = {"inputs": Raw({"image": batch.pop("image")}), **batch}
    one, values = jax.jit(lambda: device_step(held, moving, batch))()
    shares = jax.tree.map(lambda a: a.reshape(2, 3, *a.shape[1:]), batch)
    of_share = jax.vmap(lambda share: device_step(held, moving, share, "data"), axis_name="data")
    two, shared_values = jax.jit(of_share)(shares)
    for device in (0, 1):
        mine = jax.tree.map(lambda a, d=device: a[d], (two, shared_values))
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=BUDGET),
            mine,
            (one, values),
        )
    trace = one.opt_state[1].trace["adapter"]["down"]["kernel"][0]
    assert np.abs(trace).max() > 0.05


def test_retrieval_against_a_loop(history):
    """The loop of the paper, image by image, with heads that send images from task to task."""
    state, generator = history[2].ended, np.random.default_rng(3)
    head = {"rows": generator.normal(size=(7, 12)), "bias": generator.normal(size=7)}
    prototypes, features = generator.normal(size=(7, 12)), generator.normal(size=(40, 4, 12))
    small = jax.tree.map(np.float32, (head, prototypes, features))
    memory = {**state.memory, "head": small[0], "prototypes": small[1]}
    state = state.replace(memory=jax.tree.map(jnp.asarray, memory))
    found = verbs.one_device().score(state, jnp.asarray(small[2]))
    scores, relevance = jax.tree.map(np.asarray, found)
    head, prototypes, features = jax.tree.map(np.float64, small)
    seen, lengths = np.array(OWNER) >= 0, set()
    for image in range(40):
        f = features[image]
        cosine = prototypes @ f[0] / np.linalg.norm(prototypes, axis=1) / np.linalg.norm(f[0])
        logits = np.where(seen, f @ head["rows"].T + head["bias"], -np.inf)
        now, tried = OWNER[np.argmax(np.where(seen, cosine, -np.inf))], 0
        while True:
            tried += 1
            used, now = now, OWNER[np.argmax(logits[now])]
            if tried == 4 or now == used:
                break
        lengths.add(tried)
        expected = softmax(logits[used]) + softmax(np.where(seen, 3 * cosine, -np.inf))
        np.testing.assert_allclose(scores[image][seen], expected[seen], atol=BUDGET)
        np.testing.assert_array_equal(relevance[image], np.eye(4)[used])
    assert lengths == {1, 2, 3, 4}


def test_what_a_task_leaves_stays(tiny, history):
    for task in tiny.tasks[:2]:
        i, c, old = task.index, np.array(task.classes), history[task.index].ended.memory
        for later in history[i + 1 :]:
            new = later.ended.memory
            jax.tree.map(
                lambda a, b, i=i: np.testing.assert_array_equal(a[i], b[i]),
                old["adapters"],
                new["adapters"],
            )
            np.testing.assert_array_equal(old["prototypes"][c], new["prototypes"][c])
            jax.tree.map(
                lambda a, b, c=c: np.testing.assert_array_equal(a[c], b[c]),
                old["generator"],
                new["generator"],
            )
    total = jax.tree.map(lambda a: np.float64(a[:3]).sum(0), history[2].ended.memory["adapters"])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        history[2].ended.memory["sum"],
        total,
    )


def test_the_adapter_goes_on_and_the_head_is_aligned_from_the_second_task(history):
    for last, now in pairwise(history):
        jax.tree.map(
            np.testing.assert_array_equal,
            last.trained.trainable["adapter"],
            now.begun.trainable["adapter"],
        )
    first, head = history[0].ended.memory["head"], history[0].trained.trainable["head"]
    np.testing.assert_array_equal(first["rows"][jnp.array([4, 1])], head["rows"])
    np.testing.assert_array_equal(first["bias"][jnp.array([4, 1])], head["bias"])
    # All rows seen move, those of classes 3 and 6 stay at zero.
    moved = np.asarray(history[1].ended.memory["head"]["rows"] - first["rows"]).any(axis=1)
    np.testing.assert_array_equal(moved, [True, True, False, False, True, False, False])


def test_statistics_are_of_the_right_slots(tiny, history):
    state, task = history[2].ended, tiny.tasks[2]
    batches = [tiny.batch(task, s) for s in range(2)]
    images = np.concatenate([b["image"] for b in batches])
    labels = np.concatenate([b["label"] for b in batches])
    features = np.float64(verbs.slot_features(state, images))
    for c in task.classes:
        mine = features[labels == c]
        gaussians = state.memory["generator"]
        np.testing.assert_allclose(gaussians.mean[c], mine[:, 2].mean(0), atol=BUDGET)
        np.testing.assert_allclose(state.memory["prototypes"][c], mine[:, 0].mean(0), atol=BUDGET)
        factor = np.float64(gaussians.factor[c])
        wanted = np.cov(mine[:, 2].T) + 1e-4 * np.eye(12)
        np.testing.assert_allclose(factor @ factor.T, wanted, atol=5 * BUDGET)


def test_every_pass_leaves_the_mean_of_older_adapters(history, config):
    """Slot 1 holds the adapter of task 0; the sum holds what task 1 trained, merged once less
    often than the optimiser found it.
    """
    config = qkd_jax.override(config, "mos.merge=every_pass")
    state = history[1].trained.replace(config=config)
    first, held = state.memory, state.trainable["adapter"]
    memory = mos.freeze(state).memory
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a[1], b, atol=1e-6),
        memory["adapters"],
        first["sum"],
    )

    def unmerged(own, mean):
        own, mean = np.float64(own), np.float64(mean)
        return mean + (own - mean) / 0.9**2  # two blocks

    trained = jax.tree.map(jnp.subtract, memory["sum"], first["sum"])
    expected = jax.tree.map(unmerged, held, first["sum"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), trained, expected)
    changed = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), held, first["sum"])
    assert max(jax.tree.leaves(changed)) > 1e-4  # the task did learn something


def test_predictions_do_not_depend_on_the_batch(tiny, history):
    state, images = history[2].ended, tiny.batch(tiny.tasks[2])["image"]
    scores, relevance = verbs.predict_with_relevance(state, images)
    order = np.array([3, 1, 0, 2])
    again, relevance_again = verbs.predict_with_relevance(state, images[order])
    np.testing.assert_allclose(again, np.asarray(scores)[order], atol=BUDGET)
    np.testing.assert_array_equal(relevance_again, np.asarray(relevance)[order])
    scores = np.asarray(scores)
    assert (scores[:, [3, 6]] == -np.inf).all() and np.isfinite(scores[:, [0, 1, 2, 4, 5]]).all()


@pytest.mark.parametrize(
    "setting",
    ["mos.merge_rate=1.0", "mos.orthogonality=-1.0", "mos.retrievals=0", "alignment.jitter=0.0"],
)
def test_settings_that_do_not_fit_are_refused(tiny, setting):
    message = f"{setting.partition('=')[0]}: expected (0|above|at least)"
    with pytest.raises(ConfigError, match=message):
        tiny.config("method=mos", setting)
