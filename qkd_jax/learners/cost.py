"""What a learner costs once all tasks are learned: passes for each input, and bytes kept."""

import dataclasses
from typing import Any

import jax

from qkd_jax.errors import ConfigError
from qkd_jax.learners.classifier import new_classifier
from qkd_jax.learners.shape import feature_width, learner_of
from qkd_jax.learners.state import LearnerState
from qkd_jax.settings.config import Config


def passes_per_input(config: Config, depth: int) -> float:
    """How many times an input goes through a transformer of `depth` blocks at test, after the last
    task: once for each slot that is read, but all slots with adapters share one pass through the
    blocks before the first adapter.
    """
    learner = learner_of(config)
    slots = learner.slots.score(config.shapes.max_tasks - 1)
    count = len(slots) if learner.predict(config) is None else learner.passes(config)
    frozen = int(learner.slots.frozen in slots)
    shared = (learner.first_block(config) or 0) / depth if count > frozen else 0.0
    return frozen + shared + (count - frozen) * (1.0 - shared)


def kept_bytes(state: LearnerState) -> dict[str, int]:
    """The bytes that are carried from one task to the next: memory, what is trained, and a
    classifier in closed form. The frozen backbone and the optimiser's state are not counted.

    An array grows with classes, or with tasks, if its shape is another for one class, or one task,
    more. Some arrays grow with both, such as a row for each class and slot.

    Returns:
      `kept_bytes`: all. `kept_bytes_per_class`, `kept_bytes_per_task`: those of the arrays that
      grow with classes, or tasks, divided by their number. `kept_bytes_constant`: those of the
      arrays that grow with neither.
    """
    shapes = state.config.shapes
    now = _arrays(state)
    by_class = _others(state, now, num_classes=(shapes.num_classes + 1,))
    # Some methods have no room for one task more.
    by_task = _others(state, now, max_tasks=(shapes.max_tasks + 1, shapes.max_tasks - 1))
    sizes = [leaf.size * leaf.dtype.itemsize for leaf in now]

    def total(chosen):
        return sum(size for size, counts in zip(sizes, chosen, strict=True) if counts)

    neither = [not (a or b) for a, b in zip(by_class, by_task, strict=True)]
    return {
        "kept_bytes": sum(sizes),
        "kept_bytes_constant": total(neither),
        "kept_bytes_per_class": total(by_class) // shapes.num_classes,
        "kept_bytes_per_task": total(by_task) // shapes.max_tasks,
    }


def _others(state: LearnerState, now: list[Any], **values: tuple[int, ...]) -> list[bool]:
    """Whether the shape of each array is another with the first of `values` that a field of
    `Shapes` may have; never where it may have none.
    """
    ((name, candidates),) = values.items()
    for value in candidates:
        try:
            shapes = dataclasses.replace(state.config.shapes, **{name: value})
            then = _arrays(state.replace(config=state.config.replace(shapes=shapes)))
        except ConfigError:
            continue
        return [a.shape != b.shape for a, b in zip(now, then, strict=True)]
    return [False] * len(now)


def _arrays(state: LearnerState) -> list[jax.ShapeDtypeStruct]:
    """Shapes and types of what is kept under the settings of `state`; nothing is computed."""

    def parts(key):
        learner = learner_of(state.config)
        kept = new_classifier(state.replace(key=key), learner.slots, feature_width(state))
        return learner.init(key, state.backbone, state.config), kept

    return jax.tree.leaves(jax.eval_shape(parts, state.key))
