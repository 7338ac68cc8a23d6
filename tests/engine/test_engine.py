"""One device and eight simulated ones must learn the same.

What is compared is the update itself. The two silent traps of parallel gradients would show here:
a sum in the place of a mean gives a gradient eight times too large, and a mean inside the
differentiated function gives every device its own local gradient, that is, device 0's eighth of the
batch. Both change the momentum buffer after the first step far beyond the tolerance.
"""

import dataclasses
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qkd_jax.engine import verbs
from qkd_jax.engine.sharding import engine_of
from qkd_jax.errors import ConfigError
from qkd_jax.learners.state import Moving, join, split
from qkd_jax.nn.backbone import Backbone
from qkd_jax.nn.inputs import Raw, Stem
from qkd_jax.nn.parameters import init_random
from qkd_jax.nn.vit import ViTSpec
from qkd_jax.protocol.tasks import Task
from qkd_jax.settings.config import Config, Shapes, override
from qkd_jax.settings.sections import TrainConfig

pytestmark = [pytest.mark.floor, pytest.mark.usefixtures("compiled")]

CLASSES, BATCH = 2, 16
# Real rows of a padded batch, unevenly over 8 devices of 2 rows: 2, 2, 1, 0, 0, 0, 2, 1.
STEPS = 50
UNEVEN = np.array([1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 1, 1, 0, 1], bool)


@pytest.fixture(scope="module")
def backbone():
    spec = ViTSpec(
        width=16, depth=2, num_heads=2, mlp_width=32, patch_size=8, image_size=16, grid=2
    )
    return Backbone(params=init_random(jax.random.key(0), spec), spec=spec, name="two_blocks")


def settings(method, num_tasks=3, *assignments):
    shapes = Shapes(num_classes=num_tasks * CLASSES, max_tasks=num_tasks, max_task_classes=CLASSES)
    return override(
        Config(method=method, shapes=shapes),
        "backbone.image_size=16",
        "adapter.bottleneck=2",
        "adapter.dropout=0.2",
        "gate.encoding=angle",
        "gate.score=fidelity",  # a logarithm near 0 would amplify rounding, as a high rate does
        "gate.whiten=false",
        "gate.num_qubits=2",
        "gate.rank=2",
        "train.learning_rate=0.005",  # small, so that rounding is not amplified step by step
        *assignments,
        where_read=True,
    )


def engine_on(devices):
    return engine_of(TrainConfig(devices=devices))


def batch_of(task, step, mask=None):
    """uint8 noise with a colour for each class; padding rows hold what must not matter."""
    rng = np.random.default_rng([task, step])
    labels = task * CLASSES + rng.integers(0, CLASSES, BATCH).astype(np.int32)
    images = rng.integers(0, 200, (BATCH, 16, 16, 3))
    images[..., 0] += 20 * (labels % CLASSES)[:, None, None]
    return {
        "inputs": Raw({"image": images.astype(np.uint8)}),
        "label": labels,
        "mask": np.ones(BATCH, bool) if mask is None else mask,
    }


def third_task(backbone, config):
    """A state in task 2, its memory full of noise, so that distillation and the gate are live."""
    state = verbs.init_state(jax.random.key(1), backbone, config)
    for t in range(3):
        task = Task(t, tuple(range(t * CLASSES, (t + 1) * CLASSES)))
        state = verbs.begin_task(state, task, STEPS)
    return state.replace(memory=jax.tree.map(_shaken, state.memory))


def _shaken(leaf):
    noise = np.random.default_rng(leaf.size).normal(0.0, 0.1, leaf.shape)
    return leaf + jnp.asarray(noise, leaf.dtype)


@pytest.fixture(scope="module")
def learned(backbone):
    """qkd, 50 steps in its third task, on 1 and on 8 devices."""
    return many_steps(backbone, settings("qkd"))


