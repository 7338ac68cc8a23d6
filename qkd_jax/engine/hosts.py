"""Several hosts, each a process with its own devices, running one program.

Every host has its own copy of what is learned and does the same with it; hosts differ only in the
rows of a batch that they read. With one host all of this does nothing.
"""

import os
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qkd_jax.errors import ConfigError


def connect(coordinator: str = "", num_hosts: int = 0, host_id: int = -1) -> int:
    """Joins the hosts of one run and returns this host's number; call it before using devices.

    Without arguments it joins on a TPU pod, whose hosts know one another, and does nothing
    elsewhere.

    Args:
      coordinator: address:port of host 0, the same on every host.
      num_hosts: number of hosts.
      host_id: number of this host, from 0.

    Raises:
      ConfigError: some of the three are missing, or the hosts do not find one another.
    """
    given = (bool(coordinator), num_hosts > 0, host_id >= 0)
    if not any(given):
        if len(os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")) > 1:
            jax.distributed.initialize()
        return jax.process_index()
    if not all(given) or host_id >= num_hosts:
        raise ConfigError(
            "hosts: expected --coordinator ADDRESS:PORT --num-hosts N --host-id I, I from 0 to "
            f"N - 1, found {coordinator!r}, {num_hosts} and {host_id}"
        )
    try:
        jax.distributed.initialize(coordinator, num_hosts, host_id)
    except (RuntimeError, ValueError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"host {host_id} of {num_hosts} cannot join at {coordinator}: {first}"
        ) from None
    return host_id


def count() -> int:
    """The number of hosts."""
    return jax.process_count()


def is_first() -> bool:
    """Whether this host is the one that writes and shows."""
    return jax.process_index() == 0


def own_rows(rows: np.ndarray) -> np.ndarray:
    """This host's part of the rows of a batch."""
    size = len(rows) // count()
    return rows[jax.process_index() * size :][:size]


def gathered(rows: np.ndarray) -> np.ndarray:
    """The rows of all hosts, in the order of `own_rows`; all hosts must call this together."""
    if count() == 1:
        return rows
    one_each = {device.process_index: device for device in reversed(jax.devices())}
    mesh = Mesh(np.asarray([one_each[host] for host in range(count())]), ("host",))
    parts = NamedSharding(mesh, PartitionSpec("host"))
    whole = jax.make_array_from_process_local_data(parts, rows)
    return np.asarray(own_copy(jax.device_put(whole, NamedSharding(mesh, PartitionSpec()))))


def any_of(flag: bool) -> bool:
    """Whether `flag` holds on any host; all hosts must call this together."""
    return bool(gathered(np.asarray([flag])).any())


def wait() -> None:
    """Returns when every host has called it."""
    any_of(False)


def shared(tree: Any) -> Any:
    """The equal copies of all hosts as one global array per leaf, as checkpoints need them."""
    if count() == 1:
        return tree
    copies = NamedSharding(Mesh(np.asarray(jax.devices()), ("device",)), PartitionSpec())
    join = jax.make_array_from_process_local_data
    return jax.tree.map(lambda a: join(copies, np.asarray(a)), tree)


def own_copy(array: Any) -> Any:
    """This host's copy of an array that all hosts hold."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return array.addressable_data(0)
    return array
