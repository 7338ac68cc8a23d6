"""The interface of every generator."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax


class Generator(NamedTuple):
    """Pure functions around a memory, a pytree whose shapes do not depend on the classes seen.

    Attributes:
      empty: (num_classes, width) -> memory with room for every class that may come.
      fit: (memory, statistics, columns int [M]) -> memory that also holds the classes of one task.
        `statistics` are of its M classes, `columns` their class columns; those out of range are
        padding and dropped.
      draw: (memory, key, labels int [N]) -> one feature of the class of each label, [N, D].
      one_class: `draw` takes labels that are all the same, since features of one class together
        are much cheaper than one by one.
    """

    empty: Callable[[int, int], Any]
    fit: Callable[[Any, Any, jax.Array], Any]
    draw: Callable[[Any, jax.Array, jax.Array], jax.Array]
    one_class: bool = False
