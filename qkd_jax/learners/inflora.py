"""InfLoRA: a low-rank branch per task that reads only directions which older tasks do not use.

Liang and Li, "InfLoRA: Interference-Free Low-Rank Adaptation for Continual Learning", CVPR 2024,
arXiv 2404.00228; the authors' code is liangyanshuo/InfLoRA. Keys and values of every block get a
low-rank branch for each task; all branches are added up. Before a task is trained, a pass over its
images gives the second moment M of every block's attention input under the current model. The new
branch's down-projection is fixed to the top singular vectors of (I - P) M / sqrt(3), where P
projects on the directions occupied by older tasks; only the up-projection (from zero) and the
linear head of the task are trained, by cross-entropy over the task's classes. A second pass after
training lets P grow (DualGPM) until its share of the squared moment is
lamb + (lame - lamb) * task / tasks. All heads score the one feature.

Published settings (json files of the code): Adam at 5e-4 without decay along a quarter of a cosine
by epoch, batch 128, rank 10, lame 1; CIFAR-100 Inc10 20 epochs, lamb 0.95; ImageNet-R Inc10, Inc20
and Inc40 50 epochs, lamb 0.98; both with `inflora.first_basis = "below"`.

Where this differs from the code:
- DualGPM stores P or, past half the width, its complement. Both forms give the same directions, so
  here P itself is stored. If the first basis takes more than half the width the code stops with an
  assertion, and at exactly half it confuses the basis with its complement; neither happens here.
- `first_basis`: GPM takes the fewest directions that reach the threshold (Saha et al., ICLR 2021,
  arXiv 2103.09762, Eq. 5). The code's first update takes one fewer, but at least one: "below".
- A direction without energy is zero instead of an arbitrary vector.
- The two passes see each image once, preprocessed as at test; the code's see random crops.
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from qkd_jax.errors import ConfigError
from qkd_jax.learners.features import pooled_feature
from qkd_jax.learners.shape import Learner, Slots, Survey, register
from qkd_jax.learners.task_heads import (
    class_terms,
    empty_linear_head,
    finish_with_head,
    mask_unseen,
    new_linear_head,
)
from qkd_jax.nn.heads import linear_logits
from qkd_jax.nn.lora import attention_moments, branch_inserts, free_directions, occupy
from qkd_jax.settings.ranges import Conflicts, setting


@dataclass(frozen=True)
class InfloraSettings:
    """InfLoRA (arXiv 2404.00228): the low-rank branches and the memory of directions.

    `first_basis`: how many directions the first task leaves in memory. `reach`: the fewest whose
    share of the energy reaches `lamb`. `below`: as the authors' code, one fewer, but at least one.
    """

    rank: int = setting(10, low=1)  # of a branch
    # Share of the energy in memory after the first task ...
    lamb: float = setting(0.95, low=0, high=1)
    lame: float = setting(1.0, low=0, high=1)  # ... rising towards this
    first_basis: Literal["reach", "below"] = "reach"

    def conflicts(self) -> Conflicts:
        if self.lamb > self.lame:
            yield "lamb", f"at most inflora.lame ({self.lame:g})"


# Length of the directions in a branch's down-projection.
DOWN_LENGTH = 3**-0.5


def new_branch(backbone, config):
    """{"key", "value"}: up-projections [L, R, D] of one task's branch, which start at zero."""
    shape = (backbone.spec.depth, config.inflora.rank, backbone.spec.width)
    return {"key": jnp.zeros(shape), "value": jnp.zeros(shape)}


def init(key, backbone, config):
    depth, width = backbone.spec.depth, backbone.spec.width
    rank, tasks = config.inflora.rank, config.shapes.max_tasks
    if rank > width:
        raise ConfigError(
            f"inflora.rank: expected at most the backbone's width {width}, found {rank}"
        )
    up = new_branch(backbone, config)
    memory = {
        "down": jnp.zeros((depth, width, tasks, rank)),
        "up": jax.tree.map(lambda a: jnp.stack([a] * tasks, axis=1), up),
        "occupied": jnp.zeros((depth, width, width)),  # P of every block
        **empty_linear_head(backbone, config),
    }
    return {"up": up, "head": new_linear_head(key, backbone, config)}, memory


def begin(state, key):
    head = new_linear_head(key, state.backbone, state.config)
    return {"up": new_branch(state.backbone, state.config), "head": head}, state.memory


def stored_branch(state, up):
    """`memory["up"]` with the branch of the current task replaced by `up`."""
    return jax.tree.map(lambda all_, one: all_.at[:, state.task].set(one), state.memory["up"], up)


def add_moments(state, inputs, labels, mask):
    """Sums over images from which M of every block follows, under the branches in memory."""
    backbone, dtype = state.backbone, jnp.dtype(state.config.backbone.compute_dtype)
    inserts = branch_inserts(state.memory["down"], state.memory["up"])
    moments, tokens = attention_moments(backbone, inputs, mask, inserts, dtype)
    return {"moments": moments, "tokens": tokens}


def moments_of(sums):
    """M = mean of x x^T over all tokens: [L, D, D]."""
    return sums["moments"] / jnp.maximum(sums["tokens"], 1.0)


def new_directions(state, sums, key):
    rank, occupied = state.config.inflora.rank, state.memory["occupied"]
    free = jax.vmap(lambda m, p: free_directions(m, p, rank))(moments_of(sums), occupied)
    down = state.memory["down"].at[:, :, state.task].set(DOWN_LENGTH * free)
    return state.replace(memory={**state.memory, "down": down})


def loss(trainable, state, inputs, batch, context):
    inserts = branch_inserts(state.memory["down"], stored_branch(state, trainable["up"]))
    features = pooled_feature(state, inputs, inserts)
    head = trainable["head"]
    return class_terms(state, linear_logits(features, head["rows"], head["bias"]), batch["label"])


def freeze(state):
    up = stored_branch(state, state.trainable["up"])
    return state.replace(memory={**state.memory, "up": up})


def occupied_directions(state, sums):
    settings = state.config.inflora
    progress = state.task.astype(jnp.float32) / state.config.shapes.max_tasks
    threshold = settings.lamb + (settings.lame - settings.lamb) * progress
    below = (state.task == 0) & (settings.first_basis == "below")
    occupied = jax.vmap(lambda m, p: occupy(m, p, threshold, below))(
        moments_of(sums), state.memory["occupied"]
    )
    return state.replace(memory={**state.memory, "occupied": occupied})


def extract(state, inputs, slot, features):
    inserts = branch_inserts(state.memory["down"], state.memory["up"])
    return pooled_feature(state, inputs, inserts)


def score(state, features):
    feature = features[:, state.task]
    logits = linear_logits(feature, state.memory["rows"], state.memory["bias"])
    return mask_unseen(state, logits), None


# Each task has a slot of its own, since every branch changes the one feature.
LEARNER = register(
    Learner(
        name="inflora",
        init=init,
        begin=begin,
        loss=loss,
        freeze=freeze,
        finish=finish_with_head,
        extract=extract,
        score=score,
        slots=Slots(score=lambda task: (task,), finish=lambda task: ()),
        survey=Survey(add=add_moments, before=new_directions, after=occupied_directions),
    ),
    inflora=InfloraSettings,
)
