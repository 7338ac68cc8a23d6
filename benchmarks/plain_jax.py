"""The step of `transformer.py` as JAX is usually written: einsum attention, `jax.nn.gelu`, blocks
in a Python loop, everything left to autodiff. The peer of compile time.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from qkd_jax.nn.vit import ViTSpec

SCALE = 0.1  # of the adapters


def norm(p: dict, x: jax.Array, eps: float) -> jax.Array:
    centred = x - x.mean(-1, keepdims=True)
    return centred / jnp.sqrt(x.var(-1, keepdims=True) + eps) * p["scale"] + p["bias"]


def dense(p: dict, x: jax.Array) -> jax.Array:
    return x @ p["kernel"] + p["bias"]


def attention(p: dict, x: jax.Array, heads: int) -> jax.Array:
    batch, tokens, width = x.shape
    q, k, v = (
        dense(p[name], x).reshape(batch, tokens, heads, -1) for name in ("query", "key", "value")
    )
    weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) * (width // heads) ** -0.5)
    mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(batch, tokens, width)
    return dense(p["out"], mixed)


def features(params: dict, adapter: dict, spec: ViTSpec, images: jax.Array) -> jax.Array:
    batch, patch = len(images), spec.patch_size
    grid = spec.image_size // patch
    x = images.reshape(batch, grid, patch, grid, patch, 3).transpose(0, 1, 3, 2, 4, 5)
    x = dense(params["patch"], x.reshape(batch, grid * grid, -1))
    first = jnp.broadcast_to(params["class_token"], (batch, 1, spec.width))
    x = jnp.concatenate([first, x], axis=1) + params["position"]
    for i, p in enumerate(params["blocks"]):
        x = x + attention(p, norm(p["norm1"], x, spec.eps), spec.num_heads)
        hidden = jax.nn.gelu(dense(p["fc1"], norm(p["norm2"], x, spec.eps)), approximate=False)
        down, up = (jax.tree.map(lambda a, i=i: a[i], adapter[name]) for name in ("down", "up"))
        x = x + dense(p["fc2"], hidden) + SCALE * dense(up, jax.nn.relu(dense(down, x)))
    return norm(params["norm"], x, spec.eps)[:, 0]


def make_step(spec: ViTSpec, learning_rate: float, momentum: float) -> tuple[Callable, Callable]:
    """(step, init): step (params, trainable, opt_state, images, labels) -> (trainable, opt_state,
    loss), init trainable -> opt_state.
    """
    optimiser = optax.sgd(learning_rate, momentum)

    def unit(x):
        return x / jnp.linalg.norm(x, axis=-1, keepdims=True)

    def loss_of(trainable, params, images, labels):
        head = trainable["head"]
        found = unit(features(params, trainable["adapter"], spec, images))
        logits = head["scale"] * found @ unit(head["rows"]).T
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def step(params, trainable, opt_state, images, labels):
        loss, grads = jax.value_and_grad(loss_of)(trainable, params, images, labels)
        updates, opt_state = optimiser.update(grads, opt_state)
        return optax.apply_updates(trainable, updates), opt_state, loss

    return step, optimiser.init
