"""The frozen model's part in QKD's answer. `test_oracle.py` has its formula in float64.

Error budget: as the scores of test_fusion.py, 1e-4 of scores below 20.
"""

import jax
import numpy as np
import pytest

import qkd_jax
from qkd_jax.engine import verbs
from qkd_jax.learners.cost import passes_per_input
from qkd_jax.learners.features import pooled_feature
from qkd_jax.learners.qkd import frozen
from qkd_jax.learners.shape import learner_of
from qkd_jax.nn.inputs import Raw
from qkd_jax.settings.config import override

BUDGET = 1e-4
METHOD = ("method=qkd", "fusion.frozen_weight=0.3", "gate.shrinkage=0")


@pytest.fixture(scope="module")
def ended(tiny):
    return tiny.run(tiny.backbone, tiny.config(*METHOD))[-1].ended


@pytest.fixture(scope="module")
def images(tiny):
    return np.concatenate([tiny.batch(task, seed=5)["image"] for task in tiny.tasks])


def changed(state, *settings):
    return state.replace(config=override(state.config, *settings))


def test_its_slot_is_the_frozen_models_feature(ended, images):
    """Bit for bit, since a run takes it from a store that all methods share."""
    found = verbs.slot_features(ended, images)[:, frozen.slot_of(ended.config)]
    expected = jax.jit(lambda state: pooled_feature(state, Raw({"image": images})))(ended)
    np.testing.assert_array_equal(found, expected)
    assert learner_of(ended.config).slots.frozen == frozen.slot_of(ended.config)


def test_with_all_weight_it_is_whitened_simplecil(tiny, ended, images):
    """That one's covariance is float64: conditions are below 100 here."""
    config = tiny.config("method=simplecil", "classifier.kind=whitened")
    simple = tiny.run(tiny.backbone, config)[-1].ended
    expected = np.asarray(qkd_jax.predict(simple, images))
    scale = float(ended.trainable["head"]["scale"])
    alone = qkd_jax.predict(changed(ended, "fusion.frozen_weight=1"), images)
    np.testing.assert_allclose(np.asarray(alone) / scale, expected, atol=1e-3)
    both = np.asarray(qkd_jax.predict(ended, images))
    assert np.abs(both - alone)[:, :3].max() > 100 * BUDGET


@pytest.mark.parametrize("weight", [0.3, 1.0])
def test_routed_to_all_is_the_full_fusion(ended, images, weight):
    state = changed(ended, f"fusion.frozen_weight={weight}")
    routed = changed(state, "fusion.kind=routed", "fusion.top_k=4")
    found, expected = (qkd_jax.predict(one, images) for one in (routed, state))
    np.testing.assert_allclose(found, expected, atol=BUDGET)


def test_adapters_are_trained_as_without_it(tiny, ended):
    plain = tiny.run(tiny.backbone, tiny.config(*METHOD, "fusion.frozen_weight=0"))[-1].ended
    assert "frozen" not in plain.memory
    for name in ("adapters", "rows", "scatter"):
        jax.tree.map(np.testing.assert_array_equal, ended.memory[name], plain.memory[name])


@pytest.mark.parametrize(
    "settings, passes",
    [((), 5), (("fusion.kind=routed", "fusion.top_k=2"), 4), (("fusion.kind=block_mix",), 3)],
)
def test_it_costs_one_pass(tiny, settings, passes):
    config = tiny.config(*METHOD, *settings)
    assert passes_per_input(config, 2) == passes
    assert passes_per_input(override(config, "fusion.frozen_weight=0"), 2) == passes - 1


def test_kept_features_of_teachers_are_those_of_adapters(tiny):
    """With `distillation.teacher_view=test` a batch brings the features of all slots."""
    settings = (*METHOD, "distillation.teacher_view=test")
    state = tiny.run(tiny.backbone, tiny.config(*settings))[1].begun
    batch = tiny.batch(tiny.tasks[1])
    features, losses = np.array(verbs.slot_features(state, batch["image"])), []
    for value in (7.0, 70.0):
        features[:, frozen.slot_of(state.config)] = value
        taught = {**batch, "features": features}
        losses.append(float(qkd_jax.train_task(tiny.copy(state), taught)[1]["loss_kd"]))
    assert losses[0] == losses[1] > 0
