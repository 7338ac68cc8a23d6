"""The five verbs that users call, and the halves of them that a run calls.

A `Learner` (`learner.py`) supplies the parts in which methods differ; the verbs `init_state`,
`begin_task`, `train_task`, `end_task` and `predict` are the same for all. All of it is pure
functions over one `LearnerState`. The task index is a traced integer and everything per task is
padded to `max_tasks`: a run compiles its step once.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qkd_jax.engine.checks import Batch, check_batch, check_batches, check_images
from qkd_jax.errors import ConfigError, DataError, ProtocolError
from qkd_jax.learners.shape import columns_of, learner_of
from qkd_jax.learners.state import LearnerState, join, split
from qkd_jax.learners.step import (
    device_step,
    optimiser,
    prepare_images,
    select_rows,
)
from qkd_jax.nn.vit import Backbone
from qkd_jax.protocol.tasks import Task
from qkd_jax.settings.config import Config, TrainConfig


def init_state(key: jax.Array, backbone: Backbone, config: Config) -> LearnerState:
    """The state before the first task; every shape is final.

    Args:
      key: typed PRNG key (`jax.random.key(seed)`).
      backbone: from `load_backbone`.
      config: its `method` chooses the learner; `num_classes`, `max_tasks`, `max_task_classes` fix
        the shapes.

    Raises:
      ConfigError: unknown method, or settings that do not fit the backbone.
    """
    if not jnp.issubdtype(getattr(key, "dtype", None), jax.dtypes.prng_key):
        raise ConfigError("init_state needs a typed key: jax.random.key(seed), not PRNGKey(seed)")
    trainable, memory = learner_of(config).init(jax.random.fold_in(key, 0), backbone, config)
    return LearnerState(
        backbone=backbone,
        config=config,
        key=key,
        task=jnp.int32(-1),
        step=jnp.int32(0),
        num_steps=jnp.int32(0),
        task_classes=jnp.full(config.max_task_classes, -1, jnp.int32),
        task_of_class=jnp.full(config.num_classes, -1, jnp.int32),
        trainable=trainable,
        opt_state=optimiser(config.train).init(trainable),
        memory=memory,
    )


def begin_task(
    state: LearnerState, task: Task, num_steps: int = 0, batches: Iterable[Batch] | None = None
) -> LearnerState:
    """Opens the next task: a new slot, head rows and optimiser state.

    Args:
      task: `Task(index, classes)`; index must follow the last one, classes must be new.
      num_steps: length of the cosine schedule; 0 keeps the rate constant.
      batches: the task's training images as for `end_task`, for methods that look at them before
        training (inflora).

    Raises:
      ProtocolError: task out of turn, classes seen before, out of range, or more than the config
        has room for.
      ConfigError: the method needs `batches`.
      DataError: there is no image in `batches`, or not what `train_task` takes.
    """
    state = open_task(state, task, num_steps)
    if learner_of(state.config).survey is None:
        return state
    if batches is None:
        raise ConfigError(
            f"{state.config.method} looks at a task's images before training: "
            "begin_task(state, task, num_steps, batches)"
        )
    return prepare(state, sum_survey(state, batches))


def open_task(state: LearnerState, task: Task, num_steps: int = 0) -> LearnerState:
    """`begin_task` without the look at the images."""
    config = state.config
    for name, value in (("num_steps", num_steps), *(("a task's class", c) for c in task.classes)):
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            raise ProtocolError(f"{name}: expected a whole number, found {value!r}")
    if num_steps < 0:
        raise ProtocolError(f"num_steps: expected 0 (constant rate) or more, found {num_steps}")
    classes = np.asarray(task.classes, np.int32)
    seen = np.flatnonzero(np.asarray(state.task_of_class) >= 0)
    expected = int(state.task) + 1
    if task.index != expected:
        raise ProtocolError(f"task {task.index} cannot start: the next task is {expected}")
    if task.index >= config.max_tasks:
        raise ProtocolError(
            f"task {task.index}: the state has room for max_tasks={config.max_tasks}"
        )
    if not 1 <= len(classes) <= config.max_task_classes:
        raise ProtocolError(
            f"task {task.index} has {len(classes)} classes; the state has room for 1 to "
            f"max_task_classes={config.max_task_classes}"
        )
    if len(set(classes.tolist())) != len(classes) or np.intersect1d(classes, seen).size:
        raise ProtocolError(f"task {task.index} repeats classes: {classes.tolist()}")
    if classes.min() < 0 or classes.max() >= config.num_classes:
        raise ProtocolError(
            f"task {task.index}: expected classes 0 to {config.num_classes - 1}, found "
            f"{classes.tolist()}"
        )
    padded = np.full(config.max_task_classes, -1, np.int32)
    padded[: len(classes)] = classes
    return _begin(state, jnp.asarray(padded), jnp.int32(task.index), jnp.int32(num_steps))


@jax.jit
def _survey(state, images, mask):
    return learner_of(state.config).survey(state, prepare_images(state, images), mask)


@jax.jit
def _prepare(state, sums):
    key = jax.random.fold_in(jax.random.fold_in(state.key, 4), state.task)
    return learner_of(state.config).prepare(state, sums, key)


@jax.jit
def _absorb(state, sums):
    return learner_of(state.config).absorb(state, sums)


def sum_survey(state: LearnerState, batches: Iterable[Batch]) -> Any:
    """The learner's survey of a task's images, summed over batches."""
    total = None
    for batch in check_batches(batches):
        batch = check_batch(state, batch)
        sums = _survey(state, jnp.asarray(batch["image"]), jnp.asarray(batch["mask"]))
        total = sums if total is None else jax.tree.map(jnp.add, total, sums)
    if total is None:
        raise DataError(f"{state.config.method} looks at a task's images, but none was given")
    return total


def prepare(state: LearnerState, sums: Any) -> LearnerState:
    """Second half of `begin_task`: what the survey of the images changes before training."""
    return _prepare(state, sums)


def absorb(state: LearnerState, sums: Any) -> LearnerState:
    """After `freeze`: what the survey of the images leaves in memory."""
    return _absorb(state, sums)


@jax.jit
def _begin(state, classes, index, num_steps):
    owners = state.task_of_class.at[columns_of(classes, state)].set(index, mode="drop")
    state = state.replace(
        task=index,
        step=jnp.int32(0),
        num_steps=num_steps,
        task_classes=classes,
        task_of_class=owners,
    )
    key = jax.random.fold_in(jax.random.fold_in(state.key, 1), index)
    trainable, memory = learner_of(state.config).begin(state, key)
    opt_state = optimiser(state.config.train).init(trainable)
    return state.replace(trainable=trainable, opt_state=opt_state, memory=memory)


@partial(jax.jit, donate_argnums=1)
def _train(held, moving, batch):
    return device_step(held, moving, batch)


@partial(jax.jit, donate_argnums=1)
def _train_many(held, moving, batches):
    return lax.scan(lambda carry, batch: device_step(held, carry, batch), moving, batches)


def train_task(state: LearnerState, batch: Batch) -> tuple[LearnerState, dict[str, jax.Array]]:
    """One optimisation step of the current task.

    Pure and jitted; what the step changes is donated, so use the returned state and not the old
    one. The backbone and `state.memory` are never copied or changed.

    Args:
      state: after `begin_task`.
      batch: {"image": [B, H, W, 3] uint8 or float in [0, 1], "label": [B] int}, optionally "mask"
        [B] bool (False = padding) and "features" [B, S, D] (cached features of the filled slots).
        With a leading axis of steps, [S, B, ...], the steps are scanned in one call.

    Returns:
      The new state and a dict of scalars (of [S] arrays for a leading axis of steps).

    Raises:
      DataError: wrong shapes or types, an empty batch, labels that are not of this task, pixels
        outside [0, 1].
      ProtocolError: no task has begun.
      ConfigError: the method trains nothing.
    """
    learner = learner_of(state.config)
    if learner.loss is None or not learner.trains(state.config, int(state.task)):
        when = "" if learner.loss is None else f" in task {int(state.task)}"
        raise ConfigError(
            f"{state.config.method} trains nothing{when}: call end_task right after begin_task"
        )
    batch = check_batch(state, batch, of_steps=True)
    held, moving = split(state)
    batch = {name: jnp.asarray(value) for name, value in batch.items()}
    train = _train_many if batch["image"].ndim == 5 else _train
    moving, metrics = train(held, moving, batch)
    return join(held, moving), metrics


@jax.jit
def _freeze(state):
    return learner_of(state.config).freeze(state)


@jax.jit
def _extract_slots(state, images, features, slots, count):
    """Fills features [B, S, D] for the first `count` of `slots` [S]."""
    images, learner, chunk = prepare_images(state, images), learner_of(state.config), 1
    if learner.shared is not None:
        images = learner.shared(state, images)
        chunk = task_chunk(state.config.train, *features.shape[:2])

    def fill_chunk(i, features):
        chosen = lax.dynamic_slice(slots, (i * chunk,), (chunk,))
        found = jax.vmap(lambda slot: learner.extract(state, images, slot, features), out_axes=1)
        return features.at[:, chosen].set(found(chosen).astype(features.dtype))

    def fill(i, features):
        found = learner.extract(state, images, slots[i], features)
        return features.at[:, slots[i]].set(found.astype(features.dtype))

    done = jnp.int32(0)
    if chunk > 1:  # what is left over is done one by one, so that no pass is for nothing
        features = lax.fori_loop(0, count // chunk, fill_chunk, features)
        done = count // chunk * chunk
    return lax.fori_loop(done, count, fill, features)


def task_chunk(config: TrainConfig, batch_size: int, num_slots: int) -> int:
    """How many slots one pass over a batch computes.

    By default 16 images in all on a CPU, whose caches more rows overflow (measured: within 2 % of
    the best for batches of 1 to 32), and 256 elsewhere, a choice that has not been tuned.
    """
    if config.task_chunk:
        return min(config.task_chunk, num_slots)
    rows = 16 if jax.default_backend() == "cpu" else 256
    return min(max(1, rows // batch_size), num_slots)


@jax.jit
def _accumulate(state, statistics, features, labels, mask):
    features = select_rows(mask, features)
    learner = learner_of(state.config)
    return learner.accumulate(state, statistics, features, labels, mask)


@jax.jit
def _finish(state, statistics):
    key = jax.random.fold_in(jax.random.fold_in(state.key, 3), state.task)
    return learner_of(state.config).finish(state, statistics, key)


def freeze(state: LearnerState) -> LearnerState:
    """First half of `end_task`: what was trained becomes a filled slot and can be extracted."""
    return _freeze(state)


def finish(state: LearnerState, batches: Iterable[Batch]) -> LearnerState:
    """Second half of `end_task`: statistics of images given with their slot features."""
    config = state.config
    width = state.backbone.spec.width
    statistics = learner_of(config).statistics(config, num_slots(config), width)
    missing, given = set(np.asarray(state.task_classes).tolist()) - {-1}, 0
    for batch in batches:
        label = np.asarray(batch["label"])
        mask = np.asarray(batch.get("mask", np.ones(label.shape, bool)))
        missing -= set(label[mask].tolist())
        given += int(mask.sum())
        features = jnp.asarray(batch["features"])
        statistics = _accumulate(state, statistics, features, jnp.asarray(label), jnp.asarray(mask))
    if missing:
        raise DataError(f"end_task: no image of classes {sorted(missing)} was given")
    if 0 < config.max_task_images < given:
        raise DataError(
            f"end_task: {given} images were given, more than max_task_images="
            f"{config.max_task_images}; set it to the training images of the largest task, or to 0"
        )
    return _finish(state, statistics)


def end_task(state: LearnerState, batches: Iterable[Batch]) -> LearnerState:
    """Closes the current task: freezes its slot and computes prototypes, task state and statistics.

    Args:
      batches: the task's training images once more, without augmentation, as for `train_task`.

    Raises:
      DataError: a class of the task has no image in `batches`, or not what `train_task` takes.
      ProtocolError: no task has begun.
    """
    learner = learner_of(state.config)
    check_batches(batches)
    state = freeze(state)
    if learner.survey is not None:
        batches = list(batches)  # read twice
        state = absorb(state, sum_survey(state, batches))
    slots = learner.slots_at_end(int(state.task))

    def with_features():
        for batch in batches:
            batch = check_batch(state, batch)
            yield {**batch, "features": slot_features(state, batch["image"], slots)}

    return finish(state, with_features())


def num_slots(config: Config) -> int:
    """S: how many slots a feature array has."""
    learner, last = learner_of(config), config.max_tasks - 1
    return 1 + max(0, *learner.slots(last), *learner.slots_at_end(last))


def slot_features(
    state: LearnerState, images: jax.Array, slots: tuple[int, ...] | None = None
) -> jax.Array:
    """Features [B, S, D] of `slots` (None: those that `score` reads); other slots are zero."""
    if slots is None:
        slots = tuple(learner_of(state.config).slots(int(state.task)))
    size, width = num_slots(state.config), state.backbone.spec.width
    order = jnp.asarray(slots + (0,) * (size - len(slots)), jnp.int32)
    empty = jnp.zeros((images.shape[0], size, width))
    return _extract_slots(state, jnp.asarray(images), empty, order, jnp.int32(len(slots)))


@jax.jit
def score(state: LearnerState, features: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """(scores [B, C], relevance [B, T] or None) from slot features [B, S, D]; the cheap end of
    `predict`.
    """
    return learner_of(state.config).score(state, features)


@jax.jit
def _predict(state, images):
    return learner_of(state.config).predict(state, prepare_images(state, images))


def predict_with_relevance(
    state: LearnerState, images: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    """`predict` and, for methods that route, the relevance [B, T] of each learned task."""
    images = jnp.asarray(check_images(state.config, images))
    if learner_of(state.config).reads_images(state.config):
        return _predict(state, images)
    return score(state, slot_features(state, images))


def predict(state: LearnerState, images: jax.Array) -> jax.Array:
    """Scores [B, num_classes] of images; classes not learned yet are -inf. There is no task
    argument.

    Args:
      state: after `end_task`.
      images: [B, H, W, 3] uint8, or float in [0, 1]. A row's scores do not depend on the other
        rows.

    Raises:
      DataError: images of another shape or type, none at all, or pixels outside [0, 1].
    """
    return predict_with_relevance(state, images)[0]
