"""Which classes are learned in which task: the class order and its split into tasks.

Split names: `B0-IncN` learns N classes per task; `Bm-IncN` learns m classes first, then N per task.
When the classes left over do not fill a task, the last task is smaller. Nothing here is random
except the class order, which has its own seed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from qkd_jax.errors import ProtocolError


@dataclass(frozen=True)
class Task:
    """One task: its place in the sequence (from 0) and its original label ids, in learned order."""

    index: int
    classes: tuple[int, ...]


def class_order(
    num_classes: int, seed: int | None = 1993, explicit: Sequence[int] | None = None
) -> np.ndarray:
    """The order in which original label ids are learned, int64 [C].

    The rule of iCaRL, PILOT and most published tables: a permutation by NumPy's legacy generator.
    It is a stream that NumPy has frozen, so the order is the same on every version and machine.

    Args:
      num_classes: C, at least 1.
      seed: order seed; None keeps the labels in their own order (as VTAB does).
      explicit: an order to use instead of the seed's.

    Raises:
      ProtocolError: C < 1, a seed outside [0, 2**32), or `explicit` not a permutation.

    Example:
      >>> class_order(5, seed=1993)
      array([0, 2, 3, 4, 1])
    """
    _check_count("num_classes", num_classes, minimum=1)
    if explicit is not None:
        return _permutation(explicit, num_classes)
    if seed is None:
        return np.arange(num_classes, dtype=np.int64)
    _check_count("the class order seed", seed, minimum=0)
    if seed >= 2**32:
        raise ProtocolError(f"the class order seed: expected a number below 2**32, found {seed}")
    return np.random.RandomState(seed).permutation(num_classes).astype(np.int64)


def split_tasks(order: Sequence[int] | np.ndarray, base: int, increment: int) -> tuple[Task, ...]:
    """Cuts a class order into tasks: `base` classes first, then `increment` classes each.

    With base 0 there is no base task. The last task is smaller when C - base is not a multiple
    of increment.

    Raises:
      ProtocolError: `order` is not a permutation, base outside [0, C], increment outside [1, C].

    Example:
      >>> split_tasks([3, 0, 2, 1, 4], base=0, increment=2)[-1]  # the last task is smaller
      Task(index=2, classes=(4,))
    """
    num_classes = len(order)
    _check_count("the number of classes in the order", num_classes, minimum=1)
    order = _permutation(order, num_classes)
    _check_count("base", base, minimum=0)
    _check_count("increment", increment, minimum=1)
    for name, value in (("base", base), ("increment", increment)):
        if value > num_classes:
            raise ProtocolError(
                f"{name}: expected at most {num_classes}, the number of classes, found {value}"
            )
    bounds = ([0] if base else []) + list(range(base, num_classes, increment)) + [num_classes]
    return tuple(
        Task(index, tuple(int(label) for label in order[start:stop]))
        for index, (start, stop) in enumerate(pairwise(bounds))
    )


def split_name(base: int, increment: int) -> str:
    """The field's name of a split: `B0-Inc10`, `B50-Inc10`.

    Example:
      >>> split_name(base=50, increment=10)
      'B50-Inc10'
    """
    return f"B{base}-Inc{increment}"


def task_of_class(tasks: Sequence[Task], num_classes: int) -> np.ndarray:
    """Task index of every original label id, int64 [C]; -1 for classes in none of `tasks`.

    Raises:
      ProtocolError: a label outside 0..C-1, or one that is in two tasks.

    Example:
      >>> task_of_class([Task(0, (3, 0)), Task(1, (2,))], num_classes=5)
      array([ 0, -1,  1,  0, -1])
    """
    table = np.full(num_classes, -1, np.int64)
    for task in tasks:
        for label in task.classes:
            if not 0 <= label < num_classes:
                raise ProtocolError(
                    f"task {task.index}: expected classes 0 to {num_classes - 1}, found {label}"
                )
            if table[label] >= 0:
                raise ProtocolError(
                    f"class {label}: expected it in one task, found it in tasks {table[label]} "
                    f"and {task.index}"
                )
            table[label] = task.index
    return table


def max_classes_per_task(tasks: Sequence[Task]) -> int:
    """Size of the largest task, to which arrays per task are padded."""
    if not tasks:
        raise ProtocolError("tasks: expected at least one, found none")
    return max(len(task.classes) for task in tasks)


def _check_count(name: str, value: int, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < minimum:
        raise ProtocolError(
            f"{name}: expected a whole number of at least {minimum}, found {value!r}"
        )


def _permutation(order: Sequence[int] | np.ndarray, num_classes: int) -> np.ndarray:
    array = np.asarray(order)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise ProtocolError(
            "the class order: expected a flat list of whole label ids, found shape "
            f"{list(array.shape)} of {array.dtype}"
        )
    if len(array) != num_classes:
        raise ProtocolError(f"the class order: expected {num_classes} classes, found {len(array)}")
    if not np.array_equal(np.sort(array), np.arange(num_classes)):
        labels, counts = np.unique(array, return_counts=True)
        twice = labels[counts > 1][:5].tolist()
        missing = np.setdiff1d(np.arange(num_classes), labels)[:5].tolist()
        foreign = np.setdiff1d(labels, np.arange(num_classes))[:5].tolist()
        raise ProtocolError(
            f"the class order: expected each of 0..{num_classes - 1} once, found twice {twice}, "
            f"missing {missing}, outside {foreign} (at most five of each)"
        )
    return array.astype(np.int64)
