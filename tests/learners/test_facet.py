"""FACET against loops in NumPy float64.

Error budget: features of 12 numbers near 1, of which sums over 12 squares are formed, and 20
cosines: below 20 times 100 eps = 2e-4, relative to the size of the result where that is large.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qkd_jax
from qkd_jax.errors import ConfigError
from qkd_jax.learners import facet
from qkd_jax.learners.features import pooled_feature
from qkd_jax.learners.shape import Context, learner_of
from qkd_jax.nn.inputs import Raw
from qkd_jax.protocol.tasks import Task

BUDGET = 2e-4
TASKS = (Task(0, (4, 1)), Task(1, (0, 3)), Task(2, (5,)))  # three, two of equal size
SETTINGS = ("method=facet", "adapter.dropout=0.0", "facet.rank=2", "facet.auxiliary=0.5")


@pytest.fixture(scope="module")
def history(tiny):
    return tiny.run(tiny.backbone, tiny.config(*SETTINGS), tasks=TASKS)


@pytest.fixture(scope="module")
def made_up(history):
    """The state after the last task with adapter, codes and heads that differ widely."""
    state, generator = history[2].ended, np.random.default_rng(0)

    def fill(array):
        return jnp.asarray(np.float32(generator.normal(size=array.shape)))

    trainable = {**state.trainable, **{n: jax.tree.map(fill, state.trainable[n]) for n in PARTS}}
    snapshot = jax.tree.map(fill, state.memory["snapshot"])
    memory = {**state.memory, "snapshot": snapshot, "auxiliary": fill(state.memory["auxiliary"])}
    return state.replace(trainable=trainable, memory=memory)


PARTS = ("shared", "codes")


@jax.jit
def encode_by(state, parts, images, tasks):
    """Features and class tokens under the codes of `tasks` [L], or [L, B]."""
    parts = {name: parts[name] for name in PARTS}
    features, seen = facet.encode_by(state, parts, Raw({"image": images}), {"task": tasks})
    return features, seen["token"]


CONTEXT = Context(jax.random.split(jax.random.key(0), 8), jnp.ones(8, bool), lambda x: x)


def images_of():
    """Eight images of four patches in one colour each, so that class tokens differ."""
    colours = np.random.default_rng(1).random((8, 2, 1, 2, 1, 3)) > 0.5
    shape = (8, 2, 4, 2, 4, 3)
    return jnp.asarray(np.float32(np.broadcast_to(colours, shape).reshape(8, 8, 8, 3)))


def in_second_task(state):
    """The state as if the third task had not come."""
    return state.replace(
        task=jnp.int32(1),
        step=jnp.int32(3),
        task_classes=jnp.array([0, 3], jnp.int32),
        task_of_class=state.task_of_class.at[5].set(-1),
    )


def log_softmax(logits):
    logits = logits - logits.max()
    return logits - np.log(np.exp(logits).sum())


def cosines(tokens, rows):
    """20 cos of one class token [D] and rows [M, D]."""
    tokens, rows = np.float64(tokens), np.float64(rows)
    return 20 * rows @ tokens / (np.linalg.norm(rows, axis=1) * np.linalg.norm(tokens))


def entropies(state, level, token):
    """[T]: over each task's own classes."""
    found = np.full(4, np.inf)
    for task in TASKS[: int(state.task) + 1]:
        rows = state.memory["auxiliary"][level, task.index, : len(task.classes)]
        log = log_softmax(cosines(token, rows))
        found[task.index] = -(np.exp(log) * log).sum()
    return found


