"""Students of each host and form: forward, losses, what learns and what stays.

Budget of a repeated float32 pass through two blocks of width 12 in another program: 50 eps = 6e-6
of scores near 1; twice that against float64.
"""

import dataclasses
import itertools
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qkd_jax
from qkd_jax.learners import passes
from qkd_jax.learners.cdl.learner import HOSTS
from qkd_jax.learners.cdl.settings import FORMS, CdlSettings
from qkd_jax.learners.shape import Context, feature_width, learner_of
from qkd_jax.nn.backbone import Backbone
from qkd_jax.nn.encode import encode_all
from qkd_jax.nn.vit import ViTSpec

# The default suite has the authors' numbers (test_golden.py), what is refused (test_settings.py),
# and a run that is stopped in each phase (runs/test_teacher.py).
pytestmark = pytest.mark.slow

BUDGET = 6e-6
# Two classes in each task: with one, cross-entropy is constant and moves nothing.
TASKS = tuple(qkd_jax.Task(i, classes) for i, classes in enumerate([(4, 1), (0, 3), (5, 2)]))
SEEN = [4, 1, 0, 3, 5, 2]
REAL = Context(jax.random.split(jax.random.key(0), 4), jnp.ones(4, bool), lambda x: x)


@pytest.fixture(scope="module")
def coda(cdl):
    return cdl.run(cdl.config("coda_prompt", "kdp"), TASKS)


@pytest.fixture(scope="module")
def l2p(cdl):
    """The official L2P, whose prompts are tokens and whose feature is their mean output."""
    return cdl.run(cdl.config("l2p", "kdp", "l2p.form=official"), TASKS)


@pytest.fixture(scope="module")
def apt(cdl):
    return cdl.run(cdl.config("apt", "kdp"), TASKS[:2])


def terms_of(cdl, state, batch, **changes):
    """The terms [B] of the student's loss on a batch."""
    batch = {**batch, "teacher": passes.teach(state, batch["inputs"])}
    state = state.replace(**changes)
    learner = learner_of(state.config)
    return learner.loss(state.trainable, state, batch["inputs"], batch, REAL)


def float64(tree):
    return jax.tree.map(np.float64, tree)


def norm(params, x, eps=1e-6):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * params["scale"] + params["bias"]


def linear(params, x):
    return x @ params["kernel"] + params["bias"]


def outputs_of(backbone, image, tokens, attention, kd):
    """All output rows for one image, with the keys and values of each block in a Python list."""
    spec, params = backbone.spec, float64(backbone.params)
    stream = spec.embed(backbone.params, {"image": image[None]}, None, jnp.float32).stream
    x = np.concatenate([np.float64(stream[0]), *tokens, np.float64(kd["token"])])
    for index, p in enumerate(params["blocks"]):
        normed, insert = norm(p["norm1"], x), attention[index] if attention else None
        query, keys, values = (linear(p[name], normed) for name in ("query", "key", "value"))
        keys, values = list(keys), list(values)
        if insert is not None and insert.class_key is not None:
            keys[0], values[0] = keys[0] + insert.class_key, values[0] + insert.class_value
        if insert is not None and insert.prefix_key is not None:
            keys, values = [*insert.prefix_key, *keys], [*insert.prefix_value, *values]
        if index > 0:
            prompt = np.float64(kd["prompts"][index - 1])
            half = len(prompt) // 2
            keys, values = [*keys, *prompt[:half]], [*values, *prompt[half:]]
        size = spec.width // spec.num_heads
        mixed = np.zeros_like(x)
        for n, head in itertools.product(range(len(x)), range(spec.num_heads)):
            part = slice(head * size, (head + 1) * size)
            logits = np.array([query[n, part] @ key[part] for key in keys]) / math.sqrt(size)
            weights = np.exp(logits - logits.max())
            for weight, value in zip(weights / weights.sum(), values, strict=True):
                mixed[n, part] += weight * value[part]
        x = x + linear(p["out"], mixed)
        hidden = linear(p["fc1"], norm(p["norm2"], x))
        hidden = hidden * np.vectorize(lambda v: 0.5 * (1 + math.erf(v / math.sqrt(2))))(hidden)
        x = x + linear(p["fc2"], hidden)
    return norm(params["norm"], x)


