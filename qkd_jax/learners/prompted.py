"""Common parts of methods with prompts in a frozen transformer: query, linear head, slots.

Slot 0 is the frozen model's feature, the query q(x) that chooses prompts: it never changes, so it
is computed once for each image. Slot 1 + t is the prompted model after task t; `score` reads the
last. The head is linear with a bias; a task trains the rows of its own classes, cross-entropy sees
no other class, and `memory["rows"]` [C, D] and `memory["bias"]` [C] keep them when the task ends.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax

from qkd_jax.learners.features import pooled_feature
from qkd_jax.learners.shape import Learner, Slots, Sums
from qkd_jax.learners.state import LearnerState
from qkd_jax.learners.task_heads import class_terms, finish_with_head, mask_unseen
from qkd_jax.nn.heads import linear_logits
from qkd_jax.nn.inputs import Raw


def query_of(state: LearnerState, inputs: Raw, batch: dict) -> jax.Array:
    """[B, D]: the frozen query of training inputs, taken from the batch if it is cached there."""
    cached = batch["features"][:, 0] if "features" in batch else pooled_feature(state, inputs)
    return lax.stop_gradient(cached)


def classification(
    head: dict, state: LearnerState, features: jax.Array, labels: jax.Array
) -> dict[str, jax.Array]:
    """Terms [B] of cross-entropy over the current task's classes, for features [B, D]."""
    return class_terms(state, linear_logits(features, head["rows"], head["bias"]), labels)


def class_scores(state: LearnerState, features: jax.Array) -> jax.Array:
    """Scores [B, C] of the last prompted feature among slot features [B, S, D]."""
    feature = features[:, 1 + state.task]
    logits = linear_logits(feature, state.memory["rows"], state.memory["bias"])
    return mask_unseen(state, logits)


def query_slots(finish: tuple[int, ...] = ()) -> Slots:
    """Slots of the query and of the last prompted model; `finish`: read when a task ends."""
    return Slots(
        score=lambda task: (0, 1 + task),
        finish=lambda task: finish,
        loss=lambda task: (0,),
        frozen=0,
    )


def prompt_learner(
    name: str,
    *,
    init: Callable,
    begin: Callable,
    loss: Callable,
    inserts_of: Callable,
    feature: Callable = pooled_feature,
    **others: Any,
) -> Learner:
    """A `Learner` with the slots and the head of the module docstring.

    Args:
      inserts_of: (state, query [B, D]) -> `Inserts` of the model after the current task.
      feature: (state, inputs, inserts) -> [B, D].
      others: fields of `Learner` in which the method differs.
    """

    def extract(state, inputs, slot, features):
        return lax.cond(
            slot == 0,
            lambda: pooled_feature(state, inputs),
            lambda: feature(state, inputs, inserts_of(state, features[:, 0])),
        )

    shared = {
        "freeze": lambda state: state,
        "finish": finish_with_head,
        "extract": extract,
        "score": lambda state, features: (class_scores(state, features), None),
        "slots": query_slots(),
        "sums": Sums(
            empty=lambda config, num_slots, width: (),
            add=lambda state, sums, features, labels, mask: sums,
        ),
    }
    return Learner(name=name, init=init, begin=begin, loss=loss, **{**shared, **others})
