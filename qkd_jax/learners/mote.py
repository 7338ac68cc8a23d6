"""MoTE: an adapter per task as an expert, experts filtered by their predictions, features fused.

Li, Wu and Ji, "MoTE: Mixture of Task-specific Experts for Pre-Trained Model-Based Class-incremental
Learning", arXiv 2506.11038; by the first author of QKD. Each adapter is trained by cross-entropy on
its own task. Every class has one row: its mean under the adapter of its own task. At test each
expert i compares its feature f_i with the rows of all classes seen,

    p_i = softmax(10 cos(f_i, row)),  y_i = argmax p_i,  c_i = max p_i.

Experts whose y_i is a class of their own task are kept; if there is none, the most confident of
all. The kept experts have weights w = softmax(c_best, 0.1 c_others), and the image
scores cos(sum_i w_i f_i, row[c]).

Published settings: adapters `sequential` with bottleneck 64 (VTAB 16), head.scale 1, SGD with
weight decay on everything; CIFAR-100 rate 0.025, batch 48; CUB 0.01, 32; ImageNet-R 0.05, 16 and
weight decay 0.005; ImageNet-A 0.1, 32, 0.005; VTAB 0.1, 16, 0.005, 45 epochs; 20 epochs elsewhere.

Six of the fusions in the authors' repository are settings here. The default filters experts, as in
the abstract and in the authors' variant with few adapters (`vote_re`); their main forward pass does
not (`mote.filter=false`). Features are fused and not tokens, so no joint pass is needed. The
variant with few adapters, which stops adding them, is left out.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from qkd_jax.learners.ease import begin, extract, freeze
from qkd_jax.learners.finetune import loss
from qkd_jax.learners.shape import Learner, Slots, class_columns, register
from qkd_jax.learners.state import seen_classes
from qkd_jax.learners.task_adapters import (
    empty_adapters,
    first_adapter_block,
    new_tuned,
    store_rows,
)
from qkd_jax.learners.task_heads import HeadSettings, mask_unseen
from qkd_jax.nn.adapters import AdapterSpec
from qkd_jax.nn.heads import class_means, head_logits
from qkd_jax.nn.losses import MASKED
from qkd_jax.settings.ranges import setting


@dataclass(frozen=True)
class MoteSettings:
    """MoTE (arXiv 2506.11038): which experts score an image, and with which weight."""

    filter: bool = True  # keep experts that predict a class of their own task
    merge: bool = True  # fuse the features of the kept experts; false = the most confident one's
    # Factor on the confidence of all kept experts but the best; 1 = none.
    others: float = setting(0.1, low=0, high=1)
    sharpness: float = setting(10.0, above=0)  # of the cosines in an expert's confidence


def init(key, backbone, config):
    rows = jnp.zeros((1, config.shapes.num_classes, backbone.spec.width))
    memory = {"adapters": empty_adapters(backbone, config), "rows": rows}
    return new_tuned(key, backbone, config), memory


def finish(state, statistics, key):
    means = class_means(statistics)[state.task]
    rows = store_rows(state.memory["rows"], class_columns(state), means)
    return state.replace(memory={**state.memory, "rows": rows})


def expert_weights(state, features):
    """w [B, T]: the weights of experts, from features [B, T, D]; they sum to 1 for each image."""
    settings, experts = state.config.mote, jnp.arange(features.shape[1])
    logits = head_logits(features, state.memory["rows"][0], settings.sharpness, "cosine")
    logits = jnp.where(seen_classes(state), logits, MASKED)
    confidence = jnp.max(jax.nn.softmax(logits), axis=-1)
    learned = jnp.broadcast_to(experts <= state.task, confidence.shape)
    kept = learned
    if settings.filter:
        at_home = state.task_of_class[jnp.argmax(logits, axis=-1)] == experts[None, :]
        alone = _most_confident(confidence, learned)
        kept = learned & at_home
        kept = jnp.where(jnp.any(kept, axis=1, keepdims=True), kept, alone)
    best = _most_confident(confidence, kept)
    if not settings.merge:
        return best.astype(confidence.dtype)
    heard = jnp.where(best, confidence, settings.others * confidence)
    return jax.nn.softmax(jnp.where(kept, heard, MASKED))


def _most_confident(confidence, among):
    """bool [B, T]: the most confident expert `among` some, the first of equals."""
    chosen = jnp.argmax(jnp.where(among, confidence, -1.0), axis=1)
    return jnp.arange(confidence.shape[1])[None, :] == chosen[:, None]


def fused_scores(state, features, weights):
    """Scores [B, C] of the features [B, T, D] fused with weights [B, T]."""
    fused = jnp.einsum("bt,btd->bd", weights, features)
    return mask_unseen(state, head_logits(fused, state.memory["rows"][0], 1.0, "cosine"))


def score(state, features):
    weights = expert_weights(state, features)
    return fused_scores(state, features, weights), weights


def score_with_task(state, features, tasks):
    """The expert of the given task alone."""
    return fused_scores(state, features, jax.nn.one_hot(tasks, features.shape[1]))


LEARNER = register(
    Learner(
        name="mote",
        init=init,
        begin=begin,
        loss=loss,
        freeze=freeze,
        finish=finish,
        extract=extract,
        score=score,
        score_with_task=score_with_task,
        slots=Slots(score=lambda task: range(task + 1), finish=lambda task: (task,)),
        first_block=first_adapter_block,
    ),
    adapter=AdapterSpec,
    head=HeadSettings,
    mote=MoteSettings,
)
