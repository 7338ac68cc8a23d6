"""Training batches: the images of an epoch in its order, cropped or as they are kept."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from qkd_jax.data.crops import crop_draws
from qkd_jax.data.streams import epoch_batches
from qkd_jax.engine import hosts
from qkd_jax.learners.state import LearnerState
from qkd_jax.runs.slot_features import SlotFeatures


def training_batches(
    features: SlotFeatures,
    state: LearnerState,
    *,
    task: int,
    epoch: int,
    start_step: int = 0,
    padded_to: int = 0,
    with_features: bool = False,
) -> Iterator[tuple[dict[str, Any], int]]:
    """This host's rows of the batches of one epoch.

    Args:
      features: of the task's images.
      state: on every device, to compute what is not kept yet.
      task, epoch: determine the order and the crops, with the run's seed.
      start_step: the first batch to give.
      padded_to: rows of every batch of all hosts; 0 = the batch size.
      with_features: also give the features of the filled slots.

    Yields:
      ({"inputs", "label", "mask", maybe "features"}, number of rows of all hosts that are not
      padding).
    """
    config, examples = features.config, features.set
    place = {"seed": config.seed, "task": task, "epoch": epoch}
    size = config.train.batch_size
    for all_indices, all_masks in epoch_batches(
        len(examples), size, start_step=start_step, padded_to=padded_to, **place
    ):
        indices, mask = hosts.own_rows(all_indices), hosts.own_rows(all_masks)
        if config.data.augment:
            inputs = features.raw(indices, crop_draws(indices, **place))
        else:
            inputs = features.inputs(state, indices)
        batch = {"inputs": inputs}
        if with_features:
            batch["features"] = features.values[indices]
        taught = None if config.data.augment else features.taught(indices)
        if taught is not None:
            batch["teacher"] = taught
        batch |= {"label": examples.labels[indices].astype(np.int32), "mask": mask}
        yield batch, int(all_masks.sum())
