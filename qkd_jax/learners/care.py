"""CaRE: routed experts in every block, chosen where a task's own classes are told apart best.

Lou, Fu and Yu, "Scaling Continual Learning to 300+ Tasks with Bi-Level Routing Mixture-of-Experts",
ICML 2026, arXiv 2602.03473; the authors' code is LMMMEng/CaRE. Every task adds to every block an
expert (a small adapter), a router over the experts so far, and a class perceptron, which tells the
task's classes apart by the expert's class token; `nn.experts` has the formulas. One shared adapter,
which all inputs use, is trained in the first task; later it is pulled back to what it was by 0.999
before every step. The M = 2 routers whose perceptron has the least entropy weigh K = 3 experts
each. While a task trains, its own router is always one of the two. The loss is cross-entropy on s
cos(feature, row) with margin m (CosFace) over the task's classes, plus the mean over blocks of half
of

    CE(s c) + tau^2 KL( softmax(cos / tau) || softmax(c / tau) ),

where c are the perceptron's logits, the cosines are those of the head and tau is 1 in the first
half of the blocks and 2 in the second. When a task ends, the head over all classes is trained once
more on Gaussian draws, as in TUNA.

At test an image goes through once and every block chooses its routers (`care.passes=one`, as the
authors do with long sequences). With `every_task`, as they do with up to 60 tasks, every task also
passes it through its own router and the experts up to its own; the softmax over all classes of
least entropy among these is added to that of the free pass: T + 1 passes.

Slot 2 t is the pass of task t with its own router, slot 2 t + 1 the free pass after task t.
Published (exps/*.json): experts of 16, shared adapter of 64 units, dropout 0.1; s 20, m 0 (0.3 on
ImageNet-A, there plain cross-entropy of c and no KL); SGD, momentum 0.9, cosine, decay 5e-4 on
every leaf; rate, batch, epochs 0.05, 64, 60 (CIFAR-100), 0.02, 32, 60 (ImageNet-R Inc20), 0.01, 16,
20 (ImageNet-A), 0.01, 16, 30 (VTAB); alignment of 30 epochs at 0.005, alignment.period 5
(ImageNet-A 10 at 0.01 on variances).

Where we differ from the authors' code:
- From the second task on it trains twice, half of the epochs each: from the full rate to half of
  it, then, after an alignment of the head in between, to zero. We train once, along one cosine,
  whose mean rate is the same.
- It pulls the shared adapter before each forward pass, so that the last update of a task stays
  whole; ours is pulled after each step, the last one too.
- It scales the class means that alignment draws around by age with the sign of TUNA's code, so that
  new classes shrink. With `care.mean_decay` ours shrinks old ones, as SSIAT does.
- A router's weight on experts that it leaves out is e^-100 there and zero here; entropies there
  have 1e-10 inside the logarithm.
- With `every_task` it goes back to one pass after 60 tasks; ours does what the setting says.
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from qkd_jax.errors import ConfigError
from qkd_jax.generators.learned import DriftSettings
from qkd_jax.learners.features import observed_feature
from qkd_jax.learners.shape import Learner, Slots, Sums, class_columns, register
from qkd_jax.learners.state import local_labels, task_class_masks, valid_task_classes
from qkd_jax.learners.task_heads import (
    AlignmentSettings,
    age_factors,
    aligned,
    class_terms,
    generator_of,
    mask_unseen,
    new_cosine_rows,
    stored_head,
    with_term,
)
from qkd_jax.nn.experts import ExpertsSpec, new_adapter, new_expert
from qkd_jax.nn.heads import head_logits
from qkd_jax.nn.inserts import Inserts
from qkd_jax.nn.losses import entropy, softened_kl
from qkd_jax.settings.ranges import setting


@dataclass(frozen=True)
class CareSettings:
    """CaRE (arXiv 2602.03473): routed experts, class perceptrons, cosine head with margin."""

    expert_bottleneck: int = setting(16, low=1)
    shared_bottleneck: int = setting(64, low=1)
    dropout: float = setting(0.1, low=0, below=1)
    first_block: int = setting(0, low=0)
    routers: int = setting(2, low=1)  # M
    experts: int = setting(3, low=1)  # K, of each router
    # How much of the shared adapter of the last task each step puts back; 1 = it is frozen.
    shared_decay: float = setting(0.999, low=0, high=1)
    scale: float = setting(20.0, above=0)  # s of the cosine head; fixed
    # The margin m, subtracted from the cosine of an image's own class in training.
    margin: float = setting(0.0, low=0)
    # Of the perceptrons: scaled and with margin as the head's, or as it is.
    perceptron_loss: Literal["cosface", "cross_entropy"] = "cosface"
    distill: bool = True  # the head teaches the perceptrons
    # How alignment scales class means: not at all, or the more the older a class is.
    mean_decay: Literal["none", "old"] = "none"
    # At test: one pass that every block routes, or also one for every task.
    passes: Literal["one", "every_task"] = "one"


def spec_of(config):
    settings = config.care
    return ExpertsSpec(
        num_experts=config.shapes.max_tasks,
        expert_bottleneck=settings.expert_bottleneck,
        shared_bottleneck=settings.shared_bottleneck,
        routers_per_input=settings.routers,
        experts_per_router=settings.experts,
        dropout=settings.dropout,
        first_block=settings.first_block,
    )


def fresh_expert(key, backbone, config):
    settings, depth, width = config.care, backbone.spec.depth, backbone.spec.width
    if settings.first_block >= depth:
        raise ConfigError(
            f"care.first_block: expected 0 to {depth - 1} of {depth} blocks, found "
            f"{settings.first_block}"
        )
    classes = config.shapes.max_task_classes
    return new_expert(key, spec_of(config), depth - settings.first_block, width, classes)


def init(key, backbone, config):
    keys, width = jax.random.split(key, 3), backbone.spec.width
    experts = fresh_expert(keys[0], backbone, config)
    blocks, classes = len(experts["router"]["bias"]), config.shapes.num_classes
    shared = new_adapter(keys[1], blocks, width, config.care.shared_bottleneck)
    trainable = {
        **experts,
        "shared": shared,
        "head": new_cosine_rows(keys[2], backbone, config),
    }
    memory = {
        "experts": jax.tree.map(
            lambda a: jnp.zeros((blocks, config.shapes.max_tasks, *a.shape[1:])), experts
        ),
        "shared": shared,
        "rows": jnp.zeros((classes, width)),
        "generator": generator_of(config).empty(classes, width),
    }
    return trainable, memory


def begin(state, key):
    """The shared adapter is trained on; expert, router, perceptron and head rows are new. From the
    third task on, the expert starts at the mean of all older experts except the newest.
    """
    keys = jax.random.split(key)
    new, stored = fresh_expert(keys[0], state.backbone, state.config), state.memory["experts"]
    count = jnp.maximum(state.task - 1, 0)

    def start(new, all_):
        older = (jnp.arange(all_.shape[1]) < count).astype(jnp.float32)
        mean = jnp.einsum("lt...,t->l...", all_, older) / jnp.maximum(count, 1).astype(jnp.float32)
        return jnp.where(count > 0, mean, new)

    trainable = {
        **new,
        "expert": jax.tree.map(start, new["expert"], stored["expert"]),
        "shared": state.trainable["shared"],
        "head": new_cosine_rows(keys[1], state.backbone, state.config),
    }
    return trainable, state.memory


def with_expert(state, trainable):
    """The experts in memory with the trained one in the current task's place."""
    return jax.tree.map(
        lambda all_, one: all_.at[:, state.task].set(one),
        state.memory["experts"],
        {name: trainable[name] for name in state.memory["experts"]},
    )


