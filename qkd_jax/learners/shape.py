"""The shape that every method has, and the list of those that are known."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from qkd_jax.learners.state import LearnerState, local_labels
from qkd_jax.nn import heads
from qkd_jax.settings.config import Config
from qkd_jax.settings.methods import Method, declare, method_names


class Rows(NamedTuple):
    """What belongs to the rows of a batch beside images and labels.

    Attributes:
      keys: [B] typed keys, each row's own.
      mask: bool [B], False where a row is padding.
      gather: [B, ...] -> [all rows of all devices, ...], for losses that couple images.
    """

    keys: jax.Array
    mask: jax.Array
    gather: Callable


def class_statistics(config: Config, num_slots: int, width: int) -> heads.ClassStatistics:
    """The usual accumulator: sums and counts of each class, no second moments."""
    return heads.empty_statistics(num_slots, config.shapes.max_task_classes, width, 0)


def add_classes(state, statistics, features, labels, mask):
    """The usual accumulation: features [B, S, D] of labels [B] into `ClassStatistics`."""
    return heads.add_to_statistics(statistics, features, local_labels(state, labels), mask)


class Learner(NamedTuple):
    """The parts of a method.

    A *slot* is one frozen way to turn images into features, such as one task's adapter. A feature
    of a filled slot never changes again, so a run computes each (image, slot) pair once. A method
    whose one model changes with every task has a slot a task.

    Attributes:
      init: (key, backbone, config) -> (trainable, memory), arrays in their final shapes.
      begin: (state, key) -> (trainable, memory) for the task that starts.
      loss: (trainable, state, images [B, H, W, 3], batch, Rows) -> dict of [B] arrays with key
        "loss"; None where nothing is trained.
      freeze: state -> state with what was trained moved to memory as a filled slot.
      finish: (state, statistics, key) -> state with the prototypes and states of the finished task.
      extract: (state, images [B, H, W, 3], slot, features [B, S, D] of the slots extracted before)
        -> [B, D] features of a filled slot.
      shared: (state, images [B, H, W, 3]) -> what `extract` takes in place of images and every slot
        begins with. Given, slots do not read one another and are extracted several at a time.
      score: (state, features [B, S, D]) -> (scores [B, C], relevance [B, T] or None).
      slots: task -> the slots that `score` reads when `task` is the last, in order of extraction.
      finish_slots: the same for `finish`; None = `slots`.
      teachers: task -> the slots whose features of the current images `loss` reads.
      statistics: (config, S, D) -> what `finish` reads, of no image.
      accumulate: (state, statistics, features [B, S, D], labels [B], mask [B]) -> statistics.
      first_block: config -> the first block that differs from the frozen model's.
      trains: (config, task) -> whether the task has optimisation steps.
      project: (trainable, state) -> trainable, after every optimisation step.
      survey: (state, images, mask [B]) -> sums over the images, for what one must know about the
        task's images before training and after it. None = nothing.
      prepare: (state, sums, key) -> state, after `begin`, before the first step.
      absorb: (state, sums) -> state, after `freeze`.
      reads_images: config -> whether the score needs the images themselves, not only slot features.
      predict: (state, images or kept tokens) -> (scores, relevance), for such settings.
      end_rate: the setting with the rate of what is trained when a task ends; "" = nothing is.
    """

    name: str
    init: Callable
    begin: Callable
    loss: Callable | None
    freeze: Callable
    finish: Callable
    extract: Callable
    score: Callable
    slots: Callable
    finish_slots: Callable | None = None
    teachers: Callable = lambda task: ()
    shared: Callable | None = None
    statistics: Callable = class_statistics
    accumulate: Callable = add_classes
    first_block: Callable = lambda config: config.adapter.first_block
    trains: Callable = lambda config, task: True
    project: Callable = lambda trainable, state: trainable
    survey: Callable | None = None
    prepare: Callable | None = None
    absorb: Callable | None = None
    reads_images: Callable = lambda config: False
    predict: Callable | None = None
    end_rate: str = ""

    def slots_at_end(self, task: int) -> tuple[int, ...]:
        """The slots that are extracted from the images of a task that ends."""
        return tuple((self.finish_slots or self.slots)(task))


_REGISTRY: dict[str, Learner] = {}


def register(
    learner: Learner,
    *,
    defaults: tuple[str, ...] = (),
    presets: Mapping[str, tuple[str, ...]] | None = None,
    **sections: type,
) -> Learner:
    """Makes a learner and its settings known by its name; returns it.

    Args:
      defaults: shared settings such as "protocol.kind=joint" that a new `Config` of it has.
      presets: assignments by name of the preset.
      sections: the dataclass of each section of settings that the method reads beside the shared
        ones: `ease=EaseSettings` makes `config.ease.alpha` and `--set ease.alpha=...`.
    """
    declare(learner.name, Method(sections, defaults, presets or {}))
    _REGISTRY[learner.name] = learner
    return learner


def learner_names() -> tuple[str, ...]:
    """The known methods."""
    return method_names()


def learner_of(config: Config) -> Learner:
    """The learner of `config.method`."""
    return _REGISTRY[config.method]


def columns_of(classes, state):
    """Class of each row of the task's head; padding points outside and is dropped."""
    return jnp.where(classes >= 0, classes, state.config.shapes.num_classes)


def class_columns(state: LearnerState) -> jax.Array:
    """int [M]: class of each row of the task's head; out of range for padding (mode="drop")."""
    return columns_of(state.task_classes, state)
