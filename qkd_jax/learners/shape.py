"""The parts that every method has, and the registry of methods."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from qkd_jax.learners.classifier import headed
from qkd_jax.learners.state import LearnerState, local_labels
from qkd_jax.nn import heads
from qkd_jax.settings.config import Config
from qkd_jax.settings.methods import Method, declare, method_names
from qkd_jax.settings.sections import BackboneConfig


class Context(NamedTuple):
    """What `Learner.loss` is given beside state, inputs and batch.

    Attributes:
      keys: [B] typed keys, one for each row.
      mask: bool [B], False where a row is padding.
      gather: [B, ...] -> [all rows of all devices, ...], for losses that couple rows.
    """

    keys: jax.Array
    mask: jax.Array
    gather: Callable


def class_statistics(config: Config, num_slots: int, width: int) -> heads.ClassStatistics:
    """An empty accumulator of sums and counts per class, without second moments."""
    return heads.empty_statistics(num_slots, config.shapes.max_task_classes, width, 0)


def add_classes(state, statistics, features, labels, mask):
    """`statistics` with a batch added: features [B, S, D] with labels [B]."""
    return heads.add_to_statistics(statistics, features, local_labels(state, labels), mask)


class Slots(NamedTuple):
    """Which slots are read when: functions task -> slots in order of extraction.

    Attributes:
      score: read by `Learner.score` after `task`.
      finish: read by `Learner.finish` when `task` ends; None = as `score`.
      loss: read by `Learner.loss` for the current inputs: the teachers of distillation, or the
        frozen query of prompts.
      loss_view: the view of the current inputs whose features these are: "training", or "test",
        without augmentation. Features of the test view are computed once per task and kept.
      frozen: the slot of the frozen model's class token; None = there is none. Its features are
        shared by all methods and seeds (`runs.store`).
    """

    score: Callable
    finish: Callable | None = None
    loss: Callable = lambda task: ()
    loss_view: Literal["training", "test"] = "training"
    frozen: int | None = None

    def at_end(self, task: int) -> tuple[int, ...]:
        """The slots that are read when `task` ends."""
        return tuple((self.finish or self.score)(task))


class Sums(NamedTuple):
    """Sums over a task's inputs, computed in one pass, for `Learner.finish`.

    Attributes:
      empty: (config, S, D) -> an empty accumulator.
      add: (state, sums, features [B, S, D], labels [B], mask [B]) -> sums.
    """

    empty: Callable = class_statistics
    add: Callable = add_classes


# Of a learner that leaves nothing to sum up.
NO_SUMS = Sums(
    empty=lambda config, num_slots, width: (),
    add=lambda state, sums, features, labels, mask: sums,
)


class Survey(NamedTuple):
    """A pass over a task's inputs before training, and another one after it.

    Attributes:
      add: (state, inputs, labels [B], mask [B]) -> sums over the inputs.
      before: (state, sums, key) -> state, after `begin`, before the first step.
      after: (state, sums) -> state, after `freeze`.
    """

    add: Callable
    before: Callable
    after: Callable


class Teacher(NamedTuple):
    """What makes a learner a student: another learner, on a backbone of its own, that learns every
    task first.

    Attributes:
      config: the student's config -> the teacher's; None where these settings have no teacher.
      alone: config -> the config of the same student that learns alone, with all that only a
        taught one reads at its default, so that runs of one student have the same.
      outputs: (state, inputs) -> pytree of arrays [B, ...], what `Learner.loss` reads of
        `state.teacher` for these inputs, as `batch["teacher"]`.
      shares_query: config -> whether the teacher's queries come from the student's backbone, which
        its state then holds as `frozen["query"]`, with `shapes.query_width`.
      rate: the student's setting of the teacher's learning rate.
      check: (the student's spec, the teacher's) -> None, or ConfigError where the two backbones do
        not fit together.
    """

    config: Callable
    alone: Callable
    outputs: Callable
    shares_query: Callable = lambda config: False
    rate: str = "train.learning_rate"
    check: Callable = lambda student, teacher: None


def teacher_settings(
    config: Config, method: str, backbone: BackboneConfig, learning_rate: float
) -> Config:
    """The settings of a teacher by this method, which learns from the student's data, in the same
    tasks and with the same steps, but for a learning rate of its own; 0 = the student's.

    Where both have a section of settings of one name, the teacher's is the student's.
    """
    teacher = Config(
        experiment=config.experiment, method=method, seed=config.seed, shapes=config.shapes
    )
    rate = learning_rate or config.train.learning_rate
    return teacher.replace(
        backbone=backbone,
        data=config.data,
        protocol=config.protocol,
        train=replace(config.train, learning_rate=rate),
        **{name: section for name, section in config.own if name in dict(teacher.own)},
    )


class Learner(NamedTuple):
    """A method, as its parts.

    A *slot* is one frozen way to turn inputs into features, such as the adapter of one task. The
    features of a filled slot never change, so a run computes each (input, slot) pair once. A method
    whose one model changes with every task has a slot for each task.

    Inputs are `Raw`, or the `Stem` that all adapters share where `first_block` allows it.

    Attributes:
      name: as in `config.method`.
      init: (key, backbone, config) -> (trainable, memory), arrays in their final shapes.
      begin: (state, key) -> (trainable, memory) for the task that starts.
      loss: (trainable, state, inputs, batch, Context) -> dict of [B] arrays with key "loss"; None
        where nothing is trained.
      freeze: state -> state with what was trained moved to memory as a filled slot.
      finish: (state, sums, key) -> state with what the finished task leaves, such as prototypes.
      extract: (state, inputs, slot, features [B, S, D] of the slots extracted before) -> features
        [B, D] of a filled slot.
      score: (state, features [B, S, D]) -> (scores [B, C], relevance [B, T] or None).
      score_with_task: (state, features [B, S, D], tasks int [B]) -> scores [B, C], as `score` would
        give them if its choice of a task were the true one, `tasks`. A diagnostic of evaluation
        (`oracle_accuracy`), which no prediction reads; None where no choice is made.
      slots: which slots are read when; a function config -> `Slots` where settings decide, which
        `learner_of` calls.
      sums: what `finish` is given.
      survey: passes over a task's inputs before and after training; None = no such passes.
      predict: config -> None, or, for settings whose passes depend on the input, a function
        (state, inputs) -> (scores, relevance), which is called instead of `score`.
      predict_with_task: config -> None, or, where a known task needs passes of its own, a function
        (state, inputs, tasks int [B]) -> scores, which is called instead of `score_with_task`.
      passes: config -> how many passes of an input the function of `predict` makes.
      project: (trainable, state) -> trainable, after every optimisation step.
      carried: the parts of `trainable` that have no gradient: `project` alone changes them.
      stage: of a task whose steps are several optimisations, one after the other: state -> (int
        [], int []), how many steps of the current one are done, and how many it has. Each begins
        with a new optimiser and its own learning-rate schedule. None = one optimisation.
      first_block: config -> the first block with an adapter; what comes before it is shared by all
        slots and computed once. None if anything else is inserted.
      trains: (config, task) -> whether the task has optimisation steps.
      describe: config -> {file name: text}, files that a run writes beside its settings.
      parts: config -> how many vectors as wide as the backbone the feature of a slot consists of.
      teacher: of a student; None for a method that learns alone.
      draw: (state, key, labels int [N]) -> features [N, D] of slot 0 that the method draws of
        classes it has seen, for the measure `draws_energy_distance`; None = it draws none.
      has_features: whether the features of its slots are what it learned to classify; False where
        the classifier itself is the method.
    """

    name: str
    init: Callable
    begin: Callable
    loss: Callable | None
    freeze: Callable
    finish: Callable
    extract: Callable
    score: Callable
    slots: Slots | Callable
    sums: Sums = Sums()
    survey: Survey | None = None
    score_with_task: Callable | None = None
    predict: Callable = lambda config: None
    predict_with_task: Callable = lambda config: None
    passes: Callable = lambda config: 0
    project: Callable = lambda trainable, state: trainable
    carried: tuple[str, ...] = ()
    stage: Callable | None = None
    first_block: Callable = lambda config: None
    trains: Callable = lambda config, task: True
    describe: Callable = lambda config: {}
    parts: Callable = lambda config: 1
    teacher: Teacher | None = None
    draw: Callable | None = None
    has_features: bool = True

    def optimised(self, trainable: dict) -> dict:
        """The parts of `trainable` that have a gradient."""
        return {name: part for name, part in trainable.items() if name not in self.carried}

    def num_slots(self, config: Config) -> int:
        """S, the number of slots in an array of features."""
        last = config.shapes.max_tasks - 1
        return 1 + max(0, *self.slots.score(last), *self.slots.at_end(last))


_REGISTRY: dict[str, Learner | Callable[[Config], Learner]] = {}


def register(
    learner: Learner | Callable[[Config], Learner],
    *,
    name: str = "",
    defaults: tuple[str, ...] = (),
    presets: Mapping[str, tuple[str, ...]] | None = None,
    reads: str = "",
    **sections: type,
) -> Learner | Callable[[Config], Learner]:
    """Registers a learner and its settings under its name; returns it.

    Args:
      learner: or a function config -> `Learner`, where all parts depend on the settings.
      name: the method's, where `learner` is a function.
      defaults: assignments such as "protocol.kind=joint" that hold when a `Config` is first made.
      presets: name of a preset -> its assignments.
      reads: the field of a batch that the backbone must read, such as "token_ids"; "" = any.
      sections: the dataclass of each section of settings that the method reads beside the shared
        ones: `ease=EaseSettings` makes `config.ease.alpha` and `--set ease.alpha=...`.
    """
    name = name or learner.name
    declare(name, Method(sections, defaults, presets or {}, reads))
    _REGISTRY[name] = learner
    return learner


def learner_names() -> tuple[str, ...]:
    """The names of the known methods.

    Example:
      >>> "qkd" in learner_names()
      True
    """
    return method_names()


def learner_of(config: Config) -> Learner:
    """The learner of `config.method`, with its parts for these settings.

    Raises:
      ConfigError: `config.classifier` does not fit the method.
    """
    learner = _REGISTRY[config.method]
    if not isinstance(learner, Learner):
        learner = learner(config)
    elif not isinstance(learner.slots, Slots):
        learner = learner._replace(slots=learner.slots(config))
    return headed(learner, config)


def feature_width(state: LearnerState) -> int:
    """W, the last axis of slot features; narrower ones, such as queries, are padded with zeros."""
    own = learner_of(state.config).parts(state.config) * state.backbone.spec.width
    return max(own, state.query.spec.width)


def columns_of(classes, state):
    """`classes` int [M] as columns, with an index out of range for padding (mode="drop")."""
    return jnp.where(classes >= 0, classes, state.config.shapes.num_classes)


def class_columns(state: LearnerState) -> jax.Array:
    """int [M]: the class of each row of the task's head, out of range for padding."""
    return columns_of(state.task_classes, state)
