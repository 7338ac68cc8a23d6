"""Checks of the inputs, labels, masks and tasks that the verbs are given.

The inputs themselves are checked by the backbone's spec. Padded rows may hold anything.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qkd_jax.errors import ConfigError, DataError, ProtocolError
from qkd_jax.learners.state import LearnerState
from qkd_jax.nn.backbone import Backbone
from qkd_jax.nn.inputs import Raw
from qkd_jax.protocol.tasks import Task
from qkd_jax.settings.config import Config

Batch = Mapping[str, Any]


def check_batch(state: LearnerState, batch: Batch, *, of_steps: bool = False) -> dict[str, Any]:
    """The batch of the current task as a compiled step takes it, after all checks: {"inputs",
    "label", "mask"}, and "features" and "teacher" if they are given.

    Args:
      batch: the backbone's fields, such as "image" [B, H, W, 3], and "label" [B]; optionally "mask"
        [B] and "features" [B, S, D].
      of_steps: whether a leading axis of steps is allowed, [S, B, ...].

    Raises:
      ProtocolError: no task has begun.
      DataError: names the field, what was expected and what was found.
    """
    if int(state.task) < 0:
        raise ProtocolError("no task has begun: call begin_task first")
    spec = state.reader.spec
    wanted = (*spec.fields, "label")
    names = " and ".join(map(repr, wanted))
    if not isinstance(batch, Mapping):
        raise DataError(f"batch: expected a dict with {names}, found {type(batch).__name__}")
    if not all(name in batch for name in wanted):
        raise DataError(f"batch: expected {names}, found {sorted(map(str, batch))}")
    fields, rows = spec.check_form({name: batch[name] for name in spec.fields}, of_steps=of_steps)
    label = _on_host("label", batch["label"])
    if label.shape != rows:
        raise DataError(f"label: expected shape {list(rows)}, found {list(label.shape)}")
    if not np.issubdtype(label.dtype, np.integer):
        raise DataError(f"label: expected whole numbers, found {label.dtype}")
    mask = _on_host("mask", batch.get("mask", np.ones(rows, bool)))
    if mask.shape != rows or mask.dtype != bool:
        raise DataError(f"mask: expected bool {list(rows)}, found {mask.dtype} {list(mask.shape)}")
    features = batch.get("features")
    if features is not None and (
        np.ndim(features) != len(rows) + 2 or np.shape(features)[:-2] != rows
    ):
        raise DataError(
            f"features: expected [{', '.join(map(str, rows))}, S, D], found "
            f"{list(np.shape(features))}"
        )
    if not mask.any(axis=-1).all():
        raise DataError("mask: expected at least one image in each batch, found only padding")
    allowed = np.asarray(state.task_classes)
    allowed = allowed[allowed >= 0]
    wrong = mask & ~np.isin(label, allowed)
    if wrong.any():
        found = sorted(set(label[wrong].tolist()))[:5]
        raise DataError(
            f"label: expected classes of task {int(state.task)}, {sorted(allowed.tolist())}, "
            f"found {found}"
        )
    spec.check_values(fields, mask)
    checked = {"inputs": state.raw(fields), "label": label.astype(np.int32), "mask": mask}
    kept = {name: batch[name] for name in ("features", "teacher") if batch.get(name) is not None}
    return checked | kept


def check_batches(batches: Any) -> Iterable[Batch]:
    """Raises DataError where one batch, or nothing, is given in place of several."""
    if isinstance(batches, Mapping) or not isinstance(batches, Iterable):
        raise DataError(
            f"batches: expected a list or iterator of batches, found {type(batches).__name__}"
        )
    return batches


def check_inputs(state: LearnerState, inputs: Any) -> Raw:
    """The inputs to predict, after all checks; traced arrays are checked by shape alone.

    Args:
      inputs: an array [B, ...], or a dict of arrays where the backbone reads more than one.

    Raises:
      DataError: as `check_batch`.
    """
    spec = state.reader.spec
    fields = dict(inputs) if isinstance(inputs, Mapping) else {spec.fields[0]: inputs}
    if set(fields) != set(spec.fields):
        raise DataError(f"inputs: expected {sorted(spec.fields)}, found {sorted(fields)}")
    fields, rows = spec.check_form(fields)
    if not any(isinstance(field, jax.core.Tracer) for field in fields.values()):
        spec.check_values(fields, np.ones(rows, bool))
    return state.raw(fields)


def check_teacher(backbone: Backbone, teacher: Backbone | None, config: Config) -> None:
    """Raises ConfigError unless `teacher` can teach a student with `backbone`: both read the same
    inputs, of which only images may have other sizes. `config`: the teacher's.
    """
    if teacher is None:
        raise ConfigError(
            "teacher: expected a backbone, as these settings have a teacher, found None; load "
            f"{config.backbone.name!r} and give it as `teacher`"
        )
    own, other = backbone.spec, teacher.spec
    if own.fields != other.fields:
        raise ConfigError(
            f"teacher: expected a backbone that reads {' and '.join(own.fields)}, as the student "
            f"does, found {teacher.name or 'one'} that reads {' and '.join(other.fields)}"
        )
    texts = (own.input_size, backbone.preprocessing), (other.input_size, teacher.preprocessing)
    if own.unit == "tokens" and texts[0] != texts[1]:
        raise ConfigError(
            f"teacher: expected the student's tokenizer and {own.input_size} tokens, found "
            f"{teacher.name or 'one'} with {other.input_size} or another tokenizer"
        )


def check_task(state: LearnerState, task: Task, num_steps: int) -> jax.Array:
    """The classes of a task that may begin, int32 [M], padded with -1.

    Raises:
      ProtocolError: task out of turn, classes seen before, out of range, or more than the config
        has room for.
    """
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
        raise ProtocolError(f"task: expected index {expected} next, found {task.index}")
    if task.index >= config.shapes.max_tasks:
        raise ProtocolError(
            f"task: expected an index below max_tasks={config.shapes.max_tasks}, found {task.index}"
        )
    if not 1 <= len(classes) <= config.shapes.max_task_classes:
        raise ProtocolError(
            f"task {task.index}: expected 1 to max_task_classes="
            f"{config.shapes.max_task_classes} classes, found {len(classes)}"
        )
    if len(set(classes.tolist())) != len(classes) or np.intersect1d(classes, seen).size:
        raise ProtocolError(f"task {task.index}: expected new classes, found {classes.tolist()}")
    if classes.min() < 0 or classes.max() >= config.shapes.num_classes:
        raise ProtocolError(
            f"task {task.index}: expected classes 0 to {config.shapes.num_classes - 1}, found "
            f"{classes.tolist()}"
        )
    padded = np.full(config.shapes.max_task_classes, -1, np.int32)
    padded[: len(classes)] = classes
    return jnp.asarray(padded)


def _on_host(name: str, values: Any) -> np.ndarray:
    try:
        return np.asarray(values)
    except ValueError as error:  # rows of different lengths
        raise DataError(f"{name}: expected an array, found rows that make none ({error})") from None
