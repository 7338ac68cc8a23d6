"""The verbs that all methods share: refusals, schedule, weight decay."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qkd_jax
from qkd_jax.engine import verbs
from qkd_jax.errors import ConfigError, DataError, ProtocolError
from qkd_jax.learners.step import learning_rate, optimiser
from qkd_jax.protocol.tasks import Task

pytestmark = pytest.mark.floor


@pytest.mark.parametrize(
    "task, words",
    [
        (Task(0, (2, 3)), "task: expected index 1 next, found 0"),
        (Task(2, (2, 3)), "task: expected index 1 next, found 2"),
        (Task(1, ()), "classes, found 0"),
        (Task(1, (0, 2, 3)), "max_task_classes=2"),
        (Task(1, (2, 2)), "expected new classes"),
        (Task(1, (4, 2)), "expected new classes"),
        (Task(1, (2, 7)), "expected classes 0 to 6"),
        (Task(1, (-1, 2)), "expected classes 0 to 6"),
    ],
)
def test_begin_task_refuses(begun, task, words):
    with pytest.raises(ProtocolError, match="task") as caught:
        qkd_jax.begin_task(begun, task)
    assert words in str(caught.value)


def test_begin_task_refuses_more_tasks_than_there_is_room_for(fresh):
    full = fresh.replace(task=jnp.int32(3))
    with pytest.raises(ProtocolError, match="expected an index below max_tasks=4, found 4"):
        qkd_jax.begin_task(full, Task(4, (2,)))


def test_begin_task_sets_the_books(fresh, begun):
    assert int(begun.task) == 0 and int(begun.step) == 0
    np.testing.assert_array_equal(begun.task_classes, [4, 1])
    np.testing.assert_array_equal(begun.task_of_class, [-1, 0, -1, -1, 0, -1, -1])
    np.testing.assert_array_equal(fresh.task_of_class, [-1] * 7)


def test_end_task_names_a_class_without_images(tiny, begun):
    batch = tiny.batch(tiny.tasks[0])
    label = batch["label"][batch["label"] == 4]
    only = {"label": label, "mask": np.ones(len(label), bool)}
    features = np.zeros((2, 4, 12), np.float32)
    with pytest.raises(DataError, match="found none of \\[1\\]"):
        verbs.one_device().finish(begun, [{**only, "features": features}])


@pytest.mark.parametrize(
    "changes, words",
    [
        (["method=qdk"], "method: expected one of aper, apt, care, cdl, "),
        (["adapter.bottleneck=13"], "at most the backbone's width 12, found 13"),
        (["adapter.first_block=2"], "adapter.first_block"),
        (["gate.encoding=amplitude", "gate.kind=quantum"], "gate.num_qubits: expected at least 4"),
        (["gate.encoding=angle", "gate.angle_map=first_q", "gate.num_qubits=13"], "num_qubits"),
        (["gate.encoding=angle", "gate.angle_map=pool", "gate.num_qubits=13"], "num_qubits"),
    ],
)
def test_init_state_refuses_what_does_not_fit(tiny, changes, words):
    with pytest.raises(ConfigError) as caught:
        qkd_jax.init_state(jax.random.key(0), tiny.backbone, tiny.config("method=qkd", *changes))
    assert words in str(caught.value)


def test_init_state_wants_a_typed_key(tiny):
    with pytest.raises(ConfigError, match="typed key"):
        qkd_jax.init_state(jax.random.PRNGKey(0), tiny.backbone, tiny.config("method=simplecil"))


def test_cosine_schedule(tiny):
    config = tiny.config("train.schedule=cosine", "train.learning_rate=0.2").train
    first, five = jnp.int32(0), jnp.int32(5)
    for steps in (1, 4, 10):
        for step in range(steps + 2):
            expected = 0.2 * 0.5 * (1 + np.cos(np.pi * min(step / steps, 1)))
            found = learning_rate(config, jnp.int32(step), jnp.int32(steps), first)
            assert abs(float(found) - expected) < 0.2 * 4e-7
    assert float(learning_rate(config, five, jnp.int32(0), first)) == np.float32(0.2)
    constant = tiny.config("train.schedule=constant", "train.learning_rate=0.2").train
    assert float(learning_rate(constant, five, jnp.int32(9), first)) == np.float32(0.2)


@pytest.mark.parametrize("epochs, later", [(5, 0), (5, 3), (2, 1), (1, 4)])
@pytest.mark.parametrize("task", [0, 1])
def test_quarter_cosine_goes_by_epoch(tiny, epochs, later, task):
    """Beside the loop of the CODA-Prompt code: its scheduler starts at 0 and steps to 0 first."""
    config = tiny.config(
        *("train.schedule=quarter_cosine", "train.learning_rate=0.2"),
        *(f"train.epochs={epochs}", f"train.later_epochs={later}"),
    ).train
    num_epochs = later if task and later else epochs
    counted, expected = [0, *range(num_epochs - 1)], []
    for e in counted:
        angle = 99 * np.pi * e / (200 * max(num_epochs - 1, 1))
        expected += 3 * [0.2 * np.cos(angle)]
    expected += expected[-1:]  # a step too many keeps the last rate
    total = jnp.int32(3 * num_epochs)
    found = [
        float(learning_rate(config, jnp.int32(step), total, jnp.int32(task)))
        for step in range(3 * num_epochs + 1)
    ]
    np.testing.assert_allclose(found, expected, atol=0.2 * 4e-7)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_weight_decay_touches_the_named_leaves_and_never_the_gate(tiny, optimizer):
    """Without gradients an update is the decay alone: weight_decay * parameter."""
    config = tiny.config(
        f"train.optimizer={optimizer}", "train.weight_decay=0.1", "train.decay_leaves=kernel,rows"
    ).train
    ones = {
        "adapter": {"down": {"kernel": jnp.ones(2), "bias": jnp.ones(2)}},
        "head": {"rows": jnp.ones(2), "scale": jnp.ones(2)},
        "gate": {"kernel": jnp.ones(2), "map": jnp.ones(2), "rows": jnp.ones(2)},
    }
    transformation = optimiser(config)
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = transformation.update(
            jax.tree.map(jnp.zeros_like, ones), transformation.init(ones), ones
        )
    decayed = {"['adapter']['down']['kernel']", "['head']['rows']"}
    for path, leaf in jax.tree_util.tree_leaves_with_path(updates):
        expected = 0.1 if jax.tree_util.keystr(path) in decayed else 0.0
        np.testing.assert_allclose(leaf, expected, atol=1e-8, err_msg=str(path))


def test_sgd_with_momentum_over_three_steps(tiny):
    """v <- m v + g + wd p; p <- p - lr v, in float64 beside the library."""
    config = tiny.config("train.momentum=0.9", "train.weight_decay=0.1").train
    transformation, p = optimiser(config), {"kernel": jnp.asarray([1.0, -2.0])}
    memory, q, v = transformation.init(p), np.array([1.0, -2.0]), np.zeros(2)
    for step in range(3):
        g = np.array([0.3, 0.1 * step])
        updates, memory = transformation.update({"kernel": jnp.asarray(g, jnp.float32)}, memory, p)
        p = {"kernel": p["kernel"] - 0.05 * updates["kernel"]}
        v = 0.9 * v + g + 0.1 * q
        q = q - 0.05 * v
        np.testing.assert_allclose(p["kernel"], q, rtol=1e-6)
