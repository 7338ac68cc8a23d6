"""SimpleCIL: the cosine to class means of the frozen model's features; nothing is trained.

Zhou et al., "Revisiting Class-Incremental Learning with Pre-Trained Models", arXiv 2303.07338. Its
last accuracy does not depend on the class order, so it tests weights, preprocessing and split.

With `classifier.kind=whitened` they are compared in the metric of the covariance within classes, as
in QKD's head: this is the part of QKD that needs no adapter.
"""

import jax.numpy as jnp

from qkd_jax.learners.features import pooled_feature
from qkd_jax.learners.shape import Learner, Slots, class_columns, register
from qkd_jax.learners.task_heads import mask_unseen
from qkd_jax.nn.heads import class_means, head_logits


def init(key, backbone, config):
    return {}, {"rows": jnp.zeros((config.shapes.num_classes, backbone.spec.width))}


def finish(state, statistics, key):
    means = class_means(statistics)[0]
    rows = state.memory["rows"].at[class_columns(state)].set(means, mode="drop")
    return state.replace(memory={"rows": rows})


def extract(state, inputs, slot, features):
    return pooled_feature(state, inputs)


def score(state, features):
    feature, rows = features[:, 0], state.memory["rows"]
    return mask_unseen(state, head_logits(feature, rows, jnp.float32(1.0), "cosine")), None


LEARNER = register(
    Learner(
        name="simplecil",
        init=init,
        begin=lambda state, key: ({}, state.memory),
        loss=None,
        freeze=lambda state: state,
        finish=finish,
        extract=extract,
        score=score,
        slots=Slots(score=lambda task: (0,), frozen=0),
    )
)
