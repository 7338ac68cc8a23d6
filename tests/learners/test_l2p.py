"""L2P: its choices, what tasks change, and the settings that do not fit.

Forward, loss and gradients are pinned in test_golden_l2p_dualprompt.py. Budget of a repeated
float32 pass through two blocks of width 12 in another program: 50 eps = 6e-6 of scores near 1.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qkd_jax
from qkd_jax.engine import verbs
from qkd_jax.errors import ConfigError
from qkd_jax.learners import l2p
from qkd_jax.learners.shape import Context
from qkd_jax.nn.backbone import Backbone
from qkd_jax.nn.inputs import Raw
from qkd_jax.nn.vit import ViTSpec

BUDGET = 6e-6
SMALL = ("method=l2p", "l2p.pool=6", "l2p.top_k=2", "l2p.length=2", "l2p.start=signed")
ADAM = ("train.optimizer=adam", "train.learning_rate=0.01", "train.weight_decay=0")
VIT_B = ViTSpec(
    width=768, depth=12, num_heads=12, mlp_width=3072, patch_size=16, image_size=224, grid=14
)


@pytest.fixture(scope="module")
def official(tiny):
    return tiny.run(tiny.backbone, tiny.config(*SMALL, *ADAM, "l2p.diversify=frequency"))


@pytest.fixture(scope="module")
def masked(tiny):
    """ "L2P++" in two blocks, each task with prompts of its own: before and after two tasks."""
    settings = ("l2p.form=gtripl", "l2p.blocks=2", "l2p.pool=8", "l2p.diversify=task")
    config = tiny.config(*SMALL, *ADAM, *settings, "l2p.key_loss=gtripl_sum")
    state = qkd_jax.init_state(jax.random.key(7), tiny.backbone, config)
    states = [tiny.copy(state)]
    for index, classes in enumerate([(4, 1), (5, 2)]):
        task = qkd_jax.Task(index, classes)
        state = qkd_jax.begin_task(state, task, num_steps=4)
        state, _ = qkd_jax.train_task(state, tiny.batch(task, 0))
        state, _ = qkd_jax.train_task(state, tiny.batch(task, 1))
        states.append(tiny.copy(state))
    return states


def queries(tiny, state, task, seed):
    """The frozen features [B, D] that choose."""
    return np.asarray(verbs.slot_features(state, tiny.batch(task, seed)["image"], (0,)))[:, 0]


def cosine(query, keys):
    query, keys = np.float64(query), np.float64(keys)
    return query @ keys.T / np.linalg.norm(query, axis=1)[:, None] / np.linalg.norm(keys, axis=1)


def count(config):
    """Numbers in the pool of a ViT-B, without allocating them."""
    trainable, _ = jax.eval_shape(
        lambda key: l2p.init(key, Backbone({}, VIT_B), config), jax.random.key(0)
    )
    return sum(trainable[name].size for name in ("prompts", "keys"))


def test_published_pools_have_the_published_number_of_parameters():
    """10 (5 + 1) 768 and 20 (5 + 1) 768, as the paper's Table 1 counts them."""
    config = qkd_jax.Config(method="l2p")
    assert count(config) == 46_080
    assert count(qkd_jax.override(config, "l2p.pool=20", "l2p.top_k=4")) == 92_160


def test_an_image_never_sees_its_batch(tiny, official):
    """The public code's majority vote would give all images of a batch the same prompts."""
    state = official[-1].ended
    some = [0, 1, 4, 8]  # of every task, in a batch of the size that is already compiled
    images = np.concatenate([tiny.batch(task, 5)["image"] for task in tiny.tasks])[some]
    query = np.concatenate([queries(tiny, state, task, 5) for task in tiny.tasks])[some]
    (_, chosen), *_ = l2p.choose(state, state.trainable["keys"], query, training=False)
    assert len({tuple(sorted(row)) for row in np.asarray(chosen).tolist()}) > 1
    whole = np.asarray(qkd_jax.predict(state, images))
    seen, order = [4, 1, 0, 5, 2], np.array([2, 0, 3, 1])
    shuffled = np.asarray(qkd_jax.predict(state, images[order]))[:, seen]
    np.testing.assert_allclose(shuffled, whole[order][:, seen], atol=BUDGET)
    for index in range(4):
        others = np.where(np.arange(4)[:, None, None, None] == index, images, images[:1])
        alone = np.asarray(qkd_jax.predict(state, others))[index, seen]
        np.testing.assert_allclose(alone, whole[index, seen], atol=BUDGET)
    assert (whole[:, [3, 6]] == -np.inf).all()


def test_scores_are_the_stored_head_on_the_prompted_feature(tiny, official):
    state = official[-1].ended
    images = tiny.batch(tiny.tasks[0], 7)["image"]
    feature = np.float64(verbs.slot_features(state, images))[:, 1 + 2]
    rows, bias = np.float64(state.memory["rows"]), np.float64(state.memory["bias"])
    found = np.asarray(qkd_jax.predict(state, images))
    seen = [4, 1, 0, 5, 2]
    np.testing.assert_allclose(found[:, seen], (feature @ rows.T + bias)[:, seen], atol=BUDGET)
    # The rows that a task trained stay as they were; later tasks and padding do not touch them.
    for task, stage in zip(tiny.tasks, official, strict=True):
        size, classes = len(task.classes), np.array(task.classes)
        for name, stored in state.trainable["head"].items():
            assert stored.shape[0] == 2
            trained = stage.trained.trainable["head"][name][:size]
            np.testing.assert_array_equal(state.memory[name][classes], trained)
    assert not rows[[3, 6]].any() and not bias[[3, 6]].any()


