"""For every method: an image is scored alone, no input is kept, and what is frozen stays as it was.

Float32 sums of another batch size may be in another order: BUDGET of the largest score, some 100
roundings of 1.2e-7.
"""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qkd_jax
from qkd_jax.engine.verbs import teacher_config
from qkd_jax.learners.shape import learner_names, learner_of
from qkd_jax.protocol.tasks import Task
from qkd_jax.settings.config import override
from qkd_jax.settings.experiments import load_experiment
from qkd_jax.settings.methods import methods_reading
from qkd_jax.weights.load import load_backbone

BUDGET = 1e-5
# Those that train little run in every suite; tests of the other methods look at batches too.
QUICK = ("simplecil", "linear_probe")


def images_of(classes, seed):
    generator = np.random.default_rng([seed, *classes])
    label = np.resize(classes, 4)
    image = 0.5 * generator.random((4, 32, 32, 3)) + label[:, None, None, None] / 12
    return {"image": np.float32(image), "label": label}


def contents(state):
    """The bytes of every array that is reachable from a state, but for its keys."""
    leaves = [leaf for leaf in jax.tree.leaves(state) if hasattr(leaf, "dtype")]
    is_key = functools.partial(jnp.issubdtype, arg2=jax.dtypes.prng_key)
    return [np.asarray(leaf).tobytes() for leaf in leaves if not is_key(leaf.dtype)]


@pytest.fixture(
    scope="module",
    params=[pytest.param(m, marks=[] if m in QUICK else pytest.mark.slow) for m in learner_names()],
)
def learned(request, texts):
    """Three tasks of two classes (`joint`: one of six), each with two steps of training."""
    method = request.param
    config = load_experiment("smoke").get_config(method)
    one_task = config.protocol.kind == "joint"
    size = 6 if one_task else 2
    shapes = qkd_jax.Shapes(6, 6 // size, size, max_task_images=12)
    config = override(config, "alignment.epochs=1", where_read=True).replace(shapes=shapes)
    reads_images = method in methods_reading(("image",))
    if reads_images:
        backbone, batch_of = load_backbone("tiny_random", image_size=32), images_of
    else:
        backbone = texts.backbone

        def batch_of(classes, seed):
            return texts.batch(Task(0, tuple(classes)), seed)

    teacher = backbone if teacher_config(config) else None
    state, fed = qkd_jax.init_state(jax.random.key(7), backbone, config, teacher=teacher), []
    frozen = frozen_bytes(state)
    for index in range(6 // size):
        task = Task(index, tuple(range(size * index, size * (index + 1))))
        batches = [batch_of(task.classes, seed) for seed in range(2)]
        if one_task:
            batches = [batch_of(task.classes[part : part + 2], 0) for part in (0, 2, 4)]
        if state.teacher is not None:
            state = state.taught_by(taught(state.teacher, task, batches))
        state = taught(state, task, batches)
        fed += batches
    query = [batch_of([c], 5) for c in range(6)]
    query = {n: np.concatenate([batch[n][:1] for batch in query]) for n in query[0] if n != "label"}
    return SimpleNamespace(state=state, fed=fed, query=query, frozen=frozen)


def taught(state, task, batches):
    """The state after a task with one step on each batch."""
    learner = learner_of(state.config)
    state = qkd_jax.begin_task(state, task, num_steps=4, batches=batches)
    if learner.loss is not None and learner.trains(state.config, task.index):
        for batch in batches:
            state, _ = qkd_jax.train_task(state, batch)
    return qkd_jax.end_task(state, batches)


def frozen_bytes(state):
    parts = {name: part for name, part in state.frozen.items() if name != "teacher"}
    own = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(parts)]
    return own if state.teacher is None else own + frozen_bytes(state.teacher)


def test_an_input_is_scored_as_if_it_were_alone(learned):
    def scores(rows):
        fields = {name: array[list(rows)] for name, array in learned.query.items()}
        fields = fields["image"] if "image" in fields else fields
        return np.float64(qkd_jax.predict(learned.state, fields))

    whole = scores(range(6))
    assert np.isfinite(whole).all()
    size = np.abs(whole).max()
    near = functools.partial(np.testing.assert_allclose, rtol=0, atol=BUDGET * size)
    order = [3, 0, 5, 1, 4, 2]
    near(scores(order), whole[order])  # shuffled
    near(scores([2, 1, 1, 1, 1, 1])[0], whole[2])  # all others replaced
    near(scores([*range(6), 0, 0, 0, 0])[:6], whole)  # padded
    for row in range(0, 6, 2):
        near(scores([row])[0], whole[row])  # all others removed
    assert np.abs(whole - whole[:1]).max() > 100 * BUDGET * size  # inputs differ


def test_nothing_that_was_fed_is_kept(learned):
    """Sixteen numbers of an image, or all tokens of a text, are in no array of the state."""
    state = contents(learned.state)
    for batch in learned.fed:
        for name in set(batch) - {"label", "token_mask", "mask"}:
            for row in batch[name]:
                part = np.asarray(row).ravel()[:16].tobytes()
                assert not any(part in leaf for leaf in state), name


def test_what_is_frozen_is_never_written(learned):
    assert frozen_bytes(learned.state) == learned.frozen
