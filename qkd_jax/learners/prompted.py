"""What methods with prompts in a frozen transformer share: the query, the linear head, the slots.

Slot 0 is the frozen model's feature, the query q(x) that chooses prompts: it never changes, so it
is computed once an image. Slot 1 + t is the prompted model after task t; `score` reads the last
one. The head is linear with a bias; a task trains the rows of its own classes, cross-entropy sees
no other class, and `memory["rows"]` [C, D] and `memory["bias"]` [C] keep them when the task ends.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from qkd_jax.config import Config
from qkd_jax.learners.base import Learner, class_columns
from qkd_jax.learners.task_adapters import encode_with, mask_unseen
from qkd_jax.nn.heads import linear_logits
from qkd_jax.nn.losses import cross_entropy
from qkd_jax.nn.vit import Backbone, Inserts, encode
from qkd_jax.state import LearnerState, local_labels, valid_task_classes


def new_head(key: jax.Array, backbone: Backbone, config: Config, start: str = "uniform") -> dict:
    """Rows [M, D] and bias [M] of one task's classes: zero, or uniform in +-1 / sqrt(D)."""
    width, size = backbone.spec.width, config.max_task_classes
    if start == "zeros":
        return {"rows": jnp.zeros((size, width)), "bias": jnp.zeros(size)}
    bound = width**-0.5
    drawn = jax.random.uniform(key, (size, width + 1), minval=-bound, maxval=bound)
    return {"rows": drawn[:, :width], "bias": drawn[:, width]}


def empty_head(backbone: Backbone, config: Config) -> dict:
    """Room in memory for the head of every class."""
    shape = (config.num_classes, backbone.spec.width)
    return {"rows": jnp.zeros(shape), "bias": jnp.zeros(config.num_classes)}


def store_head(state: LearnerState) -> dict:
    """`memory` with the trained head of the current task's classes; padding is dropped."""
    columns, head = class_columns(state), state.trainable["head"]
    stored = {name: state.memory[name].at[columns].set(head[name], mode="drop") for name in head}
    return {**state.memory, **stored}


def query_of(state: LearnerState, images: jax.Array, batch: dict) -> jax.Array:
    """[B, D]: the frozen query of training images, from the batch where it is cached."""
    cached = batch["features"][:, 0] if "features" in batch else encode_with(state, None, images)
    return lax.stop_gradient(cached)


def encode_prompted(state: LearnerState, inserts: Inserts, images: jax.Array) -> jax.Array:
    """[B, D] feature of images [B, H, W, 3] with prompts inserted."""
    backbone, dtype = state.backbone, jnp.dtype(state.config.backbone.compute_dtype)
    feature = encode(backbone.params, backbone.spec, images, inserts, compute_dtype=dtype)
    return feature.astype(jnp.float32)


def classification(
    head: dict, state: LearnerState, features: jax.Array, labels: jax.Array
) -> dict[str, jax.Array]:
    """Terms [B] of cross-entropy over the current task's classes, for features [B, D]."""
    return class_terms(state, linear_logits(features, head["rows"], head["bias"]), labels)


def class_terms(state: LearnerState, logits: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
    """The same of logits [B, M]."""
    labels, valid = local_labels(state, labels), valid_task_classes(state)
    ce = cross_entropy(logits, labels, valid)
    correct = jnp.argmax(jnp.where(valid, logits, -jnp.inf), axis=1) == labels
    return {"loss": ce, "loss_ce": ce, "train_accuracy": 100.0 * correct.astype(jnp.float32)}


def with_key_loss(terms: dict, weight: float, pull: jax.Array) -> dict[str, jax.Array]:
    """`terms` with weight * pull [B] added to the loss."""
    return {**terms, "loss": terms["loss"] + weight * pull, "loss_key": pull}


def class_scores(state: LearnerState, features: jax.Array) -> jax.Array:
    """[B, C]: the head on the last prompted feature of slot features [B, S, D]."""
    feature = features[:, 1 + state.task]
    logits = linear_logits(feature, state.memory["rows"], state.memory["bias"])
    return mask_unseen(state, logits)


def prompt_learner(
    name: str,
    *,
    init: Callable,
    begin: Callable,
    loss: Callable,
    inserts_of: Callable,
    **others: Any,
) -> Learner:
    """A `Learner` with slots and head as above.

    Args:
      inserts_of: (state, query [B, D]) -> `Inserts` of the model after the last task.
      others: fields of `Learner` in which the method differs.
    """

    def extract(state, images, slot, features):
        return lax.cond(
            slot == 0,
            lambda: encode_with(state, None, images),
            lambda: encode_prompted(state, inserts_of(state, features[:, 0]), images),
        )

    shared = {
        "freeze": lambda state: state,
        "finish": lambda state, statistics, key: state.replace(memory=store_head(state)),
        "extract": extract,
        "score": lambda state, features: (class_scores(state, features), None),
        "slots": lambda task: (0, 1 + task),
        "finish_slots": lambda task: (),
        "teachers": lambda task: (0,),
        "statistics": lambda config, num_slots, width: (),
        "accumulate": lambda state, statistics, features, labels, mask: statistics,
        "first_block": lambda config: 0,
    }
    return Learner(name=name, init=init, begin=begin, loss=loss, **{**shared, **others})
