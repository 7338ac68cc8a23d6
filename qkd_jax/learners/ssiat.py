"""SSIAT: one shared adapter tuned on task after task, shifted class means, aligned head.

Tan, Zhou, Xiang, Wang, Wu and Li, "Semantically-Shifted Incremental Adapter-Tuning is A Continual
ViTransformer", CVPR 2024, arXiv 2403.19979. The adapter is never frozen. It is trained with a
cosine head (scale s, margin m) on the current task's classes. When the task ends, the mean mu_c of
every old class is shifted by how far the task's features moved between the old adapter and the new
one, f_i -> g_i, weighted by how near they were:

    mu_c <- mu_c + sum_i w_ci (g_i - f_i) / sum_i w_ci,
    w_ci = exp(-|f_i - mu_c|^2 / (2 sigma^2)) + floor

(after semantic drift compensation, arXiv 2004.00440). Then, from the second task on, the head over
all classes is trained once more on Gaussian pseudo-features; those of task i are drawn around
(0.9 + 0.1 (i + 1) / (t + 1)) mu_c.

Slot t is the model after task t; the one before it stays in memory until the task ends. Published
settings: bottleneck 64, s 20, m 0 (ImageNet-A 0.3); SGD 0.01, batch 48, weight decay 5e-4 on every
leaf, 20 epochs and 10 in later tasks; alignment.epochs 5, learning_rate 0.01, samples 256, jitter
1e-3. sigma = 4 is small compared with distances of a ViT's features, so that with the floor, 1e-5,
nearly all images have the same weight.

Where we differ from the authors' code:
- It reads the features of the two adapters in two passes of a loader that shuffles and augments, so
  that f_i and g_i belong to different images. Ours belong to the same image in the test view.
  `ssiat.shift=unpaired` is theirs on average over all orders: mean of g - weighted mean of f.
- The age of a class is its position divided by the size of the current task; ours is its task,
  which is the same for tasks of equal size.
- Old head rows shrink by weight decay while a task trains, which does not affect a cosine.
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from qkd_jax.generators.learned import DriftSettings
from qkd_jax.learners.finetune import freeze
from qkd_jax.learners.shape import Learner, Slots, Sums, class_columns, register
from qkd_jax.learners.state import local_labels, old_classes
from qkd_jax.learners.task_adapters import encode_with, first_adapter_block, new_adapter
from qkd_jax.learners.task_heads import (
    AlignmentSettings,
    age_factors,
    aligned,
    class_terms,
    generator_of,
    mask_unseen,
    new_cosine_rows,
    stored_head,
)
from qkd_jax.nn.adapters import AdapterSpec
from qkd_jax.nn.heads import head_logits
from qkd_jax.settings.ranges import setting


@dataclass(frozen=True)
class SsiatSettings:
    """SSIAT (arXiv 2403.19979): cosine head with margin, shift of old class means, alignment."""

    scale: float = setting(20.0, above=0)  # s of the cosine head; fixed
    # The margin m, subtracted from the cosine of an image's own class in training.
    margin: float = setting(0.0, low=0)
    # Shift of old class means with the adapter: by how far each image moved; by the difference of
    # means, the expectation of the authors' code, which shuffles between its two passes; or not at
    # all.
    shift: Literal["paired", "unpaired", "none"] = "paired"
    # sigma of the weight of an image in the shift of a class.
    kernel_width: float = setting(4.0, above=0)
    # Added to every weight, so that all far images count equally.
    kernel_floor: float = setting(1e-5, above=0)
    # Alignment draws the oldest classes around their mean times 1 minus this.
    mean_decay: float = setting(0.1, low=0, below=1)


def init(key, backbone, config):
    width, classes = backbone.spec.width, config.shapes.num_classes
    adapter = new_adapter(jax.random.fold_in(key, 0), backbone, config)
    head = new_cosine_rows(jax.random.fold_in(key, 1), backbone, config)
    memory = {
        "previous": adapter,
        "rows": jnp.zeros((classes, width)),
        "generator": generator_of(config).empty(classes, width),
    }
    return {"adapter": adapter, "head": head}, memory


def begin(state, key):
    """The adapter is trained on, and a copy of it kept; the head is new."""
    adapter, head = state.trainable["adapter"], new_cosine_rows(key, state.backbone, state.config)
    return {"adapter": adapter, "head": head}, {**state.memory, "previous": adapter}


def logits_of(state, features, rows):
    """s cos(feature, row)."""
    return head_logits(features, rows, jnp.float32(state.config.ssiat.scale), "cosine")


def loss(trainable, state, inputs, batch, context):
    settings = state.config.ssiat
    features = encode_with(state, trainable["adapter"], inputs, context.keys)
    logits = logits_of(state, features, trainable["head"]["rows"])
    return class_terms(state, logits, batch["label"], settings.scale * settings.margin)


def extract(state, inputs, slot, features):
    """Features under the current adapter in the current task's slot, else under the one before."""
    adapter = jax.tree.map(
        lambda now, before: jnp.where(slot == state.task, now, before),
        state.trainable["adapter"],
        state.memory["previous"],
    )
    return encode_with(state, adapter, inputs)


