"""Features of several slots in one pass against one pass a slot.

Error budget: both sides compute the same float32 sums over at most 48 terms in another order,
through two blocks whose LayerNorms divide by deviations near 1: 1e-6 of features near 1, bound
1e-5.
"""

import jax
import numpy as np
import pytest

from qkd_jax.engine import verbs
from qkd_jax.errors import ConfigError
from qkd_jax.learners import passes
from qkd_jax.learners.shape import learner_of
from qkd_jax.nn.inputs import Raw
from qkd_jax.settings.config import override

BUDGET = 1e-5
METHODS = ("ease", "mos", "mote", "qkd", "tuna")


@pytest.fixture(
    scope="module",
    params=[pytest.param(m, marks=[] if m == "qkd" else pytest.mark.slow) for m in METHODS],
)
def ended(tiny, request):
    return tiny.run(tiny.backbone, tiny.config(f"method={request.param}"))[-1].ended


@pytest.fixture(scope="module")
def images(tiny):
    return np.concatenate([tiny.batch(task, seed=5)["image"] for task in tiny.tasks])


def one_by_one(state, images):
    learner = learner_of(state.config)
    prepared = Raw({"image": images})
    shape = (
        len(images),
        learner_of(state.config).num_slots(state.config),
        state.backbone.spec.width,
    )
    features = np.zeros(shape, np.float32)
    extract = jax.jit(lambda slot, before: learner.extract(state, prepared, slot, before))
    for slot in learner.slots.score(int(state.task)):
        features[:, slot] = extract(slot, features)
    return features


@pytest.mark.parametrize("chunk", [0, 1, 2, 3, 100])
def test_any_chunk_gives_the_features_of_one_pass_a_slot(ended, images, chunk):
    """Also where the chunk does not divide the learned slots, and is more than there are."""
    expected = one_by_one(ended, images)
    state = ended.replace(config=override(ended.config, f"train.task_chunk={chunk}"))
    found = verbs.slot_features(state, images)
    np.testing.assert_allclose(found, expected, atol=BUDGET)
    # Slots differ; little where an adapter starts as the last one ended.
    assert np.ptp(expected[:, :2], axis=1).max() > 30 * BUDGET


def test_only_the_slots_asked_for_are_filled(ended, images):
    """Padding of a chunk writes nothing, not even in slot 0."""
    state = ended.replace(config=override(ended.config, "train.task_chunk=3"))
    found = np.asarray(verbs.slot_features(state, images, (1,)))
    assert np.abs(found[:, 1]).min(axis=1).max() > 0
    assert not found[:, [s for s in range(found.shape[1]) if s != 1]].any()


def test_the_chunk_follows_the_batch(tiny):
    """On a CPU 16 images a pass; what the user sets is kept; never more than the slots."""
    config = tiny.config("method=qkd").train
    assert [passes.task_chunk(config, batch, 10) for batch in (1, 2, 8, 16, 64)] == [10, 8, 2, 1, 1]
    config = tiny.config("method=qkd", "train.task_chunk=4").train
    assert [passes.task_chunk(config, 64, slots) for slots in (3, 10)] == [3, 4]


def test_a_negative_chunk_is_refused(tiny):
    with pytest.raises(ConfigError, match=r"train\.task_chunk: expected 0"):
        tiny.config("train.task_chunk=-1")
