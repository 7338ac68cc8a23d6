"""A circuit that learns from a teacher: its numbers, its loss in float64, its tasks, its noise.

Error budget: expectations 2e-5 (see tests/quantum), times a head of rows below 1: 1e-4 for logits
and losses.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qkd_jax
from qkd_jax.engine.verbs import slot_features, teacher_config, teacher_outputs
from qkd_jax.errors import ConfigError
from qkd_jax.learners import qd_llm
from qkd_jax.learners.shape import learner_of
from qkd_jax.nn.encode import encode
from qkd_jax.nn.inputs import Raw
from qkd_jax.nn.losses import jensen_shannon
from qkd_jax.quantum import Noise, apply, circuit_parameters, classifier_circuit, expectation_z
from qkd_jax.settings.config import Config, Shapes, override
from qkd_jax.weights.load import tiny_random_text

BUDGET = 1e-4
STUDENTS = ("circuit", "cos", "tanh")


def config_of(texts, *settings):
    plain = ("qd_llm.qubits=5", "qd_llm.angle_range=7.0", "protocol.kind=incremental")
    return texts.config("method=qd_llm", "train.momentum=0.0", *plain, *settings)


def new_state(texts, *settings):
    config = config_of(texts, *settings)
    return qkd_jax.init_state(jax.random.key(7), texts.backbone, config, teacher=texts.backbone)


def learned(texts, state, task, steps=2):
    """begun and ended state of one task, after the teacher has learned it too."""
    batches = [texts.batch(task, step) for step in range(steps)]
    if state.teacher is not None:
        _, teacher = learned(texts, state.teacher, task, steps)
        state = state.taught_by(teacher)
    state = qkd_jax.begin_task(state, task)
    begun = texts.copy(state)
    for batch in batches:
        state, _ = qkd_jax.train_task(state, batch)
    return begun, texts.copy(qkd_jax.end_task(state, batches))


@pytest.fixture(scope="module")
def run(texts):
    """student -> begun and ended state of every task, with a teacher."""

    def stages(student):
        state, found = new_state(texts, f"qd_llm.student={student}", "qd_llm.js=proper"), []
        for task in texts.tasks:
            begun, state = learned(texts, state, task)
            found.append((begun, state))
            state = texts.copy(state)
        return found

    return {student: stages(student) for student in STUDENTS}


@pytest.mark.parametrize(("classes", "total"), [(2, 8_627), (4, 8_651)])
def test_the_numbers_of_the_paper(classes, total):
    """With BERT's width; the twins have no circuit."""
    shapes = Shapes(num_classes=classes, max_tasks=1, max_task_classes=classes)
    backbone = tiny_random_text(8)
    wide = backbone.replace(spec=type(backbone.spec)(**{**vars(backbone.spec), "width": 768}))
    for student in STUDENTS:
        config = override(Config(method="qd_llm", shapes=shapes), f"qd_llm.student={student}")
        trainable, _ = qd_llm.init(jax.random.key(0), wide, config)
        found = sum(leaf.size for leaf in jax.tree.leaves(trainable))
        assert found == total - 144 * (student != "circuit")


def softmax(values):
    values = np.exp(values - values.max(axis=-1, keepdims=True))
    return values / values.sum(axis=-1, keepdims=True)


def kl(p, q):
    return np.sum(p * (np.log(p) - np.log(q)), axis=-1)


def loss_in_float64(logits, teacher, labels, alpha, tau, js):
    """The authors' `forward_fn` for one batch, with logits [B, M] of the task's classes."""
    logits, teacher = np.float64(logits), np.float64(teacher)
    ce = -np.log(softmax(logits))[np.arange(len(labels)), labels]
    p, q = softmax(logits / tau), softmax(teacher / tau)
    total = (1 - alpha) * ce + alpha * tau**2 * kl(q, p)
    if js == "repo":
        again_p, again_q = softmax(np.log(p)), softmax(q)
        mean = 0.5 * (again_p + again_q)
        # `KLDivLoss(reduction="mean")` divides by the number of elements.
        total += alpha * 0.5 * (kl(mean, again_p) + kl(mean, again_q)) / logits.shape[1]
    elif js == "proper":
        mean = 0.5 * (p + q)
        total += alpha * 0.5 * (kl(p, mean) + kl(q, mean))
    return total.mean()


