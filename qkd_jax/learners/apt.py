"""APT: one additive prompt for the class token in every block, trained on task after task.

Chen et al., "Achieving More with Less: Additive Prompt Tuning for Rehearsal-Free Class-Incremental
Learning", ICCV 2025, arXiv 2503.07979. In every block one vector is added to the class token's key
and one to its value: 2 L D numbers (18,432 for ViT-B/16), the same for all tasks, without a query
and without a choice. They and the rows of the task's classes are trained by cross-entropy over
those classes. When a task ends the prompt that inference uses moves towards the trained one,

    p <- (1 - m) p + m current        (first task: p = current),

while training goes on from the current one. Logits are standardize(feature) . row / |row|.

Published settings (the authors' scripts): Adam, no decay, batch 64, cosine; rate 0.004, 30 epochs
(CIFAR-100); 0.003, 30 epochs, m 0.2 (ImageNet-R); 0.02, 25 epochs (CUB); 0.005, 50 epochs (Cars);
m 0.3 except where said; ViT-B/16 tuned on ImageNet-1k, pixels in [0, 1].

As the authors' code, not as its text: the head's LayerNorm has parameters that no optimiser ever
gets, so it only standardises; the head's bias is never added; "dropout 0.01" is never applied; the
normal of deviation 0.02 is cut at 2 (100 deviations), so it is not cut. Differences: our cosine
falls with every step to 0, theirs with every epoch to a hundredth; the authors train on AutoAugment
and drop the last incomplete batch of each task's test images, we score every image.
"""

import jax
import jax.numpy as jnp

from qkd_jax.learners.base import Learner, class_columns, register
from qkd_jax.learners.task_adapters import mask_unseen
from qkd_jax.nn.heads import unit
from qkd_jax.nn.layers import AttentionInsert, standardize
from qkd_jax.nn.losses import cross_entropy
from qkd_jax.nn.vit import Inserts, encode
from qkd_jax.state import local_labels, valid_task_classes

PROMPT_DEVIATION = 0.02
HEAD_EPS = 1e-5


def new_rows(key, backbone, config):
    """Rows [M, D] ~ U(-1, 1) / sqrt(D). Their length sets how far one step turns them."""
    bound = backbone.spec.width**-0.5
    shape = (config.max_task_classes, backbone.spec.width)
    return jax.random.uniform(key, shape, minval=-bound, maxval=bound)


def init(key, backbone, config):
    spec = backbone.spec
    shape = (spec.depth, spec.width)
    key_prompt, key_head = jax.random.split(key)
    key_key, key_value = jax.random.split(key_prompt)
    prompt = {
        "key": PROMPT_DEVIATION * jax.random.normal(key_key, shape),
        "value": PROMPT_DEVIATION * jax.random.normal(key_value, shape),
    }
    trainable = {"prompt": prompt, "head": {"rows": new_rows(key_head, backbone, config)}}
    merged = jax.tree.map(jnp.zeros_like, prompt)
    return trainable, {"prompt": merged, "rows": jnp.zeros((config.num_classes, spec.width))}


def begin(state, key):
    head = {"rows": new_rows(key, state.backbone, state.config)}
    return {"prompt": state.trainable["prompt"], "head": head}, state.memory


def encode_added(state, prompt, images):
    """[B, D] feature with a prompt {"key", "value"}, each [L, D], on the class token."""
    inserts = tuple(
        AttentionInsert(class_key=key, class_value=value)
        for key, value in zip(prompt["key"], prompt["value"], strict=True)
    )
    feature = encode(
        state.backbone.params,
        state.backbone.spec,
        images,
        Inserts(attention=inserts),
        compute_dtype=jnp.dtype(state.config.backbone.compute_dtype),
    )
    return feature.astype(jnp.float32)


def logits_of(features, rows):
    return standardize(features, HEAD_EPS) @ unit(rows).T


def loss(trainable, state, images, batch, rows):
    features = encode_added(state, trainable["prompt"], images)
    logits = logits_of(features, trainable["head"]["rows"])
    labels, valid = local_labels(state, batch["label"]), valid_task_classes(state)
    ce = cross_entropy(logits, labels, valid)
    correct = jnp.argmax(jnp.where(valid, logits, -jnp.inf), axis=1) == labels
    return {"loss": ce, "loss_ce": ce, "train_accuracy": 100.0 * correct.astype(jnp.float32)}


def freeze(state):
    share = jnp.where(state.task == 0, 1.0, state.config.apt.merge)  # m
    prompt = jax.tree.map(
        lambda old, new: (1.0 - share) * old + share * new,
        state.memory["prompt"],
        state.trainable["prompt"],
    )
    return state.replace(memory={**state.memory, "prompt": prompt})


def finish(state, statistics, key):
    columns = class_columns(state)
    rows = state.memory["rows"].at[columns].set(state.trainable["head"]["rows"], mode="drop")
    return state.replace(memory={**state.memory, "rows": rows})


def extract(state, images, slot, features):
    return encode_added(state, state.memory["prompt"], images)


def score(state, features):
    return mask_unseen(state, logits_of(features[:, state.task], state.memory["rows"])), None


# Every task has a slot of its own, since the merged prompt changes with each.
LEARNER = register(
    Learner(
        name="apt",
        init=init,
        begin=begin,
        loss=loss,
        freeze=freeze,
        finish=finish,
        extract=extract,
        score=score,
        slots=lambda task: (task,),
        finish_slots=lambda task: (),
        first_block=lambda config: 0,
    )
)
