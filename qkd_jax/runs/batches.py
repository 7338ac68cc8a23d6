"""Training batches: the images of an epoch in its order, cropped, or read from what is kept."""

from collections.abc import Iterator

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
) -> Iterator[tuple[dict[str, np.ndarray], int]]:
    """The batches of one epoch, this host's rows of them.

    Args:
      features: of the task's images.
      state: on every device, for tokens that are not kept yet.
      task, epoch: decide, with the run's seed, the order and the crops.
      start_step: the first batch to give; the rest is as without it.
      padded_to: rows of every batch of all hosts; 0 = the batch size.
      with_features: also gives the features of the filled slots.

    Yields:
      ({"image" or "tokens", "label", "mask", maybe "features"}, how many rows of the whole batch,
      of all hosts, are images and not padding).
    """
    config, images = features.config, features.set
    place = {"seed": config.seed, "task": task, "epoch": epoch}
    size = config.train.batch_size
    for every_index, every_mask in epoch_batches(
        len(images), size, start_step=start_step, padded_to=padded_to, **place
    ):
        indices, mask = hosts.own_rows(every_index), hosts.own_rows(every_mask)
        if config.data.augment:
            draws = crop_draws(indices, **place)
            batch = {"image": images.load(indices, config.backbone.image_size, draws)}
        else:
            inputs = features.inputs(state, indices)
            batch = {"tokens" if inputs.ndim == 3 else "image": inputs}
        if with_features:
            batch["features"] = features.values[indices]
        batch |= {"label": images.labels[indices].astype(np.int32), "mask": mask}
        yield batch, int(every_mask.sum())
