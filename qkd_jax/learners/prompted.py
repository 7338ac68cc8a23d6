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

from qkd_jax.learners.shape import Learner
from qkd_jax.learners.state import LearnerState
from qkd_jax.learners.task_adapters import encode_with
from qkd_jax.learners.task_heads import class_terms, finish_with_head, mask_unseen
from qkd_jax.nn.encode import Inserts, encode
from qkd_jax.nn.heads import linear_logits


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
        "finish": finish_with_head,
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
