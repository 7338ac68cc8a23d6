"""A small training loop for parameters that learn from stored statistics rather than images."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax


def fit(
    params: Any,
    opt_state: Any,
    loss: Callable[[Any, Any], jax.Array],
    batch: Callable[[jax.Array], Any],
    optimiser: optax.GradientTransformation,
    steps: int | jax.Array,
) -> tuple[Any, Any]:
    """(params, opt_state) after `steps` optimisation steps, all in one compiled loop.

    Args:
      params: pytree of float arrays.
      opt_state: `optimiser.init(params)`, or what an earlier call returned.
      loss: (params, batch) -> scalar.
      batch: step (int32 scalar from 0) -> the batch of that step, any pytree.
      optimiser: its updates are added to the parameters, so they include the learning rate.
      steps: int; may be traced.
    """

    def step(i, carry):
        params, opt_state = carry
        grads = jax.grad(loss)(params, batch(i))
        # Adam's bias correction raises a float to an int32 count, which strict promotion refuses.
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = optimiser.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return lax.fori_loop(0, steps, step, (params, opt_state))


def sgd(
    rate: Callable[[jax.Array], jax.Array], momentum: float, weight_decay: float
) -> optax.GradientTransformation:
    """SGD: v <- momentum v + g + decay p; p <- p - rate(step) v, for every leaf.

    Optax's own chain adds g + decay p first, which rounds differently.
    """

    def init(params):
        return jax.tree.map(jnp.zeros_like, params)

    def update(grads, velocity, params):
        velocity = jax.tree.map(
            lambda v, g, p: momentum * v + g + weight_decay * p, velocity, grads, params
        )
        return velocity, velocity

    decayed = optax.GradientTransformation(init, update)
    return optax.chain(decayed, optax.scale_by_learning_rate(rate))


def cosine_factor(epoch: jax.Array, period: int) -> jax.Array:
    """(1 + cos(pi e / period)) / 2: from 1 at epoch 0 to 0 at `period`, then up again."""
    return 0.5 * (1.0 + jnp.cos(jnp.pi * epoch.astype(jnp.float32) / period))
