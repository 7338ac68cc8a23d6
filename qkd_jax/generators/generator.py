"""The interface of every generator."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax


class Generator(NamedTuple):
    """A generator as pure functions over its memory, a pytree of fixed shapes.

    Attributes:
      empty: (num_classes, width) -> memory with room for all classes.
      fit: (memory, statistics, columns int [M]) -> memory that also holds the classes of one task.
        `statistics` are of its M classes, `columns` their labels; those out of range are padding
        and dropped.
      draw: (memory, key, labels int [N]) -> one feature of the class of each label, [N, D].
      one_class: `draw` needs labels that are all equal: drawing one class at a time is much
        cheaper.
    """

    empty: Callable[[int, int], Any]
    fit: Callable[[Any, Any, jax.Array], Any]
    draw: Callable[[Any, jax.Array, jax.Array], jax.Array]
    one_class: bool = False
