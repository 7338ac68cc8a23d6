"""One optimisation step, the same for every method and as one device runs it."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from qkd_jax.learners.shape import Rows, learner_of
from qkd_jax.learners.state import LearnerState, Moving, join
from qkd_jax.nn.encode import encode_prefix
from qkd_jax.nn.vit import normalize
from qkd_jax.settings.config import TrainConfig

Batch = Mapping[str, Any]


def optimiser(config: TrainConfig) -> optax.GradientTransformation:
    """Directions without the learning rate, which follows the task's schedule (`learning_rate`)."""
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
    """Rate of `step` of a task; constant where `num_steps` is 0.

    cosine: lr (1 + cos(pi p)) / 2 with p = step / num_steps. quarter_cosine, by epoch as the code
    of CODA-Prompt: lr cos(99 pi e / (200 (E - 1))) with e = 0, 0, 1, ..., E - 2 in the E epochs.
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
    """True for leaves whose own name is among `names`; the gate's are never decayed."""

    def chosen(path, _):
        keys = [getattr(part, "key", "") for part in path]
        return keys[-1] in names and "gate" not in keys

    return jax.tree_util.tree_map_with_path(chosen, tree)


def prepare_images(state: LearnerState, images: jax.Array) -> jax.Array:
    """Pixels (uint8 [0, 255] or float [0, 1]) as the backbone was trained on, [B, H, W, 3]."""
    return normalize(images, state.backbone.preprocessing)


def frozen_prefix(state: LearnerState, images: jax.Array) -> jax.Array:
    """Residual stream [B, N, D] of images before the first adapter's block: never changes, so
    it can be kept.
    """
    backbone = state.backbone
    return encode_prefix(
        backbone.params,
        backbone.spec,
        prepare_images(state, images),
        learner_of(state.config).first_block(state.config),
        compute_dtype=jnp.dtype(state.config.backbone.compute_dtype),
    )


def device_step(
    held: LearnerState, moving: Moving, batch: Batch, axis_name: str | None = None
) -> tuple[Moving, dict[str, jax.Array]]:
    """One optimisation step as one device runs it; pure.

    Under `jax.pmap` or `jax.jit` alike: every device takes its share of the batch, losses are
    divided by the number of real rows of the whole batch, gradients are averaged once, with
    `pmean`. All randomness belongs to the row of the global batch, so results do not depend on the
    number of devices.
    """
    state = join(held, moving)
    config, learner = state.config, learner_of(state.config)
    num_rows = batch["label"].shape[0]
    first = lax.axis_index(axis_name) * num_rows if axis_name else 0
    key = jax.random.fold_in(state.key, 2)
    key = jax.random.fold_in(jax.random.fold_in(key, state.task), state.step)
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(first + jnp.arange(num_rows))
    real = batch.get("mask", jnp.ones(num_rows, bool))
    images = batch.get("tokens", batch.get("image"))
    if "tokens" not in batch:
        images = prepare_images(state, images)
    # A padded row may hold anything, also NaN, which no weight of zero takes out of a gradient.
    images = select_rows(real, images)
    batch = {n: select_rows(real, v) if n == "features" else v for n, v in batch.items()}
    mask = real.astype(jnp.float32)
    count, num_devices = jnp.sum(mask), 1
    if axis_name:
        count, num_devices = lax.psum(count, axis_name), lax.psum(1, axis_name)
    weight = mask * (num_devices / jnp.maximum(count, 1.0))
    gather = partial(lax.all_gather, axis_name=axis_name, tiled=True) if axis_name else lambda x: x
    rows = Rows(jax.vmap(lambda k: jax.random.fold_in(k, 1))(keys), real, gather)

    def objective(trainable):
        terms = learner.loss(trainable, state, images, batch, rows)
        means = {n: jnp.sum(v * weight) for n, v in terms.items()}
        return means["loss"], means

    grads, metrics = jax.grad(objective, has_aux=True)(state.trainable)
    if axis_name:
        grads, metrics = lax.pmean((grads, metrics), axis_name)
    # Adam's bias correction raises a float to an int32 count, which strict promotion refuses.
    with jax.numpy_dtype_promotion("standard"):
        updates, opt_state = optimiser(config.train).update(grads, state.opt_state, state.trainable)
    rate = learning_rate(config.train, state.step, state.num_steps, state.task)
    updates = _scale_head(config.train.head_rate, updates)
    trainable = jax.tree.map(lambda p, u: p - (rate * u).astype(p.dtype), state.trainable, updates)
    trainable = learner.project(trainable, state)
    metrics["learning_rate"] = rate
    return Moving(trainable, opt_state, state.step + 1), metrics


def _scale_head(factor: float, updates: Any) -> Any:
    """The head may learn at another rate than the rest."""
    if factor == 1.0 or "head" not in updates:
        return updates
    return {**updates, "head": jax.tree.map(lambda u: factor * u, updates["head"])}


def select_rows(real: jax.Array, rows: jax.Array) -> jax.Array:
    """`rows` [B, ...] with zeros where `real` [B] does not hold."""
    return jnp.where(real.reshape(-1, *[1] * (rows.ndim - 1)), rows, jnp.zeros((), rows.dtype))