@pytest.mark.parametrize("host", ["coda", "l2p", "apt"])
def test_forward_against_loops(cdl, tiny, host, request):
    """Features of class token (L2P: of its prompts) and token for distillation, and scores."""
    state = request.getfixturevalue(host)[-1].student.ended
    name, task = state.config.cdl.host, int(state.task)
    images = jnp.asarray(tiny.batch(TASKS[0], 9)["image"][:2])
    slots = learner_of(state.config).slots.score(task)
    features = np.asarray(cdl.slots(state, images, slots))
    query = jnp.asarray(features[:, 0, :12]) if HOSTS[name].has_query else None
    host_inserts = jax.jit(HOSTS[name].learned)(state, query)
    found = features[:, slots[-1]]
    for b, image in enumerate(images):
        tokens, attention = [], ()
        if host_inserts.tokens is not None:
            tokens = [np.float64(host_inserts.tokens[b])]
        if host_inserts.attention:
            pick = lambda a, b=b: np.float64(a if name == "apt" else a[b])  # noqa: E731
            attention = [a and jax.tree.map(pick, a) for a in host_inserts.attention]
        rows = outputs_of(tiny.backbone, image, tokens, attention, state.trainable["kd"])
        own = rows[5:-1].mean(0) if tokens else rows[0]
        expected = np.concatenate([own, rows[-1]])
        np.testing.assert_allclose(found[b], expected, atol=2 * BUDGET)
    kept, scores = float64(state.memory), np.asarray(cdl.scores(state, images))
    if name != "apt":
        own = found[:, :12] @ kept["rows"].T + kept["bias"]
        taught = found[:, 12:] @ kept["kd"]["rows"].T + kept["kd"]["bias"]
    else:
        unit = lambda r: r / np.maximum(np.linalg.norm(r, axis=1, keepdims=True), 1e-12)  # noqa: E731
        plain = {"scale": 1.0, "bias": 0.0}
        own = norm(plain, np.float64(found[:, :12]), 1e-5) @ unit(kept["rows"]).T
        taught = norm(plain, np.float64(found[:, 12:]), 1e-5) @ unit(kept["kd"]["rows"]).T
    seen = SEEN[: 2 * (task + 1)]
    expected = 0.5 * own + 0.5 * taught
    np.testing.assert_allclose(scores[:, seen], expected[:, seen], atol=2 * BUDGET)
    assert (np.delete(scores, seen, axis=1) == -np.inf).all()


def test_without_its_prompts_kdp_is_kd_token_bit_for_bit(cdl, coda):
    state = coda[1].student.trained
    kd = {name: part for name, part in state.trainable["kd"].items() if name != "prompts"}
    changes = {"trainable": {**state.trainable, "kd": kd}}
    token = qkd_jax.override(state.config, "cdl.form=kd_token")
    deit = qkd_jax.override(state.config, "cdl.form=deit")
    batch, images = cdl.batch(TASKS[1], 3), cdl.batch(TASKS[0], 3)["inputs"].fields["image"]

    def both(state):
        return jax.jit(lambda s: terms_of(cdl, s, batch))(state), cdl.scores(state, images)

    expected = both(state.replace(**changes))
    for config in (token, deit):
        found = both(state.replace(config=config, **changes))
        jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert np.abs(both(state)[0]["loss"] - expected[0]["loss"]).max() > 1e-3


