"""Generators in two dimensions, each trained by one field with one bandwidth."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax import lax

from qkd_jax.generators.fields import drifting_velocity, gradient_flow_velocity
from qkd_jax.nn.fit import fit

# Names of the fields, and what they are.
FIELDS = {
    "drifting": "drifting, Laplace kernel",
    "kl_qp": "KL(q‖p)",
    "kl_pq": "KL(p‖q)",
    "chi2_qp": "chi²(q‖p)",
    "mixed": "KL(p‖q) + chi²(q‖p)",
    "mmd": "MMD²",
}
NOISE = 8
LONGEST_STEP = 0.5  # a velocity is shortened to this length


class Training(NamedTuple):
    """How long, and with how many samples; static.

    Attributes:
      steps: optimisation steps.
      batch: generated samples, and as many of the data, in a step.
      pictures: how many times in between samples are drawn.
      shown: how many of them.
    """

    steps: int = 1600
    batch: int = 256
    pictures: int = 4
    shown: int = 1000


class Perceptron(nn.Module):
    """Noise [N, 8] -> points [N, 2]."""

    @nn.compact
    def __call__(self, noise):
        hidden = noise
        for _ in range(3):
            hidden = nn.gelu(nn.Dense(96)(hidden))
        return nn.Dense(2)(hidden)


def velocity(field: str, x: jax.Array, data: jax.Array, bandwidth: jax.Array) -> jax.Array:
    """Where samples x [N, 2] should go, at most `LONGEST_STEP` away."""
    if field == "drifting":
        moved = drifting_velocity(x, data, x, bandwidth, own=True)
    else:
        moved = gradient_flow_velocity(x, data, x, bandwidth, field, own=True)
    length = jnp.linalg.norm(moved, axis=1, keepdims=True)
    return moved * jnp.minimum(1.0, LONGEST_STEP / jnp.maximum(length, 1e-9))


@partial(jax.jit, static_argnames=("field", "training"))
def train(
    key: jax.Array, data: jax.Array, bandwidth: jax.Array, field: str, training: Training
) -> jax.Array:
    """Samples [1 + pictures, shown, 2] before training, in between and after it.

    Args:
      key: of first parameters, batches and samples.
      data: [N, 2].
      bandwidth: of the kernel, in the units of the data.
    """
    model, optimiser = Perceptron(), optax.adam(optax.cosine_decay_schedule(2e-3, training.steps))
    keys = jax.random.split(key, 3)
    params = model.init(keys[0], jnp.zeros((1, NOISE)))

    def batch(step):
        key_noise, key_data = jax.random.split(jax.random.fold_in(keys[1], step))
        rows = jax.random.randint(key_data, (training.batch,), 0, len(data))
        return jax.random.normal(key_noise, (training.batch, NOISE)), data[rows]

    def loss(params, batch):
        noise, real = batch
        x = model.apply(params, noise)
        goal = lax.stop_gradient(x + velocity(field, x, real, bandwidth))
        return jnp.mean(jnp.sum((x - goal) ** 2, axis=1))

    def draw(params):
        return model.apply(params, jax.random.normal(keys[2], (training.shown, NOISE)))

    def part(carry, first):
        each = training.steps // training.pictures
        carry = fit(*carry, loss, lambda step: batch(first * each + step), optimiser, each)
        return carry, draw(carry[0])

    start = params, optimiser.init(params)
    _, drawn = lax.scan(part, start, jnp.arange(training.pictures))
    return jnp.concatenate([draw(params)[None], drawn])
