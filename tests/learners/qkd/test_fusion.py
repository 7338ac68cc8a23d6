"""Fusion of adapters whose passes depend on relevance: routed to a few, and mixed in every block.

Error budget: as the scores of test_learner.py, 5e-4 of scores below 5: cosines in a metric
whose condition is below 100. The same features reach both sides, so 1e-4 is asked.
"""

import jax
import numpy as np
import pytest

import qkd_jax
from qkd_jax.engine import verbs
from qkd_jax.errors import ConfigError
from qkd_jax.learners.qkd import fusion
from qkd_jax.learners.task_adapters import adapter_of, encode_with
from qkd_jax.nn.inputs import Raw
from qkd_jax.settings.config import Config, override

BUDGET = 1e-4


@pytest.fixture(scope="module")
def ended(tiny):
    """Three learned tasks of four; two relevances are never equal."""
    config = tiny.config("method=qkd", "gate.temperature=0.3", "fusion.frozen_weight=0")
    return tiny.run(tiny.backbone, config)[-1].ended


def with_fusion(state, *settings):
    return state.replace(config=override(state.config, *settings))


@pytest.fixture(scope="module")
def images(tiny):
    return np.concatenate([tiny.batch(task, seed=5)["image"] for task in tiny.tasks])


def test_routed_to_all_is_the_full_fusion(ended, images):
    expected, alpha = qkd_jax.predict(ended, images), verbs.predict_with_relevance(ended, images)[1]
    for count in (3, 4, 9):  # the tasks that are learned, that fit, and more
        routed = with_fusion(ended, "fusion.kind=routed", f"fusion.top_k={count}")
        found, weights = verbs.predict_with_relevance(routed, images)
        np.testing.assert_allclose(found, expected, atol=BUDGET)
        np.testing.assert_allclose(weights, alpha, atol=BUDGET)


@pytest.mark.parametrize("count", [1, 2])
def test_routed_to_few_is_written_out(ended, images, count):
    """sum over the k largest alpha_i of alpha_i z^(i) / sum of these alpha_i, image by image."""
    features = verbs.slot_features(ended, images)
    alpha = np.float64(verbs.one_device().score(ended, features)[1])
    assert len({tuple(np.argsort(-row)[:count]) for row in alpha}) > 1  # images differ in routes
    logits = [np.float64(fusion.logits_in(ended, t, features[:, t])) for t in range(3)]
    expected = np.zeros((len(images), 7))
    for b, row in enumerate(alpha):
        chosen = np.argsort(-row)[:count]
        for t in chosen:
            expected[b] += row[t] / row[chosen].sum() * logits[t][b]
    expected[:, [3, 6]] = -np.inf
    routed = with_fusion(ended, "fusion.kind=routed", f"fusion.top_k={count}")
    np.testing.assert_allclose(qkd_jax.predict(routed, images), expected, atol=BUDGET)


@pytest.mark.parametrize("kind", ["routed", "block_mix"])
def test_scores_of_an_image_do_not_depend_on_the_batch(ended, images, kind):
    state = with_fusion(ended, f"fusion.kind={kind}")
    whole, order = qkd_jax.predict(state, images), np.array([7, 2, 11, 0])
    np.testing.assert_allclose(qkd_jax.predict(state, images[order]), whole[order], atol=BUDGET)


def test_mixed_with_all_weight_on_one_task_is_that_adapter(ended, images):
    """Rows are those of every class's own slot, in the metric of slot 0."""
    state = with_fusion(ended, "fusion.kind=block_mix")
    # A class of the last slot too, as if the fourth task had been learned.
    rows = state.memory["rows"].at[3, 3].set(np.linspace(-1, 1, state.memory["rows"].shape[-1]))
    owners = state.task_of_class.at[3].set(3)
    state = state.replace(memory={**state.memory, "rows": rows}, task_of_class=owners)
    chosen = np.arange(len(images)) % 3
    weights = np.eye(4, dtype=np.float32)[chosen]
    found = fusion.mixed_logits(state, Raw({"image": images}), jax.numpy.asarray(weights))
    owner, rows = np.asarray(state.task_of_class), np.float64(state.memory["rows"])
    whitener = np.float64(state.memory["metrics"].whitener[0])
    centre = np.float64(state.memory["metrics"].centre[0])
    scale = float(state.trainable["head"]["scale"])
    for b, task in enumerate(chosen):
        pixels = Raw({"image": images[b : b + 1]})
        feature = np.float64(encode_with(state, adapter_of(state, int(task)), pixels)[0])
        f = whitener @ (feature - centre)
        for c in (4, 1, 0, 5, 2, 3):
            r = whitener @ (rows[owner[c], c] - centre)
            cosine = f @ r / np.linalg.norm(f) / np.linalg.norm(r)
            assert abs(float(found[b, c]) - scale * cosine) < BUDGET


def test_top_k_is_at_least_one():
    with pytest.raises(ConfigError, match=r"fusion\.top_k: expected at least 1, found 0"):
        override(Config(), "fusion.top_k=0")