def encode_with(state, experts, shared, inputs, newest, forced, dropout_keys=None):
    """(Features [B, D], what each block observed [L, ...]) with the experts up to `newest`; with
    `forced`, its router is always one of those chosen.
    """
    spec = spec_of(state.config)
    given = {
        "class_mask": task_class_masks(state),
        "newest": jnp.asarray(newest),
        "forced": jnp.asarray(forced),
    }
    blocks = len(shared["scale"])
    given = jax.tree.map(lambda a: jnp.broadcast_to(a, (blocks, *a.shape)), given)
    inserts = Inserts({"experts": experts, "shared": shared, **given}, spec)
    keys = dropout_keys if spec.dropout > 0 else None
    return observed_feature(state, inputs, inserts, keys)


def cosines_of(features, rows):
    return head_logits(features, rows, jnp.float32(1.0), "cosine")


def loss(trainable, state, inputs, batch, context):
    settings, labels = state.config.care, batch["label"]
    experts, shared = with_expert(state, trainable), trainable["shared"]
    features, observed = encode_with(state, experts, shared, inputs, state.task, True, context.keys)
    cosines = cosines_of(features, trainable["head"]["rows"])
    margin = settings.scale * settings.margin
    terms = class_terms(state, settings.scale * cosines, labels, margin)
    return with_term(
        terms, "perceptrons", 1.0, perceptron_loss(state, observed["logits"], cosines, labels)
    )


