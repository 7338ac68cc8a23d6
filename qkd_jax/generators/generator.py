"""The interface of every generator."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax


class Generator(NamedTuple):
    """A generator as pure functions over its memory, a dataclass of arrays of fixed shapes.

    A memory has `mean` [C, D], the means of the classes; what is drawn of a class moves with it.
    What is collected of a task while its features pass by, `statistics`, has `mean` [M, D] and
    `count` [M] of its M classes, and is dropped when the task ends.

    Attributes:
      empty: (num_classes, width) -> memory with room for all classes.
      statistics: (M, width) -> statistics before any feature.
      add: (statistics, features [B, D], positions int [B] among the task's classes, mask bool [B],
        False where a row is padding) -> statistics.
      fit: (memory, statistics, columns int [M], key) -> memory that also holds the classes of one
        task. `columns` are the labels; those out of range are padding and dropped.
      draw: (memory, key, labels int [N]) -> one feature of the class of each label, [N, D].
      one_class: `draw` needs labels that are all equal: drawing one class at a time is much
        cheaper.
    """

    empty: Callable[[int, int], Any]
    statistics: Callable[[int, int], Any]
    add: Callable[[Any, jax.Array, jax.Array, jax.Array], Any]
    fit: Callable[[Any, Any, jax.Array, jax.Array], Any]
    draw: Callable[[Any, jax.Array, jax.Array], jax.Array]
    one_class: bool = False
