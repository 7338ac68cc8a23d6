"""QKD against `oracle.py`, a second description of it in float64, over three tasks.

The library and the oracle share weights, images and random numbers, nothing else: each goes its own
way from the first step to the last score, so that a mistake anywhere is seen in all that follows.

The random numbers are drawn here from the keys that the library documents: (run, purpose, task,
step, row). Purposes 0, 1, 2, 3: the first parameters, a task's begin, a step, a task's end.

Error budgets, eps = 1.2e-7, of the largest entry of an array. A feature: two blocks of six products
and norms in a row, each rounding sums of 8 to 12 numbers by about 5 eps: 60 eps; rows are means of
features. Weights move less than their size, so that they are as good. Logits are 20 cosines, so 20
times 10 eps off; probabilities and their logarithms pass that on, and the evidence log(p) / 0.3 of
the gate does likewise where p is above a tenth; the way back is as long again: 1000 eps for terms,
gradients, relevance and scores. Inverting a covariance multiplies by its condition, below 20.
"""

import typing
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import qkd_jax
from qkd_jax.engine import verbs
from qkd_jax.learners.qkd import gate
from qkd_jax.learners.qkd.learner import (
    DistillationSettings,
    QkdAdapterSpec,
    QkdHeadSettings,
    SparsitySettings,
)
from qkd_jax.nn.backbone import Backbone
from qkd_jax.nn.parameters import init_random
from qkd_jax.nn.pixels import Preprocessing
from qkd_jax.nn.vit import ViTSpec
from tests.learners.qkd import oracle

# CLIP's form and its channel statistics, as the default backbone has them.
MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SPEC = ViTSpec(
    *(8, 2, 2, 12, 4, 8, 2), activation="quick_gelu", eps=1e-5, pre_norm=True, patch_bias=False
)
KEY, SEED, BOTTLENECK, STEPS, SCHEDULE = jax.random.key(7), 45, 2, 2, 4
EPS = 1.2e-7
FEATURE = WEIGHT = 60 * EPS
TERM, SLOPE, METRIC, SCORE = (1000 * EPS,) * 4
# Only sizes: all else that a test does not name has its default.
SIZES = (
    *("backbone.image_size=8", "adapter.bottleneck=2"),
    *("num_classes=7", "max_tasks=4", "max_task_classes=2"),
)


def fold(*numbers):
    key = KEY
    for number in numbers:
        key = jax.random.fold_in(key, number)
    return key


def new_adapter(key):
    """`down` uniform in +-1 / sqrt(D), a key for each block; everything else zero."""
    down = [
        jax.random.uniform(
            jax.random.fold_in(key, block), (8, BOTTLENECK), minval=-(8**-0.5), maxval=8**-0.5
        )
        for block in range(2)
    ]
    return {
        "down.kernel": np.float64(down),
        "down.bias": np.zeros((2, BOTTLENECK)),
        "up.kernel": np.zeros((2, BOTTLENECK, 8)),
        "up.bias": np.zeros((2, 8)),
    }


def new_rows(key):
    """Normal with variance 1 / D."""
    return np.float64(jax.random.normal(key, (2, 8))) * 8**-0.5


def new_gate(num_qubits):
    """The map and theta of a gate with angles; amplitude states have no parameters."""
    keys = jax.random.split(fold(0, 2), 5)
    theta = jax.random.uniform(keys[2], (2, num_qubits), maxval=0.1)
    drawn = jax.random.normal(keys[0], (8, num_qubits))
    return {"gate.map": np.float64(drawn) * 8**-0.5, "gate.theta": np.float64(theta)}


def kept_units(task, step, rows):
    """Dropout of 0.1: [B, L, N, R] factors 0 or 1 / 0.9, a key for each image and block."""
    keys = [jax.random.fold_in(fold(2, task, step, row), 1) for row in range(rows)]
    draw = jax.vmap(lambda key: jax.random.bernoulli(key, 0.9, (5, BOTTLENECK)))
    kept = [draw(jnp.stack([jax.random.fold_in(key, b) for key in keys])) for b in range(2)]
    return np.float64(kept).swapaxes(0, 1) / 0.9


