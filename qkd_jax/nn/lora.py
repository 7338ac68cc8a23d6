"""Low-rank branches in the attention of every block, and the directions that they avoid.

Per block, with M the second moment of the attention's normalised input x (x x^T over tokens, [D,
D]) and P the projector on the directions that are occupied:

- a new branch reads the free directions of its images: the top left singular vectors of (I - P) M;
- afterwards P grows by the top left singular vectors of (I - P) M until the occupied share of
  |M|_F^2 reaches a threshold.

The decomposition is of (I - P) M itself and not of its square, which loses the small directions in
float32.
"""

import jax
import jax.numpy as jnp

from qkd_jax.nn.backbone import Backbone, block_at
from qkd_jax.nn.encode import embed, encode_all
from qkd_jax.nn.inputs import Raw
from qkd_jax.nn.inserts import Inserts
from qkd_jax.nn.layers import AttentionInsert, layer_norm


def branch_inserts(down: jax.Array, up: dict[str, jax.Array]) -> Inserts:
    """The sum of all branches in the keys and the values of every block.

    Args:
      down: [L, D, T, R], T branches of rank R, read by keys and values alike.
      up: {"key", "value"}, each [L, T, R, D]; zeros for branches that are not there yet.
    """
    depth, width = down.shape[:2]

    def of_block(index):
        reads = down[index].reshape(width, -1)
        writes = {name: leaf[index].reshape(-1, width) for name, leaf in up.items()}
        return AttentionInsert(
            lora_key={"down": reads, "up": writes["key"]},
            lora_value={"down": reads, "up": writes["value"]},
        )

    return Inserts(attention=tuple(of_block(index) for index in range(depth)))


def attention_moments(
    backbone: Backbone,
    inputs: Raw,
    mask: jax.Array,
    inserts: Inserts,
    compute_dtype,
) -> tuple[jax.Array, jax.Array]:
    """Sum of x x^T over all tokens x that enter each block's attention, and their number.

    Args:
      mask: bool [B], False for inputs to leave out.

    Returns:
      ([L, D, D], float32 []).
    """
    params, spec = backbone.params, backbone.spec
    tokens = embed(backbone, inputs, compute_dtype=compute_dtype)
    streams = encode_all(backbone, tokens, inserts, compute_dtype=compute_dtype)
    real = jnp.broadcast_to(mask[:, None], tokens.stream.shape[:2])
    if tokens.mask is not None:
        real = real & tokens.mask

    def of_block(index):
        x = streams[index]
        if not spec.post_norm:
            x = layer_norm(block_at(params, index)["norm1"], x, spec.eps)
        x = jnp.where(real[:, :, None], x, 0.0).reshape(-1, spec.width)
        return jnp.matmul(x.T, x, precision="highest")

    moments = jnp.stack([of_block(index) for index in range(spec.depth)])
    return moments, jnp.sum(real.astype(jnp.float32))


def free_directions(moment: jax.Array, occupied: jax.Array, rank: int) -> jax.Array:
    """[D, rank]: the top left singular vectors of (I - P) M, largest value first.

    Where the singular value is zero the column is zero, since such a singular vector is arbitrary:
    it may lie in the occupied directions, and differs between devices.

    Args:
      moment: M [D, D].
      occupied: P [D, D].
    """
    vectors, values, floor = _free_spectrum(moment, occupied)
    return jnp.where(values > floor, vectors, 0.0)[:, :rank]


def occupy(
    moment: jax.Array, occupied: jax.Array, threshold: jax.Array, below: jax.Array
) -> jax.Array:
    """P [D, D] grown by the fewest directions that bring its share of |M|_F^2 to the threshold.

    If `below`, the share stays below it instead, but grows by at least one direction.
    """
    vectors, values, floor = _free_spectrum(moment, occupied)
    total = jnp.sum(jnp.square(moment))
    shares = jnp.square(values) / jnp.where(total > 0, total, 1.0)
    after = 1.0 - jnp.sum(shares) + jnp.cumsum(shares)  # share of P with directions 0 .. i
    first = jnp.arange(shares.shape[0]) == 0
    chosen = jnp.where(below, (after < threshold) | first, after - shares < threshold)
    new = jnp.where((chosen & (values > floor))[None, :], vectors, 0.0)
    return occupied + jnp.matmul(new, new.T, precision="highest")


def _free_spectrum(moment, occupied):
    """Left singular vectors [D, D] and values [D] of (I - P) M, and the size of rounding errors."""
    free = _outside(occupied, moment)
    vectors, values, _ = jnp.linalg.svd(free, full_matrices=False)
    # In exact arithmetic a vector with a value above zero is already outside; in float32 only up to
    # eps |M| / value. A second projection mends that, so that P stays a projector after many tasks.
    vectors = _outside(occupied, vectors)
    length = jnp.sqrt(jnp.sum(jnp.square(vectors), axis=0, keepdims=True))
    vectors = vectors / jnp.where(length > 0, length, 1.0)
    size = jnp.sqrt(jnp.sum(jnp.square(moment)))
    return vectors, values, moment.shape[0] * float(jnp.finfo(moment.dtype).eps) * size


def _outside(occupied, columns):
    """(I - P) columns."""
    return columns - jnp.matmul(occupied, columns, precision="highest")
