"""TUNA: an adapter per task, chosen by confidence, and a universal adapter fused from all.

Wang, Zhou and Ye, "Integrating Task-Specific and Universal Adapters for Pre-Trained Model-based
Class-Incremental Learning", ICCV 2025, arXiv 2508.08165. One adapter is trained from task to task,
with a cosine head (scale s, margin m) on the task's own classes and kept away from the
stored adapters. From the second task on, the head over all classes is trained once more on Gaussian
pseudo-features. The universal adapter takes, for every parameter, the sign of the mean over tasks
and the largest magnitude of that sign. At test, every task's adapter predicts, the one with the
least entropy is chosen, and its softmax and the universal adapter's are added.

Slot 2 i is the adapter of task i, slot 2 i + 1 the universal adapter after task i. Published
settings: bottleneck 16, scale 0.1, dropout 0.1; s 20, no margin (0.3 on ImageNet-A), weight of the
orthogonality term 0 on CIFAR-100; momentum 0.9, cosine, weight decay 5e-4 on every leaf; rate 0.01
and batch 16 on CIFAR-100 (15 epochs) and ImageNet-A (20), 0.01 and 48 on CUB (20), 0.02 and 32 on
ImageNet-R (10); alignment of 30 epochs at 0.005 (ImageNet-A 10 at 0.01), alignment.period 5.

Where we differ from the authors' code (commit 77d4f10 of a public copy with their history):
- At test it asks for the adapter after the last, meaning the universal one, but the count of stored
  adapters answers with the newest task's: the fused adapter is never used. Ours is;
  `tuna.universal=newest` is theirs (slot 2 i + 1 then holds the adapter of task i once more).
- It scales the class means that alignment draws around by the age of a class, but a task's size
  enters with a minus sign, so that new classes shrink instead of old ones: `tuna.mean_decay=new`
  (ImageNet-R, ImageNet-A, ObjectNet); `old` is what was meant (SSIAT, arXiv 2403.19979).
- Its optimiser also holds the stored adapters, so that the orthogonality loss moves them a little;
  ours are frozen. Old head rows shrink by weight decay there, which does not affect a cosine.
- After the first task it gives plain cosines; the sum of two equal softmaxes ranks the same.
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from qkd_jax.generators.learned import DriftSettings
from qkd_jax.learners.shape import Learner, Slots, Sums, class_columns, register
from qkd_jax.learners.state import local_labels, old_classes, valid_task_classes
from qkd_jax.learners.task_adapters import (
    adapter_of,
    empty_adapters,
    encode_with,
    first_adapter_block,
    new_adapter,
    store_adapter,
)
from qkd_jax.learners.task_heads import (
    AlignmentSettings,
    aligned,
    class_terms,
    generator_of,
    mask_unseen,
    new_cosine_rows,
    stored_head,
    with_term,
)
from qkd_jax.nn.adapters import AdapterSpec
from qkd_jax.nn.heads import head_logits, unit
from qkd_jax.nn.losses import entropy
from qkd_jax.settings.ranges import setting


@dataclass(frozen=True)
class TunaSettings:
    """TUNA (arXiv 2508.08165): cosine head with margin, orthogonality, universal adapter."""

    scale: float = setting(20.0, above=0)  # s of the cosine head; fixed
    # The margin m, subtracted from the cosine of an image's own class in training.
    margin: float = setting(0.0, low=0)
    # Weight of the overlap with old adapters, times exp(-(t + 1)).
    orthogonality: float = setting(1e-3, low=0)
    # How alignment scales class means: not at all, the more the older a class is, or the more the
    # newer, which the authors' code does by a wrong sign.
    mean_decay: Literal["none", "old", "new"] = "none"
    # The universal adapter: fused from all, or the newest, which the authors' code reads instead.
    universal: Literal["fused", "newest"] = "fused"


def init(key, backbone, config):
    width, classes = backbone.spec.width, config.shapes.num_classes
    adapter = new_adapter(jax.random.fold_in(key, 0), backbone, config)
    trainable = {
        "adapter": adapter,
        "head": new_cosine_rows(jax.random.fold_in(key, 1), backbone, config),
    }
    memory = {
        "adapters": empty_adapters(backbone, config),
        "universal": jax.tree.map(jnp.zeros_like, adapter),
        "rows": jnp.zeros((classes, width)),
        "order": jnp.zeros(classes, jnp.int32),  # how many classes came before each
        "generator": generator_of(config).empty(classes, width),
    }
    return trainable, memory


def begin(state, key):
    """The adapter is trained on; the head is new."""
    head = new_cosine_rows(key, state.backbone, state.config)
    return {"adapter": state.trainable["adapter"], "head": head}, state.memory


def logits_of(state, features, rows):
    """s cos(feature, row)."""
    return head_logits(features, rows, jnp.float32(state.config.tuna.scale), "cosine")


def overlap(state, adapter):
    """Sum over old tasks of the mean over blocks of |mean_d u_d . mean_e v_e|, with u_d, v_e [R]
    the columns of both up-projections at unit length.
    """

    def mean_direction(adapters):  # [..., R, D] -> [..., R]
        return jnp.mean(unit(jnp.swapaxes(adapters["up"]["kernel"], -1, -2)), axis=-2)

    mine, stored = mean_direction(adapter), mean_direction(state.memory["adapters"])
    each = jnp.mean(jnp.abs(jnp.einsum("lr,tlr->tl", mine, stored)), axis=1)
    return jnp.sum(jnp.where(jnp.arange(len(each)) < state.task, each, 0.0))


def loss(trainable, state, inputs, batch, context):
    settings = state.config.tuna
    features = encode_with(state, trainable["adapter"], inputs, context.keys)
    logits = logits_of(state, features, trainable["head"]["rows"])
    margin = settings.scale * settings.margin
    terms = class_terms(state, logits, batch["label"], margin)
    weight = settings.orthogonality * jnp.exp(-(state.task + 1).astype(jnp.float32))
    return with_term(terms, "orthogonality", weight, overlap(state, trainable["adapter"]))


def fused(adapters, known):
    """One adapter from those [T, ...] that are `known` [T]: for every parameter the sign of their
    mean (0 counts as negative) times the largest magnitude among those of that sign.
    """

    def fuse(values):
        mask = known.reshape(-1, *[1] * (values.ndim - 1))
        values = jnp.where(mask, values, 0.0)
        sign = jnp.where(jnp.sum(values, axis=0) > 0, 1.0, -1.0)
        return sign * jnp.max(jnp.maximum(values * sign[None], 0.0), axis=0)

    return jax.tree.map(fuse, adapters)


def freeze(state):
    """The adapter fills its slot; the universal adapter is fused again."""
    adapters = store_adapter(state)
    universal = fused(adapters, jnp.arange(state.config.shapes.max_tasks) <= state.task)
    return state.replace(memory={**state.memory, "adapters": adapters, "universal": universal})


def statistics(config, num_slots, width):
    return generator_of(config).statistics(config.shapes.max_task_classes, width)


def accumulate(state, statistics, features, labels, mask):
    positions = local_labels(state, labels)
    return generator_of(state.config).add(statistics, features[:, 2 * state.task], positions, mask)


def finish(state, statistics, key):
    memory, columns, generator = state.memory, class_columns(state), generator_of(state.config)
    place = jnp.sum(old_classes(state)) + jnp.arange(len(columns))
    memory = {
        **stored_head(state, memory),
        "order": memory["order"].at[columns].set(place.astype(jnp.int32), mode="drop"),
        "generator": generator.fit(memory["generator"], statistics, columns, key),
    }
    state = state.replace(memory=memory)
    drawn = memory["generator"]
    drawn = drawn.replace(mean=mean_factors(state)[:, None] * drawn.mean)
    rows = aligned(
        state, key, memory["rows"], lambda r, f: logits_of(state, f, r), generator, drawn
    )
    return state.replace(memory={**memory, "rows": rows})


def mean_factors(state):
    """[C]: 0.9 + 0.1 (i + 1) / (t + 1) for classes of task i; see `tuna.mean_decay`."""
    kind, owner = state.config.tuna.mean_decay, state.task_of_class
    if kind == "none":
        return jnp.ones(len(owner))
    if kind == "new":  # i = floor(place of the class / -(number of the task's classes))
        size = jnp.sum(valid_task_classes(state)).astype(jnp.int32)
        owner = -((state.memory["order"] + size - 1) // size)
    share = (owner + 1).astype(jnp.float32) / (state.task + 1).astype(jnp.float32)
    return 0.9 + 0.1 * share


def extract(state, inputs, slot, features):
    adapter = adapter_of(state, slot // 2)
    if state.config.tuna.universal == "fused":
        odd, universal = slot % 2 == 1, state.memory["universal"]
        adapter = jax.tree.map(lambda one, all_: jnp.where(odd, all_, one), adapter, universal)
    return encode_with(state, adapter, inputs)


def score(state, features):
    """softmax(z) of the task's adapter with the least entropy + softmax(z) of the universal one."""
    tasks, softmax = jnp.arange(state.config.shapes.max_tasks), slot_softmax(state, features)
    doubt = jnp.where((tasks <= state.task)[None, :], entropy(softmax[:, 0::2]), jnp.inf)
    chosen = jnp.argmin(doubt, axis=1)
    return with_universal(state, softmax, chosen), jax.nn.one_hot(chosen, len(tasks))


