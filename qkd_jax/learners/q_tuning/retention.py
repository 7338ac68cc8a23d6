"""How much one prediction says of another: mutual information, as a critic estimates it.

The estimate is the Jensen-Shannon one of Deep InfoMax (Hjelm et al., arXiv 1808.06670): with a
critic F and sp(z) = log(1 + e^z),

    E over pairs of one text [-sp(-F(a, b))] - E over pairs of two texts [sp(F(a, b'))].

It is no number of nats: it lies between -2 log 2, which F = 0 reaches on any data and a trained
critic on independent ones, and 0.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

FLOOR = -1.3862943611198906  # -2 log 2


def new_critic(key: jax.Array, inputs: int, hidden: int) -> dict:
    """A perceptron with two hidden layers of `hidden` ReLUs: [.., inputs] -> [.., 1]."""

    def layer(index, fan_in, fan_out):
        drawn = jax.random.normal(jax.random.fold_in(key, index), (fan_in, fan_out))
        return {"kernel": (2 / fan_in) ** 0.5 * drawn, "bias": jnp.zeros(fan_out)}

    sizes = ((inputs, hidden), (hidden, hidden), (hidden, 1))
    return {f"layer{index}": layer(index, *size) for index, size in enumerate(sizes)}


def mutual_information(
    critic: dict, own: jax.Array, other: jax.Array, mask: jax.Array, gather: Callable
) -> jax.Array:
    """[B]: terms of the estimate for pairs of `own` and `other`, both [B, M].

    For E over two texts, a row meets the `other` of every further row of the whole batch, instead
    of one that a shuffle gives it. This is the mean over all shuffles, it needs no random numbers,
    and it does not depend on how the batch is divided over devices.

    Args:
      mask: bool [B], False where a row is padding.
      gather: [B, ...] -> the same of all devices, [B of all, ...].
    """
    real = gather(mask).astype(own.dtype)
    joint = _score(critic, own, other)
    pairs = _score(critic, own[:, None], gather(other)[None])
    of_all = jnp.sum(jax.nn.softplus(pairs) * real[None], axis=1)
    # Without the row itself; a batch of one row has no further ones, and no second term.
    further = (of_all - jax.nn.softplus(joint)) / jnp.maximum(jnp.sum(real) - 1.0, 1.0)
    return -jax.nn.softplus(-joint) - further


def _score(critic, own, other):
    """F of pairs [..., M] and [..., M], broadcast to one another: [...]."""
    shape = jnp.broadcast_shapes(own.shape, other.shape)
    x = jnp.concatenate([jnp.broadcast_to(own, shape), jnp.broadcast_to(other, shape)], axis=-1)
    for index in range(len(critic)):
        layer = critic[f"layer{index}"]
        bias = layer["bias"].reshape((1,) * (x.ndim - 1) + layer["bias"].shape)
        x = (jax.nn.relu(x) if index else x) @ layer["kernel"] + bias
    return x[..., 0]
