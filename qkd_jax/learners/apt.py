"""APT: one additive prompt for the class token in every block, trained on task after task.

Chen et al., "Achieving More with Less: Additive Prompt Tuning for Rehearsal-Free Class-Incremental
Learning", ICCV 2025, arXiv 2503.07979. In every block one vector is added to the class token's key
and one to its value: 2 L D numbers (18,432 for ViT-B/16), the same for all tasks, without a query
and without a choice. They and the rows of the task's classes are trained by cross-entropy over
those classes. When a task ends the prompt that inference uses moves towards the trained one,

    p <- (1 - m) p + m current        (first task: p = current),

while training continues from the current one. Logits are standardize(feature) . row / |row|.

Published settings (the authors' scripts): Adam, no decay, batch 64, the rate falling by epoch as
CODA-Prompt's (`train.schedule=quarter_cosine`); rate 0.004, 30 epochs
(CIFAR-100); 0.003, 30 epochs, m 0.2 (ImageNet-R); 0.02, 25 epochs (CUB); 0.005, 50 epochs (Cars);
m 0.3 except where said; ViT-B/16 tuned on ImageNet-1k, pixels in [0, 1].

Some things follow what the authors' code does rather than what it says: the head's LayerNorm has
parameters that no optimiser gets, so it only standardises; the head's bias is never added;
"dropout 0.01" is never applied; the normal distribution of deviation 0.02 is truncated at 2 (100
deviations), so effectively not at all.

Differences: the authors train with AutoAugment and drop the last incomplete batch of each task's
test images; we score every image.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from qkd_jax.learners.prompted import PromptHost, prompt_learner
from qkd_jax.learners.shape import register
from qkd_jax.learners.task_heads import new_linear_head
from qkd_jax.nn.heads import unit
from qkd_jax.nn.inserts import Inserts
from qkd_jax.nn.layers import AttentionInsert, standardize
from qkd_jax.settings.ranges import setting


@dataclass(frozen=True)
class AptSettings:
    """APT (arXiv 2503.07979): how far the prompt of inference moves when a task ends."""

    merge: float = setting(0.3, low=0, high=1)  # m: share of the newly trained prompt


PROMPT_DEVIATION = 0.02
HEAD_EPS = 1e-5


def new_head(key, backbone, config):
    """{"rows": [M, D]} of a new head. The longer a row, the less one step turns it."""
    return {"rows": new_linear_head(key, backbone, config)["rows"]}


def init(key, backbone, config):
    spec = backbone.spec
    key_key, key_value, key_head = jax.random.split(key, 3)
    shape = (spec.depth, spec.width)
    prompt = {
        "key": PROMPT_DEVIATION * jax.random.normal(key_key, shape),
        "value": PROMPT_DEVIATION * jax.random.normal(key_value, shape),
    }
    rows = jnp.zeros((config.shapes.num_classes, spec.width))
    memory = {"prompt": jax.tree.map(jnp.zeros_like, prompt), "rows": rows}
    return {"prompt": prompt, "head": new_head(key_head, backbone, config)}, memory


def begin(state, key):
    head = new_head(key, state.backbone, state.config)
    return {"prompt": state.trainable["prompt"], "head": head}, state.memory


def inserts(prompt):
    """A prompt {"key", "value"}, each [L, D], on the class token."""
    added = tuple(
        AttentionInsert(class_key=key, class_value=value)
        for key, value in zip(prompt["key"], prompt["value"], strict=True)
    )
    return Inserts(attention=added)


def logits(head, features):
    return standardize(features, HEAD_EPS) @ unit(head["rows"]).T


def freeze(state):
    share = jnp.where(state.task == 0, 1.0, state.config.apt.merge)  # m
    prompt = jax.tree.map(
        lambda old, new: (1.0 - share) * old + share * new,
        state.memory["prompt"],
        state.trainable["prompt"],
    )
    return state.replace(memory={**state.memory, "prompt": prompt})


HOST = PromptHost(
    name="apt",
    init=init,
    begin=begin,
    trained=lambda trainable, state, query, context: (inserts(trainable["prompt"]), {}),
    learned=lambda state, query: inserts(state.memory["prompt"]),
    new_head=new_head,
    logits=logits,
    has_query=False,
    freeze=freeze,
)
LEARNER = register(prompt_learner(HOST), apt=AptSettings)