def measured_in_float64(state, feature):
    """m [B, Q] by the definition; the circuit by the gate-by-gate simulator."""
    trainable, settings = state.trainable, state.config.qd_llm
    reduce = jax.tree.map(np.float64, trainable["reduce"])
    a = np.float64(feature) @ reduce["kernel"] + reduce["bias"]
    if settings.student == "tanh":
        return np.tanh(a)
    least, largest = a.min(1, keepdims=True), a.max(1, keepdims=True)
    x = settings.angle_range * (a - least) / (largest - least + 1e-9)
    if settings.student == "cos":
        return np.cos(x)
    circuit = classifier_circuit(settings.qubits)
    one = jax.jit(
        lambda x: expectation_z(apply(circuit, circuit_parameters(x, trainable["angles"])))
    )
    return np.stack([one(jnp.asarray(row, jnp.float32)) for row in x])


@pytest.mark.parametrize(
    ("student", "js"),
    [
        ("cos", "proper"),
        *(
            pytest.param(*pair, marks=pytest.mark.slow)
            for pair in (("circuit", "repo"), ("circuit", "off"), ("tanh", "repo"), ("tanh", "off"))
        ),
    ],
)
def test_the_loss_is_that_of_the_paper(texts, student, js):
    settings = (f"qd_llm.student={student}", f"qd_llm.js={js}", "qd_llm.alpha=0.3")
    state = new_state(texts, *settings, "qd_llm.temperature=3.0")
    task, batch = texts.tasks[0], texts.batch(texts.tasks[0])
    _, teacher = learned(texts, state.teacher, task)
    state = qkd_jax.begin_task(state.taught_by(teacher), task)
    inputs = {name: batch[name] for name in texts.backbone.spec.fields}
    feature = slot_features(state, inputs, (0,))[:, 0, : texts.backbone.spec.width]
    head = jax.tree.map(np.float64, state.trainable["head"])
    logits = measured_in_float64(state, feature) @ head["rows"].T + head["bias"]
    own = [task.classes.index(c) for c in batch["label"]]
    taught = np.asarray(qkd_jax.predict(teacher, inputs))[:, list(task.classes)]
    expected = loss_in_float64(logits, taught, own, 0.3, 3.0, js)
    outputs = teacher_outputs(state, inputs)
    for given in ({}, {"teacher": outputs}):  # computed in the step, or kept by a run
        _, metrics = qkd_jax.train_task(texts.copy(state), {**batch, **given})
        np.testing.assert_allclose(float(metrics["loss"]), expected, rtol=0, atol=BUDGET)


def test_without_a_teacher_the_loss_is_cross_entropy(texts):
    state = qkd_jax.begin_task(new_state(texts, "qd_llm.teacher=none"), texts.tasks[0])
    assert state.teacher is None
    _, metrics = qkd_jax.train_task(state, texts.batch(texts.tasks[0]))
    assert float(metrics["loss"]) == float(metrics["loss_ce"])
    assert "loss_distillation" not in metrics