def pseudo_features(task, owner, steps, size):
    """Classes, evenly from those seen, and standard normal noise, for every step of calibration."""
    drawn, allowed = [], jnp.where(owner >= 0, 0.0, -1e9)
    for key in jax.random.split(fold(3, task), steps):
        key_class, key_noise = jax.random.split(key)
        classes = jax.random.categorical(key_class, allowed, shape=(size,))
        drawn.append((np.asarray(classes), np.float64(jax.random.normal(key_noise, (size, 8)))))
    return drawn


def planted(task):
    """Added to the adapter that a task starts with, so that adapters differ as they do after many
    steps and distillation has much to say.
    """
    generator = np.random.default_rng([SEED, task])
    parts = {"down": ((2, 8, BOTTLENECK), 0.5), "up": ((2, BOTTLENECK, 8), 5.0)}
    added = {}
    for name, (shape, size) in parts.items():
        added[f"{name}.kernel"] = size * generator.normal(size=shape)
        added[f"{name}.bias"] = size * generator.normal(size=(2, shape[2]))
    return {name: np.float32(array) for name, array in added.items()}


def nested(adapter):
    parts = {name: tuple(name.split(".")) for name in adapter}
    return {
        side: {parts[n][1]: jnp.asarray(adapter[n]) for n in adapter if parts[n][0] == side}
        for side in ("down", "up")
    }


def by_name(tree):
    """{"adapter.down.kernel": array, ...} of the library's parameters."""
    named = jax.tree_util.tree_leaves_with_path(tree)
    return {".".join(part.key for part in path): np.asarray(leaf) for path, leaf in named}


ANGLES = {
    "gate.encoding": "angle",
    "gate.num_qubits": 2,
    "gate.calibration_steps": 3,
    "gate.calibration_batch": 8,
}
# Every value of the switches in `TRIED`, in few runs, since each compiles anew.
RUNS = {
    "defaults": {},
    "angles": ANGLES
    | {
        "gate.whiten": "false",
        "adapter.start": "random",
        "head.prototypes": "all",
        "head.covariance": "seen",
        "fusion.frozen_weight": 0.0,
        "distillation.columns": "all",
        "sparsity.kind": "l1_scores",
    },
    "frozen": ANGLES
    | {
        "gate.states": "weights",
        "gate.stack": "product",
        "gate.rank": 3,
        "gate.shrinkage": 0.6,
        "gate.freeze_after": 1,
        "head.prototypes": "own",
        "distillation.columns": "own",
        "distillation.temperature": 2.0,
        "distillation.top_k": 1,
    },
    "delta": {
        "gate.states": "weights",
        "gate.stack": "delta",
        "gate.rank": 3,
        "gate.score": "fidelity",
        "gate.temperature": 0.3,
        "head.prototypes": "none",
        "head.whiten": "false",
        "distillation.target": "features",
        "sparsity.kind": "l1_softmax",
    },
    "measurement": {
        "gate.kind": "measurement",
        "gate.copies": 2,
    },
}
TRIED = {
    "adapter.start": QkdAdapterSpec,
    "gate.stack": gate.GateSettings,
    "gate.score": gate.GateSettings,
    "head.prototypes": QkdHeadSettings,
    "head.covariance": QkdHeadSettings,
    "distillation.columns": DistillationSettings,
    "distillation.target": DistillationSettings,
    "sparsity.kind": SparsitySettings,
}


@pytest.mark.parametrize("name", TRIED)
def test_no_value_is_left_out(name):
    values = typing.get_args(typing.get_type_hints(TRIED[name])[name.split(".")[1]])
    assert {run.get(name, oracle.DEFAULTS[name]) for run in RUNS.values()} == set(values)


def value(text):
    return {"true": True, "false": False}.get(text, text)


