"""The operations inside a transformer block, in the formulations that XLA runs fastest.

Shapes: B batch, N tokens, D width, H heads. Matrix products run in `dtype`; means, variances,
exponentials and sums run in at least float32, so bfloat16 costs accuracy only inside products.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax


def as_row(vector: jax.Array, like: jax.Array) -> jax.Array:
    """A [D] vector with leading axes of size 1, so that it broadcasts against `like` [..., D]."""
    return vector.reshape((1,) * (like.ndim - 1) + vector.shape)


def at_least_float32(dtype) -> jnp.dtype:
    """The dtype of reductions and of the residual stream: float32, or float64 for float64."""
    return jnp.dtype(jnp.float64 if jnp.dtype(dtype) == jnp.float64 else jnp.float32)


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """Exact GELU, x Phi(x), with erf: `jax.nn.gelu` uses erfc, which is slower."""
    return 0.5 * x * (1.0 + lax.erf(x * 0.7071067811865476))


@jax.custom_vjp
def quick_gelu(x: jax.Array) -> jax.Array:
    """CLIP's activation, x sigmoid(1.702 x)."""
    return x * jax.nn.sigmoid(1.702 * x)


# These derivatives keep only the input for the backward pass, one array as wide as the MLP, where
# autodiff keeps two. They use Phi(x) = 1 - Phi(-x): written as above, XLA would see the expression
# twice and keep its value from the forward pass.


def _gelu_backward(x, g):
    above = 0.5 * (1.0 + lax.erf(-x * 0.7071067811865476))  # Phi(-x)
    return (g * (1.0 - above + x * jnp.exp(-0.5 * x * x) * 0.3989422804014327),)


def _quick_gelu_backward(x, g):
    above = jax.nn.sigmoid(-1.702 * x)
    return (g * (1.0 - above) * (1.0 + 1.702 * x * above),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)
quick_gelu.defvjp(lambda x: (quick_gelu(x), x), _quick_gelu_backward)


ACTIVATIONS = {"gelu": gelu, "quick_gelu": quick_gelu}


@jax.custom_vjp
def standardize(x: jax.Array, eps: float) -> jax.Array:
    """Subtract the mean and divide by sqrt(variance + eps) over the last axis.

    Two passes: E[x^2] - E[x]^2 would save a third of the time of this small part, but cancels
    when |mean| >> standard deviation. The derivative is written by hand so that it reads the stored
    result; with autodiff, every block recomputes the residual sums below it.
    """
    return _standardize_forward(x, eps)[0]


def _standardize_forward(x, eps):
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
    inverse = lax.rsqrt(variance + eps)
    y = centred * inverse
    return y, (y, inverse)


def _standardize_backward(residuals, g):
    y, inverse = residuals
    mean_g = jnp.mean(g, axis=-1, keepdims=True)
    mean_gy = jnp.mean(g * y, axis=-1, keepdims=True)
    return (g - mean_g - y * mean_gy) * inverse, None


standardize.defvjp(_standardize_forward, _standardize_backward)


def layer_norm(params: dict, x: jax.Array, eps: float) -> jax.Array:
    """Layer normalisation over the last axis; the result has the dtype of `x`.

    Args:
        params: {"scale": [D], "bias": [D]}.
        x: [..., D], float32 or float64.
        eps: added to the variance.
    """
    scale = params["scale"].astype(x.dtype)
    bias = params["bias"].astype(x.dtype)
    return standardize(x, eps) * as_row(scale, x) + as_row(bias, x)


def linear(params: dict, x: jax.Array, dtype) -> jax.Array:
    """x @ kernel (+ bias) in `dtype`, for frozen weights.

    Args:
        params: {"kernel": [D, E], "bias"?: [E]}.
        x: [..., D].
    """
    y = x.astype(dtype) @ params["kernel"].astype(dtype)
    if "bias" in params:
        y = y + as_row(params["bias"].astype(dtype), y)
    return y


