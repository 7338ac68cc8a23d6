"""Fusion: which adapters an image needs, and how their logits become one prediction.

Relevance alpha [B, T] comes from the feature under the first task's adapter. Three ways to use it
(`fusion.kind`):

    logits     z = sum_i alpha_i z^(i): a pass of every learned adapter (arXiv 2604.11112)
    block_mix  adapters mixed by alpha in every block: one more pass, however many tasks
    routed     the logits of the k most relevant adapters of each image, alpha renormalised over
               them: k more passes, however many tasks

With `fusion.frozen_weight` the frozen model has a part in the answer too (`qkd.frozen`): one more
pass.
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from qkd_jax.learners.qkd import frozen, gate, measurement
from qkd_jax.learners.task_adapters import adapter_of, chosen_adapters, encode_with
from qkd_jax.learners.task_heads import mask_unseen
from qkd_jax.nn.adapters import mixed_adapter
from qkd_jax.nn.heads import head_logits
from qkd_jax.nn.whitening import whiten
from qkd_jax.settings.ranges import setting


@dataclass(frozen=True)
class FusionSettings:
    """How relevance combines adapters at test (see `learners.qkd.fusion`)."""

    kind: Literal["logits", "block_mix", "routed"] = "logits"
    top_k: int = setting(2, low=1)
    # The frozen model's part in the answer, beside that of the adapters.
    frozen_weight: float = setting(0.25, low=0, high=1, zero="none, and no pass of it")


def gate_inputs(state, vectors):
    """`vectors`, features of slot 0, as the gate reads them."""
    return whiten(metric_of(state, 0), vectors) if state.config.gate.whiten else vectors


def metric_of(state, slot):
    """The metric in which features of a slot are compared (slot 0's if there is only one)."""
    metrics = state.memory["metrics"]
    last = metrics.centre.shape[0] - 1
    return jax.tree.map(lambda a: a[jnp.minimum(slot, last)], metrics)


def anchors(state):
    """(vectors [A, D], owner [A]): the gate's anchors and their tasks."""
    if state.config.gate.states == "class":
        return gate_inputs(state, state.memory["class_means"]), state.task_of_class
    return state.memory["task_states"], jnp.arange(state.config.shapes.max_tasks)


def route(state, gate_params, query, open_tasks):
    """`gate.Relevance` of the open tasks for images with features `query` [B, D] of slot 0."""
    query, settings = gate_inputs(state, query), state.config.gate
    if settings.kind == "measurement":
        root = state.memory["measurement"]
        return measurement.relevance(root, settings, query, *anchors(state), open_tasks)
    vectors, owner = gate.anchor_states(gate_params, *anchors(state))
    return gate.relevance(gate_params, settings, query, vectors, owner, open_tasks)


def logits_in(state, slot, features):
    """z^(slot) [B, C] of features [B, D] of a slot, with the head rows and metric of that slot."""
    config, rows = state.config, state.memory["rows"]
    if config.head.whiten:
        rows = state.memory["whitened_rows"]
        features = whiten(metric_of(state, slot), features)
    rows = rows[jnp.minimum(slot, len(rows) - 1)]
    return head_logits(features, rows, state.trainable["head"]["scale"], config.head.kind)


def learned(state):
    """bool [T]: the tasks that have been learned."""
    return jnp.arange(state.config.shapes.max_tasks) <= state.task


def score(state, features):
    """z = sum_i alpha_i z^(i) over the learned tasks, from features [B, S, D]."""
    relevance = route(state, state.trainable["gate"], features[:, 0], learned(state)).weights
    return fused_scores(state, features, relevance), relevance


def score_with_task(state, features, tasks):
    """As `score`, with alpha 1 for the given task of each image."""
    return fused_scores(state, features, _all_for(state, tasks))


def fused_scores(state, features, relevance):
    """Scores [B, C] of features [B, S, D] with alpha [B, T]."""
    fused = jnp.einsum("bt,btc->bc", relevance, logits_in_all(state, features))
    if frozen.is_read(state.config):
        fused = frozen.joined(state, fused, features[:, frozen.slot_of(state.config)])
    return mask_unseen(state, fused)


def logits_in_all(state, features):
    """z^(i) [B, T, C] of features [B, S, D] in the slots of all adapters."""
    tasks = jnp.arange(state.config.shapes.max_tasks)
    of_slot = jax.vmap(lambda slot, f: logits_in(state, slot, f), in_axes=(0, 1), out_axes=1)
    return of_slot(tasks, features[:, : len(tasks)])


def predict(state, inputs):
    """(scores [B, C], alpha [B, T]) of inputs, for the kinds whose passes depend on alpha."""
    query = encode_with(state, adapter_of(state, 0), inputs)
    relevance = route(state, state.trainable["gate"], query, learned(state)).weights
    return answer(state, inputs, relevance), relevance


def predict_with_task(state, inputs, tasks):
    """As `predict`, with alpha 1 for the given task of each image."""
    return answer(state, inputs, _all_for(state, tasks))


def answer(state, inputs, relevance):
    """Scores [B, C] of inputs with alpha [B, T]."""
    logits = {"block_mix": mixed_logits, "routed": routed_logits}[state.config.fusion.kind]
    fused = logits(state, inputs, relevance)
    if frozen.is_read(state.config):
        fused = frozen.joined(state, fused, encode_with(state, None, inputs))
    return mask_unseen(state, fused)


def _all_for(state, tasks):
    """alpha [B, T]: 1 for `tasks` int [B]."""
    return jax.nn.one_hot(tasks, state.config.shapes.max_tasks)


def passes(config):
    """The passes of an image in `predict`: one for alpha, those that alpha asks for, and that of
    the frozen model.
    """
    mixed = config.fusion.kind == "block_mix"
    adapted = 2 if mixed else 1 + min(config.fusion.top_k, config.shapes.max_tasks)
    return adapted + frozen.is_read(config)


def most_relevant(weights, count):
    """(alpha renormalised [B, k], tasks int [B, k]) of the k = min(count, T) largest alpha of each
    image; all zero where no task is open.
    """
    largest, tasks = lax.top_k(weights, min(count, weights.shape[1]))
    total = jnp.sum(largest, axis=1, keepdims=True)
    return largest / jnp.where(total > 0, total, 1.0), tasks


def routed_logits(state, inputs, weights):
    """[B, C]: sum of alpha_i z^(i) over the k most relevant tasks of each image."""
    shares, chosen = most_relevant(weights, state.config.fusion.top_k)

    def one(total, choice):
        share, slots = choice  # [B], [B]
        feature = encode_with(state, chosen_adapters(state, slots), inputs)
        logits = own_logits(state, slots, feature)
        return total + share[:, None] * logits, None

    nothing = jnp.zeros((len(weights), state.config.shapes.num_classes))
    return lax.scan(one, nothing, (shares.T, chosen.T))[0]


def own_logits(state, slots, features):
    """Logits [B, C] of features [B, D], each in its own slot, slots int [B]."""
    if len(state.memory["rows"]) == 1:  # all slots have the same rows
        return logits_in(state, 0, features)
    if len(slots) < state.config.shapes.max_tasks:  # reads only the head rows that are needed
        return jax.vmap(lambda slot, f: logits_in(state, slot, f[None])[0])(slots, features)

    def keep(slot, logits):
        mine = (slots == slot)[:, None]
        return jnp.where(mine, logits_in(state, slot, features), logits)

    nothing = jnp.zeros((len(slots), state.config.shapes.num_classes))
    return lax.fori_loop(0, state.task + 1, keep, nothing)


def mixed_logits(state, inputs, weights):
    """Logits [B, C] of the feature under adapters mixed by alpha in every block."""
    adapter, factors = mixed_adapter(state.memory["adapters"], weights)
    feature = encode_with(state, adapter, inputs, hidden_factors=factors)
    # A mixed feature belongs to no slot, so every class has the row of its own task's slot.
    rows = state.memory["rows"]
    own = jnp.minimum(jnp.maximum(state.task_of_class, 0), len(rows) - 1)
    rows = rows[own, jnp.arange(rows.shape[1])]
    if state.config.head.whiten:
        metric = metric_of(state, 0)
        feature, rows = whiten(metric, feature), whiten(metric, rows)
    scale = state.trainable["head"]["scale"]
    return head_logits(feature, rows, scale, state.config.head.kind)
