"""What a run will do, before its first step: data, class order, tasks, array shapes."""

import dataclasses
from typing import NamedTuple

import numpy as np

from qkd_jax.protocol import tasks as protocol
from qkd_jax.settings.config import Config, Shapes
from qkd_jax.data.image_set import ImageSet, Split
from qkd_jax.data.sources import load_split
from qkd_jax.data.splits import SHOWN, last_of_each_class
from qkd_jax.errors import ConfigError, DataError


class Plan(NamedTuple):
    """A run before its first step: the final config (shapes filled in), data and tasks."""

    config: Config
    data: Split
    tasks: tuple[protocol.Task, ...]
    order: np.ndarray


def plan(config: Config) -> Plan:
    """Opens the data, orders the classes, cuts them into tasks, and fixes the shapes in the config.

    Raises:
      DataError, ProtocolError, ConfigError: see the rooms that raise them.
    """
    data = load_split(
        config.data.source,
        path=config.data.path or None,
        split_file=config.data.split_file or None,
        follow_links=config.data.follow_links,
    )
    if config.data.num_classes:
        available = len(data.train.class_names)
        if not 0 < config.data.num_classes <= available:
            raise ConfigError(
                f"data.num_classes={config.data.num_classes}: expected 1..{available}, the "
                f"classes of {config.data.source}, or 0 for all"
            )
        data = Split(*(_first_classes(part, config.data.num_classes) for part in data))
    if config.data.validation:
        train = data.train
        held_out = last_of_each_class(train.ids, train.labels, config.data.validation)
        data = Split(train.take(np.flatnonzero(~held_out)), train.take(np.flatnonzero(held_out)))
    num_classes = len(data.train.class_names)
    seed = config.protocol.order_seed if config.protocol.shuffle else None
    order = protocol.class_order(num_classes, seed)
    tasks = protocol.split_tasks(order, config.protocol.base, config.protocol.increment)
    if config.protocol.kind == "joint":
        tasks = (protocol.Task(0, tuple(int(c) for c in order)),)
    counts = np.bincount(data.train.labels, minlength=num_classes)
    need_every_class(data)
    shapes = Shapes(
        num_classes=num_classes,
        max_tasks=len(tasks),
        max_task_classes=protocol.max_classes_per_task(tasks),
        max_task_images=max(int(counts[list(task.classes)].sum()) for task in tasks),
    )
    return Plan(dataclasses.replace(config, shapes=shapes), data, tasks, order)


def need_every_class(split: Split) -> None:
    """Raises DataError unless every class has an image to train and one to test on."""
    _need_images(split.train, "training")
    _need_images(split.test, "test")


def _need_images(images: ImageSet, role: str) -> None:
    counts = np.bincount(images.labels, minlength=len(images.class_names))
    empty = [f"{images.class_names[label]!r}" for label in np.flatnonzero(counts == 0)]
    if empty:
        more = f" and {len(empty) - SHOWN} more" if len(empty) > SHOWN else ""
        raise DataError(
            f"{images.name}: expected a {role} image of every class, so that every task can be "
            f"{'learned' if role == 'training' else 'measured'}; found none of "
            f"{', '.join(empty[:SHOWN])}{more}"
        )


def _first_classes(images: ImageSet, count: int) -> ImageSet:
    kept = images.take(np.flatnonzero(images.labels < count))
    return dataclasses.replace(kept, class_names=images.class_names[:count])