def test_the_pool_goes_on_and_the_head_starts_anew(official):
    for before, after in itertools.pairwise(official):
        for name in ("prompts", "keys"):
            begun, trained = (stage.trainable[name] for stage in (after.begun, after.trained))
            np.testing.assert_array_equal(before.trained.trainable[name], begun)
            # The second task has one class: its cross-entropy is constant and moves no prompt.
            moves = name == "keys" or after is official[2]
            assert np.any(trained != begun) == moves
        assert not np.asarray(after.begun.trainable["head"]["rows"]).any()


def test_frequency_penalty_counts_choices_and_avoids_them(tiny, official):
    """h_j of the paper: the share of earlier choices that fell on prompt j."""
    counts = np.zeros(6)
    for task, stage in zip(tiny.tasks, official, strict=True):
        keys = stage.trained.trainable["keys"][0]
        query = np.concatenate([queries(tiny, stage.ended, task, s) for s in range(2)])
        share = counts / max(counts.sum(), 1.0)
        penalised = (1.0 - cosine(query, keys)) * np.maximum(share, 1e-6)
        chosen = np.argsort(penalised, axis=1, kind="stable")[:, :2]
        (_, found), *_ = l2p.choose(stage.trained, keys[None], query, training=True)
        np.testing.assert_array_equal(found, chosen)
        if task.index:
            unused = np.flatnonzero(counts == 0)
            assert unused.size < 2 or np.isin(chosen, unused).all()
        counts += np.bincount(chosen.ravel(), minlength=6)
        np.testing.assert_array_equal(stage.ended.memory["chosen"], counts[None])
    # A test image is not penalised.
    (_, found), *_ = l2p.choose(official[-1].ended, keys[None], query, training=False)
    plain = np.argsort(-cosine(query, keys), axis=1, kind="stable")[:, :2]
    np.testing.assert_array_equal(found, plain)


def test_the_mask_of_a_task_leaves_all_other_prompts_as_they_were(tiny, official, masked):
    for task, (before, after) in enumerate(itertools.pairwise(masked)):
        own = np.arange(2 * task, 2 * task + 2)
        for name in ("prompts", "keys"):
            old, new = (np.moveaxis(np.asarray(s.trainable[name]), 1, 0) for s in (before, after))
            np.testing.assert_array_equal(np.delete(new, own, 0), np.delete(old, own, 0))
            assert (new[own] != old[own]).reshape(4, -1).any(1).all()
        # A test image chooses among the prompts of learned tasks.
        query = queries(tiny, official[-1].ended, tiny.tasks[0], 3)
        for _, chosen in l2p.choose(after, after.trainable["keys"], query, training=False):
            assert np.asarray(chosen).max() < 2 * task + 2


def test_a_cached_query_stands_for_a_pass_through_the_frozen_model(tiny, official):
    state, batch = official[1].begun, tiny.batch(tiny.tasks[1], 0)
    features = verbs.slot_features(official[1].ended, batch["image"])
    real = Context(jax.random.split(jax.random.key(0), 4), jnp.ones(4, bool), lambda x: x)

    @jax.jit
    def both(state, label, image, features):
        batches = {"label": label}, {"label": label, "features": features}
        return [
            l2p.LEARNER.loss(state.trainable, state, Raw({"image": image}), b, real)
            for b in batches
        ]

    plain, cached = both(state, batch["label"], batch["image"], features)
    assert set(plain) == {"loss", "loss_ce", "loss_key", "train_accuracy"}
    for name, value in plain.items():
        np.testing.assert_allclose(value, cached[name], atol=BUDGET)
    # One class in the task: cross-entropy is zero and the rest is lambda times the key loss.
    assert not np.asarray(plain["loss_ce"]).any() and (plain["train_accuracy"] == 100.0).all()
    np.testing.assert_allclose(plain["loss"], 0.5 * plain["loss_key"], rtol=1e-6)


def test_settings_that_do_not_fit_are_named(tiny):
    def start(*settings):
        config = tiny.config(*SMALL, *settings)
        return qkd_jax.init_state(jax.random.key(0), tiny.backbone, config)

    with pytest.raises(ConfigError, match=r"top_k: expected at most l2p.pool \(6\), found 7"):
        start("l2p.top_k=7")
    with pytest.raises(ConfigError, match=r"pool: expected at least 8.* 4 tasks 2 .* found 6"):
        start("l2p.diversify=task")
    with pytest.raises(ConfigError, match=r"expected at most 2, .* found 3"):
        start("l2p.form=gtripl", "l2p.blocks=3")
    with pytest.raises(ConfigError, match=r"l2p.length: .* half for keys.* found 3"):
        start("l2p.form=gtripl", "l2p.length=3")
    for setting in ("pool=0", "length=0", "blocks=0", "key_weight=-1"):
        with pytest.raises(ConfigError, match=f"l2p.{setting.split('=')[0]}: expected"):
            start(f"l2p.{setting}", "l2p.top_k=1")
    assert jnp.isfinite(start().trainable["keys"]).all()
