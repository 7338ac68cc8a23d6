"""What the forms of continual distillation train beside their host, as pure functions.

A token and prompts for distillation, a mapper of the teacher's prompts, a projection of tokens
(FitNets, arXiv 1412.6550) and the fusion of blocks (ReviewKD, arXiv 2104.09044).
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from qkd_jax.learners.coda_prompt import component_weights
from qkd_jax.nn.inserts import Inserts
from qkd_jax.nn.layers import as_row, layer_norm, matmul_trainable
from qkd_jax.nn.prompts import joined_rows, new_rows, split_prefix, with_prefixes

FUSION_EPS = 1e-5


def start_rows(key: jax.Array, shape: tuple[int, ...], start: str) -> jax.Array:
    """Token or prompts of `shape`: zero, or uniform in the range of `prompts.STARTS`."""
    return jnp.zeros(shape) if start == "zeros" else new_rows(key, shape, start)


def with_token(inserts: Inserts, token: jax.Array) -> Inserts:
    """`inserts` with a token [1, D] as the last row of the sequence."""
    return inserts.replace(tokens=joined_rows(inserts.tokens, token))


def with_prompts(inserts: Inserts, prompts: jax.Array) -> Inserts:
    """`inserts` with prompts [L - 1, P, D] as more prefix rows of blocks 1 to L - 1."""
    prefixes = {1 + index: split_prefix(rows) for index, rows in enumerate(prompts)}
    return with_prefixes(inserts, 1 + len(prompts), prefixes)


def new_mapper(key: jax.Array, shape: tuple[int, int, int], teacher: int, student: int) -> dict:
    """The mapper of `shape` (K blocks, M components, P rows), from width `teacher` to `student`.

    Rows of keys, attention vectors and components are orthonormal, or columns where there are more
    rows than columns.
    """
    blocks, size, length = shape
    orthogonal = jax.nn.initializers.orthogonal()

    def rows(key, width):
        keys = jax.random.split(key, blocks)
        return jnp.stack([orthogonal(key, (size, width)) for key in keys])

    key_keys, key_attention, key_components = jax.random.split(key, 3)
    components = rows(key_components, length * student)
    return {
        "keys": rows(key_keys, teacher),
        "attention": rows(key_attention, teacher),
        "components": components.reshape(blocks, size, length, student),
    }


def with_mapped(inserts: Inserts, mapper: dict, means: jax.Array, depth: int) -> Inserts:
    """`inserts` with prefix rows that are mapped from the teacher's prompts, in the first blocks.

    As in CODA-Prompt: w_m = cos(u * A_m, K_m), prompt = sum_m w_m P_m, half for keys and half for
    values; here u is the mean over the rows of the teacher's prompt.

    Args:
      means: u [B, K, E], E the width of the teacher.
      depth: L, the blocks of the student.
    """
    prefixes = {}
    for index, components in enumerate(mapper["components"]):
        weights = component_weights(
            means[:, index], mapper["attention"][index], mapper["keys"][index]
        )
        prompt = jnp.einsum("bm,mpd->bpd", weights, components, precision="highest")
        prefixes[index] = split_prefix(prompt)
    return with_prefixes(inserts, depth, prefixes)


def new_linear(key: jax.Array, inputs: int, outputs: int) -> dict:
    """{"kernel", "bias"} of a linear layer, uniform in +-1 / sqrt(inputs)."""
    bound = inputs**-0.5
    drawn = jax.random.uniform(key, (inputs + 1, outputs), minval=-bound, maxval=bound)
    return {"kernel": drawn[:inputs], "bias": drawn[inputs]}


def apply_linear(params: dict, x: jax.Array) -> jax.Array:
    """x [..., D] through a linear layer that trains."""
    return matmul_trainable(x, params["kernel"]) + as_row(params["bias"], x)


def new_fusion(key: jax.Array, depth: int, teacher: int, student: int) -> dict:
    """The layers that fuse the student's blocks: {"last": of the last block, "others": of those
    below it, each array with an axis [L - 1] in front}.
    """

    def layer(key):
        key_in, key_gate, key_out = jax.random.split(key, 3)
        norm = {"scale": jnp.ones(student), "bias": jnp.zeros(student)}
        own = {
            "in": new_linear(key_in, student, student),
            "in_norm": norm,
            "out": new_linear(key_out, student, teacher),
        }
        gate = {"gate": new_linear(key_gate, student, student), "gate_norm": norm}
        return own, {**own, **gate, "fused_norm": norm}

    keys = jax.random.split(key, depth)
    return {"last": layer(keys[-1])[0], "others": jax.vmap(layer)(keys[:-1])[1]}


def fused_blocks(params: dict, blocks: Sequence[jax.Array]) -> jax.Array:
    """The student's blocks, each [B, N, D], fused from the last to the first, in the teacher's
    width: [B, L, N, E].

    In block l: x = LN(W x_l); below the last block, with the fused y of the block above it,
    x = LN(x * g(x) + y * g(y)) and g(v) = LN(V v); the result is U x.
    """

    def normed(layer, name, x):
        return layer_norm(layer[f"{name}_norm"], apply_linear(layer[name], x), FUSION_EPS)

    def fuse(above, layer_and_block):
        layer, block = layer_and_block
        x = normed(layer, "in", block)
        x = x * normed(layer, "gate", x) + above * normed(layer, "gate", above)
        x = layer_norm(layer["fused_norm"], x, FUSION_EPS)
        return x, apply_linear(layer["out"], x)

    top = normed(params["last"], "in", blocks[-1])
    rest = params["others"], jnp.stack(blocks[:-1])
    _, outputs = jax.lax.scan(fuse, top, rest, reverse=True)
    last = apply_linear(params["last"]["out"], top)
    return jnp.concatenate([outputs, last[None]]).swapaxes(0, 1)