def test_loss_of_a_step(cdl, coda):
    """(1 - alpha) CE + alpha tau^2 KL on the task's columns, from features of the same weights."""
    state, batch = coda[1].student.begun, cdl.batch(TASKS[1], 0)
    terms = jax.jit(lambda s: terms_of(cdl, s, batch))(state)
    learner = learner_of(state.config)
    frozen = jax.jit(learner.freeze)(state)
    features = np.float64(cdl.slots(frozen, batch["inputs"].fields["image"], (0, 2)))[:, 2]
    outputs = jax.jit(learner.teacher.outputs)(state, batch["inputs"])
    heads = float64([state.trainable["head"], state.trainable["kd"]["head"]])
    own, student = (
        part @ head["rows"].T + head["bias"]
        for part, head in zip(np.split(features, 2, axis=1), heads, strict=True)
    )
    teacher = np.float64(outputs["logits"])[:, list(TASKS[1].classes)]
    softmax = lambda z: np.exp(z) / np.exp(z).sum(1, keepdims=True)  # noqa: E731
    position = np.array([TASKS[1].classes.index(c) for c in np.asarray(batch["label"])])
    ce = -np.log(softmax(own)[np.arange(4), position])
    p, q = softmax(teacher / 2), softmax(student / 2)
    kl = 4.0 * (p * np.log(p / q)).sum(1)
    np.testing.assert_allclose(terms["loss_ce"], ce, atol=2 * BUDGET)
    np.testing.assert_allclose(terms["loss_distillation"], kl, atol=8 * BUDGET)
    np.testing.assert_allclose(terms["loss"], 0.5 * ce + 0.5 * kl, atol=8 * BUDGET)
    right = 100.0 * (np.argmax(own + student, axis=1) == position)
    np.testing.assert_array_equal(terms["train_accuracy"], right)
    config = qkd_jax.override(state.config, "cdl.alpha=0.2", "cdl.temperature=1")
    other = jax.jit(lambda s: terms_of(cdl, s, batch))(state.replace(config=config))
    p, q = softmax(teacher), softmax(student)
    expected = 0.8 * ce + 0.2 * (p * np.log(p / q)).sum(1)
    np.testing.assert_allclose(other["loss"], expected, atol=4 * BUDGET)


def test_the_teacher_predicts_as_at_test_time(cdl, l2p):
    stage, batch = l2p[1], cdl.batch(TASKS[1], 4)
    state = stage.student.begun
    outputs = jax.jit(learner_of(state.config).teacher.outputs)(state, batch["inputs"])
    scores = cdl.scores(stage.teacher.ended, batch["inputs"].fields["image"])
    assert set(outputs) == {"logits"}
    np.testing.assert_allclose(
        outputs["logits"][:, [4, 1, 0, 3]], scores[:, [4, 1, 0, 3]], atol=BUDGET
    )


def test_in_every_task_labels_move_the_prompts_for_distillation(cdl, l2p):
    """The paper's reason for them. Prompts of L2P that no image chose get exactly no gradient."""
    for task, stage in zip(TASKS, l2p, strict=True):
        state, batch = stage.student.begun, cdl.batch(task, 0)
        batch = {**batch, "teacher": jax.jit(passes.teach)(state, batch["inputs"])}
        learner = learner_of(state.config)

        def mean_ce(trainable, state=state, batch=batch, learner=learner):
            return learner.loss(trainable, state, batch["inputs"], batch, REAL)["loss_ce"].mean()

        # The rows of a new head are zero here, which sends nothing on.
        head = {**state.trainable["head"], "rows": jnp.eye(2, 12)}
        gradient = jax.jit(jax.grad(mean_ce))({**state.trainable, "head": head})
        assert (np.abs(gradient["kd"]["prompts"]).max((1, 2)) > 1e-6).all()
        assert np.abs(gradient["kd"]["token"]).max() > 1e-6
        query = cdl.slots(state, batch["inputs"].fields["image"], (0,))[:, 0, :12]
        keys = np.float64(state.trainable["keys"][0])
        cosine = np.float64(query) @ keys.T / np.linalg.norm(keys, axis=1)
        chosen = np.unique(np.argsort(-cosine, axis=1)[:, :2])
        moved = np.abs(gradient["prompts"][0]).max((1, 2)) > 0
        np.testing.assert_array_equal(np.flatnonzero(moved), chosen)
        assert len(chosen) < 6


def test_token_and_prompts_go_on_and_the_heads_start_anew(cdl, coda):
    kept = coda[-1].student.ended.memory["kd"]
    for index, stage in enumerate(coda):
        begun, trained = (s.trainable["kd"] for s in (stage.student.begun, stage.student.trained))
        for name in ("token", "prompts"):
            assert (np.asarray(begun[name]) != np.asarray(trained[name])).any()
            if index:
                before = coda[index - 1].student.trained.trainable["kd"][name]
                np.testing.assert_array_equal(begun[name], before)
        for name, rows in trained["head"].items():
            assert (np.asarray(begun["head"][name]) != np.asarray(rows)).any()
            np.testing.assert_array_equal(kept[name][np.array(TASKS[index].classes)], rows)
            if index:
                before = coda[index - 1].student.trained.trainable["kd"]["head"][name]
                assert (np.asarray(begun["head"][name]) != np.asarray(before)).all()
    assert not np.asarray(kept["rows"][6]).any()