def test_the_loss_term_by_term(made_up):
    """CE + 0.5 mean over blocks of CE of their heads + 2 |CLS_j(snapshot) - CLS_j|^2."""
    state, images, labels = in_second_task(made_up), images_of(), np.resize([0, 3], 8)
    terms = jax.jit(
        lambda s, x, y: facet.loss(s.trainable, s, Raw({"image": x}), {"label": y}, CONTEXT)
    )(state, images, jnp.asarray(labels))
    features, tokens = encode_by(state, state.trainable, images, jnp.array([1, 1]))
    under_old = jnp.array([0, 0])  # the only old task
    now, _ = encode_by(state, state.trainable, images, under_old)
    then, _ = encode_by(state, state.memory["snapshot"], images, under_old)
    rows, scale = state.trainable["head"]["rows"], float(state.trainable["head"]["scale"])
    for image, label in enumerate(labels):
        own = [0, 3].index(label)
        expected = -log_softmax(scale / 20 * cosines(features[image], rows))[own]
        blocks = [
            -log_softmax(cosines(tokens[level, image], state.trainable["auxiliary"]["rows"][level]))
            for level in range(2)
        ]
        block = np.mean([each[own] for each in blocks])
        change = np.square(np.float64(then[image]) - np.float64(now[image])).sum()
        assert change > 0.1
        for name, value in {
            "loss_ce": expected,
            "loss_auxiliary": block,
            "loss_consistency": change,
            "loss": expected + 0.5 * block + 2 * change,
        }.items():
            np.testing.assert_allclose(terms[name][image], value, rtol=BUDGET, atol=BUDGET)


def test_the_first_task_has_nothing_to_be_consistent_with(made_up):
    state = made_up.replace(task=jnp.int32(0))
    images = Raw({"image": images_of()})
    found = jax.jit(lambda s: facet.inconsistency(s.trainable, s, images))(state)
    assert not np.asarray(found).any()


def test_the_old_task_is_drawn_anew_for_each_batch(made_up):
    draw = jax.jit(lambda s, step: facet.drawn_task(s.replace(step=step)))
    drawn = [int(draw(made_up, jnp.int32(step))) for step in range(20)]
    assert set(drawn) == {0, 1}  # of tasks before the third


def test_only_what_may_change_of_older_tasks_does(tiny, history):
    """Codes of old tasks move by the consistency, heads of blocks never."""
    first, last = history[0].ended, history[2].ended
    np.testing.assert_array_equal(
        first.memory["auxiliary"][:, 0], first.trainable["auxiliary"]["rows"]
    )
    np.testing.assert_array_equal(last.memory["auxiliary"][:, 0], first.memory["auxiliary"][:, 0])
    before, after = (h.trainable["codes"] for h in (history[1].begun, history[1].trained))
    moved = {
        n: np.abs(np.moveaxis(after[n] - before[n], 1, 0)).reshape(4, -1).max(1) > 0 for n in before
    }
    # After one step from equal models only the second one has a distance, to which s and U belong.
    assert moved["diagonal"].tolist() == moved["left"].tolist() == [True, True, False, False]
    for kept, now in zip(*(jax.tree.leaves(t) for t in snapshots(history)), strict=True):
        np.testing.assert_array_equal(kept, now)


def snapshots(history):
    """(what the second task left, the snapshot in the third)."""
    parts = {name: history[1].ended.trainable[name] for name in PARTS}
    return parts, history[2].trained.memory["snapshot"]


def test_gradients_that_are_switched_off(made_up):
    """Of the consistency on old codes, and of the blocks' heads on the adapter."""
    state, images, labels = in_second_task(made_up), images_of(), jnp.array([0, 3] * 4)
    off = ("facet.train_old_codes=false", "facet.auxiliary_gradient=false")
    without = state.replace(config=qkd_jax.override(state.config, *off))

    @jax.jit
    def gradients(state):
        def terms(trainable):
            found = facet.loss(trainable, state, Raw({"image": images}), {"label": labels}, CONTEXT)
            return jnp.stack([found[f"loss_{name}"].sum() for name in ("consistency", "auxiliary")])

        return jax.jacrev(terms)(state.trainable)

    def sizes(found):
        return {
            name: [
                max(float(jnp.abs(leaf[i]).max()) for leaf in jax.tree.leaves(part)) for i in (0, 1)
            ]
            for name, part in found.items()
        }

    on, off = sizes(gradients(state)), sizes(gradients(without))
    assert on["codes"][0] > 0 and on["shared"][1] > 0
    assert off["codes"] == [0, 0] and off["shared"][1] == 0
    assert off["shared"][0] > 0 and off["auxiliary"][1] > 0