@pytest.fixture(scope="module", params=RUNS)
def run(tiny, request):
    """Three tasks of two steps in the library and in the oracle."""
    changes = RUNS[request.param]
    weights = init_random(jax.random.key(0), SPEC)
    backbone = Backbone(weights, SPEC, Preprocessing(MEAN, DEVIATION))
    texts = [f"{name}={text}" for name, text in changes.items()]
    config = tiny.config_of("method=qkd", *SIZES, *texts)
    vit = oracle.Transformer(jax.tree.map(np.float64, weights), 2, 4, 1e-5, MEAN, DEVIATION)
    known = {name: value(changes[name]) for name in oracle.DEFAULTS if name in changes}
    taught = "gate.calibration_steps" in changes
    second = oracle.Learner(vit, known, new_gate(2) if taught else {}, num_classes=7)
    state, tasks = qkd_jax.init_state(KEY, backbone, config), []
    for task in tiny.tasks:
        index, added = task.index, planted(task.index)
        state = qkd_jax.begin_task(state, task, num_steps=SCHEDULE)
        key_adapter, key_rows = jax.random.split(fold(1, index))
        second.begin(task.classes, new_adapter(key_adapter), new_rows(key_rows))
        begun = by_name(state.trainable), dict(second.params)
        second.params |= {
            f"adapter.{n}": second.adapter(second.params)[n] + added[n] for n in added
        }
        adapter = jax.tree.map(jnp.add, state.trainable["adapter"], nested(added))
        state = state.replace(trainable={**state.trainable, "adapter": adapter})
        steps = []
        for step in range(STEPS):
            batch, kept = tiny.batch(task, step), kept_units(index, step, 4)
            state, found = qkd_jax.train_task(state, batch)
            seen = np.float64(batch["image"]), batch["label"], kept
            distilled = second.slopes(*seen, "loss_kd") if index and step == 0 else None
            terms = second.step(*seen, step / SCHEDULE)
            velocity = by_name(optax.tree_utils.tree_get(state.opt_state, "trace"))
            steps.append(
                SimpleNamespace(
                    terms=(found, terms),
                    velocity=(velocity, dict(second.velocity)),
                    distilled=distilled,
                )
            )
        trained = by_name(state.trainable), dict(second.params)
        batches = [tiny.batch(task, step) for step in range(2)]
        state = qkd_jax.end_task(state, batches)
        pseudo = pseudo_features(index, state.task_of_class, 3, 8) if taught else ()
        images = np.float64(np.concatenate([batch["image"] for batch in batches]))
        labels = np.concatenate([batch["label"] for batch in batches])
        second.end(images, labels, pseudo)
        ended = by_name(state.trainable), dict(second.params)
        memory = jax.tree.map(np.asarray, state.memory), leaves(second)
        images = np.concatenate([tiny.batch(task, 5)["image"] for task in tiny.tasks])
        scores = verbs.predict_with_relevance(state, images), second.score(np.float64(images))
        tasks.append(
            SimpleNamespace(
                index=index,
                begun=begun,
                steps=steps,
                trained=trained,
                ended=ended,
                memory=memory,
                scores=scores,
            )
        )
    return SimpleNamespace(name=request.param, tasks=tasks, second=second, batch=tiny.batch)


def leaves(second):
    """What the finished tasks of the oracle leave, in slots 0 to T; the last is not learned yet."""
    slots = range(len(second.tasks))
    shared = second.s["head.prototypes"] in ("none", "own")
    one_metric = shared or not second.s["head.whiten"]
    return {
        "rows": [second.rows(slot) for slot in ([0] if shared else range(len(slots) + 1))],
        "metrics": [second.metric(slot) for slot in ([0] if one_metric else slots)],
        "class_means": second.means(0),
        "task_states": [oracle.task_embedding(t.adapter, t.start, second.s) for t in second.tasks],
    }


