"""EASE: an adapter per task, and class means in the subspace of every adapter.

Zhou et al., "Expandable Subspace Ensemble for Pre-Trained Model-Based Class-Incremental Learning",
CVPR 2024, arXiv 2403.12030. Each adapter is trained by cross-entropy on its own task. A class c of
task i scores cos(f_i, row[i, c]) + alpha / t * sum over the other subspaces j of cos(f_j, row[j,
c]), t = index of the last task. Rows of old classes in new subspaces are estimated from their
similarity to the new classes (`complemented`).

Published settings (sun-hailong/CVPR24-Ease, json files): bottleneck 64 (VTAB 16), head.scale 1, SGD
with momentum 0.9 and weight decay on everything, alpha 0.1 (CUB 0.05), old rows recomputed after
every task (`recalc_sim`); CIFAR-100 rate 0.025, batch 48; CUB 0.008, 32; ImageNet-R 0.05, 16 and
weight decay 0.005; ImageNet-A 0.05, 32, 0.005; VTAB 0.03, 16, 0.005, 45 epochs; 20 epochs
elsewhere.

Where this differs from the authors' code, as do all methods here that train an adapter with
`task_heads.new_head`: the rate falls by step, theirs by epoch (its sum over steps is
1 + 1 / epochs times ours); the rows of the training head start at length about 1, theirs at about
0.58, where cosine rows turn three times as fast at first. The subspace of the frozen model
(`use_init_ptm`, on for CUB and OmniBenchmark in their files) is left out.
"""

from dataclasses import dataclass

import jax.numpy as jnp

from qkd_jax.learners.finetune import loss
from qkd_jax.learners.shape import Learner, Slots, class_columns, register
from qkd_jax.learners.task_adapters import (
    adapter_of,
    complemented,
    empty_adapters,
    encode_with,
    first_adapter_block,
    means_in_slots,
    new_tuned,
    store_adapter,
    store_rows,
)
from qkd_jax.learners.task_heads import HeadSettings, mask_unseen
from qkd_jax.nn.adapters import AdapterSpec
from qkd_jax.nn.heads import class_means, unit


@dataclass(frozen=True)
class EaseSettings:
    """EASE (arXiv 2403.12030): weight of other subspaces than a class's own, and their rows."""

    alpha: float = 0.1
    complement: bool = True  # estimate the rows of old classes in new subspaces


def init(key, backbone, config):
    shape = (config.shapes.max_tasks, config.shapes.num_classes, backbone.spec.width)
    memory = {"adapters": empty_adapters(backbone, config), "rows": jnp.zeros(shape)}
    return new_tuned(key, backbone, config), memory


def begin(state, key):
    return new_tuned(key, state.backbone, state.config), state.memory


def freeze(state):
    return state.replace(memory={**state.memory, "adapters": store_adapter(state)})


def finish(state, statistics, key):
    values = means_in_slots(class_means(statistics), state.task)
    rows = store_rows(state.memory["rows"], class_columns(state), values)
    if state.config.ease.complement:
        rows = complemented(rows, state)
    return state.replace(memory={**state.memory, "rows": rows})


def extract(state, inputs, slot, features):
    return encode_with(state, adapter_of(state, slot), inputs)


def cosines(state, features):
    """[B, S, C]: of features [B, S, D] to the rows of every class in the same slot."""
    return jnp.einsum("bsd,scd->bsc", unit(features), unit(state.memory["rows"]))


def score_with_task(state, features, tasks):
    """The subspace of the given task alone, for all classes."""
    return mask_unseen(state, cosines(state, features)[jnp.arange(len(tasks)), tasks])


def score(state, features):
    num_slots, cosine = features.shape[1], cosines(state, features)
    own = state.task_of_class[None, :] == jnp.arange(num_slots)[:, None]  # [S, C]
    others = state.config.ease.alpha / jnp.maximum(state.task, 1).astype(jnp.float32)
    weight = jnp.where(own, 1.0, others)
    weight = jnp.where((jnp.arange(num_slots) <= state.task)[:, None], weight, 0.0)
    return mask_unseen(state, jnp.sum(cosine * weight[None], axis=1)), None


LEARNER = register(
    Learner(
        name="ease",
        init=init,
        begin=begin,
        loss=loss,
        freeze=freeze,
        finish=finish,
        extract=extract,
        score=score,
        score_with_task=score_with_task,
        slots=Slots(score=lambda task: range(task + 1)),
        first_block=first_adapter_block,
    ),
    adapter=AdapterSpec,
    ease=EaseSettings,
    head=HeadSettings,
)