@jax.custom_vjp
def matmul_trainable(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x @ kernel for weights that train: [..., D] @ [D, E].

    The weight gradient is computed as (g^T x)^T. The plain rule makes XLA write the wide input
    transposed, which is slow on a CPU.
    """
    return x @ kernel


def _matmul_forward(x, kernel):
    return x @ kernel, (x, kernel)


def _matmul_backward(residuals, g):
    x, kernel = residuals
    flat_g = g.reshape(-1, g.shape[-1])
    flat_x = x.reshape(-1, x.shape[-1])
    kernel_gradient = lax.dot_general(flat_g, flat_x, (((0,), (0,)), ((), ()))).T
    return g @ kernel.T, kernel_gradient


matmul_trainable.defvjp(_matmul_forward, _matmul_backward)


@struct.dataclass
class AttentionInsert:
    """What is inserted in the attention of one block; parts that are None are absent.

    Attributes:
        prefix_key, prefix_value: [P, D] for all images, or [B, P, D] per image: more keys and
            values, not projected (prefix tuning).
        class_key, class_value: [D], added to the class token's key and value.
        lora_key, lora_value: {"down": [D, R], "up": [R, D]}; x down up is added to the frozen
            projection.
    """

    prefix_key: Any = None
    prefix_value: Any = None
    class_key: Any = None
    class_value: Any = None
    lora_key: Any = None
    lora_value: Any = None


def attention(
    params: dict,
    queries_from: jax.Array,
    x: jax.Array,
    num_heads: int,
    dtype,
    insert: AttentionInsert | None = None,
    token_mask: jax.Array | None = None,
) -> jax.Array:
    """Multi-head self-attention from some tokens to all tokens.

    Args:
        params: {"query", "key", "value", "out"}, each {"kernel": [D, D], "bias": [D]}.
        queries_from: [B, M, D], the normalised tokens that attend (all of `x`, or only some).
        x: [B, N, D], the normalised tokens attended to, the class token first.
        num_heads: H; each head is D / H wide.
        insert: what is inserted in the keys and values of this block.
        token_mask: bool [B, N], the tokens that are attended to; None is all. Prefix rows are too.

    Returns:
        [B, M, D] in `dtype`.
    """
    width = x.shape[-1]
    scale = (width // num_heads) ** -0.5

    def heads(y):
        batch, tokens, _ = y.shape
        return y.reshape(batch, tokens, num_heads, -1).swapaxes(1, 2)

    key, value = linear(params["key"], x, dtype), linear(params["value"], x, dtype)
    if insert is not None:
        key = _inserted(insert.lora_key, insert.class_key, insert.prefix_key, x, key)
        value = _inserted(insert.lora_value, insert.class_value, insert.prefix_value, x, value)
    q = heads(linear(params["query"], queries_from, dtype) * scale)
    k, v = heads(key), heads(value)
    wide = at_least_float32(dtype)
    logits = jnp.matmul(q, k.swapaxes(-1, -2), preferred_element_type=wide)
    if token_mask is not None:
        prefix = k.shape[2] - token_mask.shape[1]
        visible = jnp.pad(token_mask, ((0, 0), (prefix, 0)), constant_values=True)
        logits = jnp.where(visible[:, None, None, :], logits, jnp.finfo(wide).min)
    # softmax(l) v = exp(l - max) v / sum(exp(l - max)): dividing the [M, D/H] result is cheaper
    # than dividing the [M, N] weights. The maximum cancels, so it needs no derivative.
    weights = jnp.exp(logits - lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True)))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    mixed = jnp.matmul(weights.astype(dtype), v, preferred_element_type=wide) / total
    merged = mixed.swapaxes(1, 2).reshape(*queries_from.shape[:2], width)
    return linear(params["out"], merged, dtype)


def _inserted(lora, class_row, prefix, x, y):
    """Keys or values y [B, N, D] with a low-rank update, a vector added to the class token's, and
    a prefix.
    """
    if lora is not None:
        down, up = lora["down"].astype(y.dtype), lora["up"].astype(y.dtype)
        y = y + matmul_trainable(matmul_trainable(x.astype(y.dtype), down), up)
    if class_row is not None:
        y = y.at[:, 0].add(as_row(class_row.astype(y.dtype), y[:, 0]))
    if prefix is not None:
        prefix = jnp.broadcast_to(prefix.astype(y.dtype), (y.shape[0], *prefix.shape[-2:]))
        y = jnp.concatenate([prefix, y], axis=1)
    return y
