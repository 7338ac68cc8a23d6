"""DualPrompt: whose prompts train, which ones a test image gets, settings that do not fit.

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
from qkd_jax.learners import dualprompt
from qkd_jax.nn.backbone import Backbone
from qkd_jax.nn.prompts import cosines, key_loss
from qkd_jax.nn.vit import ViTSpec

BUDGET = 6e-6
SMALL = (
    "method=dualprompt",
    "dualprompt.general_blocks=1",
    "dualprompt.expert_blocks=1",
    "dualprompt.general_length=2",
    "dualprompt.expert_length=3",
    "dualprompt.start=signed",
    "train.optimizer=adam",
    "train.learning_rate=0.01",
    "train.weight_decay=0",
)
VIT_B = ViTSpec(
    width=768, depth=12, num_heads=12, mlp_width=3072, patch_size=16, image_size=224, grid=14
)


@pytest.fixture(scope="module")
def stages(tiny):
    return tiny.run(tiny.backbone, tiny.config(*SMALL))


def unit(x):
    return np.float64(x) / np.linalg.norm(np.float64(x), axis=-1, keepdims=True)


def test_a_task_trains_its_own_prompts_and_the_general_ones(stages):
    for index, stage in enumerate(stages):
        begun, trained = stage.begun.trainable, stage.trained.trainable
        assert set(trained) == {"general", "expert", "keys", "head"}
        assert trained["expert"].shape == (1, 2, 3, 12) and trained["keys"].shape == (1, 12)
        assert np.any(begun["keys"] != trained["keys"])
        # The second task has one class: its cross-entropy is constant and moves no prompt.
        moves = index != 1
        for name in ("general", "expert"):
            assert np.any(begun[name] != trained[name]) == moves
    for before, after in itertools.pairwise(stages):
        for name in ("general", "expert"):
            np.testing.assert_array_equal(
                before.trained.trainable[name], after.begun.trainable[name]
            )
        assert np.all(before.trained.trainable["keys"] != after.begun.trainable["keys"])


def test_prompts_and_keys_of_old_tasks_stay_as_they_were(stages):
    memory = stages[-1].ended.memory
    for index, stage in enumerate(stages):
        learned = stage.trained.trainable
        np.testing.assert_array_equal(memory["experts"][index], learned["expert"])
        np.testing.assert_array_equal(memory["keys"][index], learned["keys"])
        for later in stages[index:]:
            for name in ("experts", "keys"):
                np.testing.assert_array_equal(later.ended.memory[name][index], memory[name][index])
    assert not memory["experts"][3].any() and not memory["keys"][3].any()


def test_an_image_gets_the_learned_task_with_the_nearest_key(tiny, stages):
    images = np.concatenate([tiny.batch(task, 5)["image"] for task in tiny.tasks])[[0, 1, 4, 8]]
    for index, stage in enumerate(stages):
        state = stage.ended
        features = verbs.slot_features(state, images)
        keys = state.memory["keys"][: index + 1, 0]
        nearest = np.argmax(unit(features[:, 0]) @ unit(keys).T, axis=1)
        scores, relevance = verbs.one_device().score(state, features)
        np.testing.assert_array_equal(relevance, np.eye(4)[nearest])
    # The feature behind the scores is that of the chosen task's prompts.
    forced = state.replace(memory={**state.memory, "keys": jnp.roll(state.memory["keys"], 1, 0)})
    assert np.abs(verbs.slot_features(forced, images) - features)[:, 3].max() > 1e-4
    rows, bias = np.float64(state.memory["rows"]), np.float64(state.memory["bias"])
    seen = [4, 1, 0, 5, 2]
    expected = (np.float64(features)[:, 3] @ rows.T + bias)[:, seen]
    np.testing.assert_allclose(np.asarray(scores)[:, seen], expected, atol=BUDGET)
    assert (np.asarray(scores)[:, [3, 6]] == -np.inf).all()


def test_an_image_never_sees_its_batch(tiny, stages):
    state = stages[-1].ended
    images = np.concatenate([tiny.batch(task, 5)["image"] for task in tiny.tasks])[[0, 1, 4, 8]]
    seen, order = [4, 1, 0, 5, 2], np.array([2, 0, 3, 1])
    whole = np.asarray(qkd_jax.predict(state, images))[:, seen]
    shuffled = np.asarray(qkd_jax.predict(state, images[order]))[:, seen]
    np.testing.assert_allclose(shuffled, whole[order], atol=BUDGET)
    for index in range(4):
        others = np.where(np.arange(4)[:, None, None, None] == index, images, images[:1])
        alone = np.asarray(qkd_jax.predict(state, others))[index, seen]
        np.testing.assert_allclose(alone, whole[index], atol=BUDGET)


def test_keys_learn_to_route_as_well_as_class_means(key):
    """Clusters of queries: a key pulled to its own becomes the mean of the unit queries, so routing
    equals the nearest mean in cosine."""
    centres = jax.random.normal(key, (4, 8))
    noise = jax.random.normal(jax.random.fold_in(key, 1), (4, 60, 8))
    queries = centres[:, None] + 0.8 * noise
    train, test = queries[:, :40], queries[:, 40:]
    only, real = jnp.zeros((40, 1), jnp.int32), jnp.ones(40, bool)

    def learn(start, own):
        def loss(k):
            return jnp.mean(key_loss(cosines(own, k[None]), only, "mean", real, lambda x: x))

        step = lambda k, _: (k - 0.5 * jax.grad(loss)(k), None)  # noqa: E731
        return jax.lax.scan(step, start, length=300)[0]

    starts = jax.random.uniform(jax.random.fold_in(key, 2), (4, 8))
    keys = jax.jit(jax.vmap(learn))(starts, train)
    means = unit(unit(train).mean(1))
    # 300 steps of rate 0.5 on a key of length about 2 contract the angle by e^-30.
    np.testing.assert_allclose(unit(keys), means, atol=1e-4)
    flat = np.asarray(test).reshape(-1, 8)
    by_keys = np.argmax(np.asarray(cosines(flat, keys)), axis=1)
    np.testing.assert_array_equal(by_keys, np.argmax(unit(flat) @ means.T, axis=1))
    assert (by_keys == np.repeat(np.arange(4), 20)).mean() > 0.9


@pytest.mark.parametrize(
    ("settings", "general", "task"),
    [
        # Rows of keys and of values apart: G 2 2 5 d; a task 3 2 5 d and one key.
        ((), 2 * 2 * 5 * 768, 3 * 2 * 5 * 768 + 768),
        # G 6 = 3 + 3 in 2 blocks; E 20 = 10 + 10 in 3, with a key in each.
        (
            ("form=gtripl", "general_length=6", "expert_length=20"),
            2 * 6 * 768,
            3 * 20 * 768 + 3 * 768,
        ),
    ],
)
def test_published_prompts_have_the_published_shapes(settings, general, task):
    changes = [f"dualprompt.{setting}" for setting in settings]
    config = qkd_jax.override(qkd_jax.Config(method="dualprompt"), *changes)
    backbone = Backbone({}, VIT_B)
    trainable, memory = jax.eval_shape(
        lambda key: dualprompt.init(key, backbone, config), jax.random.key(0)
    )
    assert trainable["general"].size == general
    assert trainable["expert"].size + trainable["keys"].size == task
    assert memory["experts"].size + memory["keys"].size == 10 * task


def test_experts_start_from_the_previous_ones_or_anew(tiny, stages):
    state = stages[0].ended
    config = tiny.config(*SMALL, "dualprompt.expert_start=random")
    fresh = state.replace(config=config, task=jnp.int32(1))
    trainable, _ = dualprompt.begin(fresh, jax.random.key(3))
    assert np.all(trainable["expert"] != state.trainable["expert"])
    again, _ = dualprompt.begin(state.replace(task=jnp.int32(1)), jax.random.key(3))
    np.testing.assert_array_equal(again["expert"], state.trainable["expert"])
    np.testing.assert_array_equal(again["keys"], trainable["keys"])


def test_settings_that_do_not_fit_are_named(tiny):
    def start(*settings):
        config = tiny.config(*SMALL, *settings)
        return qkd_jax.init_state(jax.random.key(0), tiny.backbone, config)

    with pytest.raises(ConfigError, match=r"pool: .* at least 4, since each of 4 .* found 3"):
        start("dualprompt.pool=3")
    assert start("dualprompt.pool=9").memory["experts"].shape == (4, 1, 2, 3, 12)
    with pytest.raises(
        ConfigError, match="expected at most 2, the blocks of the backbone, found 5"
    ):
        start("dualprompt.general_blocks=2", "dualprompt.expert_blocks=3")
    with pytest.raises(ConfigError, match=r"expert_length: expected an even number.* found 3"):
        start("dualprompt.form=gtripl")
    bad = ("general_blocks=-1", "expert_blocks=0", "general_length=0", "pool=-1", "key_weight=-1")
    for setting in bad:
        with pytest.raises(ConfigError, match=f"dualprompt.{setting.split('=')[0]}: expected"):
            start(f"dualprompt.{setting}")
