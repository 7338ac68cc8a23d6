"""The state of a learner between two steps, and what can be read off it."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from qkd_jax.nn.backbone import Backbone
from qkd_jax.nn.inputs import Raw
from qkd_jax.settings.config import Config


@flax.struct.dataclass
class LearnerState:
    """Everything a learner knows. Shapes depend on the config only, never on the task.

    Attributes:
      frozen: what no step of this learner changes: "backbone", and where there are such, "query",
        the backbone that gives queries in place of the own one, and "teacher", the `LearnerState`
        of a student's teacher.
      config: static settings.
      key: typed PRNG key of the run; never advanced. Keys are derived from (key, task, step), so a
        resumed run draws the same numbers.
      task: int32 [], index of the current task; -1 before the first.
      step: int32 [], optimisation steps done in the current task.
      num_steps: int32 [], length of the learning-rate schedule; 0 = constant rate.
      task_classes: int32 [M], labels of the current task's classes, padded with -1.
      task_of_class: int32 [C], the task that brought each class; -1 = not seen.
      trainable: what the current task optimises.
      opt_state: optax state of `trainable`.
      memory: what finished tasks leave; frozen while a task trains.
      classifier: what a classifier in closed form keeps (`learners.classifier`); else empty.
    """

    frozen: dict[str, Any]
    config: Config = flax.struct.field(pytree_node=False)
    key: jax.Array
    task: jax.Array
    step: jax.Array
    num_steps: jax.Array
    task_classes: jax.Array
    task_of_class: jax.Array
    trainable: Any
    opt_state: Any
    memory: Any
    classifier: Any = ()

    @property
    def backbone(self) -> Backbone:
        """The frozen transformer."""
        return self.frozen["backbone"]

    @property
    def query(self) -> Backbone:
        """The frozen transformer whose features are queries: the own one, or a student's."""
        return self.frozen.get("query", self.backbone)

    @property
    def teacher(self) -> "LearnerState | None":
        """The state of a student's teacher."""
        return self.frozen.get("teacher")

    @property
    def _backbones(self) -> list[Backbone]:
        """The own one, that of the queries, and those of the teacher."""
        taught = [] if self.teacher is None else self.teacher._backbones
        return [self.backbone, self.query, *taught]

    @property
    def reader(self) -> Backbone:
        """The backbone whose form all inputs have: of several, that with the largest inputs."""
        return max(self._backbones, key=lambda backbone: backbone.spec.input_size)

    @property
    def resizes(self) -> bool:
        """Whether some backbone reads smaller inputs than `reader`."""
        return len({backbone.spec.input_size for backbone in self._backbones}) > 1

    def raw(self, fields: dict[str, jax.Array]) -> Raw:
        """Inputs in the form of `reader`, for every backbone of this state."""
        return Raw(fields, resize=self.resizes)

    def taught_by(self, teacher: "LearnerState") -> "LearnerState":
        """This student with its teacher in another state."""
        return self.replace(frozen={**self.frozen, "teacher": teacher})


@flax.struct.dataclass
class Moving:
    """The part of a state that an optimisation step changes; it is donated to the step."""

    trainable: Any
    opt_state: Any
    step: jax.Array


def split(state: LearnerState) -> tuple[LearnerState, Moving]:
    """(held, moving): the state without what a step changes, and what it changes."""
    moving = Moving(state.trainable, state.opt_state, state.step)
    return state.replace(trainable=None, opt_state=None, step=None), moving


def join(held: LearnerState, moving: Moving) -> LearnerState:
    """The inverse of `split`."""
    return held.replace(trainable=moving.trainable, opt_state=moving.opt_state, step=moving.step)


def seen_classes(state: LearnerState) -> jax.Array:
    """bool [C]: classes of tasks up to and including the current one."""
    return state.task_of_class >= 0


def old_classes(state: LearnerState) -> jax.Array:
    """bool [C]: classes of tasks before the current one."""
    return (state.task_of_class >= 0) & (state.task_of_class < state.task)


def valid_task_classes(state: LearnerState) -> jax.Array:
    """bool [M]: which rows of the current task's head stand for a class."""
    return state.task_classes >= 0


def task_class_masks(state: LearnerState) -> jax.Array:
    """bool [T, M]: `valid_task_classes` of every task; all False for tasks that have not come."""
    shapes = state.config.shapes
    sizes = jnp.sum(state.task_of_class[None] == jnp.arange(shapes.max_tasks)[:, None], axis=1)
    return jnp.arange(shapes.max_task_classes)[None] < sizes[:, None]


def local_labels(state: LearnerState, labels: jax.Array) -> jax.Array:
    """int32 [B]: position of each label among the current task's classes.

    A label of another task maps to 0; `engine.checks.check_batch` refuses such batches.
    """
    match = labels[:, None] == state.task_classes[None, :]
    return jnp.argmax(match, axis=1)