def statistics(config, num_slots, width):
    """What the generator collects of the task's classes; for all classes sum_i w_i and
    sum_i w_i (g_i - f_i).
    """
    return {
        "own": generator_of(config).statistics(config.shapes.max_task_classes, width),
        "weight": jnp.zeros(config.shapes.num_classes),
        "moved": jnp.zeros((config.shapes.num_classes, width)),
    }


def accumulate(state, statistics, features, labels, mask):
    settings, means = state.config.ssiat, state.memory["generator"].mean
    old, new = features[:, jnp.maximum(state.task - 1, 0)], features[:, state.task]
    own = generator_of(state.config).add(statistics["own"], new, local_labels(state, labels), mask)
    distance = jnp.sum(jnp.square(old[:, None] - means[None]), axis=-1)
    weight = jnp.exp(-distance / (2.0 * settings.kernel_width**2)) + settings.kernel_floor
    weight = jnp.where(mask[:, None] & old_classes(state)[None], weight, 0.0)
    step = new - old if settings.shift == "paired" else -old
    moved = jnp.matmul(weight.T, step, precision="highest")
    return {
        "own": own,
        "weight": statistics["weight"] + weight.sum(0),
        "moved": statistics["moved"] + moved,
    }


def shifts(state, statistics):
    """[C, D]: how far each class mean moves; zero for classes that are not old."""
    own, kind = statistics["own"], state.config.ssiat.shift
    # The floor bounds the sum of weights from below wherever there are images.
    shift = statistics["moved"] / jnp.maximum(statistics["weight"], 1e-30)[:, None]
    if kind == "unpaired":
        total = jnp.sum(own.mean * own.count[:, None], axis=0)
        shift = shift + (total / jnp.maximum(own.count.sum(), 1.0))[None]
    moving = old_classes(state) & (kind != "none")
    return jnp.where(moving[:, None], shift, 0.0)


def finish(state, statistics, key):
    memory, columns = stored_head(state, state.memory), class_columns(state)
    kept, generator = memory["generator"], generator_of(state.config)
    kept = kept.replace(mean=kept.mean + shifts(state, statistics))
    kept = generator.fit(kept, statistics["own"], columns, key)
    drawn, start = scaled(state, kept), memory["rows"]
    rows = aligned(state, key, start, lambda r, f: logits_of(state, f, r), generator, drawn)
    return state.replace(memory={**memory, "rows": rows, "generator": kept})


def scaled(state, kept):
    """The generator's memory with means of old classes multiplied by 0.9 (the oldest) to 1 (the
    newest).
    """
    factor = age_factors(state, state.config.ssiat.mean_decay)
    return kept.replace(mean=factor[:, None] * kept.mean)


def score(state, features):
    logits = logits_of(state, features[:, state.task], state.memory["rows"])
    return mask_unseen(state, logits), None


LEARNER = register(
    Learner(
        name="ssiat",
        init=init,
        begin=begin,
        loss=loss,
        freeze=freeze,
        finish=finish,
        extract=extract,
        score=score,
        slots=Slots(
            score=lambda task: (task,),
            finish=lambda task: (task - 1, task) if task else (task,),
        ),
        sums=Sums(statistics, accumulate),
        first_block=first_adapter_block,
    ),
    adapter=AdapterSpec,
    alignment=AlignmentSettings,
    drift=DriftSettings,
    ssiat=SsiatSettings,
)