def test_divergences_count_the_columns_alone():
    generator = np.random.default_rng(0)
    teacher, student = generator.normal(size=(2, 3, 4)).astype(np.float32)
    columns = np.array([[True, False, True, True]])
    kept = [values[:, columns[0]] for values in (np.float64(teacher), np.float64(student))]
    q, p = softmax(kept[0]), softmax(kept[1])
    mean = 0.5 * (p + q)
    expected = 0.5 * (kl(p, mean) + kl(q, mean))
    junk = teacher.copy()
    junk[:, 1] = -np.inf  # as a teacher's score of a class it has not seen
    for logits in (teacher, junk):
        found = jensen_shannon(jnp.asarray(logits), jnp.asarray(student), jnp.asarray(columns))
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-7)
    again_q, again_p = softmax(q), softmax(np.log(p))
    mean = 0.5 * (again_p + again_q)
    expected = 0.5 * (kl(mean, again_p) + kl(mean, again_q)) / 3
    form = qd_llm.repeated_softmax_js
    for logits in (teacher, junk):
        found = form(jnp.asarray(logits), jnp.asarray(student), jnp.asarray(columns))
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-7)
        gradient = jax.grad(lambda s, t=logits: jnp.sum(form(jnp.asarray(t), s, columns)))
        assert np.all(np.isfinite(gradient(jnp.asarray(student))))


@pytest.mark.parametrize("student", STUDENTS)
def test_scores_are_those_of_all_rows_on_what_is_measured(texts, run, student):
    stages = run[student]
    state, queries = stages[-1][1], texts.batch(texts.tasks[0], 9)
    inputs = {name: queries[name] for name in texts.backbone.spec.fields}
    feature = slot_features(state, inputs, (0,))[:, 0, : texts.backbone.spec.width]
    values = measured_in_float64(state, feature)
    scores = np.asarray(qkd_jax.predict(state, inputs))
    seen = sorted(c for task in texts.tasks for c in task.classes)
    expected = values @ np.float64(state.memory["rows"]).T + np.float64(state.memory["bias"])
    np.testing.assert_allclose(scores[:, seen], expected[:, seen], rtol=0, atol=BUDGET)
    assert (scores[:, [3, 6]] == -np.inf).all()


@pytest.mark.parametrize("student", STUDENTS)
def test_layers_go_on_and_the_rows_of_old_classes_stay(texts, run, student):
    for (_, before), (begun, after) in itertools.pairwise(run[student]):
        kept = {name: v for name, v in before.trainable.items() if name != "head"}
        for name, values in kept.items():
            for old, new in zip(
                jax.tree.leaves(values), jax.tree.leaves(begun.trainable[name]), strict=True
            ):
                np.testing.assert_array_equal(old, new)
        old = np.asarray(before.task_of_class) >= 0
        np.testing.assert_array_equal(before.memory["rows"][old], after.memory["rows"][old])
        assert not np.array_equal(before.trainable["head"]["rows"], begun.trainable["head"]["rows"])
    first, last = run[student][0][0].trainable, run[student][-1][1].trainable
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), first, last)
    assert all(jax.tree.leaves(moved)), moved


# One of each way to score: a method's one feature, one of many slots, several, a pass of its own.
@pytest.mark.parametrize(
    "method",
    [
        "ease",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("linear_probe", "coda_prompt", "finetune", "mos")
        ),
    ],
)
def test_any_method_can_be_the_teacher(texts, method):
    own = {"coda_prompt": ("coda_prompt.blocks=2", "coda_prompt.pool=8")}.get(method, ())
    config = texts.config(f"method={method}", *own)
    last = texts.run(texts.backbone, config, tasks=texts.tasks[:2])[-1].ended
    batch = texts.batch(texts.tasks[0], 9)
    fields = {name: jnp.asarray(batch[name]) for name in texts.backbone.spec.fields}
    found = jax.jit(lambda state, fields: qd_llm.scores_of(state, state.raw(fields)))(last, fields)
    expected = np.asarray(qkd_jax.predict(last, fields))
    np.testing.assert_array_equal(np.isfinite(found), np.isfinite(expected))
    seen = np.isfinite(expected)
    np.testing.assert_allclose(np.asarray(found)[seen], expected[seen], rtol=1e-4, atol=BUDGET)