def many_steps(backbone, config):
    """(start, [(engine, first, last, history)]); first and last batch are padded unevenly."""
    start = third_task(backbone, config)
    results = []
    for devices in (1, 8):
        engine = engine_on(devices)
        held, moving = split(engine.place(jax.tree.map(jnp.copy, start)))
        history, first = [], None
        for step in range(STEPS):
            batch = batch_of(2, step, UNEVEN if step in (0, STEPS - 1) else None)
            moving, values = engine.step(held, moving, batch)
            history.append({name: float(value) for name, value in values.items()})
            first = first or jax.device_get(moving)
        results.append((engine, first, jax.device_get(moving), history))
    return start, results


def relative(a, b):
    """|a - b| / |b| over all leaves of a tree."""
    pairs = list(zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    difference = sum(np.sum(np.square(np.subtract(x, y, dtype=np.float64))) for x, y in pairs)
    return np.sqrt(difference / sum(np.sum(np.square(y, dtype=np.float64)) for _, y in pairs))


def check_equal(start, results):
    (_, _, one, history_one), (_, _, eight, history_eight) = results
    assert relative(one.trainable, start.trainable) > 1e-2  # enough happened that could differ
    assert relative(eight.trainable, one.trainable) < 1e-5
    for a, b in zip(history_one, history_eight, strict=True):
        assert a.keys() == b.keys()
        # Losses are of order 1; float32 sums in another order, 50 steps on.
        np.testing.assert_allclose([*b.values()], [*a.values()], rtol=1e-4, atol=1e-4)
    return history_one


def test_qkd_learns_the_same_on_eight_devices(learned):
    history = check_equal(*learned)
    assert all(values["loss_kd"] > 1e-6 for values in history[:-1])
    assert all(values["gate_entropy"] > 1e-3 for values in history)  # two tasks to choose from


@pytest.mark.parametrize("method", [pytest.param("ease", marks=pytest.mark.slow), "finetune"])
def test_other_methods_learn_the_same_on_eight_devices(backbone, method):
    check_equal(*many_steps(backbone, settings(method)))


def gradient(moving):
    """The momentum buffer after one step from zero: the gradient, plus the decay of what decays."""
    (trace,) = (
        part for part in jax.tree.leaves(moving.opt_state, is_leaf=_is_trace) if _is_trace(part)
    )
    return jax.device_get(trace.trace)


def _is_trace(part):
    return isinstance(part, optax.TraceState)


def test_gradient_equals_that_of_one_device(learned):
    """On a batch padded unevenly, so that a mean of means is wrong too.

    Tolerance: the sum over 9 rows in another order, a few float32 roundings of 6e-8 each, on terms
    that may cancel tenfold: 1e-5 of the whole gradient's length for every leaf.
    """
    start, ((engine, first_one, _, _), (_, first_eight, _, _)) = learned
    one, eight = gradient(first_one), gradient(first_eight)
    assert np.abs(one["gate"]["theta"]).max() > 1e-6  # the gate takes part
    length = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(one)))
    assert length > 1e-3
    for a, b in zip(jax.tree.leaves(eight), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * length)

    def share(mask):
        """The gradient of some of the rows, by the step on one device."""
        held, moving = split(engine.place(jax.tree.map(jnp.copy, start)))
        return gradient(engine.step(held, moving, batch_of(2, 0, mask))[0])

    # What each trap gives instead; all of it lies far beyond the tolerance.
    shares = [share(UNEVEN & (np.arange(BATCH) // 2 == device)) for device in (0, 1, 2, 6, 7)]
    summed = jax.tree.map(lambda g: 8.0 * g, one)
    mean_of_means = jax.tree.map(lambda *g: sum(g) / len(g), *shares)
    for wrong in (summed, shares[0], mean_of_means):
        assert relative(wrong, one) > 1e-2


def test_the_step_donates_what_it_replaces(learned):
    """No second copy of parameters and optimiser state lives on; what is held is untouched."""
    start, results = learned
    for engine, *_ in results:
        held, moving = split(engine.place(jax.tree.map(jnp.copy, start)))
        after, _ = engine.step(held, moving, batch_of(2, 0))
        jax.block_until_ready(after)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(moving))
        assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((held, after)))
        assert engine.compilations == 1  # the same program as in the fixture


def test_placed_state_is_on_every_device_and_stays_there(learned):
    start, (_, (engine, *_)) = learned
    held, moving = split(engine.place(jax.tree.map(jnp.copy, start)))
    after, values = engine.step(held, moving, batch_of(2, 0))
    for leaf in jax.tree.leaves((held, after, values)):
        assert leaf.sharding.is_fully_replicated and len(leaf.sharding.device_set) == 8


@pytest.mark.parametrize("num_tasks", [3, 6])
@pytest.mark.parametrize("devices", [1, 8])
def test_step_is_compiled_once_whatever_the_number_of_tasks(backbone, devices, num_tasks, caplog):
    """Traced and compiled once over T tasks, as a run calls it."""
    config = settings("finetune", num_tasks)
    engine = engine_on(devices)
    state = engine.place(verbs.init_state(jax.random.key(1), backbone, config))
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        for t in range(num_tasks):
            task = Task(t, tuple(range(t * CLASSES, (t + 1) * CLASSES)))
            state = engine.place(verbs.begin_task(state, task, 2))
            held, moving = split(state)
            for step in range(2):
                moving, _ = engine.step(held, moving, batch_of(t, step, UNEVEN if step else None))
            state = verbs.one_device().freeze(join(held, moving))
            engine.features(state, batch_of(t, 0)["inputs"], [t])
    compiled = [r.getMessage() for r in caplog.records if "XLA compilation" in r.getMessage()]
    assert engine.compilations == 1
    # Under pmap both programs are called `_fun` since jax 0.10, and have no brackets before.
    ours = [m for m in compiled if re.search(r"\b(_counted_step|extract|_fun)\b", m)]
    assert len(ours) == 2


def test_features_and_stems_are_equal_on_eight_devices(backbone):
    config = settings("ease", 3, "adapter.first_block=1")
    state = third_task(backbone, config)
    inputs = batch_of(0, 0)["inputs"]
    eight = engine_on(8)
    engines = engine_on(1), eight
    a, b = (np.asarray(e.features(e.place(state), inputs, (0, 1))) for e in engines)
    assert a.shape == (BATCH, 3, backbone.spec.width)
    # Features of order 1: the same float32 sums in smaller matrices.
    np.testing.assert_allclose(b, a, atol=1e-5)
    kept = [jax.tree.map(np.asarray, e.shared(e.place(state), inputs)) for e in engines]
    assert isinstance(kept[1], Stem) and kept[0].residual.shape == (BATCH, 1, 16)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(y, x, atol=1e-5), *kept)
    from_kept = eight.features(eight.place(state), kept[1], (0, 1))
    np.testing.assert_allclose(from_kept, a, atol=1e-5)
    assert np.abs(a[:, 0] - a[:, 1]).max() > 1e-3
    assert not a[:, 2].any()