def assert_near(found, expected, budget, name):
    """`budget` is of the largest entry that is expected, where it is not zero by cancelling."""
    found, expected = np.float64(found), np.float64(expected)
    size = np.abs(expected[np.isfinite(expected)]).max(initial=1e-8)
    np.testing.assert_allclose(found, expected, rtol=0, atol=budget * size, err_msg=name)


def assert_all_near(pair, budget, name):
    found, expected = pair
    assert set(found) == set(expected)
    for leaf in expected:
        assert_near(found[leaf], expected[leaf], budget, f"{name}: {leaf}")


def test_a_task_begins_with_its_own_draws_and_what_is_trained_on(run):
    """New adapter and rows from the task's key; the head's scale and the gate go on."""
    for task in run.tasks:
        assert_all_near(task.begun, WEIGHT, f"task {task.index}")


def test_terms_of_every_step(run):
    for task in run.tasks:
        for step in task.steps:
            found, expected = step.terms
            assert set(found) == set(expected)
            for name, number in expected.items():
                assert abs(float(found[name]) - number) < TERM * max(1, number), (task.index, name)


def test_gradient_of_every_step(run):
    """The momentum holds g of the first step, and 0.9 of it plus g of the second, with decay."""
    for task in run.tasks:
        for number, step in enumerate(task.steps):
            assert_all_near(step.velocity, SLOPE, f"task {task.index}, step {number}")


def test_distillation_is_a_good_part_of_loss_and_gradient(run):
    """Else the tests above would say little about it."""
    for task in run.tasks[1:]:
        (_, terms), velocity = task.steps[0].terms, task.steps[0].velocity[1]
        assert 0.2 < terms["loss_kd"] < 3
        for leaf, slope in task.steps[0].distilled.items():
            if leaf.startswith("adapter."):
                assert np.abs(slope).max() > 100 * SLOPE * np.abs(velocity[leaf]).max(), leaf
        # Only the logits of all classes give the new rows something to imitate.
        moved = np.abs(task.steps[0].distilled["head.rows"]).max() > 0
        assert moved == (run.name == "angles")
    *_, last = run.tasks
    assert 0.05 < last.steps[0].terms[1]["gate_entropy"] < np.log(2) - 0.01  # two teachers, unequal


def test_weights_after_the_steps_and_after_calibration(run):
    for task in run.tasks:
        assert_all_near(task.trained, WEIGHT, f"task {task.index}, trained")
        # Adam passes on the error of a gradient relative to its size.
        assert_all_near(task.ended, SLOPE, f"task {task.index}, ended")
        # Among one task there is nothing to route, and after task 1 the gate may be frozen.
        routes = task.index == 1 or (task.index == 2 and run.name == "angles")
        (_, before), (_, after) = task.trained, task.ended
        for leaf in before:
            if leaf.startswith("gate."):
                assert (np.abs(after[leaf] - before[leaf]).max() > 0.001) == routes, leaf


def test_what_a_finished_task_leaves(run):
    for task in run.tasks:
        found, expected = task.memory
        for slot, rows in enumerate(expected["rows"]):
            assert_near(found["rows"][slot], rows, FEATURE, f"rows in slot {slot}")
        for slot, (centre, factor) in enumerate(expected["metrics"]):
            metric = f"metric of slot {slot}"
            assert_near(found["metrics"].centre[slot], centre, FEATURE, metric)
            assert_near(found["metrics"].whitener[slot], np.linalg.inv(factor), METRIC, metric)
        for label, mean in expected["class_means"].items():
            assert_near(found["class_means"][label], mean, FEATURE, f"mean of class {label}")
        for index, vector in enumerate(expected["task_states"]):
            assert_near(found["task_states"][index], vector, METRIC, f"state of task {index}")


def test_scores_and_relevance(run):
    for task in run.tasks:
        (scores, alpha), (z, expected) = task.scores
        learned = task.index + 1
        assert_near(alpha[:, :learned], expected, SCORE, "alpha")
        assert not np.asarray(alpha)[:, learned:].any()
        assert_near(scores, z, SCORE, "z")
