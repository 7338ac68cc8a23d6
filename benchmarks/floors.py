"""What a computation cannot be faster than: its operations and bytes at this machine's own rates.

One multiplication and addition are two operations; matrix products alone are counted by hand.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from benchmarks.pairs import enough, seconds
from qkd_jax.nn.vit import ViTSpec

BOTTLENECK = 64  # of every adapter that is timed here


def matmul_rate(rows: int, dtype: str = "float32") -> float:
    """Operations a second of [rows, 768] x [768, 3072], the best of a few."""
    multiply = jax.jit(jnp.matmul)
    a, b = jnp.ones((rows, 768), dtype), jnp.ones((768, 3072), dtype)

    def call():
        return jax.block_until_ready(multiply(a, b))

    times = enough(call)
    return 2 * rows * 768 * 3072 / min(seconds(call, times) for _ in range(5))


def bandwidth() -> float:
    """Bytes a second, read and written, of adding 1 to an array far larger than the caches.

    In place: a new array would be written to pages that the kernel has to clear first.
    """
    add = jax.jit(lambda a: a + 1.0, donate_argnums=0)
    holder = [jnp.ones(64 * 2**20)]

    def call():
        holder[0] = jax.block_until_ready(add(holder[0]))

    times = enough(call)
    return 2 * holder[0].nbytes / min(seconds(call, times) for _ in range(5))


def floor_note(function: Callable, arguments: tuple, rate: float, speed: float) -> str:
    """What a jitted function needs at least, by XLA's own count at `rate` operations and `speed`
    bytes a second; bytes as if nothing stayed in a cache between its loops.
    """
    counted = function.lower(*arguments).compile().cost_analysis()
    operations, moved = counted["flops"], counted["bytes accessed"]
    return (
        f"floor: {1e3 * operations / rate:.2g} ms for {operations:.2g} operations, "
        f"{1e3 * moved / speed:.2g} ms for {moved:.2g} bytes"
    )


def block_flops(spec: ViTSpec) -> float:
    """Of one block of one image, two a multiplication; products alone."""
    tokens, width = spec.num_tokens, spec.width
    return 2 * tokens * width * (4 * width + 2 * spec.mlp_width) + 4 * tokens**2 * width


def forward_flops(spec: ViTSpec, class_only: bool = True) -> float:
    """Of one image; with `class_only` the last block computes the class token alone."""
    tokens, width = spec.num_tokens, spec.width
    last = block_flops(spec)
    if class_only:
        last = 2 * tokens * width * 2 * width + 2 * width * (2 * width + 2 * spec.mlp_width)
        last += 4 * tokens * width
    patch = 2 * (tokens - 1) * 3 * spec.patch_size**2 * width
    return (spec.depth - 1) * block_flops(spec) + last + patch


def adapter_flops(spec: ViTSpec, tokens: int) -> float:
    """Down and up, of one block of one image."""
    return 4 * tokens * spec.width * BOTTLENECK


def adapted_forward(spec: ViTSpec) -> float:
    """One image through the frozen model with an adapter in every block."""
    early = (spec.depth - 1) * adapter_flops(spec, spec.num_tokens)
    return forward_flops(spec) + early + adapter_flops(spec, 1)


def backward(spec: ViTSpec) -> float:
    """Of one image: gradients of activations down to the first adapter, and of the adapters.

    The first block's attention and MLP have none below them that learns. A frozen product costs
    as much backward as forward (no gradient of its weights), one of two activations twice as much.
    """
    tokens, width = spec.num_tokens, spec.width
    products = 4 * tokens**2 * width
    middle = (spec.depth - 2) * (block_flops(spec) + products)
    keys_values = 2 * tokens * width * 2 * width
    class_token = 2 * width * (2 * width + 2 * spec.mlp_width) + 2 * 4 * tokens * width
    adapters = (spec.depth - 1) * adapter_flops(spec, tokens) + adapter_flops(spec, 1)
    # The first one's input needs no gradient.
    adapters = 2 * adapters - adapter_flops(spec, tokens) / 2
    return middle + keys_values + class_token + adapters