def test_frozen_parts_stay_as_they_were(cdl, tiny, coda):
    for index, stage in enumerate(coda):
        ended = stage.student.ended
        jax.tree.map(np.testing.assert_array_equal, ended.backbone.params, tiny.backbone.params)
        assert ended.teacher.query.spec == tiny.backbone.spec
        jax.tree.map(
            np.testing.assert_array_equal, ended.teacher.backbone.params, cdl.teacher.params
        )
        for part in ("trainable", "memory"):
            jax.tree.map(
                np.testing.assert_array_equal,
                getattr(ended.teacher, part),
                getattr(stage.teacher.ended, part),
            )
        if index:  # older components of the host's pool too
            before = coda[index - 1].student.ended.memory["prompt"]
            for name, pool in ended.memory["prompt"].items():
                np.testing.assert_array_equal(pool[:, :index], before[name][:, :index])


@pytest.mark.parametrize(
    "form",
    ["cdl_prompt", "kdp", "fitnets", "dkd"],
)
def test_no_gradient_reaches_the_teacher(cdl, form):
    """Even where a caller does not stop it, as the step does."""
    stage, batch = (
        cdl.run(cdl.config("coda_prompt", form), TASKS[:1], steps=1)[0],
        cdl.batch(TASKS[0], 0),
    )
    teacher, state = stage.teacher.ended, stage.student.begun
    learner = learner_of(state.config)

    def loss(trainable, parts):
        taught = state.taught_by(teacher.replace(**parts))
        outputs = learner.teacher.outputs(taught, batch["inputs"])
        given = {**batch, "teacher": outputs}
        return learner.loss(trainable, taught, batch["inputs"], given, REAL)["loss"].mean()

    parts = {"trainable": teacher.trainable, "memory": teacher.memory}
    of_student, of_teacher = jax.jit(jax.grad(loss, (0, 1)))(state.trainable, parts)
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(of_teacher))
    # All that the form trains has a gradient, and so has the host.
    for path, leaf in jax.tree_util.tree_leaves_with_path(of_student):
        assert np.isfinite(leaf).all() and np.asarray(leaf).any(), path


@pytest.mark.parametrize("host", ["coda", "l2p"])
def test_scores_do_not_depend_on_the_batch(cdl, tiny, host, request):
    state = request.getfixturevalue(host)[-1].student.ended
    images = np.concatenate([tiny.batch(task, 5)["image"][:2] for task in TASKS[:2]])
    whole, order = np.asarray(cdl.scores(state, images)), np.array([2, 0, 3, 1])
    shuffled = np.asarray(cdl.scores(state, images[order]))
    np.testing.assert_allclose(shuffled[:, SEEN], whole[order][:, SEEN], atol=BUDGET)
    for index in range(4):
        others = np.where(np.arange(4)[:, None, None, None] == index, images, images[:1])
        alone = np.asarray(cdl.scores(state, others))[index]
        np.testing.assert_allclose(alone[SEEN], whole[index, SEEN], atol=BUDGET)


def test_the_weight_of_the_second_head_in_predictions(cdl, tiny, coda):
    state = coda[-1].student.ended
    images = tiny.batch(TASKS[0], 6)["image"]

    def scores(*settings):
        config = qkd_jax.override(state.config, *settings)
        return np.float64(cdl.scores(state.replace(config=config), images))[:, SEEN]

    own, taught = scores("cdl.test_weight=0"), scores("cdl.test_weight=1")
    assert np.abs(own - taught).max() > 0.01
    np.testing.assert_allclose(scores(), 0.5 * own + 0.5 * taught, atol=BUDGET)
    np.testing.assert_allclose(scores("cdl.alpha=0.2"), 0.8 * own + 0.2 * taught, atol=BUDGET)
    both = scores("cdl.alpha=0.2", "cdl.test_weight=0.7")
    np.testing.assert_allclose(both, 0.3 * own + 0.7 * taught, atol=BUDGET)


