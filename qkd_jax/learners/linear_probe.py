"""Linear probe: a head on the frozen model's feature, trained task by task; a lower reference.

The feature cannot forget, since nothing under the head moves. What is lost is the comparison
between tasks: the head rows of each task are trained by cross-entropy over its own classes, and
frozen afterwards. `head.kind` says whether rows score by cosine or by dot product. The scale of the
cosine head is trained on from task to task: there is one scale for all classes.
"""

import jax.numpy as jnp

from qkd_jax.learners.prompted import query_of
from qkd_jax.learners.shape import Learner, Slots, register
from qkd_jax.learners.simplecil import extract
from qkd_jax.learners.task_heads import (
    HeadSettings,
    class_logits,
    finish_with_head,
    head_loss,
    mask_unseen,
    new_head,
    next_head,
)


def init(key, backbone, config):
    rows = jnp.zeros((config.shapes.num_classes, backbone.spec.width))
    return {"head": new_head(key, backbone, config)}, {"rows": rows}


def begin(state, key):
    return {"head": next_head(state, key)}, state.memory


def loss(trainable, state, inputs, batch, context):
    return head_loss(trainable["head"], state, query_of(state, inputs, batch), batch["label"])


def score(state, features):
    return mask_unseen(state, class_logits(state, features[:, 0])), None


# Slot 0 is the frozen model; training and scoring read the same features, computed once.
LEARNER = register(
    Learner(
        name="linear_probe",
        init=init,
        begin=begin,
        loss=loss,
        freeze=lambda state: state,
        finish=finish_with_head,
        extract=extract,
        score=score,
        slots=Slots(score=lambda task: (0,), loss=lambda task: (0,), frozen=0),
    ),
    head=HeadSettings,
)
