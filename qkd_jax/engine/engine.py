"""The only file that knows devices.

One device runs the per-device functions under `jax.jit`; several run the same functions under
`jax.pmap` with `axis_name="data"`. What every device reads is passed as one logical copy
(`in_axes=None`) and placed on all of them once a task, not once a step.

Several hosts run the same program, each with its own copy of the state. A host reads, decodes and
encodes its own rows of every batch (`hosts.own_rows`); gradients are averaged over the devices of
all hosts, features and scores are gathered. All else every host computes from the same numbers.
"""

import hashlib
import platform
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qkd_jax.engine import hosts
from qkd_jax.errors import ConfigError
from qkd_jax.learners.shape import learner_of
from qkd_jax.learners.state import LearnerState, Moving
from qkd_jax.learners.step import device_step, frozen_prefix, prepare_images
from qkd_jax.weights.fetch import cache_folder

AXIS = "data"
CPU_FACTS = Path("/proc/cpuinfo")  # Linux


def keep_compiled_programs() -> None:
    """Later processes load what this one compiles, from `compiled/` beside the fetched weights.

    Another folder that jax was told (`JAX_COMPILATION_CACHE_DIR`) stays. Programs for one CPU may
    not run on another, so every kind of CPU has its own.
    """
    if jax.config.jax_compilation_cache_dir:
        return
    kind = platform.machine()
    if CPU_FACTS.exists():
        flags = [line for line in CPU_FACTS.read_text().splitlines() if line.startswith("flags")]
        kind += "-" + hashlib.sha256("".join(flags[:1]).encode()).hexdigest()[:8]
    jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled" / kind))


