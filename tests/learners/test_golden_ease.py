"""EASE against the authors' code: features, loss, gradient, four steps, rows, scores.

Reference: sun-hailong/CVPR24-Ease at 6d67508ed8b7c4d23350ed4eb28c123914b40ae3.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qkd_jax
from qkd_jax.learners import base, ease
from qkd_jax.learners.base import Rows
from qkd_jax.learners.task_adapters import encode_with
from qkd_jax.protocol import Task
from qkd_jax.published import FORM

BUDGET = 1.2e-5
TASKS = (Task(0, (0, 1, 2)), Task(1, (3, 4)), Task(2, (5, 6)))
# Eight classes and four tasks have room; the last of each never comes.
SETTINGS = """
    method=ease backbone.image_size=8 data.augment=false num_classes=8 max_tasks=4
    max_task_classes=3 adapter.bottleneck=3 adapter.scale=0.1 adapter.dropout=0.0 ease.alpha=0.1
    train.optimizer=sgd train.schedule=cosine train.learning_rate=0.05 train.momentum=0.9
    train.weight_decay=0.005
""".split()


def close(found, expected, budget):
    """Within `budget` of the largest entry; `expected` is a tree of the same form."""
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=budget * np.abs(b).max()),
        found,
        expected,
    )


@pytest.fixture(scope="module")
def stored(golden):
    return golden("ease")


def adapter(stored, task):
    return jax.tree.map(lambda a: a[task], stored.adapter("adapter"))


def images_of(stored, task):
    mine = np.isin(stored.arrays["labels"], task.classes)
    return {"image": stored.arrays["images"][mine], "label": stored.arrays["labels"][mine]}


@pytest.fixture(scope="module")
def learned(stored):
    """(the state in each task before its end, the state after it), under the drawn adapters."""
    config = qkd_jax.override(qkd_jax.Config(), *SETTINGS, *FORM["ease"])
    state, found = qkd_jax.init_state(jax.random.key(0), stored.backbone, config), []
    for task in TASKS:
        state = qkd_jax.begin_task(state, task, num_steps=4)
        drawn = {**state.trainable, "adapter": adapter(stored, task.index)}
        begun = state = state.replace(trainable=drawn)
        state = qkd_jax.end_task(state, [images_of(stored, task)])
        found.append((begun, state))
    return found


@pytest.fixture(scope="module")
def second(stored, learned):
    """The second task with the given head: two rows of the reference and one of padding."""
    state, arrays = learned[1][0], stored.arrays
    rows = jnp.concatenate([arrays["head_rows"], jnp.ones((1, 12))])
    head = {"rows": rows, "scale": jnp.asarray(arrays["head_scale"])}
    return state.replace(trainable={"adapter": adapter(stored, 1), "head": head})


def head_of(arrays, name):
    return {"rows": arrays[f"{name}/rows"], "scale": arrays[f"{name}/scale"]}


def test_features_under_an_adapter(stored, learned):
    """Their forward pass in training, without dropout, and the one at test over all adapters."""
    arrays, state = stored.arrays, learned[2][1]
    queries = base.prepare_images(state, jnp.asarray(arrays["queries"]))
    trained = jax.jit(encode_with)(state, adapter(stored, 1), queries)
    close(trained, arrays["train_features"], BUDGET)
    found = base.slot_features(state, arrays["queries"])
    close(found[:, :3], arrays["features"], BUDGET)
    # The adapters matter: no two of them come close.
    spread = arrays["features"][:, :, None] - arrays["features"][:, None]
    assert np.abs(spread).max((0, 3))[~np.eye(3, dtype=bool)].min() > 0.1


def test_loss_and_gradient_of_the_second_task(stored, second):
    arrays, batch = stored.arrays, images_of(stored, TASKS[1])
    images = base.prepare_images(second, jnp.asarray(batch["image"]))
    label = jnp.asarray(batch["label"])
    keys = jax.random.split(jax.random.key(0), len(label))
    rows = Rows(keys, jnp.ones(len(label), bool), lambda x: x)

    @jax.jit
    @jax.value_and_grad
    def objective(trainable):
        return jnp.mean(
            ease.LEARNER.loss(trainable, second, images, {"label": label}, rows)["loss"]
        )

    loss, grads = objective(second.trainable)
    np.testing.assert_allclose(loss, arrays["loss"], atol=8 * BUDGET)
    np.testing.assert_array_equal(grads["head"]["rows"][2], 0.0)
    grads["head"]["rows"] = grads["head"]["rows"][:2]
    close(grads, {"adapter": stored.adapter("grad"), "head": head_of(arrays, "grad")}, 4 * BUDGET)


def test_four_steps_of_the_second_task(stored, second, tiny):
    arrays, state, losses = stored.arrays, tiny.copy(second), []
    for _ in range(4):
        state, metrics = qkd_jax.train_task(state, images_of(stored, TASKS[1]))
        losses.append(metrics["loss"])
    np.testing.assert_allclose(losses, arrays["losses"], atol=8 * BUDGET)
    found = state.trainable
    found = {
        "adapter": found["adapter"],
        "head": {**found["head"], "rows": found["head"]["rows"][:2]},
    }
    expected = {"adapter": stored.adapter("trained"), "head": head_of(arrays, "trained")}
    close(found, expected, BUDGET)


@pytest.mark.parametrize("task", TASKS)
def test_rows_and_scores_after_each_task(stored, learned, task):
    arrays, state, slots = stored.arrays, learned[task.index][1], task.index + 1
    expected = arrays[f"fc/{task.index}"].reshape(-1, slots, 12).swapaxes(0, 1)
    classes = expected.shape[1]
    close(state.memory["rows"][:slots, :classes], expected, 2 * BUDGET)
    scores, _ = base.score(state, base.slot_features(state, arrays["queries"]))
    expected = arrays[f"scores/{task.index}"]
    np.testing.assert_allclose(scores[:, :classes], expected, atol=4 * BUDGET)
    assert (np.asarray(scores[:, classes:]) == -np.inf).all()
    np.testing.assert_array_equal(scores.argmax(1), expected.argmax(1))