def score_with_task(state, features, tasks):
    """The given task's adapter instead of that with the least entropy."""
    return with_universal(state, slot_softmax(state, features), tasks)


def slot_softmax(state, features):
    """[B, S, C]: softmax(z) of features [B, S, D] in every slot."""
    logits = jax.vmap(
        lambda f: mask_unseen(state, logits_of(state, f, state.memory["rows"])),
        in_axes=1,
        out_axes=1,
    )(features)
    return jax.nn.softmax(logits)


def with_universal(state, softmax, chosen):
    """[B, C]: softmax [B, S, C] of the adapters `chosen` [B] plus that of the universal one."""
    scores = softmax[jnp.arange(len(chosen)), 2 * chosen] + softmax[:, 2 * state.task + 1]
    return mask_unseen(state, scores)


LEARNER = register(
    Learner(
        name="tuna",
        init=init,
        begin=begin,
        loss=loss,
        freeze=freeze,
        finish=finish,
        extract=extract,
        score=score,
        score_with_task=score_with_task,
        slots=Slots(
            score=lambda task: (*range(0, 2 * task + 1, 2), 2 * task + 1),
            finish=lambda task: (2 * task,),
        ),
        sums=Sums(statistics, accumulate),
        first_block=first_adapter_block,
    ),
    adapter=AdapterSpec,
    alignment=AlignmentSettings,
    drift=DriftSettings,
    tuna=TunaSettings,
)
