"""Frozen arrays divided over devices, for weights and adapters that one device cannot hold.

The devices form a mesh [data, model]. A batch is divided over the first axis; the backbone and what
finished tasks left are divided over the second, each array along its longest side. What trains is
small and is copied to every device. The compiler inserts the communication (GSPMD); the functions
are those of `engine.Engine`, so results differ only by rounding.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qkd_jax.engine import hosts
from qkd_jax.engine.engine import AXIS, Engine, MappedEngine, local_devices
from qkd_jax.errors import ConfigError
from qkd_jax.learners.state import LearnerState
from qkd_jax.settings.sections import TrainConfig

MODEL = "model"


def engine_of(config: TrainConfig) -> Engine:
    """The engine that the settings ask for.

    Raises:
      ConfigError: there are no such devices, or they do not form groups of `model_devices`.
    """
    devices = local_devices(config.devices)
    if config.model_devices > 1:
        return ShardedEngine(devices, config.model_devices)
    if len(devices) > 1 or hosts.count() > 1:
        return MappedEngine(devices)
    return Engine()


class ShardedEngine(Engine):
    """The engine whose frozen arrays are divided over groups of `model_devices` devices."""

    def __init__(self, devices: Sequence[jax.Device], model_devices: int):
        if hosts.count() > 1:
            raise ConfigError(
                f"train.model_devices: expected 1 with several hosts, found {model_devices}"
            )
        if len(devices) % model_devices:
            raise ConfigError(
                f"train.model_devices: expected a divisor of {len(devices)} devices, found "
                f"{model_devices}"
            )
        self.model_devices, self.num_devices = model_devices, len(devices)
        self.num_parts = len(devices) // model_devices
        self.mesh = Mesh(np.asarray(devices).reshape(-1, model_devices), (AXIS, MODEL))
        super().__init__()

    def place(self, state: LearnerState) -> LearnerState:
        """The state with frozen arrays and memory divided, and the rest copied to every device."""
        copied = NamedSharding(self.mesh, PartitionSpec())

        def divided(path, array):
            return jax.device_put(array, NamedSharding(self.mesh, self._division(path, array)))

        frozen = {
            name: jax.tree_util.tree_map_with_path(divided, getattr(state, name))
            for name in ("frozen", "memory")
        }
        rest = jax.device_put(state.replace(frozen=None, memory=None), copied)
        return rest.replace(**frozen)

    def alone(self, state: LearnerState) -> LearnerState:
        """As `place`, since no single device can hold the state."""
        return self.place(state)

    def _division(self, path: tuple, array: Any) -> PartitionSpec:
        """The division of one array along its longest divisible side.

        Of equal sides the last is taken; for `out` the first, over which its product sums, since
        the values that enter it are divided along that side.
        """
        sides = [i for i, n in enumerate(np.shape(array)) if n % self.model_devices == 0 and n > 1]
        if np.ndim(array) < 2 or not sides:
            return PartitionSpec()
        names = [getattr(part, "key", "") for part in path]
        longest = max(sides, key=lambda i: (array.shape[i], -i if "out" in names else i))
        return PartitionSpec(*[MODEL if i == longest else None for i in range(np.ndim(array))])

    def _build(self, function, in_axes, out_axes, donate=()):
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

    def _build_here(self, function, in_axes, out_axes):
        return self._build(function, in_axes, out_axes)
