"""Frozen arrays divided over devices, for backbones and many adapters that one device cannot hold.

The devices form a mesh [data, model]. A batch is divided over the first axis; the backbone and what
finished tasks left are divided over the second, each array along its longest side. What trains is
small and has a copy everywhere. The compiler places the exchanges (GSPMD); the functions are those
of `parallel.Runner`, so results differ by rounding alone.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qkd_jax.engine.engine import AXIS, Runner
from qkd_jax.errors import ConfigError
from qkd_jax.learners.state import LearnerState
from qkd_jax.settings.config import TrainConfig

MODEL = "model"


def runner_of(config: TrainConfig) -> Runner:
    """The runner that the settings ask for."""
    if config.model_devices == 1:
        return Runner(config.devices)
    return ShardedRunner(config.devices, config.model_devices)


class ShardedRunner(Runner):
    """A runner whose frozen arrays are divided over groups of `model_devices` devices."""

    def __init__(self, num_devices: int, model_devices: int):
        """See `Runner`.

        Raises:
          ConfigError: the devices do not form such groups, or there are several hosts.
        """
        self.model_devices = model_devices
        super().__init__(num_devices)
        if self.num_hosts > 1:
            raise ConfigError("train.model_devices: above 1 it works on one host only")

    @property
    def num_parts(self) -> int:
        return self.num_devices // self.model_devices

    @property
    def mesh(self) -> Mesh:
        if len(self.devices) % self.model_devices:
            raise ConfigError(
                f"train.model_devices: {len(self.devices)} devices do not form groups of "
                f"{self.model_devices}"
            )
        return Mesh(np.asarray(self.devices).reshape(-1, self.model_devices), (AXIS, MODEL))

    def place(self, state: LearnerState) -> LearnerState:
        """Frozen arrays divided, the others with a copy on every device."""
        mesh = self.mesh
        copied = NamedSharding(mesh, PartitionSpec())
        frozen = {
            name: jax.tree_util.tree_map_with_path(
                lambda path, a: jax.device_put(a, NamedSharding(mesh, self._division(path, a))),
                getattr(state, name),
            )
            for name in ("backbone", "memory")
        }
        rest = jax.device_put(state.replace(backbone=None, memory=None), copied)
        return rest.replace(**frozen)

    def alone(self, state: LearnerState) -> LearnerState:
        """No device holds it alone."""
        return self.place(state)

    def _division(self, path: tuple, array: Any) -> PartitionSpec:
        """Along the longest side that divides; the last of equals, but the first where a product
        sums over it what the product before left divided (`out` after the values).
        """
        sides = [i for i, n in enumerate(np.shape(array)) if n % self.model_devices == 0 and n > 1]
        if np.ndim(array) < 2 or not sides:
            return PartitionSpec()
        names = [getattr(part, "key", "") for part in path]
        longest = max(sides, key=lambda i: (array.shape[i], -i if "out" in names else i))
        return PartitionSpec(*[MODEL if i == longest else None for i in range(np.ndim(array))])

    def _axis(self, devices) -> str | None:
        return None

    def _build(self, function: Callable, devices, in_axes, out_axes, donate=()) -> Callable:
        divided, copied = (NamedSharding(self.mesh, PartitionSpec(*axes)) for axes in ((AXIS,), ()))
        compiled = jax.jit(
            function,
            donate_argnums=donate,
            out_shardings=copied if out_axes is None else divided,
        )

        def call(*arguments):
            pairs = zip(arguments, in_axes, strict=True)
            return compiled(*(jax.device_put(a, divided) if axis == 0 else a for a, axis in pairs))

        return call