def perceptron_loss(state, logits, cosines, labels):
    """[B]: the mean over blocks of the loss of perceptron logits [L, B, M], taught by the cosines
    [B, M] of the head.
    """
    settings, valid = state.config.care, valid_task_classes(state)[None]
    depth = state.backbone.spec.depth
    scale, margin = settings.scale, settings.scale * settings.margin
    if settings.perceptron_loss == "cross_entropy":
        scale, margin = 1.0, 0.0
    total = jnp.zeros(len(labels))
    for index, own in enumerate(logits, depth - len(logits)):
        term = class_terms(state, scale * own, labels, margin)["loss"]
        if settings.distill:
            temperature = 1.0 if index < depth // 2 else 2.0
            term = 0.5 * (term + softened_kl(cosines, own, valid, temperature))
        total = total + term
    return total / len(logits)


def project(trainable, state):
    """After a step in a later task: the shared adapter is pulled back to that of the last task."""
    kept = jnp.where(state.task > 0, state.config.care.shared_decay, 0.0)
    shared = jax.tree.map(
        lambda own, before: own + kept * (before - own),
        trainable["shared"],
        state.memory["shared"],
    )
    return {**trainable, "shared": shared}


def freeze(state):
    experts, shared = with_expert(state, state.trainable), state.trainable["shared"]
    return state.replace(memory={**state.memory, "experts": experts, "shared": shared})


def statistics(config, num_slots, width):
    return generator_of(config).statistics(config.shapes.max_task_classes, width)


def accumulate(state, statistics, features, labels, mask):
    positions = local_labels(state, labels)
    return generator_of(state.config).add(statistics, features[:, 2 * state.task], positions, mask)


def finish(state, statistics, key):
    memory, generator = stored_head(state, state.memory), generator_of(state.config)
    kept = generator.fit(memory["generator"], statistics, class_columns(state), key)
    drawn = kept
    if state.config.care.mean_decay == "old":
        drawn = kept.replace(mean=age_factors(state)[:, None] * kept.mean)
    scale = state.config.care.scale
    rows = aligned(
        state, key, memory["rows"], lambda r, f: scale * cosines_of(f, r), generator, drawn
    )
    return state.replace(memory={**memory, "rows": rows, "generator": kept})


def frozen_feature(state, inputs, newest, forced):
    memory = state.memory
    return encode_with(state, memory["experts"], memory["shared"], inputs, newest, forced)[0]


def extract(state, inputs, slot, features):
    return frozen_feature(state, inputs, state.task, slot % 2 == 0)


def logits_of(state, features):
    """s cos(feature, row), [B, C]; -inf for classes not seen."""
    logits = state.config.care.scale * cosines_of(features, state.memory["rows"])
    return mask_unseen(state, logits)


def score(state, features):
    return logits_of(state, features[:, 2 * state.task + 1]), None


def softmax_of(state, inputs, newest, forced):
    """The softmax [B, C] of one pass."""
    return jax.nn.softmax(logits_of(state, frozen_feature(state, inputs, newest, forced)))


def predict_with_task(state, inputs, tasks):
    """The softmax of the free pass plus that of the given task's own pass."""

    def keep(task, own):
        mine = softmax_of(state, inputs, task, True)
        return jnp.where((tasks == task)[:, None], mine, own)

    free = softmax_of(state, inputs, state.task, False)
    own = lax.fori_loop(0, state.task + 1, keep, jnp.zeros_like(free))
    return mask_unseen(state, free + own)


def chooses_tasks(config):
    """Whether tasks have passes of their own at test."""
    return config.care.passes == "every_task"


def predict(state, inputs):
    """The softmax of the free pass plus that of the task's own pass with the least entropy."""

    free = softmax_of(state, inputs, state.task, False)

    def compare(task, best):
        softmax, doubt, chosen = best
        mine = softmax_of(state, inputs, task, True)
        mine_doubt = entropy(mine)
        surer = mine_doubt < doubt
        return (
            jnp.where(surer[:, None], mine, softmax),
            jnp.minimum(mine_doubt, doubt),
            jnp.where(surer, task, chosen),
        )

    nobody = jnp.full(len(free), jnp.inf), jnp.zeros(len(free), jnp.int32)
    own, _, chosen = lax.fori_loop(0, state.task + 1, compare, (free, *nobody))
    relevance = jax.nn.one_hot(chosen, state.config.shapes.max_tasks)
    return mask_unseen(state, free + own), relevance


LEARNER = register(
    Learner(
        name="care",
        init=init,
        begin=begin,
        loss=loss,
        freeze=freeze,
        finish=finish,
        extract=extract,
        score=score,
        slots=Slots(score=lambda task: (2 * task + 1,), finish=lambda task: (2 * task,)),
        sums=Sums(statistics, accumulate),
        predict=lambda config: predict if chooses_tasks(config) else None,
        predict_with_task=lambda config: predict_with_task if chooses_tasks(config) else None,
        passes=lambda config: config.shapes.max_tasks + 1,
        project=project,
        first_block=lambda config: config.care.first_block,
    ),
    alignment=AlignmentSettings,
    drift=DriftSettings,
    care=CareSettings,
)
