"""The five verbs that users call: the engine on one device, with checks of all arguments.

A `Learner` (`learners/shape.py`) supplies the parts in which methods differ; the verbs
`init_state`, `begin_task`, `train_task`, `end_task` and `predict` are the same for all, functions
of one `LearnerState`. The task index is a traced integer and everything per task is padded to
`max_tasks`, so a run compiles its step once.

Example:
  >>> import numpy as np
  >>> import qkd_jax
  >>> shapes = qkd_jax.Shapes(num_classes=4, max_tasks=2, max_task_classes=2)
  >>> config = qkd_jax.override(
  ...     qkd_jax.Config(method="finetune", shapes=shapes),
  ...     *("backbone.name=tiny_random", "backbone.image_size=32", "adapter.bottleneck=4"),
  ... )
  >>> backbone = qkd_jax.load_backbone("tiny_random", image_size=32)
  >>> state = qkd_jax.init_state(jax.random.key(0), backbone, config)
  >>> order = qkd_jax.class_order(4, seed=None)
  >>> for task in qkd_jax.split_tasks(order, base=0, increment=2)[:1]:
  ...     images = np.random.default_rng(0).random((2, 32, 32, 3), np.float32)
  ...     batch = {"image": images, "label": np.array(task.classes)}
  ...     state = qkd_jax.begin_task(state, task)
  ...     state, metrics = qkd_jax.train_task(state, batch)  # one optimisation step
  ...     state = qkd_jax.end_task(state, [batch])
  >>> scores = qkd_jax.predict(state, images)
  >>> scores.shape, bool(jnp.isneginf(scores[:, 2:]).all())  # the second task has not come
  ((2, 4), True)
"""

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from qkd_jax.engine.checks import (
    Batch,
    check_batch,
    check_batches,
    check_inputs,
    check_teacher,
)
from qkd_jax.engine.engine import Engine
from qkd_jax.errors import ConfigError
from qkd_jax.learners.classifier import new_classifier
from qkd_jax.learners.optimiser import optimiser
from qkd_jax.learners.shape import feature_width, learner_of
from qkd_jax.learners.state import LearnerState, join, split
from qkd_jax.nn.backbone import Backbone
from qkd_jax.protocol.tasks import Task
from qkd_jax.settings.config import Config
from qkd_jax.settings.methods import method_named


@functools.cache
def one_device() -> Engine:
    """The engine of the verbs, made on the first call."""
    return Engine()


def init_state(
    key: jax.Array,
    backbone: Backbone,
    config: Config,
    *,
    teacher: Backbone | None = None,
    query: Backbone | None = None,
) -> LearnerState:
    """The state before the first task; every shape is final.

    A student's state holds that of its teacher, which learns each task first::

        teacher = end_task(...)                     # begun from state.teacher, trained as ever
        state = begin_task(state.taught_by(teacher), task)

    Args:
      key: typed PRNG key (`jax.random.key(seed)`).
      backbone: from `load_backbone`.
      config: its `method` chooses the learner; its `shapes` fix those of all arrays.
      teacher: the teacher's backbone, of methods that learn from one.
      query: the backbone that gives queries in place of the own one, where `shapes.query_width`
        says so.

    Raises:
      ConfigError: unknown method, or a backbone that does not fit the method or the settings.
    """
    if not jnp.issubdtype(getattr(key, "dtype", None), jax.dtypes.prng_key):
        raise ConfigError("key: expected a typed key, jax.random.key(seed), found another kind")
    fields, needed = backbone.spec.fields, method_named(config.method).reads
    if needed not in ("", *fields):
        raise ConfigError(
            f"backbone: expected one that reads {needed}, as {config.method} needs, found "
            f"{backbone.name or 'one'} that reads {' and '.join(fields)}; set backbone.name"
        )
    frozen: dict[str, Any] = {"backbone": backbone}
    if width := config.shapes.query_width:
        found = None if query is None else query.spec.width
        if found != width:
            raise ConfigError(f"query: expected a backbone {width} wide, found {found}")
        frozen["query"] = query
    learner, teaching = learner_of(config), teacher_config(config)
    if teaching is not None:
        check_teacher(backbone, teacher, teaching)
        learner.teacher.check(backbone.spec, teacher.spec)
        shares = learner.teacher.shares_query(config)
        if shares:
            teaching = _with_shapes(teaching, query_width=backbone.spec.width)
        own = backbone if shares else None
        frozen["teacher"] = init_state(key, teacher, teaching, query=own)
        config = _with_shapes(config, teacher_width=teacher.spec.width)
    trainable, memory = learner.init(jax.random.fold_in(key, 0), backbone, config)
    state = LearnerState(
        frozen=frozen,
        config=config,
        key=key,
        task=jnp.int32(-1),
        step=jnp.int32(0),
        num_steps=jnp.int32(0),
        task_classes=jnp.full(config.shapes.max_task_classes, -1, jnp.int32),
        task_of_class=jnp.full(config.shapes.num_classes, -1, jnp.int32),
        trainable=trainable,
        opt_state=optimiser(config.train).init(learner.optimised(trainable)),
        memory=memory,
    )
    kept = new_classifier(state, learner.slots, feature_width(state))
    return state.replace(classifier=kept)