@pytest.mark.parametrize("host", ["l2p", "apt"])
def test_without_a_teacher_the_host_is_as_by_itself(cdl, tiny, host):
    config = cdl.config(host, "none")
    assert learner_of(config).teacher.config(config) is None
    alone = qkd_jax.Config(method=host, shapes=config.shapes, train=config.train)
    alone = alone.replace(backbone=config.backbone, **{host: getattr(config, host)})
    images, states = tiny.batch(TASKS[0], 7)["image"], []
    for settings in (config, alone):
        history = cdl.run(settings, TASKS[:2])
        state = history[-1].student.ended
        losses = [stage.student.metrics for stage in history]
        states.append((losses, state.trainable, state.memory, cdl.scores(state, images)))
    jax.tree.map(np.testing.assert_array_equal, *states)


def test_every_form_and_host_has_the_numbers_that_it_is_said_to_have():
    """ViT-S/16 and 100 classes: token and prompts 25,728, with the second head 64,228."""
    small = ViTSpec(
        width=384, depth=12, num_heads=6, mlp_width=1536, patch_size=16, image_size=224, grid=14
    )
    shapes = qkd_jax.Shapes(teacher_width=768)
    width, classes = 384, 100
    head = width * classes + classes
    token, prompts = width, 11 * 6 * width
    linear = lambda a, b: a * b + b  # noqa: E731
    fusion = 12 * (linear(width, width) + linear(width, 768) + 2 * width)
    fusion += 11 * (linear(width, width) + 4 * width)
    expected = {
        "kdp": token + prompts + head,
        "kd_token": token + head,
        "deit": token + head,
        "cdl_prompt": 5 * 10 * (2 * 768 + 8 * width) + head,
        "kd": 0,
        "dkd": 0,
        "fitnets": linear(width, 768),
        "reviewkd": fusion,
    }
    assert expected["kdp"] == 64_228 and token + prompts == 25_728
    assert set(expected) == set(FORMS)
    for form, number in expected.items():
        config = qkd_jax.override(qkd_jax.Config(method="cdl", shapes=shapes), f"cdl.form={form}")
        trainable, memory = jax.eval_shape(
            lambda k, c=config: learner_of(c).init(k, Backbone({}, small), c), jax.random.key(0)
        )
        parts = [part for name, part in trainable["kd"].items() if name != "head"]
        parts.append(memory.get("kd", {}))
        assert sum(leaf.size for leaf in jax.tree.leaves(parts)) == number, form


@pytest.mark.parametrize("host", list(HOSTS))
def test_keys_have_the_width_of_the_students_query(cdl, host):
    teacher = cdl.start(cdl.config(host, "kdp")).teacher
    own = cdl.start(cdl.config(host, "kdp", "cdl.query=own")).teacher
    keys = {"l2p": lambda t: t["keys"], "dualprompt": lambda t: t["keys"]}
    keys |= {"coda_prompt": lambda t: (t["prompt"]["keys"], t["prompt"]["attention"])}
    widths = lambda state: {  # noqa: E731
        leaf.shape[-1] for leaf in jax.tree.leaves(keys.get(host, lambda t: ())(state.trainable))
    }
    assert widths(teacher) == ({12} if host != "apt" else set())
    assert widths(own) == ({16} if host != "apt" else set())
    prompts = {name: a for name, a in own.trainable.items() if name != "keys"}
    shared = {name: a for name, a in teacher.trainable.items() if name != "keys"}
    if host != "coda_prompt":
        assert jax.tree.map(jnp.shape, shared) == jax.tree.map(jnp.shape, prompts)


def test_the_query_of_both_is_the_students_feature(cdl, coda):
    images = cdl.batch(TASKS[0], 2)["inputs"].fields["image"]
    student, teacher = coda[0].student.ended, coda[0].teacher.ended
    assert (feature_width(student), feature_width(teacher)) == (24, 16)
    first, second = (cdl.slots(state, images, (0,))[:, 0] for state in (student, teacher))
    np.testing.assert_array_equal(first[:, :12], second[:, :12])
    assert not np.asarray(first[:, 12:]).any() and not np.asarray(second[:, 12:]).any()


