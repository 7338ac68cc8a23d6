"""QKD's loss and its teachers: against float64, and of few teachers against all.

Error budgets as in test_learner.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qkd_jax
from qkd_jax.engine import verbs
from qkd_jax.learners.qkd import fusion
from qkd_jax.learners.qkd import learner as qkd
from qkd_jax.learners.shape import Context
from qkd_jax.learners.state import local_labels
from qkd_jax.learners.task_adapters import encode_with
from qkd_jax.nn.inputs import Raw
from qkd_jax.protocol.tasks import Task
from tests.learners.qkd.learner_cases import (
    BUDGET,
    TOP,
    assert_close,
    assert_same_bytes,
    distance,
)


def loss_of(state, batch):
    """trainable -> the mean loss that a step differentiates, with its dropout."""
    images = Raw({"image": jnp.asarray(batch["image"])})
    keys = jax.random.split(jax.random.key(3), len(batch["label"]))
    arrays = {name: jnp.asarray(value) for name, value in batch.items()}
    rows = Context(keys, jnp.ones(len(batch["label"]), bool), lambda array: array)
    return lambda trainable: qkd.loss(trainable, state, images, arrays, rows)


def far_off(state):
    """With an adapter and rows of old classes in all directions, so that the teachers' logits
    differ from one another and from the student's.
    """
    keys = iter(jax.random.split(jax.random.key(9), 5))

    def moved(array):
        return array + jax.random.normal(next(keys), array.shape)

    adapter = jax.tree.map(moved, state.trainable["adapter"])
    return state.replace(
        trainable={**state.trainable, "adapter": adapter},
        memory={**state.memory, "rows": moved(state.memory["rows"])},
    )


def test_as_many_teachers_as_old_tasks_are_all_of_them(tiny, history):
    """Loss and gradient, with the teachers' passes in the step and with their features given.

    A gradient is as long a sum as the loss, times at most 20 numbers of an image: 20 BUDGET of the
    largest, which is about 1.
    """
    state, batch = far_off(history[2].trained), tiny.batch(tiny.tasks[2], 5)
    features = verbs.slot_features(history[1].ended, batch["image"])

    def found(top_k, batch):
        few = state.replace(config=qkd_jax.override(state.config, TOP(top_k)))
        loss = loss_of(few, batch)

        def mean(trainable):
            terms = loss(trainable)
            return terms["loss"].mean(), terms

        return jax.jit(jax.grad(mean, has_aux=True))(state.trainable)

    expected = found(0, batch)
    assert float(expected[1]["loss_kd"].min()) > 0.1
    assert distance(expected[0]["gate"], jax.tree.map(jnp.zeros_like, expected[0]["gate"])) > 1e-4
    assert_close(found(2, {**batch, "features": features}), expected)
    assert_close(found(3, batch), expected)  # more than there are, fewer than there is room for


@pytest.fixture(scope="module")
def fourth(tiny, history):
    """A fourth task with three old ones: state, images, features and relevance of the old ones."""
    state = far_off(qkd_jax.begin_task(tiny.copy(history[2].ended), Task(3, (3,))))
    images = np.concatenate([tiny.batch(task, 5)["image"] for task in tiny.tasks])
    batch = {"image": images, "label": np.full(len(images), 3)}
    features = jax.random.normal(jax.random.key(4), (len(images), 4, 12))
    alpha = fusion.route(state, state.trainable["gate"], features[:, 0], jnp.arange(4) < 3).weights
    return state, batch, features, alpha


def test_few_teachers_are_the_most_relevant_with_their_shares(fourth):
    """sum over the two largest alpha_i of alpha_i KL_i / sum of these alpha_i, image by image."""
    state, batch, features, alpha = fourth
    nearest = np.argsort(-np.float64(alpha), axis=1)[:, :2]
    assert len({tuple(sorted(row)) for row in nearest}) > 1  # images differ in teachers
    few = state.replace(config=qkd_jax.override(state.config, TOP(2)))
    given = {**batch, "features": features}
    found = jax.jit(loss_of(few, given))(state.trainable)
    images = Raw({"image": jnp.asarray(batch["image"])})
    keys = jax.random.split(jax.random.key(3), len(alpha))
    student = np.float64(
        jax.jit(lambda images: encode_with(state, state.trainable["adapter"], images, keys))(images)
    )
    rows, scale = np.float64(state.memory["rows"]), float(state.trainable["head"]["scale"])

    def log_p(feature, rows):
        lengths = np.linalg.norm(feature) * np.linalg.norm(rows, axis=-1)
        return log_softmax(scale * (rows @ feature) / lengths)

    old = [4, 1, 0, 5, 2]
    for b, chosen in enumerate(nearest):
        share = np.float64(alpha)[b, chosen] / np.float64(alpha)[b, chosen].sum()
        q, kd = log_p(student[b], rows[3, old]), 0.0
        for weight, slot in zip(share, chosen, strict=True):
            p = log_p(np.float64(features)[b, slot], rows[slot, old])
            kd += weight * (np.exp(p) * (p - q)).sum()
        assert kd > 0.1 and abs(float(found["loss_kd"][b]) - kd) < BUDGET


def test_an_image_has_the_same_few_teachers_alone_as_in_a_batch(fourth):
    state, batch, features, _ = fourth
    state = state.replace(config=qkd_jax.override(state.config, TOP(2), "adapter.dropout=0.0"))
    given = {**batch, "features": features}
    alone = {name: value[:1] for name, value in given.items()}
    found, expected = (
        jax.jit(loss_of(state, b))(state.trainable)["loss_kd"] for b in (alone, given)
    )
    np.testing.assert_allclose(found, expected[:1], atol=BUDGET)


def test_only_the_chosen_adapters_are_run(fourth):
    """The first gives the query. With one teacher, what the others hold does not matter, and no
    loop is as long as there are tasks.
    """
    state, batch, _, _ = fourth
    query = verbs.slot_features(state, batch["image"], (0,))[:, 0]
    open_tasks = jnp.arange(4) < 3
    alpha = fusion.route(state, state.trainable["gate"], query, open_tasks).weights
    chosen = np.asarray(alpha).argmax(1)
    one = int(np.bincount(chosen).argmax())
    batch = {name: value[chosen == one] for name, value in batch.items()}
    state = state.replace(config=qkd_jax.override(state.config, TOP(1)))
    unused = np.array([slot not in (0, one) for slot in range(4)])
    assert unused.any()

    def spoilt(leaf):
        return jnp.where(unused.reshape(4, *[1] * (leaf.ndim - 1)), jnp.nan, leaf)

    adapters = jax.tree.map(spoilt, state.memory["adapters"])
    other = state.replace(memory={**state.memory, "adapters": adapters})
    run = jax.jit(lambda state, trainable: loss_of(state, batch)(trainable))
    assert_same_bytes(run(state, state.trainable)["loss"], run(other, state.trainable)["loss"])
    few = str(jax.make_jaxpr(run)(state, state.trainable))
    assert "scan[" in few and "while[" not in few
    everything = state.replace(config=qkd_jax.override(state.config, TOP(0)))
    assert "while[" in str(jax.make_jaxpr(run)(everything, state.trainable))


def log_softmax(x):
    x = x - x.max()
    return x - np.log(np.exp(x).sum())


def test_loss_against_float64(tiny, history):
    """Eq. 11, 13, 15 image by image, from features, rows and relevance."""
    state, batch = history[2].trained, tiny.batch(tiny.tasks[2], 5)
    features = verbs.slot_features(history[1].ended, batch["image"])
    found = jax.jit(loss_of(state, {**batch, "features": features}))(state.trainable)
    images = Raw({"image": jnp.asarray(batch["image"])})
    keys = jax.random.split(jax.random.key(3), 4)
    encode = jax.jit(lambda images: encode_with(state, state.trainable["adapter"], images, keys))
    student = np.float64(encode(images))
    alpha = np.float64(
        fusion.route(state, state.trainable["gate"], features[:, 0], jnp.arange(4) < 2).weights
    )
    head, scale = state.trainable["head"], float(state.trainable["head"]["scale"])
    rows, teachers = np.float64(state.memory["rows"]), np.float64(features)

    def logits(feature, rows):
        lengths = np.linalg.norm(feature) * np.linalg.norm(rows, axis=-1)
        return scale * (rows @ feature) / lengths

    labels = np.asarray(local_labels(state, jnp.asarray(batch["label"])))
    old = [4, 1, 0]
    for b in range(4):
        ce = -log_softmax(logits(student[b], np.float64(head["rows"])))[labels[b]]
        kd, q = 0.0, log_softmax(logits(student[b], rows[2, old]))
        for i in range(2):
            p = log_softmax(logits(teachers[b, i], rows[i, old]))
            kd += alpha[b, i] * (np.exp(p) * (p - q)).sum()
        entropy = -(alpha[b, :2] * np.log(alpha[b, :2])).sum()
        assert abs(float(found["loss_ce"][b]) - ce) < BUDGET
        assert abs(float(found["loss_kd"][b]) - kd) < BUDGET
        assert abs(float(found["loss_sparsity"][b]) - entropy) < BUDGET


def test_gradient_against_finite_differences(tiny, history):
    """Central differences with step h = 2e-3 in float32.

    A mean loss near 3 is rounded by about 4 eps * 3 = 1.4e-6, so a difference quotient by 4e-4;
    truncation is h^2 / 6 of a third derivative, below 100: 7e-5. Where a ReLU of one of 20 x 3
    hidden units changes sides within h the quotient is off by a share of that unit: 2 % allowed.
    """
    state = history[2].trained
    batch = tiny.batch(tiny.tasks[2], 5)
    function = loss_of(state, batch)
    value = jax.jit(lambda trainable: function(trainable)["loss"].mean())
    gradient = jax.jit(jax.grad(value))(state.trainable)
    leaves, treedef = jax.tree.flatten(state.trainable)
    paths = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(gradient)]
    checked = 0
    for index, slope in enumerate(jax.tree.leaves(gradient)):
        slope = np.asarray(slope)
        flat = np.argsort(-np.abs(slope).ravel())[:2]
        for position in flat:
            where = np.unravel_index(position, slope.shape)

            def moved(amount, index=index, where=where):
                changed = list(leaves)
                changed[index] = leaves[index].at[where].add(amount)
                return float(value(treedef.unflatten(changed)))

            quotient = (moved(2e-3) - moved(-2e-3)) / 4e-3
            assert abs(quotient - slope[where]) < 1e-3 + 0.02 * abs(slope[where]), paths[index]
            checked += abs(slope[where]) > 1e-2
    assert checked >= 8  # of those, most are far above the noise
