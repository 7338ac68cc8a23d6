"""Q-tuning and its baselines: what a task leaves alone, what its copies are, how tasks are scored.

Budget of a float32 pass through three blocks of width 32 in another program, or with masked rows in
other places: 50 eps = 6e-6 of features near 1; of scores, whose routing divides by 0.1, 1e-4.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qkd_jax
from qkd_jax.engine import verbs
from qkd_jax.engine.checks import check_batch
from qkd_jax.engine.sharding import engine_of
from qkd_jax.errors import ConfigError
from qkd_jax.learners.q_tuning import learner
from qkd_jax.learners.q_tuning.queue import principal_rows, random_rows
from qkd_jax.learners.shape import Context, learner_of
from qkd_jax.learners.state import split
from qkd_jax.nn.encode import encode_pooled
from qkd_jax.nn.inputs import Raw
from qkd_jax.nn.inserts import Inserts
from qkd_jax.protocol.tasks import Task
from qkd_jax.settings.sections import TrainConfig

BUDGET = 6e-6
ADAM = ("train.optimizer=adam", "train.learning_rate=0.03", "train.weight_decay=0")
# Five tasks, room for two prompts: the queue is full from the third task on.
TASKS = tuple(Task(t, classes) for t, classes in enumerate([(4, 1), (0,), (5, 2), (3,), (6, 7)]))
SHAPES = ("num_classes=8", "max_tasks=5", "max_task_classes=2")


def config_of(texts, method, *changes):
    sizes = [f"{method}.prompt_length=2", f"{method}.reparametrise=4"]
    if method == "q_tuning":
        sizes += ["q_tuning.queue_size=2", "q_tuning.prefix_length=3"]
        sizes += ["q_tuning.retention_weight=0.5", "q_tuning.retention_hidden=8"]
    return texts.config(f"method={method}", *SHAPES, *ADAM, *sizes, *changes)


def learned(texts, method, *changes, tasks=TASKS):
    return texts.run(texts.backbone, config_of(texts, method, *changes), tasks)


@pytest.fixture(scope="module")
def history(texts):
    return learned(texts, "q_tuning")


@pytest.fixture(scope="module")
def progressive(texts):
    return learned(texts, "prog_prompt")


def raw(batch):
    return Raw({name: jnp.asarray(batch[name]) for name in ("token_ids", "token_mask")})


def inputs(texts, seed=5, tasks=TASKS):
    """Texts of every task, [2 for each]."""
    parts = [texts.batch(task, seed, 2) for task in tasks]
    return {n: np.concatenate([p[n] for p in parts]) for n in ("token_ids", "token_mask")}


def features(texts, state):
    return np.asarray(verbs.slot_features(state, inputs(texts)))


def alone(rows):
    return rows


def context(size=4):
    return Context(jax.random.split(jax.random.key(0), size), jnp.ones(size, bool), alone)


def test_old_prompts_stay_as_they_are_until_they_leave(history):
    """The new prompt is the one that was trained; the rest is the last queue, trimmed when full."""
    before = np.zeros((4, 32), np.float32)
    for task, stage in enumerate(history):
        prompt = learner.prompt_of(stage.trained.trainable)
        queue = np.asarray(stage.ended.memory["queue"])
        assert queue.shape == (4, 32)
        np.testing.assert_allclose(queue[:2], prompt, atol=1e-6)
        kept = before[:2] if task < 2 else principal_rows(before, 2)
        np.testing.assert_allclose(queue[2:], kept, atol=2e-6)
        np.testing.assert_array_equal(queue[2:], stage.begun.memory["queue"][2:])
        before = queue


@pytest.mark.parametrize("eviction", ["fifo", "random"])
def test_other_rows_can_leave(texts, eviction):
    first, second, third = learned(texts, "q_tuning", f"q_tuning.eviction={eviction}")[:3]
    full, kept = np.asarray(second.ended.memory["queue"]), third.begun.memory["queue"][2:]
    if eviction == "fifo":
        np.testing.assert_array_equal(kept, full[:2])
        np.testing.assert_array_equal(full[2:], first.ended.memory["queue"][:2])
    else:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(7), 1), 2)
        np.testing.assert_array_equal(kept, random_rows(jax.random.fold_in(key, 5), full, 2))


def test_a_task_starts_with_words_and_with_a_reweighting_that_changes_nothing(texts, history):
    table = np.asarray(texts.backbone.params["token"])
    for before, stage in zip((None, *history), history, strict=False):
        begun = stage.begun.trainable
        assert (begun["prompt"][:, None] == table[None]).all(2).any(1).all()
        np.testing.assert_array_equal(learner.prompt_of(begun), begun["prompt"])
        assert all((leaf == 1).all() for leaf in jax.tree.leaves(begun["reweighting"]))
        moved = np.abs(stage.trained.trainable["reweighting"]["u"] - 1)
        # Room that is not filled gets no gradient; a task of one class has none at all but for
        # what is retained, which does not read the queue.
        assert (moved[:2] > 0).all() == (len(TASKS[int(stage.begun.task)].classes) > 1)
        assert not moved[2:].any() or int(stage.begun.task) > 0
        if before is not None:  # the prefix goes on
            np.testing.assert_array_equal(before.ended.trainable["prefix"], begun["prefix"])


def test_a_reweighting_of_ones_leaves_prog_prompt_as_it_is(texts, progressive):
    """Bit for bit, in the third task with two old prompts in the queue."""
    old = progressive[2].begun
    plain = ("q_tuning.queue_size=5", "q_tuning.prefix_length=0", "q_tuning.retention_weight=0")
    config = config_of(texts, "q_tuning", *plain)
    new = qkd_jax.init_state(jax.random.key(7), texts.backbone, config)
    ones = new.trainable["reweighting"]
    assert ones["u"].shape == (10,) and ones["v"].shape == (32,)
    new = new.replace(
        task=old.task,
        task_classes=old.task_classes,
        task_of_class=old.task_of_class,
        trainable={**old.trainable, "reweighting": ones},
        memory={**new.memory, "queue": old.memory["queue"]},
    )
    batch = texts.batch(TASKS[2])

    @jax.jit
    def both(old, new, batch):
        label = {"label": batch["label"]}
        return [learner.loss(s.trainable, s, raw(batch), label, context()) for s in (old, new)]

    without, with_ones = both(old, new, batch)
    assert without.keys() == with_ones.keys() and (without["loss"] > 0).all()
    jax.tree.map(np.testing.assert_array_equal, with_ones, without)


def test_the_text_is_read_behind_prefix_and_reweighted_queue(texts, history):
    """The slot of the last task against the insert written out, and against its loss."""
    state, stage = history[2].ended, history[2].trained.trainable
    queue, own = np.asarray(state.memory["queue"]), stage["reweighting"]
    rows = np.vstack([stage["prefix"], queue * np.outer(own["u"], own["v"])])
    batch = inputs(texts)
    expected = encode_pooled(texts.backbone, raw(batch), Inserts(prompt=jnp.asarray(rows)))
    found = features(texts, state)[:, 2]
    np.testing.assert_allclose(found, expected, atol=BUDGET)
    plain = encode_pooled(texts.backbone, raw(batch))
    assert np.abs(found - plain).max() > 1e-2
    # After the first task half of the queue is free.
    early = history[0].ended
    short = Inserts(prompt=early.memory["models"][0][:5])
    expected = encode_pooled(texts.backbone, raw(batch), short)
    np.testing.assert_allclose(features(texts, early)[:, 0], expected, atol=BUDGET)


@pytest.mark.parametrize("method", ["q_tuning", "prog_prompt", "prompt_per_task"])
def test_what_a_task_left_is_read_as_it_was_whatever_comes_later(texts, request, method):
    """By copies, or in one queue by passing over the newer prompts."""
    known = {"q_tuning": "history", "prog_prompt": "progressive"}.get(method)
    stages = request.getfixturevalue(known) if known else learned(texts, method)
    last, models = features(texts, stages[-1].ended), stages[-1].ended.memory["models"]
    assert len(models) == (1 if method == "prog_prompt" else 5)
    for task, stage in enumerate(stages):
        np.testing.assert_allclose(
            last[:, task], features(texts, stage.ended)[:, task], atol=BUDGET
        )
        # Within the task the order of classes stays too.
        columns = np.array(TASKS[task].classes)
        then, now = (
            np.asarray(qkd_jax.predict(s.ended, inputs(texts)))[:, columns]
            for s in (stage, stages[-1])
        )
        inside = [scores - scores[:, :1] for scores in (then, now)]
        np.testing.assert_allclose(*inside, atol=1e-4)
    assert np.abs(last[:, 0] - last[:, 2]).max() > 1e-2


@pytest.mark.parametrize(
    "method", [pytest.param("q_tuning", marks=pytest.mark.slow), "prog_prompt"]
)
def test_the_last_model_can_stand_for_all(texts, request, method):
    """`final`: one model in memory, one feature for every head, which later tasks change."""
    stages = learned(texts, method, f"{method}.evaluation=final", tasks=TASKS[:3])
    known = request.getfixturevalue("history" if method == "q_tuning" else "progressive")
    state = stages[-1].ended
    assert state.memory["models"].shape[0] == 1
    assert learner_of(state.config).slots.score(2) == (2,)
    found = features(texts, state)
    # Training does not depend on it, so the last feature is the one under the last copy.
    np.testing.assert_allclose(found[:, 2], features(texts, known[2].ended)[:, 2], atol=2e-5)
    assert not found[:, :2].any()
    scores = np.asarray(qkd_jax.predict(state, inputs(texts)))
    rows, bias = np.float64(state.memory["rows"]), np.float64(state.memory["bias"])
    logits = found[:, 2] @ rows.T + bias
    np.testing.assert_allclose(scores[:, 4] - scores[:, 1], logits[:, 4] - logits[:, 1], atol=1e-4)


def expected_scores(state, slot_features):
    """Loops over texts and tasks in float64."""
    rows, bias = np.float64(state.memory["rows"]), np.float64(state.memory["bias"])
    tasks, temperature = TASKS[: int(state.task) + 1], state.config.q_tuning.temperature
    scores = np.full((len(slot_features), 8), -np.inf)
    relevance = np.zeros((len(slot_features), 5))
    for text, own in enumerate(np.float64(slot_features)):
        uncertainty, predictions = [], []
        for task in tasks:
            columns = list(task.classes)
            logits = rows[columns] @ own[task.index] + bias[columns]
            p = np.exp(logits - logits.max())
            predictions.append(p / p.sum())
            nats = -np.sum(predictions[-1] * np.log(predictions[-1]))
            uncertainty.append(nats / np.log(len(columns)) if len(columns) > 1 else None)
        informed = [u for u in uncertainty if u is not None]
        filled_in = [np.mean(informed) if u is None else u for u in uncertainty]
        weights = np.exp(-np.array(filled_in) / temperature)
        relevance[text, : len(tasks)] = weights / weights.sum()
        for task, p in zip(tasks, predictions, strict=True):
            scores[text, list(task.classes)] = np.log(relevance[text, task.index] * p)
    return scores, relevance


@pytest.mark.parametrize("last", [0, 2, 4])
def test_scores_are_relevance_times_the_prediction_of_each_head(texts, history, last):
    state = history[last].ended
    scores, relevance = verbs.predict_with_relevance(state, inputs(texts))
    expected = expected_scores(state, features(texts, state))
    np.testing.assert_allclose(scores, expected[0], atol=1e-4)
    np.testing.assert_allclose(relevance, expected[1], atol=1e-5)
    assert last == 0 or np.ptp(np.asarray(relevance)[:, 0]) > 1e-3


def test_tasks_of_one_class_alone_share_the_relevance(texts):
    ones = tuple(Task(t, (t,)) for t in range(3))
    state = learned(texts, "q_tuning", tasks=ones)[-1].ended
    scores, relevance = verbs.predict_with_relevance(state, inputs(texts))
    np.testing.assert_allclose(np.asarray(relevance)[:, :3], 1 / 3, atol=1e-6)
    np.testing.assert_allclose(np.asarray(scores)[:, :3], -np.log(3), atol=1e-6)


def test_retention_trains_prefix_and_critic_alone(texts, history):
    """The teacher is what the last task left: neither it nor the queue nor the head gets a
    gradient; in the first task there is no teacher.
    """
    batch = texts.batch(TASKS[2])
    label = {"label": batch["label"]}

    @jax.jit
    def gradient(state):
        def retained(trainable, memory):
            own = state.replace(memory=memory)
            return jnp.mean(
                learner.loss(trainable, own, raw(batch), label, context())["loss_retention"]
            )

        return jax.grad(retained, argnums=(0, 1))(state.trainable, state.memory)

    trained, memory = gradient(history[2].trained)
    size = {
        name: max(np.abs(leaf).max() for leaf in jax.tree.leaves(part))
        for name, part in trained.items()
    }
    assert {name for name, value in size.items() if value > 0} == {"prefix", "critic"}
    assert all(not np.asarray(leaf).any() for leaf in jax.tree.leaves(memory))
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(gradient(history[0].trained)))


def test_the_loss_is_cross_entropy_plus_the_weighted_estimate(texts, history):
    """The estimate reads the model before the queue was trimmed, and the prefix alone."""
    state, batch = history[2].trained, texts.batch(TASKS[2])
    head, prefix = state.trainable["head"], state.trainable["prefix"]

    def prediction(rows):
        found = encode_pooled(texts.backbone, raw(batch), Inserts(prompt=rows))
        return jax.nn.softmax(found @ head["rows"].T + head["bias"][None])

    terms = jax.jit(lambda s, b: learner.loss(s.trainable, s, raw(b), b, context()))(state, batch)
    teacher = prediction(history[1].ended.memory["models"][1])
    expected = -learner.mutual_information(
        state.trainable["critic"], prediction(prefix), teacher, jnp.ones(4, bool), alone
    )
    np.testing.assert_allclose(terms["loss_retention"], expected, atol=1e-5)
    total = terms["loss_ce"] + 0.5 * terms["loss_retention"]
    np.testing.assert_allclose(terms["loss"], total, rtol=1e-6)


@pytest.mark.parametrize("evaluation", ["snapshot", pytest.param("final", marks=pytest.mark.slow)])
def test_kept_features_stand_for_the_teacher(texts, evaluation):
    """A run computes the last model's features of a task's texts once, before its first step."""
    stages = learned(texts, "q_tuning", f"q_tuning.evaluation={evaluation}", tasks=TASKS[:3])
    state, batch = stages[2].begun, texts.batch(TASKS[2])
    slots = learner_of(state.config).slots
    assert (slots.loss(0), slots.loss(2)) == ((), (1,))
    fields = {name: batch[name] for name in ("token_ids", "token_mask")}
    kept = verbs.slot_features(state, fields, slots.loss(2))

    @jax.jit
    def both(state, batch, kept):
        batches = batch, {**batch, "features": kept}
        return [learner.loss(state.trainable, state, raw(b), b, context()) for b in batches]

    plain, with_kept = both(state, batch, kept)
    assert np.abs(plain["loss_retention"]).max() > 0.1
    for name, value in plain.items():
        np.testing.assert_allclose(with_kept[name], value, atol=2e-5)


@pytest.mark.slow
def test_padding_and_devices_change_nothing(texts, history):
    """Two steps in the third task, 5 real rows of 16, on 1 and on 8 devices, and without padding.

    Adam divides by the gradient's size, so rounding grows where it is near zero: what is compared
    are losses, and the update as a whole.
    """
    mask = np.isin(np.arange(16), [0, 1, 2, 6, 11])
    start, results = history[2].begun, []
    for devices, rows in ((1, mask), (8, mask), (1, mask[mask])):
        engine = engine_of(TrainConfig(devices=devices))
        held, moving = split(engine.place(jax.tree.map(jnp.copy, start)))
        losses = []
        for seed in range(2):
            batch = texts.batch(TASKS[2], seed, 16)
            if len(rows) < 16:
                batch = {name: array[mask] for name, array in batch.items()}
            batch = check_batch(start, {**batch, "mask": rows})
            moving, values = engine.step(held, moving, batch)
            losses.append([float(values[n]) for n in ("loss", "loss_ce", "loss_retention")])
        results.append((losses, jax.device_get(moving.trainable)))
    (expected, one), *others = results
    for losses, other in others:
        np.testing.assert_allclose(losses, expected, atol=2e-5)
        for name in ("prompt", "prefix", "head"):
            pairs = zip(jax.tree.leaves(other[name]), jax.tree.leaves(one[name]), strict=True)
            assert all(np.abs(a - b).max() < 1e-3 for a, b in pairs)
    assert np.abs(one["prompt"] - start.trainable["prompt"]).max() > 0.03


def test_shapes_are_those_of_the_start_and_the_step_compiles_once(texts):
    """So a checkpoint of any task restores into a new state."""
    config, engine = config_of(texts, "q_tuning"), engine_of(TrainConfig(devices=1))
    state = qkd_jax.init_state(jax.random.key(7), texts.backbone, config)
    before = engine.compilations
    shapes = jax.tree.map(lambda a: (a.shape, a.dtype), state)
    for task in TASKS:
        state = verbs.begin_task(state, task, 2)
        held, moving = split(state)
        moving, _ = engine.step(held, moving, check_batch(state, texts.batch(task)))
        state = verbs.end_task(verbs.join(held, moving), [texts.batch(task)])
        assert jax.tree.map(lambda a: (a.shape, a.dtype), state) == shapes
    assert engine.compilations == before + 1


def test_settings_that_do_not_fit_are_named(tiny, texts):
    for method in ("q_tuning", "prog_prompt", "prompt_per_task"):
        with pytest.raises(ConfigError, match=f"token_ids, as {method} needs, .* reads image"):
            qkd_jax.init_state(jax.random.key(0), tiny.backbone, config_of(texts, method))
    long = config_of(texts, "q_tuning", "q_tuning.prompt_length=30")
    with pytest.raises(ConfigError, match=r"at most 56 rows .* found 63: 3 of the prefix and 2"):
        qkd_jax.init_state(jax.random.key(0), texts.backbone, long)
    with pytest.raises(ConfigError, match=r"retention_weight: expected 0 with .*prefix_length=0"):
        config_of(texts, "q_tuning", "q_tuning.prefix_length=0")
    with pytest.raises(ConfigError, match="found one of q_tuning"):
        qkd_jax.override(qkd_jax.Config(method="prog_prompt"), "q_tuning.eviction=fifo")
    with pytest.raises(ConfigError, match="queue_size"):
        qkd_jax.override(qkd_jax.Config(method="prog_prompt"), "prog_prompt.queue_size=3")
