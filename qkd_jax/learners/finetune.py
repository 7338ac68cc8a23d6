"""Finetune: one adapter and one head, trained on task after task; the lower reference.

The adapter continues from where the last task left it. The head rows of old classes stay, but
their features move. Cross-entropy is over the current task's classes, as in every method here.
"""

import jax.numpy as jnp

from qkd_jax.learners.shape import Learner, Slots, register
from qkd_jax.learners.task_adapters import encode_with, first_adapter_block, new_tuned
from qkd_jax.learners.task_heads import (
    HeadSettings,
    class_logits,
    finish_with_head,
    head_loss,
    mask_unseen,
    next_head,
)
from qkd_jax.nn.adapters import AdapterSpec


def init(key, backbone, config):
    rows = jnp.zeros((config.shapes.num_classes, backbone.spec.width))
    return new_tuned(key, backbone, config), {"rows": rows}


def begin(state, key):
    trainable = {"adapter": state.trainable["adapter"], "head": next_head(state, key)}
    return trainable, state.memory


def loss(trainable, state, inputs, batch, context):
    features = encode_with(state, trainable["adapter"], inputs, context.keys)
    return head_loss(trainable["head"], state, features, batch["label"])


def freeze(state):
    return state


def extract(state, inputs, slot, features):
    return encode_with(state, state.trainable["adapter"], inputs)


def score(state, features):
    return mask_unseen(state, class_logits(state, features[:, state.task])), None


# Each task has a slot of its own, since the one adapter changes with every task.
LEARNER = register(
    Learner(
        name="finetune",
        init=init,
        begin=begin,
        loss=loss,
        freeze=freeze,
        finish=finish_with_head,
        extract=extract,
        score=score,
        slots=Slots(score=lambda task: (task,)),
        first_block=first_adapter_block,
    ),
    adapter=AdapterSpec,
    head=HeadSettings,
)
