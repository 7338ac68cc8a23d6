"""The order of examples in an epoch, its batches, and prefetching."""

import collections
import concurrent.futures
from collections.abc import Iterable, Iterator
from typing import TypeVar

import numpy as np

from qkd_jax.errors import DataError

Item = TypeVar("Item")


def num_batches(num_examples: int, batch_size: int) -> int:
    """Number of batches in an epoch; the last one may be padded."""
    return -(-num_examples // batch_size)


def epoch_order(num_examples: int, seed: int, task: int, epoch: int) -> np.ndarray:
    """The permutation int64 [num_examples] of one epoch, which depends on the arguments alone.

    The examples are sorted by raw draws of Philox, which NumPy keeps the same in all versions,
    unlike `Generator.permutation`.
    """
    seeds = np.random.SeedSequence(seed, spawn_key=(task, epoch))
    return np.argsort(np.random.Philox(seeds).random_raw(num_examples), kind="stable")


def epoch_batches(
    num_examples: int,
    batch_size: int,
    *,
    seed: int,
    task: int,
    epoch: int,
    start_step: int = 0,
    padded_to: int = 0,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Shuffled batches that hold every example once.

    Args:
      num_examples: N.
      batch_size: B.
      seed, task, epoch: determine the order.
      start_step: the first batch to give, so that a stopped epoch can continue.
      padded_to: P >= B, rows of every batch, such as a multiple of the devices; 0 = B.

    Yields:
      (indices int64 [P], mask bool [P]). The last batch is padded at its end with an index whose
      mask is False; no example is dropped.
    """
    order = epoch_order(num_examples, seed, task, epoch)
    return _batches(order, batch_size, start_step, padded_to)


def eval_batches(num_examples: int, batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches in the order of the set, padded as in `epoch_batches`."""
    return _batches(np.arange(num_examples), batch_size, 0)


def _batches(
    order: np.ndarray, batch_size: int, start_step: int, padded_to: int = 0
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    if batch_size < 1:
        raise DataError(f"batch_size: expected at least 1, found {batch_size}")
    for start in range(start_step * batch_size, len(order), batch_size):
        indices = order[start : start + batch_size]
        mask = np.arange(max(batch_size, padded_to)) < len(indices)
        yield np.pad(indices, (0, len(mask) - len(indices)), mode="edge"), mask


def prefetch(items: Iterable[Item], ahead: int = 2) -> Iterator[Item]:
    """The items in order, up to `ahead` of them drawn in a thread while the caller works on one.

    An error in drawing an item is raised in its place.
    """
    iterator, end = iter(items), object()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        pending = collections.deque(pool.submit(next, iterator, end) for _ in range(ahead))
        while (item := pending.popleft().result()) is not end:
            pending.append(pool.submit(next, iterator, end))
            yield item
