"""Methods with prompts in a frozen transformer, as data, and the learner that they make.

A `PromptHost` says what a method inserts and how it reads the result; `prompt_learner` makes a
`Learner` of it, and `cdl.student` a student that a teacher trains as well.

Where prompts are chosen by a query, slot 0 is the frozen model's feature q(x): it never changes, so
it is computed once for each image. The slots after it, one for each task, are the prompted model
after that task, since the model changes with every task; `score` reads the last. The head has rows
for the classes of the task; cross-entropy sees no other class, and `memory["rows"]` [C, D] and
`memory["bias"]` [C] keep them when the task ends.

The query may come from another transformer than the prompted one (`LearnerState.query`), so keys
have its width. Slot features have the width of the wider one (`shape.feature_width`).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from qkd_jax.learners.features import added_feature, pooled_feature
from qkd_jax.learners.shape import NO_SUMS, Learner, Slots, Sums, feature_width
from qkd_jax.learners.state import LearnerState
from qkd_jax.learners.task_heads import class_terms, finish_with_head, mask_unseen, with_term
from qkd_jax.nn.backbone import Backbone
from qkd_jax.nn.heads import linear_logits
from qkd_jax.nn.inputs import Raw
from qkd_jax.nn.inserts import Inserts
from qkd_jax.settings.config import Config


class PromptHost(NamedTuple):
    """A method with prompts, as its parts.

    Attributes:
      name: as in `config.method`.
      init: (key, backbone, config) -> (trainable, memory), arrays in their final shapes.
      begin: (state, key) -> (trainable, memory) for the task that starts.
      trained: (trainable, state, query [B, Q], Context) -> (`Inserts` of a training step,
        {name: (weight, term)} that it adds to the loss).
      learned: (state, query [B, Q]) -> `Inserts` of the model after the current task.
      new_head: (key, backbone, config) -> the head of a task's classes, {"rows" [M, D], ...}.
      logits: (head, features [B, D]) -> [B, M], or [B, C] of a memory with all rows.
      reads_added: config -> whether the feature is the mean output of the inserted tokens, and not
        the pooled one.
      prefix_blocks: config -> how many of the first blocks get prefixes.
      has_query: False where prompts are not chosen by a query; `trained` and `learned` get None.
      freeze, finish, sums: as of `Learner`.
      at_end: the slots that `sums` reads.
      relevance: (state, query [B, Q]) -> [B, T]; None = there is none.
      learned_with_task: (state, tasks int [B]) -> `Inserts` as of `learned`, if prompts were chosen
        by the task of each input; None where no task's prompts are chosen.
    """

    name: str
    init: Callable
    begin: Callable
    trained: Callable
    learned: Callable
    new_head: Callable
    logits: Callable = lambda head, features: linear_logits(features, head["rows"], head["bias"])
    reads_added: Callable = lambda config: False
    prefix_blocks: Callable = lambda config: 0
    has_query: bool = True
    freeze: Callable = lambda state: state
    finish: Callable = finish_with_head
    sums: Sums = NO_SUMS
    at_end: tuple[int, ...] = ()
    relevance: Callable | None = None
    learned_with_task: Callable | None = None

    @property
    def first_slot(self) -> int:
        """The slot of the model after the first task."""
        return int(self.has_query)


def query_width(config: Config, backbone: Backbone) -> int:
    """Q, the width of queries and keys."""
    return config.shapes.query_width or backbone.spec.width


def frozen_query(state: LearnerState, inputs: Raw) -> jax.Array:
    """[B, Q]: the query, the feature of the frozen model."""
    return lax.stop_gradient(pooled_feature(state, inputs, backbone=state.query))


def known_query(state: LearnerState, features: jax.Array) -> jax.Array:
    """[B, Q]: the query among slot features [B, S, W]."""
    return features[:, 0, : state.query.spec.width]


def query_of(state: LearnerState, inputs: Raw, batch: dict) -> jax.Array:
    """[B, Q]: the query of training inputs, taken from the batch if it is cached there."""
    if "features" in batch:
        return lax.stop_gradient(known_query(state, batch["features"]))
    return frozen_query(state, inputs)


def widened(vectors: jax.Array, width: int) -> jax.Array:
    """[B, W]: vectors [B, D] followed by zeros."""
    return jnp.pad(vectors, ((0, 0), (0, width - vectors.shape[1])))


def feature_of(host: PromptHost, state: LearnerState, inputs: Raw, inserts: Inserts) -> jax.Array:
    """[B, D]: the feature of the prompted model."""
    read = added_feature if host.reads_added(state.config) else pooled_feature
    return read(state, inputs, inserts)


def with_terms(terms: dict, extra: dict[str, tuple[Any, jax.Array]]) -> dict:
    """`terms` with those that a host's prompts add to the loss."""
    for name, (weight, term) in extra.items():
        terms = with_term(terms, name, weight, term)
    return terms


def prompt_slots(host: PromptHost) -> Slots:
    """The slot of the query, where there is one, and one for each task."""
    query = (0,) if host.has_query else ()
    return Slots(
        score=lambda task: (*query, host.first_slot + task),
        finish=lambda task: host.at_end,
        loss=lambda task: query,
        frozen=0 if host.has_query else None,
    )


def prompt_learner(host: PromptHost) -> Learner:
    """The `Learner` of a host, by itself."""

    def loss(trainable, state, inputs, batch, context):
        query = query_of(state, inputs, batch) if host.has_query else None
        inserts, extra = host.trained(trainable, state, query, context)
        features = feature_of(host, state, inputs, inserts)
        logits = host.logits(trainable["head"], features)
        return with_terms(class_terms(state, logits, batch["label"]), extra)

    def prompted(state, inputs, query):
        return feature_of(host, state, inputs, host.learned(state, query))

    def score(state, features):
        width = state.backbone.spec.width
        feature = features[:, host.first_slot + state.task, :width]
        return mask_unseen(state, host.logits(state.memory, feature)), relevance(
            host, state, features
        )

    def predict_with_task(state, inputs, tasks):
        feature = feature_of(host, state, inputs, host.learned_with_task(state, tasks))
        return mask_unseen(state, host.logits(state.memory, feature))

    return Learner(
        name=host.name,
        init=host.init,
        begin=host.begin,
        loss=loss,
        freeze=host.freeze,
        finish=host.finish,
        extract=extract_with(host, prompted),
        score=score,
        predict_with_task=lambda config: host.learned_with_task and predict_with_task,
        slots=prompt_slots(host),
        sums=host.sums,
    )


def relevance(host: PromptHost, state: LearnerState, features: jax.Array) -> jax.Array | None:
    """[B, T] from slot features [B, S, W]; None where the host has none."""
    return host.relevance and host.relevance(state, known_query(state, features))


def extract_with(host: PromptHost, prompted: Callable) -> Callable:
    """`Learner.extract`, from (state, inputs, query) -> the features of the prompted model."""

    def extract(state, inputs, slot, features):
        width = feature_width(state)
        if not host.has_query:
            return widened(prompted(state, inputs, None), width)
        return lax.cond(
            slot == 0,
            lambda: widened(frozen_query(state, inputs), width),
            lambda: widened(prompted(state, inputs, known_query(state, features)), width),
        )

    return extract
