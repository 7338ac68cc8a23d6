"""The optimiser of a task: update directions, learning rate, and which leaves decay."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from qkd_jax.settings.sections import TrainConfig


def optimiser(config: TrainConfig) -> optax.GradientTransformation:
    """Update directions, without the learning rate, which has a schedule (`learning_rate`)."""
    decay = optax.add_decayed_weights(
        config.weight_decay, mask=partial(_decayed, config.decay_leaves)
    )
    clip = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    if config.optimizer == "adam":
        return optax.chain(*clip, optax.scale_by_adam(), decay)
    return optax.chain(*clip, decay, optax.trace(decay=config.momentum))


def learning_rate(
    config: TrainConfig, step: jax.Array, num_steps: jax.Array, task: jax.Array
) -> jax.Array:
    """Learning rate of a task at `step`; constant where `num_steps` is 0.

    cosine: lr (1 + cos(pi p)) / 2 with p = step / num_steps. quarter_cosine, per epoch as in the
    code of CODA-Prompt: lr cos(99 pi e / (200 (E - 1))), e = 0, 0, 1, ..., E - 2 in the E epochs.
    """
    if config.schedule == "constant":
        return jnp.float32(config.learning_rate)
    total = jnp.maximum(num_steps, 1)
    if config.schedule == "cosine":
        progress = jnp.minimum(step.astype(jnp.float32) / total.astype(jnp.float32), 1.0)
        factor = 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
    else:
        epochs = jnp.where(task > 0, config.later_epochs or config.epochs, config.epochs)
        epoch = jnp.minimum(step * epochs // total, epochs - 1)
        progress = jnp.maximum(epoch - 1, 0).astype(jnp.float32)
        factor = jnp.cos(0.495 * jnp.pi * progress / jnp.maximum(epochs - 1, 1).astype(jnp.float32))
    return config.learning_rate * jnp.where(num_steps > 0, factor, 1.0)


def _decayed(names: tuple[str, ...], tree: Any) -> Any:
    """True for leaves whose name is among `names`; the gate never decays."""

    def chosen(path, _):
        keys = [getattr(part, "key", "") for part in path]
        return keys[-1] in names and "gate" not in keys

    return jax.tree_util.tree_map_with_path(chosen, tree)


def scale_head(factor: float, updates: Any) -> Any:
    """`updates` with those of the head multiplied by `factor`."""
    if factor == 1.0 or "head" not in updates:
        return updates
    return {**updates, "head": jax.tree.map(lambda u: factor * u, updates["head"])}
