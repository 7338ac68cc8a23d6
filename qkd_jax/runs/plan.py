"""The plan of a run before its first step: data, class order, tasks, array shapes."""

import dataclasses
from typing import NamedTuple

import numpy as np

from qkd_jax.data.examples import Examples, Split
from qkd_jax.data.labelled_set import LabelledSet
from qkd_jax.data.sources import load_split
from qkd_jax.data.splits import SHOWN, first_of_each_class, last_of_each_class
from qkd_jax.data.streams import num_batches
from qkd_jax.errors import ConfigError, DataError
from qkd_jax.learners.shape import learner_of
from qkd_jax.protocol.tasks import Task, class_order, max_classes_per_task, split_tasks
from qkd_jax.settings.config import Config, Shapes


class Plan(NamedTuple):
    """The final config (with shapes), data, tasks and class order of a run."""

    config: Config
    data: Split
    tasks: tuple[Task, ...]
    order: np.ndarray

    def rows(self, task: Task) -> np.ndarray:
        """Positions of a task's training images, int [n]."""
        return np.flatnonzero(np.isin(self.data.train.labels, task.classes))

    def epochs(self, task: Task) -> int:
        """Epochs of a task; 0 if the method trains nothing in it."""
        learner, train = learner_of(self.config), self.config.train
        if learner.loss is None or not learner.trains(self.config, task.index):
            return 0
        return (train.later_epochs or train.epochs) if task.index > 0 else train.epochs

    def images(self, task: Task) -> int:
        """Images trained on in a task, counted in every epoch."""
        return self.epochs(task) * len(self.rows(task))

    def steps(self, task: Task) -> int:
        """Optimisation steps of a task; the last batch of an epoch may be padded."""
        return self.epochs(task) * num_batches(len(self.rows(task)), self.config.train.batch_size)


def plan(config: Config) -> Plan:
    """Opens the data, orders the classes, splits them into tasks, and puts shapes in the config.

    Raises:
      DataError, ProtocolError, ConfigError: the data or settings do not fit.
    """
    data = load_split(
        config.data.source,
        path=config.data.path or None,
        split_file=config.data.split_file or None,
        follow_links=config.data.follow_links,
        text_column=config.data.text_column,
        label_column=config.data.label_column,
    )
    if config.data.num_classes:
        available = len(data.train.class_names)
        if not 0 < config.data.num_classes <= available:
            raise ConfigError(
                f"data.num_classes: expected 1 to {available}, the classes of "
                f"{config.data.source}, or 0 for all, found {config.data.num_classes}"
            )
        data = Split(*(_first_classes(part, config.data.num_classes) for part in data))
    per_class = (config.data.train_per_class, config.data.test_per_class)
    data = Split(*map(_first_examples, data, per_class))
    if config.data.validation:
        train = data.train
        held_out = last_of_each_class(train.ids, train.labels, config.data.validation)
        data = Split(train.take(np.flatnonzero(~held_out)), train.take(np.flatnonzero(held_out)))
    if config.data.augment and data.train.noun != "image":
        raise ConfigError(
            f"data.augment: expected false, since {data.train.noun}s are not varied, found true"
        )
    num_classes = len(data.train.class_names)
    seed = config.protocol.order_seed if config.protocol.shuffle else None
    order = class_order(num_classes, seed)
    protocol = config.protocol
    joint = protocol.kind == "joint"
    base, increment = (0, num_classes) if joint else (protocol.base, protocol.increment)
    tasks = split_tasks(order, base, increment)
    counts = np.bincount(data.train.labels, minlength=num_classes)
    need_every_class(data)
    shapes = Shapes(
        num_classes=num_classes,
        max_tasks=len(tasks),
        max_task_classes=max_classes_per_task(tasks),
        max_task_images=max(int(counts[list(task.classes)].sum()) for task in tasks),
    )
    return Plan(dataclasses.replace(config, shapes=shapes), data, tasks, order)


def need_every_class(split: Split) -> None:
    """Raises DataError unless every class has training and test examples."""
    _need_examples(split.train, "training")
    _need_examples(split.test, "test")


def _need_examples(examples: Examples, role: str) -> None:
    counts = np.bincount(examples.labels, minlength=len(examples.class_names))
    empty = [f"{examples.class_names[label]!r}" for label in np.flatnonzero(counts == 0)]
    if empty:
        more = f" and {len(empty) - SHOWN} more" if len(empty) > SHOWN else ""
        raise DataError(
            f"{examples.name}: expected a {role} {examples.noun} of every class, so that every "
            f"task can be {'learned' if role == 'training' else 'measured'}; found none of "
            f"{', '.join(empty[:SHOWN])}{more}"
        )


def _first_examples(examples: LabelledSet, number: int) -> LabelledSet:
    if not number:
        return examples
    return examples.take(np.flatnonzero(first_of_each_class(examples.ids, examples.labels, number)))


def _first_classes(examples: LabelledSet, count: int) -> LabelledSet:
    kept = examples.take(np.flatnonzero(examples.labels < count))
    return dataclasses.replace(kept, class_names=examples.class_names[:count])