def teacher_config(config: Config) -> Config | None:
    """The settings of a student's teacher; None for a learner that learns alone."""
    teacher = learner_of(config).teacher
    return None if teacher is None else teacher.config(config)


def _with_shapes(config, **changes):
    return dataclasses.replace(config, shapes=dataclasses.replace(config.shapes, **changes))


def begin_task(
    state: LearnerState, task: Task, num_steps: int = 0, batches: Iterable[Batch] | None = None
) -> LearnerState:
    """Opens the next task: a new slot, head rows and optimiser state.

    Args:
      task: `Task(index, classes)`; index must follow the last one, classes must be new.
      num_steps: length of the learning-rate schedule; 0 keeps the rate constant.
      batches: the task's training images as for `end_task`, for methods that look at them before
        training (inflora, min).

    Raises:
      ProtocolError: task out of turn, classes seen before, out of range, or more than the config
        has room for.
      ConfigError: the method needs `batches`.
      DataError: `batches` is empty, or not what `train_task` takes.
    """
    engine, learner = one_device(), learner_of(state.config)
    state = engine.open_task(state, task, num_steps)
    if learner.survey is None:
        return state
    if batches is None:
        raise ConfigError(
            f"batches: expected the task's images, which {state.config.method} looks at before "
            "training, found None; call begin_task(state, task, num_steps, batches)"
        )
    return engine.before(state, engine.survey(state, _checked(state, batches)))


def _checked(state: LearnerState, batches: Iterable[Batch]) -> Iterable[dict]:
    return (check_batch(state, batch) for batch in check_batches(batches))


def train_task(state: LearnerState, batch: Batch) -> tuple[LearnerState, dict[str, jax.Array]]:
    """One optimisation step of the current task.

    What the step changes is donated, so use the returned state and not the old one. The backbone
    and `state.memory` are neither copied nor changed.

    Args:
      state: after `begin_task`.
      batch: {"image": [B, H, W, 3] uint8 or float in [0, 1], "label": [B] int}, optionally "mask"
        [B] bool (False = padding), "features" [B, S, D] (cached features of the filled slots) and,
        for a student, "teacher" (`teacher_outputs` of these images, else computed in the step).
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
    batch = jax.tree.map(jnp.asarray, batch)
    train = one_device().steps if batch["label"].ndim == 2 else one_device().step
    moving, metrics = train(held, moving, batch)
    return join(held, moving), metrics


def end_task(state: LearnerState, batches: Iterable[Batch]) -> LearnerState:
    """Closes the current task: freezes its slot, computes prototypes, task state and statistics.

    Args:
      batches: the task's training inputs once more, without augmentation, as for `train_task`.

    Raises:
      DataError: `batches` lack a class of the task, or are not what `train_task` takes.
      ProtocolError: no task has begun.
    """
    engine, learner = one_device(), learner_of(state.config)
    batches = check_batches(batches)
    state = engine.freeze(state)
    if learner.survey is not None:
        batches = list(batches)  # read twice
        state = engine.after(state, engine.survey(state, _checked(state, batches)))
    slots = learner.slots.at_end(int(state.task))

    def with_features():
        for batch in _checked(state, batches):
            yield {**batch, "features": engine.features(state, batch["inputs"], slots)}

    return engine.finish(state, with_features())


def slot_features(
    state: LearnerState, inputs: Any, slots: Sequence[int] | None = None
) -> jax.Array:
    """Features [B, S, D] of `slots` (None = those that `score` reads); other slots are zero.

    Raises:
      DataError: as `predict`.
    """
    if slots is None:
        slots = learner_of(state.config).slots.score(int(state.task))
    inputs = jax.tree.map(jnp.asarray, check_inputs(state, inputs))
    return one_device().features(state, inputs, tuple(slots))


def teacher_outputs(state: LearnerState, inputs: Any) -> Any:
    """What a student's step reads of its teacher for these inputs, to be kept and given to
    `train_task` as `batch["teacher"]`: a pytree of arrays [B, ...].

    Raises:
      ConfigError: the state has no teacher.
      DataError: as `predict`.
    """
    if state.teacher is None:
        raise ConfigError(f"teacher_outputs: expected a student, found {state.config.method}")
    return one_device().teach(state, jax.tree.map(jnp.asarray, check_inputs(state, inputs)))


def predict_with_relevance(
    state: LearnerState, images: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    """`predict` and, for methods that route, the relevance [B, T] of each learned task."""
    engine = one_device()
    if learner_of(state.config).predict(state.config) is None:
        return engine.score(state, slot_features(state, images))
    return engine.predict(state, jax.tree.map(jnp.asarray, check_inputs(state, images)))


def predict(state: LearnerState, images: jax.Array) -> jax.Array:
    """Scores [B, num_classes] of images, without a task argument; unlearned classes are -inf.

    Args:
      state: after `end_task`.
      images: [B, H, W, 3] uint8, or float in [0, 1]. The scores of an image do not depend on
        the others.

    Raises:
      DataError: images of another shape or type, none at all, or pixels outside [0, 1].
    """
    return predict_with_relevance(state, images)[0]