def test_every_block_takes_the_code_of_least_entropy(made_up):
    """Over the classes of each task alone, two of which have come."""
    state, images = in_second_task(made_up), images_of()
    features, relevance = jax.jit(facet.routed)(state, Raw({"image": images}))
    chosen = np.zeros((2, len(images)), int)
    for level in range(2):  # the class token of a block depends on the codes before it alone
        _, tokens = encode_by(state, state.trainable, images, jnp.asarray(chosen))
        doubt = np.stack([entropies(state, level, token) for token in tokens[level]])
        apart = np.sort(doubt, axis=1)[:, :2]
        assert (apart[:, 1] - apart[:, 0] > BUDGET).all()
        chosen[level] = doubt.argmin(axis=1)
    assert 0 < chosen.mean() < 1 and (chosen[0] != chosen[1]).any()
    expected, _ = encode_by(state, state.trainable, images, jnp.asarray(chosen))
    np.testing.assert_allclose(features, expected, rtol=BUDGET, atol=BUDGET)
    shares = np.stack([(chosen == task).mean(axis=0) for task in range(4)], axis=1)
    np.testing.assert_array_equal(relevance, np.float32(shares))


def test_one_decision_for_all_blocks(made_up):
    """`routing=image`: the least mean over blocks of the entropy of a task's heads under its code,
    for several heads; a third task of one class, of which no head can doubt, always wins.
    """
    config, images = qkd_jax.override(made_up.config, "facet.routing=image"), images_of()
    parts, chosen = made_up.trainable, []
    under = [encode_by(made_up, parts, images, jnp.array([task, task])) for task in range(3)]
    for seed in range(4):
        state = (in_second_task(made_up) if seed else made_up).replace(config=config)
        heads = np.random.default_rng(seed).normal(size=state.memory["auxiliary"].shape)
        state = state.replace(memory={**state.memory, "auxiliary": jnp.asarray(np.float32(heads))})
        features, relevance = jax.jit(facet.routed)(state, Raw({"image": images}))
        for image in range(len(images)):
            doubt = [
                np.mean([entropies(state, level, t[level, image])[task] for level in range(2)])
                for task, (_, t) in enumerate(under[: int(state.task) + 1])
            ]
            best = int(np.argmin(doubt))
            np.testing.assert_array_equal(relevance[image], np.eye(4)[best])
            np.testing.assert_allclose(
                features[image], under[best][0][image], rtol=BUDGET, atol=BUDGET
            )
            chosen.append(best)
    assert chosen[:8] == [2] * 8 and set(chosen[8:]) == {0, 1}


def test_steps_are_compiled_once(history):
    """The types of what a step reads are the same before the first task and after the last."""
    first, last = (
        jax.tree.map(lambda leaf: (leaf.dtype, leaf.weak_type), (s.trainable, s.memory))
        for s in (history[0].begun, history[2].ended)
    )
    assert first == last


def test_slots_and_predictions_agree(tiny, history):
    """A classifier in closed form reads what the own head reads."""
    state, images = history[2].ended, tiny.batch(TASKS[1], 3)["image"]
    scores = qkd_jax.predict(state, images)
    features = qkd_jax.engine.verbs.slot_features(state, images)
    found = learner_of(state.config).score(state, features)[0]
    np.testing.assert_allclose(found, scores, rtol=BUDGET, atol=BUDGET)
    assert (np.isfinite(scores).sum(axis=1) == 5).all()


@pytest.mark.parametrize("diagonal", ["one", "zero"])
def test_an_adapter_that_was_never_trained_changes_nothing(tiny, diagonal):
    config = tiny.config(*SETTINGS, f"facet.diagonal={diagonal}")
    state = qkd_jax.init_state(jax.random.key(0), tiny.backbone, config)
    images = images_of()
    found, _ = encode_by(state, state.trainable, images, jnp.array([2, 2]))
    frozen = pooled_feature(state, Raw({"image": images}))
    np.testing.assert_allclose(found, frozen, atol=BUDGET)


@pytest.mark.parametrize(
    "setting", ["rank=0", "consistency=-1.0", "auxiliary=-1.0", "auxiliary_scale=0.0"]
)
def test_settings_out_of_range_are_named(tiny, setting):
    with pytest.raises(ConfigError, match=f"facet.{setting.split('=')[0]}: expected"):
        tiny.config("method=facet", "facet." + setting)
