"""The only file that knows devices.

One device runs the per-device functions under `jax.jit`; several run the same functions under
`jax.pmap` with `axis_name="data"`. What every device reads is passed as one logical copy
(`in_axes=None`) and placed on all of them once a task, not once a step.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qkd_jax.errors import ConfigError
from qkd_jax.learners.base import device_step, frozen_prefix, learner_of, prepare_images
from qkd_jax.state import LearnerState, Moving

AXIS = "data"


class Runner:
    """Compiled steps and passes over a fixed set of devices.

    `compilations` counts how often the training step was traced: one a run.
    """

    def __init__(self, num_devices: int = 0):
        """`num_devices`: how many local devices to use; 0 = all.

        Raises:
          ConfigError: more devices are asked for than there are.
        """
        available = jax.local_devices()
        if num_devices > len(available):
            raise ConfigError(
                f"train.devices={num_devices}, but this process has {len(available)} "
                f"({available[0].platform})"
            )
        self.devices = available[: num_devices or len(available)]
        self.compilations = 0
        self._step = self._build(self._counted_step, (None, None, 0), None, donate=(1,))
        self._extract = self._build(_extract, (None, 0, None, 0), 0)
        self._survey = self._build(_survey, (None, 0, 0), 0)
        self._prefix = self._build(frozen_prefix, (None, 0), 0)
        self._predict = self._build(_predict, (None, 0), 0)

    @property
    def num_devices(self) -> int:
        return len(self.devices)

    def check_batch_size(self, name: str, batch_size: int) -> None:
        """Raises ConfigError unless the batch divides over the devices."""
        if batch_size % self.num_devices:
            lower = batch_size // self.num_devices * self.num_devices
            fitting = f"{lower} or {lower + self.num_devices}" if lower else f"{self.num_devices}"
            raise ConfigError(
                f"{name}: {batch_size} does not divide over {self.num_devices} devices; "
                f"use {fitting}"
            )

    def place(self, tree: Any) -> Any:
        """`tree` with one copy on every device; call it when a task begins, not in every step."""
        if self.num_devices == 1:
            return jax.device_put(tree, self.devices[0])
        mesh = Mesh(np.asarray(self.devices), (AXIS,))
        return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))

    def step(
        self, held: LearnerState, moving: Moving, batch: Mapping[str, np.ndarray]
    ) -> tuple[Moving, dict[str, jax.Array]]:
        """One optimisation step on a global batch; `moving` is donated."""
        return self._step(held, moving, self._shard(batch))

    def extract(
        self, state: LearnerState, images: np.ndarray, slot: int, features: np.ndarray
    ) -> np.ndarray:
        """Features [B, D] of one filled slot, on the host; images [B, H, W, 3] or kept tokens
        [B, N, D], features [B, S, D] of the slots extracted before.
        """
        found = self._extract(state, self._shard(images), jnp.int32(slot), self._shard(features))
        return np.asarray(found).reshape(len(images), -1)

    def survey(self, state: LearnerState, batches: Iterable[Mapping[str, np.ndarray]]) -> Any:
        """The learner's survey of images in batches {"image", "mask"}, summed."""
        total = None
        for batch in batches:
            images, mask = self._shard(batch["image"]), self._shard(batch["mask"])
            sums = self._survey(state, images, mask)
            if self.num_devices > 1:
                sums = jax.tree.map(lambda a: np.asarray(a).sum(0), sums)
            total = sums if total is None else jax.tree.map(lambda a, b: a + b, total, sums)
        return total

    def prefix(self, state: LearnerState, images: np.ndarray) -> np.ndarray:
        """The residual stream [B, N, D] before the first adapter, on the host."""
        tokens = np.asarray(self._prefix(state, self._shard(images)))
        return tokens.reshape(len(images), *tokens.shape[-2:])

    def predict(self, state: LearnerState, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(scores [B, C], relevance [B, T]) for settings that read images; pixels or kept
        tokens.
        """
        found = self._predict(state, self._shard(images))
        return tuple(np.asarray(part).reshape(len(images), -1) for part in found)

    def _counted_step(self, held, moving, batch):
        self.compilations += 1
        return device_step(held, moving, batch, AXIS if self.num_devices > 1 else None)

    def _build(self, function: Callable, in_axes, out_axes, donate=()) -> Callable:
        if self.num_devices == 1:
            return jax.jit(function, donate_argnums=donate)
        return jax.pmap(
            function,
            axis_name=AXIS,
            in_axes=in_axes,
            out_axes=out_axes,
            donate_argnums=donate,
            devices=self.devices,
        )

    def _shard(self, batch: Any) -> Any:
        """[B, ...] -> [devices, B / devices, ...] where there are several."""
        if self.num_devices == 1:
            return batch
        split = partial(_split_rows, self.num_devices)
        return jax.tree.map(split, batch)


def _split_rows(parts: int, array: np.ndarray) -> np.ndarray:
    return array.reshape(parts, array.shape[0] // parts, *array.shape[1:])


def _extract(
    state: LearnerState, images: jax.Array, slot: jax.Array, features: jax.Array
) -> jax.Array:
    if images.ndim == 4:
        images = prepare_images(state, images)
    return learner_of(state.config).extract(state, images, slot, features)


def _survey(state: LearnerState, images: jax.Array, mask: jax.Array) -> Any:
    return learner_of(state.config).survey(state, prepare_images(state, images), mask)


def _predict(state: LearnerState, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    if images.ndim == 4:
        images = prepare_images(state, images)
    return learner_of(state.config).predict(state, images)
