"""FACET: one adapter for all tasks, modulated by a code of the task, kept consistent for old codes.

FACET, September 2026. The adapter (`nn.modulated`) is trained on from task to task; a task has a
code, which weighs and mixes the adapter's hidden units. The loss is cross-entropy of the task's
images under its own code, plus, for one old task j drawn for each batch,

    consistency * |CLS_j(snapshot) - CLS_j|^2,

where CLS_j is the feature of a current image under code j, and the snapshot is the model as the
last task left it. Every block has small heads of its own, one for each task, over the task's own
classes, on the block's class token; they are trained with the task and frozen with it. At test a
block takes the code of the task whose head has the least entropy there.

Slot t is the model after task t, with the codes that it chooses. Known from the text: bottleneck
384, codes of rank 8 that start at zero, the adapter's form, the consistency and its weight 2, the
choice by least entropy.

No code was published. Chosen here:
- An up-projection follows, since z is narrower than the stream; no biases, as in the formula; ReLU;
  the adapter's place, scale and dropout are those of the other methods (`adapter`).
- With U and V both at zero, neither would ever have a gradient: V starts at random. A code that
  starts at zero is taken to change nothing: s starts at one, so that a new task starts with the
  shared adapter as it is, whose up-projection starts at zero. With `facet.diagonal=zero` s starts
  at zero too, and the up-projection at random: a new task starts with the frozen model, where s and
  U alone have a gradient.
- Codes of old tasks are trained on by the consistency (`facet.train_old_codes`).
- The heads of blocks are cosine heads with a fixed scale, on the class token that the adapter
  reads. The mean of their cross-entropy over blocks has weight 1, and its gradient reaches the
  adapters of earlier blocks (`facet.auxiliary_gradient`).
- Each block decides for itself, so that an image needs one pass. `facet.routing=image`: one
  decision for all blocks, by the mean over them of the entropy of a task's heads under that task's
  code, in as many passes as there are tasks.
- Entropies are compared as they are, so a task with fewer classes is favoured.
- The final cosine head is over the task's own classes in training, as in every method here. Rate,
  batch and epochs are those of CaRE's paper, its nearest relative (0.01, 16, 20), and weight decay
  5e-4.
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from qkd_jax.learners.features import observed_feature
from qkd_jax.learners.finetune import score
from qkd_jax.learners.shape import Learner, Slots, register
from qkd_jax.learners.state import local_labels, task_class_masks, valid_task_classes
from qkd_jax.learners.task_adapters import check_bottleneck, first_adapter_block
from qkd_jax.learners.task_heads import (
    HeadSettings,
    class_logits,
    finish_with_head,
    head_loss,
    mask_unseen,
    new_head,
    next_head,
    with_term,
)
from qkd_jax.nn.adapters import AdapterSpec, num_blocks
from qkd_jax.nn.heads import init_rows
from qkd_jax.nn.inserts import Inserts
from qkd_jax.nn.losses import cross_entropy
from qkd_jax.nn.modulated import ModulatedSpec, doubts, head_logits_of, init_codes, init_shared
from qkd_jax.settings.ranges import setting


@dataclass(frozen=True)
class FacetSettings:
    """FACET (September 2026): codes of tasks, consistency, and the heads of blocks."""

    rank: int = setting(8, low=1)  # K of a code
    # Start of s: a new task starts with the shared adapter as it is, or with the frozen model.
    diagonal: Literal["one", "zero"] = "one"
    consistency: float = setting(2.0, low=0)  # weight of the change of features under an old code
    train_old_codes: bool = True  # by the consistency; else they are frozen with their task
    auxiliary: float = setting(1.0, low=0)  # weight of the loss of the blocks' heads
    auxiliary_scale: float = setting(20.0, above=0)  # of their cosines; fixed
    auxiliary_gradient: bool = True  # whether their loss trains the adapter too
    # Where the code is chosen: in each block, or once for the image.
    routing: Literal["block", "image"] = "block"


def spec_of(config):
    adapter = config.adapter
    return ModulatedSpec(
        bottleneck=adapter.bottleneck,
        scale=adapter.scale,
        dropout=adapter.dropout,
        placement=adapter.placement,
        input=adapter.input,
        first_block=adapter.first_block,
        head_scale=config.facet.auxiliary_scale,
    )


def init(key, backbone, config):
    check_bottleneck(backbone, config)
    spec, settings, shapes = spec_of(config), config.facet, config.shapes
    width, depth = backbone.spec.width, backbone.spec.depth
    keys, start = jax.random.split(key, 4), settings.diagonal
    shared = init_shared(keys[0], spec, width, depth)
    if start == "one":
        shared["up"] = jax.tree.map(jnp.zeros_like, shared["up"])
    diagonal = float(start == "one")
    trainable = {
        "shared": shared,
        "codes": init_codes(keys[1], spec, depth, shapes.max_tasks, settings.rank, diagonal),
        "head": new_head(keys[2], backbone, config),
        "auxiliary": new_auxiliary(keys[3], backbone, config),
    }
    blocks, size = num_blocks(config.adapter, backbone.spec.depth), shapes.max_task_classes
    memory = {
        "snapshot": {name: trainable[name] for name in ("shared", "codes")},
        "rows": jnp.zeros((shapes.num_classes, width)),
        "auxiliary": jnp.zeros((blocks, shapes.max_tasks, size, width)),
    }
    return trainable, memory


def new_auxiliary(key, backbone, config):
    """{"rows": [L, M, D]}: the heads of all blocks for one task."""
    blocks, size = num_blocks(config.adapter, backbone.spec.depth), config.shapes.max_task_classes
    rows = init_rows(key, blocks * size, backbone.spec.width)
    return {"rows": rows.reshape(blocks, size, -1)}


def begin(state, key):
    """Adapter and codes are trained on, and a copy of them kept; the heads are new."""
    kept = {name: state.trainable[name] for name in ("shared", "codes")}
    auxiliary = new_auxiliary(jax.random.fold_in(key, 1), state.backbone, state.config)
    trainable = {**kept, "head": next_head(state, key), "auxiliary": auxiliary}
    return trainable, {**state.memory, "snapshot": kept}


def encode_by(state, parts, inputs, chosen_by, dropout_keys=None):
    """(Features [B, D], what each block observed [L, ...]) under the adapter and codes of `parts`.

    `chosen_by`: {"task": int [], or [B] for one in each image}, or {"heads"} of `ModulatedSpec`,
    with a leading axis of blocks.
    """
    spec = spec_of(state.config)
    adapter = {"shared": parts["shared"], "codes": parts["codes"], **chosen_by}
    keys = dropout_keys if spec.dropout > 0 else None
    return observed_feature(state, inputs, Inserts(adapter, spec), keys)


def of_task(state, task):
    """`chosen_by` of one task in all blocks: int [], or [B]."""
    blocks = num_blocks(state.config.adapter, state.backbone.spec.depth)
    return {"task": jnp.broadcast_to(task, (blocks, *task.shape))}


def auxiliary_loss(state, tokens, rows, labels):
    """[B]: the mean over blocks of the cross-entropy over the task's own classes, of class tokens
    [L, B, D] and rows [L, M, D].
    """
    positions, valid = local_labels(state, labels), valid_task_classes(state)

    def of_block(token, rows):
        logits = head_logits_of(token, rows, state.config.facet.auxiliary_scale)
        return cross_entropy(logits, positions, valid)

    return jnp.mean(jax.vmap(of_block)(tokens, rows), axis=0)


def drawn_task(state):
    """int []: an old task, the same on all devices; 0 in the first task."""
    key = jax.random.fold_in(jax.random.fold_in(state.key, 7), state.task)
    key = jax.random.fold_in(key, state.step)
    return jax.random.randint(key, (), 0, jnp.maximum(state.task, 1))


def inconsistency(trainable, state, inputs):
    """[B]: |CLS_j(snapshot) - CLS_j|^2 for a drawn old task j; 0 in the first task."""
    codes = trainable["codes"]
    if not state.config.facet.train_old_codes:
        codes = lax.stop_gradient(codes)
    now = {"shared": trainable["shared"], "codes": codes}

    def distance():
        chosen_by = of_task(state, drawn_task(state))
        before, _ = encode_by(state, state.memory["snapshot"], inputs, chosen_by)
        after, _ = encode_by(state, now, inputs, chosen_by)
        return jnp.sum(jnp.square(before - after), axis=1)

    nothing = jax.eval_shape(distance)
    return lax.cond(state.task > 0, distance, lambda: jnp.zeros(nothing.shape, nothing.dtype))


def loss(trainable, state, inputs, batch, context):
    settings, labels = state.config.facet, batch["label"]
    chosen_by = of_task(state, state.task)
    features, observed = encode_by(state, trainable, inputs, chosen_by, context.keys)
    tokens = observed["token"]
    if not settings.auxiliary_gradient:
        tokens = lax.stop_gradient(tokens)
    terms = head_loss(trainable["head"], state, features, labels)
    auxiliary = auxiliary_loss(state, tokens, trainable["auxiliary"]["rows"], labels)
    terms = with_term(terms, "auxiliary", settings.auxiliary, auxiliary)
    changed = inconsistency(trainable, state, inputs)
    return with_term(terms, "consistency", settings.consistency, changed)


def freeze(state):
    """The heads of the blocks are kept with those of older tasks."""
    rows = state.trainable["auxiliary"]["rows"]
    auxiliary = state.memory["auxiliary"].at[:, state.task].set(rows)
    return state.replace(memory={**state.memory, "auxiliary": auxiliary})


def routed(state, inputs):
    """(Features [B, D] under the chosen codes, relevance [B, T]: the share of the blocks that chose
    each task).
    """
    if state.config.facet.routing == "image":
        return routed_once(state, inputs)
    rows = state.memory["auxiliary"]
    valid = task_class_masks(state)
    heads = {"rows": rows, "valid": jnp.broadcast_to(valid, (len(rows), *valid.shape))}
    features, observed = encode_by(state, state.trainable, inputs, {"heads": heads})
    choices = jax.nn.one_hot(observed["task"], state.config.shapes.max_tasks)
    return features, jnp.mean(choices, axis=0)


def routed_once(state, inputs):
    """`routed` with one decision for each image, after a pass under the code of every task."""
    rows, valid = state.memory["auxiliary"], task_class_masks(state)
    scale = state.config.facet.auxiliary_scale

    def under(task):
        features, observed = encode_by(state, state.trainable, inputs, of_task(state, task))
        own, classes = rows[:, task][:, None], valid[task][None]  # [L, 1, M, D], [1, M]
        doubt = jax.vmap(lambda token, rows: doubts(token, rows, classes, scale)[:, 0])
        return features, jnp.mean(doubt(observed["token"], own), axis=0)

    def compare(task, best):
        features, least, chosen = best
        mine, doubt = under(task)
        surer = doubt < least
        return (
            jnp.where(surer[:, None], mine, features),
            jnp.minimum(doubt, least),
            jnp.where(surer, task, chosen),
        )

    features, doubt = under(jnp.int32(0))
    best = features, doubt, jnp.zeros(len(doubt), jnp.int32)
    features, _, chosen = lax.fori_loop(1, state.task + 1, compare, best)
    return features, jax.nn.one_hot(chosen, state.config.shapes.max_tasks)


def extract(state, inputs, slot, features):
    return routed(state, inputs)[0]


def predict(state, inputs):
    features, relevance = routed(state, inputs)
    return mask_unseen(state, class_logits(state, features)), relevance


def predict_with_task(state, inputs, tasks):
    """The code of the given task in all blocks."""
    features, _ = encode_by(state, state.trainable, inputs, of_task(state, tasks))
    return mask_unseen(state, class_logits(state, features))


LEARNER = register(
    Learner(
        name="facet",
        init=init,
        begin=begin,
        loss=loss,
        freeze=freeze,
        finish=finish_with_head,
        extract=extract,
        score=score,
        slots=Slots(score=lambda task: (task,), finish=lambda task: ()),
        predict=lambda config: predict,
        predict_with_task=lambda config: predict_with_task,
        passes=lambda config: config.shapes.max_tasks if config.facet.routing == "image" else 1,
        first_block=first_adapter_block,
    ),
    adapter=AdapterSpec,
    facet=FacetSettings,
    head=HeadSettings,
)
