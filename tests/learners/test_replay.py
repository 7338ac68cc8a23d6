"""Replay: the head's start, what it is trained on, and what is kept.

Error budget: means of 16 features near 1, below 100 eps = 1.2e-5.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qkd_jax
from qkd_jax.errors import ConfigError
from qkd_jax.generators.bank import add_to_bank, empty_bank
from qkd_jax.generators.gaussian import Means, gaussian
from qkd_jax.learners import replay

BUDGET = 2e-5
SETTINGS = ("method=replay", "max_task_images=32", "alignment.samples=8", "alignment.epochs=2")


@pytest.fixture(scope="module")
def runs(tiny):
    """settings -> the states of a run, learned once."""
    found = {}

    def learned(*settings):
        if settings not in found:
            found[settings] = tiny.run(tiny.backbone, tiny.config(*SETTINGS, *settings))
        return found[settings]

    return learned


def scores_of(tiny, state):
    return np.asarray(qkd_jax.predict(state, tiny.batch(tiny.tasks[0], 9)["image"]))


def test_a_head_that_is_not_trained_is_the_nearest_class_mean(tiny, runs):
    state = runs("alignment.epochs=0")[-1].ended
    simple = tiny.run(tiny.backbone, tiny.config("method=simplecil"))[-1].ended
    scores, expected = scores_of(tiny, state), scores_of(tiny, simple)
    seen = np.isfinite(expected)
    np.testing.assert_array_equal(np.isfinite(scores), seen)
    scale = state.config.head.scale
    np.testing.assert_allclose(scores[seen], scale * expected[seen], atol=scale * BUDGET)


def test_present_classes_give_their_features_and_old_ones_draws():
    features = jnp.arange(6.0)[:, None] * jnp.ones((1, 3))
    bank = add_to_bank(
        empty_bank(10, 3), features, jnp.array([0, 0, 1, 1, 1, 0]), jnp.ones(6, bool)
    )
    columns = jnp.array([4, 1, 7])  # of seven classes; the last is padding
    memory = Means(-jnp.arange(1.0, 8.0)[:, None] * jnp.ones((1, 3)))
    generator = replay.with_present(gaussian("mean", 1e-4), bank, columns)
    labels = np.resize([4, 1, 0, 6], 400)
    drawn = np.asarray(generator.draw(memory, jax.random.key(0), jnp.asarray(labels)))[:, 0]
    assert set(drawn[labels == 4]) == {0, 1, 5} and set(drawn[labels == 1]) == {2, 3, 4}
    assert set(drawn[labels == 0]) == {-1} and set(drawn[labels == 6]) == {-7}


@pytest.mark.parametrize("old", ["drawn", "none"])
def test_the_head_sees_draws_of_old_classes_only_where_they_are_replayed(tiny, runs, old):
    """With another memory of old classes the head of the next task becomes another one."""
    state = runs(f"replay.old={old}")[0].ended
    heads = []
    for step in (1, -1):  # coordinates in their order, or in another one
        memory = state.memory["generator"]
        memory = memory.replace(mean=memory.mean[:, ::step])
        changed = state.replace(memory={**state.memory, "generator": memory})
        task = tiny.tasks[1]
        changed = qkd_jax.begin_task(changed, task)
        changed = qkd_jax.end_task(changed, [tiny.batch(task, 0)])
        heads.append(np.asarray(changed.memory["rows"]))
    assert np.allclose(*heads) == (old == "none")


def test_the_first_task_trains_the_head_and_every_task_is_compiled_once(tiny, runs):
    history = runs("replay.old=drawn")
    untrained = runs("alignment.epochs=0")
    for learned, start in zip(history, untrained, strict=True):
        assert not np.allclose(learned.ended.memory["rows"], start.ended.memory["rows"])
    assert not np.array_equal(history[0].ended.memory["scale"], history[1].ended.memory["scale"])


def test_the_largest_task_must_be_known(tiny):
    config = tiny.config("method=replay")
    with pytest.raises(ConfigError, match="max_task_images: expected at least 1, since replay"):
        qkd_jax.init_state(jax.random.key(0), tiny.backbone, config)
    config = tiny.config("method=mos", "alignment.generator=drifting")
    with pytest.raises(ConfigError, match=r"since alignment\.generator=drifting keeps"):
        qkd_jax.init_state(jax.random.key(0), tiny.backbone, config)