def test_batches_that_do_not_divide_are_padded_to_the_next_size_that_does():
    engine = engine_on(8)
    assert [engine.padded(size) for size in (1, 8, 9, 20)] == [8, 8, 16, 24]
    assert engine_on(1).padded(7) == 7


def test_more_devices_than_there_are():
    assert engine_on(0).num_devices == 8
    with pytest.raises(ConfigError, match=r"train.devices: expected at most 8 \(cpu\).*found 9"):
        engine_on(9)


def test_what_happens_once_for_each_task_leaves_the_weights_where_they_are(backbone):
    """A result of a compiled function is a new array: 343 MB for each of them at ViT-B/16."""
    states = [verbs.init_state(jax.random.key(1), backbone, settings("inflora", 2))]
    for index in range(2):
        task = Task(index, tuple(range(index * CLASSES, (index + 1) * CLASSES)))
        batch = batch_of(index, 0)
        batch = {"image": batch["inputs"].fields["image"], "label": batch["label"]}
        states.append(verbs.begin_task(states[-1], task, STEPS, [batch]))
        states.append(verbs.end_task(states[-1], [batch]))
    weights = jax.tree.leaves(backbone)
    for state in states:
        pairs = zip(weights, jax.tree.leaves(state.frozen), strict=True)
        assert all(there is found for there, found in pairs)


def test_moving_is_all_that_a_step_changes():
    """What is donated and what is averaged is this; a new field must be thought of."""
    assert [f.name for f in dataclasses.fields(Moving)] == ["trainable", "opt_state", "step"]