@pytest.mark.parametrize(
    "host",
    ["l2p", "coda_prompt", "dualprompt"],
)
def test_a_teacher_that_is_narrower_than_its_query(cdl, tiny, host):
    """Prompted features are padded, and read without the padding."""
    config = cdl.config(host, "none")
    config = config.replace(shapes=dataclasses.replace(config.shapes, query_width=16))
    key = jax.random.key(7)
    state = qkd_jax.init_state(key, tiny.backbone, config, query=cdl.teacher)
    learned = cdl.learn(state, TASKS[0])
    batch = cdl.batch(TASKS[0], 3)
    features = cdl.slots(learned.ended, batch["inputs"].fields["image"], (0, 1))
    assert features.shape[-1] == 16 and np.asarray(features[:, 0, 12:]).all()
    assert not np.asarray(features[:, 1, 12:]).any()
    kept = float64(learned.ended.memory)
    expected = np.float64(features[:, 1, :12]) @ kept["rows"].T + kept["bias"]
    scores = np.asarray(cdl.scores(learned.ended, batch["inputs"].fields["image"]))
    np.testing.assert_allclose(scores[:, [4, 1]], expected[:, [4, 1]], atol=BUDGET)


def test_tokens_of_the_teacher(cdl):
    """After its last block, before the last LayerNorm; as many blocks as the student has."""
    batch, found = cdl.batch(TASKS[0], 0), {}
    for form in ("fitnets", "reviewkd"):
        student = cdl.start(cdl.config("apt", form))
        teacher = cdl.learn(student.teacher, TASKS[0], steps=1).ended
        found[form] = jax.jit(passes.teach)(student.taught_by(teacher), batch["inputs"])
    inserts = HOSTS["apt"].learned(teacher, None)
    blocks = jax.jit(lambda x: encode_all(cdl.teacher, x, inserts))(batch["inputs"])[1:-1]
    assert len(blocks) == 3 and found["reviewkd"]["blocks"].shape == (4, 2, 5, 16)
    np.testing.assert_allclose(found["fitnets"]["tokens"], blocks[-1], atol=BUDGET)
    for index, expected in enumerate(blocks[1:]):
        np.testing.assert_allclose(found["reviewkd"]["blocks"][:, index], expected, atol=BUDGET)
    np.testing.assert_allclose(*(f["logits"] for f in found.values()), atol=BUDGET)


def test_at_test_time_cdl_prompt_needs_no_transformer_of_the_teacher(cdl, tiny):
    stage = cdl.run(cdl.config("dualprompt", "cdl_prompt"), TASKS[:1], steps=1)[0]
    teacher, state = stage.teacher.ended, stage.student.ended
    images = tiny.batch(TASKS[0], 8)["image"]
    broken = jax.tree.map(lambda a: jnp.full_like(a, jnp.nan), teacher.backbone)
    frozen = {**teacher.frozen, "backbone": broken}
    without = state.taught_by(teacher.replace(frozen=frozen))
    expected = cdl.scores(state, images)
    np.testing.assert_array_equal(cdl.scores(without, images), expected)
    other = jax.tree.map(lambda a: a + 1, teacher.trainable)
    moved = cdl.scores(state.taught_by(teacher.replace(trainable=other)), images)
    assert np.abs(moved - expected)[:, [4, 1]].max() > 1e-4


def test_every_setting_is_read(cdl, monkeypatch):
    """No form reads them all. What dataclasses read to compare and hash does not count."""
    read, plain = set(), CdlSettings.__getattribute__

    def recording(self, name):
        if "learners/cdl" in sys._getframe(1).f_code.co_filename:
            read.add(name)
        return plain(self, name)

    monkeypatch.setattr(CdlSettings, "__getattribute__", recording)
    for form in FORMS:
        # Another rate than in other tests, so that everything is traced anew.
        student = cdl.start(cdl.config("coda_prompt", form, "cdl.teacher_rate=0.003"))
        teacher = qkd_jax.begin_task(student.teacher, TASKS[0])
        state = qkd_jax.begin_task(student.taught_by(teacher), TASKS[0])
        jax.eval_shape(lambda s: terms_of(cdl, s, cdl.batch(TASKS[0], 0)), state)
        features = jnp.zeros((4, 1 + 4, feature_width(state)))
        jax.eval_shape(learner_of(state.config).score, state, features)
    own = {name for name in read if not name.startswith("_")} - {"conflicts"}
    assert own == set(CdlSettings.__dataclass_fields__)
