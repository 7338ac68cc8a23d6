"""SimpleCIL against LAMDA-PILOT."""

import jax
import numpy as np
import pytest

import qkd_jax
from qkd_jax.learners import base

BUDGET = 1.2e-5
TASKS = (qkd_jax.Task(0, (0, 1, 2)), qkd_jax.Task(1, (3, 4)))


@pytest.fixture(scope="module")
def stored(golden):
    return golden("simplecil")


def test_prototypes_and_cosines_of_two_tasks(stored):
    arrays = stored.arrays
    settings = "method=simplecil backbone.image_size=8 data.augment=false num_classes=6"
    settings += " max_tasks=3 max_task_classes=3 adapter.bottleneck=3"
    config = qkd_jax.override(qkd_jax.Config(), *settings.split())
    state = qkd_jax.init_state(jax.random.key(0), stored.backbone, config)
    scale = np.abs(arrays["features"]).max()
    for task in TASKS:
        mine = np.isin(arrays["labels"], task.classes)
        batch = {"image": arrays["images"][mine], "label": arrays["labels"][mine]}
        state = qkd_jax.end_task(qkd_jax.begin_task(state, task), [batch])
        expected = arrays[f"fc/{task.index}"]
        rows = state.memory["rows"][: len(expected)]
        np.testing.assert_allclose(rows, expected, atol=BUDGET * scale)
        features = base.slot_features(state, arrays["queries"])
        np.testing.assert_allclose(features[:, 0], arrays["features"], atol=BUDGET * scale)
        scores, expected = qkd_jax.predict(state, arrays["queries"]), arrays[f"logits/{task.index}"]
        classes = expected.shape[1]
        np.testing.assert_allclose(scores[:, :classes], expected, atol=4 * BUDGET)
        assert (np.asarray(scores[:, classes:]) == -np.inf).all()
        np.testing.assert_array_equal(scores.argmax(1), expected.argmax(1))
