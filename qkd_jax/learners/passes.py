"""The passes over inputs that a learner's parts make up, as one device runs them; pure.

`engine.Engine` compiles them for the five verbs and for runs. The optimisation step is in
`step.py`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from qkd_jax.learners.features import pooled_feature
from qkd_jax.learners.optimiser import optimiser
from qkd_jax.learners.shape import columns_of, learner_of
from qkd_jax.learners.state import LearnerState
from qkd_jax.learners.task_adapters import on_host
from qkd_jax.nn.encode import pooled_rows, stem
from qkd_jax.nn.inputs import Raw, Stem
from qkd_jax.settings.sections import TrainConfig


def shared_part(state: LearnerState, inputs: Raw | Stem) -> Raw | Stem:
    """The stem, which all slots share, where a method inserts only adapters; else the inputs."""
    first = learner_of(state.config).first_block(state.config)
    if first is None or isinstance(inputs, Stem):
        return inputs
    dtype = jnp.dtype(state.config.backbone.compute_dtype)
    rows = pooled_rows(state.backbone.spec)
    return stem(state.backbone, inputs, first, rows=rows, compute_dtype=dtype)


def begin(
    state: LearnerState, classes: jax.Array, index: jax.Array, num_steps: jax.Array
) -> LearnerState:
    """The state at the start of a task with `classes` int [M], padded with -1."""
    owners = state.task_of_class.at[columns_of(classes, state)].set(index, mode="drop")
    state = state.replace(
        task=index,
        step=jnp.int32(0),
        num_steps=num_steps,
        task_classes=classes,
        task_of_class=owners,
    )
    key = jax.random.fold_in(jax.random.fold_in(state.key, 1), index)
    learner = learner_of(state.config)
    trainable, memory = learner.begin(state, key)
    opt_state = optimiser(state.config.train).init(learner.optimised(trainable))
    return state.replace(trainable=trainable, opt_state=opt_state, memory=memory)


def survey(state: LearnerState, inputs: Raw, labels: jax.Array, mask: jax.Array) -> Any:
    """The learner's sums over the inputs whose mask [B] holds; padded rows may hold anything."""
    return learner_of(state.config).survey.add(state, select_rows(mask, inputs), labels, mask)


def before(state: LearnerState, sums: Any) -> LearnerState:
    """The state after the survey that precedes the first step."""
    key = jax.random.fold_in(jax.random.fold_in(state.key, 4), state.task)
    return learner_of(state.config).survey.before(state, sums, key)


def after(state: LearnerState, sums: Any) -> LearnerState:
    """The state with what the survey after training leaves in memory."""
    return learner_of(state.config).survey.after(state, sums)


def freeze(state: LearnerState) -> LearnerState:
    """The state with what was trained stored as a filled slot, which can be extracted."""
    return learner_of(state.config).freeze(state)


def extract(
    state: LearnerState,
    inputs: Raw | Stem,
    features: jax.Array,
    slots: jax.Array,
    count: jax.Array,
) -> jax.Array:
    """`features` [B, S, D] with those of the first `count` slots of `slots` int [S] filled in."""
    inputs, learner, chunk = shared_part(state, inputs), learner_of(state.config), 1
    # Adapters do not read one another: several at a time, unless each has to be fetched.
    if isinstance(inputs, Stem) and not on_host(state.config):
        chunk = task_chunk(state.config.train, *features.shape[:2])

    def fill_chunk(i, features):
        chosen = lax.dynamic_slice(slots, (i * chunk,), (chunk,))
        extract = jax.vmap(lambda slot: learner.extract(state, inputs, slot, features), out_axes=1)
        return features.at[:, chosen].set(extract(chosen).astype(features.dtype))

    def fill(i, features):
        feature = learner.extract(state, inputs, slots[i], features)
        return features.at[:, slots[i]].set(feature.astype(features.dtype))

    done = jnp.int32(0)
    if chunk > 1:  # the remainder is done one by one, so that no pass is wasted
        features = lax.fori_loop(0, count // chunk, fill_chunk, features)
        done = count // chunk * chunk
    return lax.fori_loop(done, count, fill, features)


def frozen_feature(state: LearnerState, inputs: Raw) -> jax.Array:
    """[B, Q]: the slot `Slots.frozen`, the same computation for all methods, so that they share it
    to the last bit.
    """
    return pooled_feature(state, inputs, backbone=state.query)


def task_chunk(config: TrainConfig, batch_size: int, num_slots: int) -> int:
    """How many slots one pass over a batch computes.

    By default 16 rows in all on a CPU, whose caches more rows overflow, and 256 elsewhere, which
    has not been tuned.
    """
    if config.task_chunk:
        return min(config.task_chunk, num_slots)
    pairs = 16 if jax.default_backend() == "cpu" else 256
    return min(max(1, pairs // batch_size), num_slots)


def teach(state: LearnerState, inputs: Raw) -> Any:
    """What a student's loss reads of its teacher: a pytree of arrays [B, ...]."""
    return lax.stop_gradient(learner_of(state.config).teacher.outputs(state, inputs))


def accumulate(
    state: LearnerState, sums: Any, features: jax.Array, labels: jax.Array, mask: jax.Array
) -> Any:
    """The learner's sums with a batch added; padded rows may hold anything."""
    features = select_rows(mask, features)
    return learner_of(state.config).sums.add(state, sums, features, labels, mask)


def finish(state: LearnerState, sums: Any) -> LearnerState:
    """The state with what the finished task leaves in memory."""
    key = jax.random.fold_in(jax.random.fold_in(state.key, 3), state.task)
    return learner_of(state.config).finish(state, sums, key)


def score(state: LearnerState, features: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """(scores [B, C], relevance [B, T] or None) from slot features [B, S, D]."""
    return learner_of(state.config).score(state, features)


def predict(state: LearnerState, inputs: Raw | Stem) -> tuple[jax.Array, jax.Array | None]:
    """As `score`, from inputs: for settings whose passes depend on them (`Learner.predict`)."""
    return learner_of(state.config).predict(state.config)(state, shared_part(state, inputs))


def score_with_task(state: LearnerState, features: jax.Array, tasks: jax.Array) -> jax.Array:
    """Scores [B, C] from slot features [B, S, D] if the task of each input, int [B], is known."""
    return learner_of(state.config).score_with_task(state, features, tasks)


def predict_with_task(state: LearnerState, inputs: Raw | Stem, tasks: jax.Array) -> jax.Array:
    """As `score_with_task`, from inputs (`Learner.predict_with_task`)."""
    predict = learner_of(state.config).predict_with_task(state.config)
    return predict(state, shared_part(state, inputs), tasks)


def select_rows(real: jax.Array, rows: Any) -> Any:
    """`rows`, a pytree of arrays [B, ...], with zeros where `real` [B] does not hold."""

    def select(array):
        mask = real.reshape(-1, *[1] * (array.ndim - 1))
        return jnp.where(mask, array, jnp.zeros((), array.dtype))

    return jax.tree.map(select, rows)