def test_the_teacher_is_a_method_on_the_same_encoder(texts):
    config = config_of(texts, "qd_llm.teacher=finetune", "qd_llm.teacher_rate=0.3")
    teacher = teacher_config(config)
    assert (teacher.method, teacher.train.learning_rate) == ("finetune", 0.3)
    assert teacher.backbone == config.backbone and teacher.protocol == config.protocol
    assert teacher_config(config_of(texts)).train == config_of(texts).train
    assert teacher_config(config_of(texts, "qd_llm.teacher=none")) is None
    with pytest.raises(ConfigError, match="expected a method without a teacher, found qd_llm"):
        teacher_config(config_of(texts, "qd_llm.teacher=qd_llm"))
    with pytest.raises(ConfigError, match=r"method: expected one of .* found 'llama'"):
        teacher_config(config_of(texts, "qd_llm.teacher=llama"))


def test_what_a_student_alone_does_not_read_is_at_its_default(texts):
    learner = learner_of(config_of(texts))
    taught = config_of(texts, "qd_llm.alpha=0.9", "qd_llm.js=repo", "qd_llm.student=cos")
    assert learner.teacher.alone(taught) == config_of(
        texts, "qd_llm.teacher=none", "qd_llm.student=cos"
    )


def test_the_protocol_is_joint_unless_it_is_set():
    assert Config(method="qd_llm").protocol.kind == "joint"


def test_the_authors_feature_is_the_last_position_of_the_full_length(texts):
    """Whatever the length of the batch, and whatever stands in its padding."""
    state = new_state(texts, "qd_llm.feature=repo_last", "qd_llm.teacher=none")
    batch, backbone = texts.batch(texts.tasks[0]), texts.backbone
    ids, mask = np.asarray(batch["token_ids"]), np.asarray(batch["token_mask"])
    longest = mask.sum(1).max()
    full = np.zeros((2, len(ids), backbone.spec.num_tokens), int)
    full[0, :, : ids.shape[1]], full[1, :, : ids.shape[1]] = np.where(mask, ids, 0), mask
    fields = {"token_ids": jnp.asarray(full[0]), "token_mask": jnp.asarray(full[1] > 0)}
    expected = encode(backbone, Raw(fields), rows=(backbone.spec.num_tokens - 1,))[:, 0]
    for length in (longest, ids.shape[1]):
        junk = np.where(mask, ids, 1)[:, :length]
        inputs = {"token_ids": junk, "token_mask": mask[:, :length]}
        found = slot_features(state, inputs, (0,))[:, 0]
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    pooled = new_state(texts, "qd_llm.teacher=none")
    assert learner_of(pooled.config).slots.frozen == 0
    assert learner_of(state.config).slots.frozen is None


def test_scores_of_a_noisy_device_are_those_of_the_circuit_in_the_mean(texts, run, key):
    state, batch = run["circuit"][-1][1], texts.batch(texts.tasks[0], 9)
    inputs = {name: batch[name] for name in texts.backbone.spec.fields}
    features = slot_features(state, inputs, (0,))[:, 0, : texts.backbone.spec.width]
    exact = np.asarray(qkd_jax.predict(state, inputs))
    seen, shots = np.isfinite(exact), 20_000
    found = np.asarray(qd_llm.noisy_scores(key, state, features, Noise(), shots))
    # A score's deviation is at most the sum of its row's weights over sqrt(shots); five of them.
    weight = np.abs(np.asarray(state.memory["rows"])).sum(1).max()
    np.testing.assert_allclose(found[seen], exact[seen], rtol=0, atol=5 * weight / shots**0.5)
    # Where every bit is a coin toss, no text can be told from another.
    blind = np.asarray(qd_llm.noisy_scores(key, state, features, Noise(readout=0.5), shots))
    bias = np.broadcast_to(state.memory["bias"], blind.shape)
    np.testing.assert_allclose(blind[seen], bias[seen], rtol=0, atol=5 * weight / shots**0.5)
    with pytest.raises(ConfigError, match="expected circuit, which has shots, found cos"):
        qd_llm.noisy_scores(key, run["cos"][-1][1], features, Noise(), 10)