class Runner:
    """Compiled steps and passes over a fixed set of devices.

    `compilations` counts how often the training step was traced: one a run.
    """

    def __init__(self, num_devices: int = 0):
        """`num_devices`: how many local devices to use; 0 = all. Several hosts use all of theirs.

        Raises:
          ConfigError: more devices are asked for than there are, or some of several hosts'.
        """
        available = jax.local_devices()
        self.num_hosts = hosts.count()
        if self.num_hosts > 1 and num_devices not in (0, len(available)):
            raise ConfigError(
                f"train.devices={num_devices}: with {self.num_hosts} hosts every device is used; "
                "leave it at 0"
            )
        if num_devices > len(available):
            raise ConfigError(
                f"train.devices={num_devices}, but this process has {len(available)} "
                f"({available[0].platform})"
            )
        self.devices = available[: num_devices or len(available)]
        self.compilations = 0
        self._backbones: tuple[Any, Any] = (None, None)  # on one device, and the same on all
        self.all_devices = jax.devices() if self.num_hosts > 1 else self.devices
        self._step = self._build(self._counted_step, self.all_devices, (None, None, 0), None, (1,))
        # What needs no other device runs on this host's alone, whatever the other hosts do.
        self._extract = self._build(_extract, self.devices, (None, 0, None, 0), 0)
        self._survey = self._build(self._summed_survey, self.devices, (None, 0, 0), None)
        self._prefix = self._build(frozen_prefix, self.devices, (None, 0), 0)
        self._predict = self._build(_predict, self.devices, (None, 0), 0)

    @property
    def num_devices(self) -> int:
        """Devices of all hosts."""
        return len(self.all_devices)

    @property
    def num_parts(self) -> int:
        """How many parts a batch is divided into."""
        return self.num_devices

    def padded(self, batch_size: int) -> int:
        """Rows of a batch that divides over the devices: the next multiple of `num_parts`."""
        return -(-batch_size // self.num_parts) * self.num_parts

    def place(self, state: LearnerState) -> LearnerState:
        """The state with one copy on every device of this host, for the passes below."""
        if len(self.devices) == 1:
            return jax.device_put(state, self.devices[0])
        single, copies = self._backbones
        known = _same_arrays(state.backbone, single)
        mesh = Mesh(np.asarray(self.devices), (AXIS,))
        placed = jax.device_put(
            state.replace(backbone=copies) if known else state, NamedSharding(mesh, PartitionSpec())
        )
        self._backbones = (state.backbone, placed.backbone)
        return placed

    def alone(self, state: LearnerState) -> LearnerState:
        """The state on one device: what is done once a task, all devices would only repeat.

        On CPU it is also a must: several devices in LAPACK at once can block one another for good
        (each waits for threads that the others hold; jaxlib 0.10).
        """
        single, copies = self._backbones
        if _same_arrays(state.backbone, copies):
            state = state.replace(backbone=single)
        return jax.device_put(jax.tree.map(hosts.own_copy, state), self.devices[0])

    def step(
        self, held: LearnerState, moving: Moving, batch: Mapping[str, np.ndarray]
    ) -> tuple[Moving, dict[str, jax.Array]]:
        """One optimisation step on this host's rows of a batch; `moving` is donated."""
        return self._step(held, moving, batch)

    def extract(
        self, state: LearnerState, images: np.ndarray, slot: int, features: np.ndarray
    ) -> np.ndarray:
        """Features [B, D] of one filled slot, of a whole batch and on the host, from this host's
        rows: images [b, H, W, 3] or kept tokens [b, N, D], features [b, S, D] of the slots
        extracted before.
        """
        found = self._extract(state, images, jnp.int32(slot), features)
        return hosts.gathered(np.asarray(found).reshape(len(images), -1))

    def survey(self, state: LearnerState, batches: Iterable[Mapping[str, np.ndarray]]) -> Any:
        """The learner's survey of images in batches of this host's rows {"image", "mask"}, summed
        over batches and hosts.
        """
        total = None
        for batch in batches:
            sums = self._survey(state, batch["image"], batch["mask"])
            total = sums if total is None else jax.tree.map(lambda a, b: a + b, total, sums)
        if self.num_hosts > 1:
            total = jax.tree.map(lambda a: hosts.gathered(np.asarray(a)[None]).sum(0), total)
        return jax.device_put(total, self.devices[0]) if len(self.devices) > 1 else total

    def prefix(self, state: LearnerState, images: np.ndarray) -> np.ndarray:
        """The residual stream [B, N, D] before the first adapter, on the host."""
        tokens = np.asarray(self._prefix(state, images))
        return tokens.reshape(len(images), *tokens.shape[-2:])

    def predict(self, state: LearnerState, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(scores [B, C], relevance [B, T]) of a whole batch for settings that read images, from
        this host's rows: pixels or kept tokens.
        """
        found = self._predict(state, images)
        return tuple(hosts.gathered(np.asarray(part).reshape(len(images), -1)) for part in found)

    def _counted_step(self, held, moving, batch):
        self.compilations += 1
        return device_step(held, moving, batch, self._axis(self.all_devices))

    def _summed_survey(self, state, images, mask):
        sums = learner_of(state.config).survey(state, prepare_images(state, images), mask)
        axis = self._axis(self.devices)
        return lax.psum(sums, axis) if axis else sums

    def _axis(self, devices) -> str | None:
        """The axis that a function compiled for `devices` is mapped over."""
        return AXIS if len(devices) > 1 else None

    def _build(self, function: Callable, devices, in_axes, out_axes, donate=()) -> Callable:
        """`function` compiled for `devices`; arguments with axis 0 are this host's rows."""
        if len(devices) == 1:
            return jax.jit(function, donate_argnums=donate)
        mapped = jax.pmap(
            function,
            axis_name=AXIS,
            in_axes=in_axes,
            out_axes=out_axes,
            donate_argnums=donate,
            devices=devices,
        )
        divide = partial(jax.tree.map, partial(_split_rows, len(self.devices)))

        def call(*arguments):
            pairs = zip(arguments, in_axes, strict=True)
            return mapped(*(divide(a) if axis == 0 else a for a, axis in pairs))

        return call


def _split_rows(parts: int, array: np.ndarray) -> np.ndarray:
    return array.reshape(parts, array.shape[0] // parts, *array.shape[1:])


def _same_arrays(tree: Any, other: Any) -> bool:
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=False)
    return other is not None and all(a is b for a, b in pairs)


def _extract(
    state: LearnerState, images: jax.Array, slot: jax.Array, features: jax.Array
) -> jax.Array:
    if images.ndim == 4:
        images = prepare_images(state, images)
    return learner_of(state.config).extract(state, images, slot, features)


def _predict(state: LearnerState, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    if images.ndim == 4:
        images = prepare_images(state, images)
    return learner_of(state.config).predict(state, images)
