"""One optimisation step, the same for every method, as one device runs it."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from qkd_jax.learners.optimiser import learning_rate, optimiser, scale_head
from qkd_jax.learners.passes import select_rows, shared_part, teach
from qkd_jax.learners.shape import Context, learner_of
from qkd_jax.learners.state import LearnerState, Moving, join


def device_step(
    held: LearnerState, moving: Moving, batch: Mapping[str, Any], axis_name: str | None = None
) -> tuple[Moving, dict[str, jax.Array]]:
    """One optimisation step as one device runs it; pure.

    Every device takes its share of the batch, losses are divided by the number of real rows of the
    whole batch, and gradients are averaged once, with `pmean`. Random numbers belong to the rows of
    the global batch, so results do not depend on the number of devices.

    Args:
      batch: {"inputs": Raw or Stem, "label" int [B], "mask" bool [B]}, optionally "features"
        [B, S, D] of the slots that the loss reads, and "teacher", the result of `passes.teach`,
        which is computed here for a student if it is not given.
      axis_name: of `jax.pmap`; None under `jax.jit`.
    """
    state = join(held, moving)
    config, learner = state.config, learner_of(state.config)
    num_rows = batch["label"].shape[0]
    first = lax.axis_index(axis_name) * num_rows if axis_name else 0
    key = jax.random.fold_in(state.key, 2)
    key = jax.random.fold_in(jax.random.fold_in(key, state.task), state.step)
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(first + jnp.arange(num_rows))
    real = batch["mask"]
    # A padded row may hold anything, even NaN, which a weight of zero leaves in the gradient.
    inputs = select_rows(real, batch["inputs"])
    given = {n: select_rows(real, batch[n]) for n in ("features", "teacher") if n in batch}
    if state.teacher is not None and "teacher" not in given:
        given["teacher"] = teach(state, inputs)
    inputs, batch = shared_part(state, inputs), {**batch, **given}
    mask = real.astype(jnp.float32)
    count, num_devices = jnp.sum(mask), 1
    if axis_name:
        count, num_devices = lax.psum(count, axis_name), lax.psum(1, axis_name)
    weight = mask * (num_devices / jnp.maximum(count, 1.0))
    gather = partial(lax.all_gather, axis_name=axis_name, tiled=True) if axis_name else lambda x: x
    context = Context(jax.vmap(lambda k: jax.random.fold_in(k, 1))(keys), real, gather)

    def objective(optimised):
        terms = learner.loss({**state.trainable, **optimised}, state, inputs, batch, context)
        means = {n: jnp.sum(v * weight) for n, v in terms.items()}
        return means["loss"], means

    before, opt_state = learner.optimised(state.trainable), state.opt_state
    grads, metrics = jax.grad(objective, has_aux=True)(before)
    if axis_name:
        grads, metrics = lax.pmean((grads, metrics), axis_name)
    done, num_steps = state.step, state.num_steps
    if learner.stage is not None:
        done, num_steps = learner.stage(state)
        new = optimiser(config.train).init(before)
        opt_state = jax.tree.map(lambda n, o: jnp.where(done == 0, n, o), new, opt_state)
    # Adam's bias correction raises a float to an int32 count, which strict promotion refuses.
    with jax.numpy_dtype_promotion("standard"):
        updates, opt_state = optimiser(config.train).update(grads, opt_state, before)
    rate = learning_rate(config.train, done, num_steps, state.task)
    updates = scale_head(config.train.head_rate, updates)
    after = jax.tree.map(lambda p, u: p - (rate * u).astype(p.dtype), before, updates)
    trainable = learner.project({**state.trainable, **after}, state)
    metrics["learning_rate"] = rate
    return Moving(trainable, opt_state, state.step + 1), metrics
