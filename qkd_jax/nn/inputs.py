"""The three forms of a frozen transformer's inputs, on the way from the user to a block."""

from typing import Any

import jax
from flax import struct


@struct.dataclass
class Raw:
    """Inputs as users have them, before anything was computed.

    Attributes:
      fields: the arrays [B, ...] of a batch that the backbone reads (`spec.fields`), for instance
        {"image": uint8 [B, H, W, 3]}.
      resize: whether they may have another size than the backbone reads, which then resizes them;
        so that backbones of different sizes can read the same inputs.
    """

    fields: dict[str, jax.Array]
    resize: bool = struct.field(pytree_node=False, default=False)


@struct.dataclass
class Tokens:
    """The residual stream before a block.

    Attributes:
      stream: [B, N, D].
      mask: bool [B, N], False for padding, which no token attends to; None = every token is real.
      block: index of the block that comes next.
    """

    stream: jax.Array
    mask: jax.Array | None = None
    block: int = struct.field(pytree_node=False, default=0)


@struct.dataclass
class Stem:
    """What all adapters share of an input: the frozen model up to where the first adapter adds.

    Attributes:
      residual: [B, N, D], the stream after attention in the first adapter's block; only the rows
        that are read afterwards if that is the last block.
      mlp: [B, N, D], the output of that block's MLP.
      mask: as in `Tokens`.
      block: index of that block.
      rows: the rows that were asked for, if that block is the last; None = all.
    """

    residual: jax.Array
    mlp: jax.Array
    mask: jax.Array | None = None
    block: int = struct.field(pytree_node=False, default=0)
    rows: tuple[int, ...] | None = struct.field(pytree_node=False, default=None)


def num_inputs(inputs: Any) -> int:
    """B of any of the three forms."""
    return jax.tree.leaves(inputs)[0].shape[0]
