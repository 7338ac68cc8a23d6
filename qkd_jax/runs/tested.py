"""A trained learner on a test set: its own, or another one with the same classes."""

from typing import NamedTuple

import numpy as np

from qkd_jax.errors import DataError
from qkd_jax.runs.evaluation import joined, predictions
from qkd_jax.runs.load import LoadedRun
from qkd_jax.runs.model import Model
from qkd_jax.runs.plan import plan
from qkd_jax.settings.config import override


class Tested(NamedTuple):
    """Name of a test set, what one example is, and what was predicted of it
    (`evaluation.predictions`).
    """

    name: str
    noun: str
    predicted: dict[str, np.ndarray]


def tested(trained: LoadedRun, data: str | None = None, split_file: str | None = None) -> Tested:
    """What is predicted of the test examples of all classes learned, on all devices.

    Args:
      data: the folder of the data; None = where the run had it.
      split_file: which examples are tested; None = the run's own, which an exported learner does
        not know.

    Raises:
      DataError: the data cannot be read, or have other classes.
    """
    # The machine may have fewer devices than that of the run.
    config = override(trained.config, "train.devices=0", "train.model_devices=1")
    for name, value in (("path", data), ("split_file", split_file)):
        if value is not None:
            config = override(config, f"data.{name}={value}")
    test = plan(config).data.test
    if test.class_names != trained.class_names:
        other = sorted(set(test.class_names) ^ set(trained.class_names))[:5]
        raise DataError(
            f"{test.name}: expected the {len(trained.class_names)} classes that were learned, "
            f"found {len(test.class_names)}; not in both: {', '.join(other)}"
        )
    model = Model(trained.state.replace(config=config))
    features = model.features_of(test)
    task_of_class = np.asarray(trained.state.task_of_class)
    slots = model.slots_read(int(trained.state.task))
    rows = features.fill(model.everywhere, slots, np.flatnonzero(task_of_class >= 0))
    scores, relevance = joined(model.scores(features, rows))
    found = predictions(test.ids[rows], test.labels[rows], scores, relevance, task_of_class)
    return Tested(test.name, test.noun, found)
