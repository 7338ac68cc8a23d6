"""Finetune: one adapter and one head, trained on task after task; the lower reference.

The adapter goes on from where the last task left it. The rows of old classes stay, but the feature
under them moves. Cross-entropy over the current task's classes only, as for every method here.
"""

import jax
import jax.numpy as jnp

from qkd_jax.learners.base import Learner, class_columns, register
from qkd_jax.learners.task_adapters import encode_with, mask_unseen, new_adapter, new_head
from qkd_jax.nn.heads import head_logits
from qkd_jax.nn.losses import cross_entropy
from qkd_jax.state import local_labels, valid_task_classes


def init(key, backbone, config):
    trainable = {
        "adapter": new_adapter(jax.random.fold_in(key, 0), backbone, config),
        "head": new_head(jax.random.fold_in(key, 1), backbone, config),
    }
    rows = jnp.zeros((config.num_classes, backbone.spec.width))
    return trainable, {"rows": rows}


def begin(state, key):
    trainable = {"adapter": state.trainable["adapter"], "head": next_head(state, key)}
    return trainable, state.memory


def next_head(state, key):
    """New rows for the classes of the task that starts; the scale goes on."""
    head = new_head(key, state.backbone, state.config)
    scale = jnp.where(state.task == 0, head["scale"], state.trainable["head"]["scale"])
    return {**head, "scale": scale}


def loss(trainable, state, images, batch, rows):
    features = encode_with(state, trainable["adapter"], images, rows.keys)
    return head_loss(trainable["head"], state, features, batch)


def head_loss(head, state, features, batch):
    """Cross-entropy of features [B, D] over the classes of the current task."""
    kind = state.config.head.kind
    logits = head_logits(features, head["rows"], head["scale"], kind)
    labels = local_labels(state, batch["label"])
    ce = cross_entropy(logits, labels, valid_task_classes(state))
    correct = jnp.argmax(jnp.where(valid_task_classes(state), logits, -jnp.inf), axis=1) == labels
    return {"loss": ce, "loss_ce": ce, "train_accuracy": 100.0 * correct.astype(jnp.float32)}


def freeze(state):
    return state


def finish(state, statistics, key):
    columns = class_columns(state)
    rows = state.memory["rows"].at[columns].set(state.trainable["head"]["rows"], mode="drop")
    return state.replace(memory={"rows": rows})


def extract(state, images, slot, features):
    return encode_with(state, state.trainable["adapter"], images)


def score(state, features):
    return mask_unseen(state, class_logits(state, features[:, state.task])), None


def class_logits(state, feature):
    """[B, C] of features [B, D] on the stored rows of all classes."""
    scale, kind = state.trainable["head"]["scale"], state.config.head.kind
    return head_logits(feature, state.memory["rows"], scale, kind)


# Every task has a slot of its own, since the one adapter changes with each.
LEARNER = register(
    Learner(
        name="finetune",
        init=init,
        begin=begin,
        loss=loss,
        freeze=freeze,
        finish=finish,
        extract=extract,
        score=score,
        slots=lambda task: (task,),
    )
)
