"""APER (ADAM): class means of features of the frozen model and an adapter of the first task.

Zhou et al., "Revisiting Class-Incremental Learning with Pre-Trained Models: Generalizability and
Adaptivity are All You Need", IJCV 2024, arXiv 2303.07338; the variant with adapters. The adapter
and a cosine head are trained by cross-entropy on the first task's classes; then the adapter is
frozen for good and the head is thrown away. The feature of an image is the concatenation
[frozen, adapted] of 2D numbers; a class scores by the cosine to the mean feature of its images.

Published (LAMDA-PILOT): SGD 0.9, cosine to 0, learnable scale from 1, bottleneck 64, adapter
scale 0.1, dropout 0.1; CIFAR-100 20 epochs, rate 0.01, batch 48, weight decay 5e-4; ImageNet-R 10
epochs, rate 0.05, batch 16, weight decay 5e-3.

The reference's head keeps a learnable scale after training. A positive factor on all cosines
changes no prediction, so scores here are plain cosines.
"""

import jax
import jax.numpy as jnp

from qkd_jax.learners.finetune import loss
from qkd_jax.learners.shape import Learner, Slots, class_columns, register
from qkd_jax.learners.task_adapters import encode_with, first_adapter_block, new_tuned
from qkd_jax.learners.task_heads import HeadSettings, mask_unseen
from qkd_jax.nn.adapters import AdapterSpec
from qkd_jax.nn.heads import class_means, head_logits

FROZEN, TUNED = 0, 1  # slots


def init(key, backbone, config):
    trainable = new_tuned(key, backbone, config)
    rows = jnp.zeros((config.shapes.num_classes, 2 * backbone.spec.width))
    return trainable, {"adapter": jax.tree.map(jnp.zeros_like, trainable["adapter"]), "rows": rows}


def begin(state, key):
    return state.trainable, state.memory


def freeze(state):
    """The adapter of the first task fills its slot; later tasks leave the slot alone."""
    adapter = jax.tree.map(
        lambda tuned, kept: jnp.where(state.task == 0, tuned, kept),
        state.trainable["adapter"],
        state.memory["adapter"],
    )
    return state.replace(memory={**state.memory, "adapter": adapter})


def finish(state, statistics, key):
    frozen, tuned = class_means(statistics)
    means = jnp.concatenate([frozen, tuned], axis=1)
    rows = state.memory["rows"].at[class_columns(state)].set(means, mode="drop")
    return state.replace(memory={**state.memory, "rows": rows})


def extract(state, inputs, slot, features):
    """The feature under the slot's adapter; zeros stand for the frozen model."""
    adapter = jax.tree.map(lambda a: jnp.where(slot == FROZEN, 0.0, a), state.memory["adapter"])
    return encode_with(state, adapter, inputs)


def score(state, features):
    joined = features.reshape(len(features), -1)
    logits = head_logits(joined, state.memory["rows"], jnp.float32(1.0), "cosine")
    return mask_unseen(state, logits), None


LEARNER = register(
    Learner(
        name="aper",
        init=init,
        begin=begin,
        loss=loss,
        freeze=freeze,
        finish=finish,
        extract=extract,
        score=score,
        slots=Slots(score=lambda task: (FROZEN, TUNED), frozen=FROZEN),
        first_block=first_adapter_block,
        trains=lambda config, task: task == 0,
    ),
    adapter=AdapterSpec,
    head=HeadSettings,
)
