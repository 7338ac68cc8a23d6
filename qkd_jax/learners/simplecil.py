"""SimpleCIL: class means of the frozen model's feature and the cosine to them; nothing is trained.

Zhou et al., "Revisiting Class-Incremental Learning with Pre-Trained Models", arXiv 2303.07338. Its
last accuracy needs no class order, so it checks weights, preprocessing and split at once.
"""

import jax.numpy as jnp

from qkd_jax.learners.base import Learner, class_columns, register
from qkd_jax.learners.task_adapters import encode_with, mask_unseen
from qkd_jax.nn.heads import class_means, head_logits


def init(key, backbone, config):
    return {}, {"rows": jnp.zeros((config.num_classes, backbone.spec.width))}


def finish(state, statistics, key):
    means = class_means(statistics)[0]
    rows = state.memory["rows"].at[class_columns(state)].set(means, mode="drop")
    return state.replace(memory={"rows": rows})


def extract(state, images, slot, features):
    return encode_with(state, None, images)


def score(state, features):
    logits = head_logits(features[:, 0], state.memory["rows"], jnp.float32(1.0), "cosine")
    return mask_unseen(state, logits), None


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
        slots=lambda task: (0,),
    )
)
