"""Replay: one head on the frozen model's features, trained on those of the task and drawn old ones.

Nothing but the head is trained, so that accuracy says how well a generator remembers classes whose
images are gone, and nothing else. When a task ends, rows of its classes start at their mean
features, and the head of all classes seen is trained by SGD (`task_heads.align_head`) on equally
many features of every class: those of the present classes are the task's own, those of older ones
are drawn from the generator as it was before the task. Then the generator is fitted.

Among its settings are references without a generator: `alignment.epochs=0` leaves the nearest class
mean by cosine; `alignment.statistics=mean` replays class means; `replay.old=none` replays nothing.
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from qkd_jax.generators.bank import FeatureBank, add_to_bank, empty_bank, pick, rows_by_class
from qkd_jax.generators.generator import Generator
from qkd_jax.generators.learned import DriftSettings
from qkd_jax.learners.shape import Learner, Slots, Sums, class_columns, register
from qkd_jax.learners.simplecil import extract
from qkd_jax.learners.state import local_labels, old_classes, seen_classes
from qkd_jax.learners.task_heads import (
    AlignmentSettings,
    HeadSettings,
    align_head,
    alignment_loss,
    generator_of,
    mask_unseen,
    need_task_images,
)
from qkd_jax.nn.heads import head_logits
from qkd_jax.settings.config import Config


@dataclass(frozen=True)
class ReplaySettings:
    """A head on frozen features that replays drawn ones."""

    old: Literal["drawn", "none"] = "drawn"  # what the head sees of older classes


def init(key, backbone, config):
    need_task_images(config, "replay")
    width, classes = backbone.spec.width, config.shapes.num_classes
    memory = {
        "rows": jnp.zeros((classes, width)),
        "scale": jnp.float32(config.head.scale),
        "generator": generator_of(config).empty(classes, width),
    }
    return {}, memory


def statistics(config, num_slots, width):
    """What the generator collects, and the features themselves."""
    own = generator_of(config).statistics(config.shapes.max_task_classes, width)
    return {"own": own, "bank": empty_bank(config.shapes.max_task_images, width)}


def accumulate(state, statistics, features, labels, mask):
    batch = features[:, 0], local_labels(state, labels), mask
    return {
        "own": generator_of(state.config).add(statistics["own"], *batch),
        "bank": add_to_bank(statistics["bank"], *batch),
    }


def logits_of(state, head, features):
    """Logits [N, C] of features [N, D]."""
    return head_logits(features, head["rows"], head["scale"], state.config.head.kind)


def finish(state, statistics, key):
    memory, columns, generator = state.memory, class_columns(state), generator_of(state.config)
    settings, own = state.config.alignment, statistics["own"]
    head = {
        "rows": memory["rows"].at[columns].set(own.mean, mode="drop"),
        "scale": memory["scale"],
    }
    seen = seen_classes(state)
    if settings.epochs:
        replayed = state.config.replay.old == "drawn"
        head = align_head(
            key,
            head,
            lambda head, f, labels: alignment_loss(state, logits_of(state, head, f), labels),
            with_present(generator, statistics["bank"], columns),
            memory["generator"],
            seen if replayed else seen & ~old_classes(state),
            epochs=settings.epochs,
            samples=settings.samples or 5 * state.config.train.batch_size,
            learning_rate=settings.learning_rate,
            weight_decay=0.0,
            period=settings.period,
        )
    kept = generator.fit(memory["generator"], own, columns, key)
    return state.replace(memory={**head, "generator": kept})


def with_present(generator: Generator, bank: FeatureBank, columns: jax.Array) -> Generator:
    """`generator` with draws of the classes `columns` [M] that are features of `bank`."""
    places = rows_by_class(bank, len(columns))

    def draw(memory, key, labels):
        key_old, key_present = jax.random.split(key)
        positions = jnp.full(len(memory.mean), -1)
        positions = positions.at[columns].set(jnp.arange(len(columns)), mode="drop")[labels]
        present = pick(places, key_present, positions)
        return jnp.where(
            (positions >= 0)[:, None], present, generator.draw(memory, key_old, labels)
        )

    return generator._replace(draw=draw)


def draw(state, key, labels):
    generator = generator_of(state.config)
    return generator.draw(state.memory["generator"], key, labels)


def score(state, features):
    return mask_unseen(state, logits_of(state, state.memory, features[:, 0])), None


LEARNER = Learner(
    name="replay",
    init=init,
    begin=lambda state, key: ({}, state.memory),
    loss=None,
    freeze=lambda state: state,
    finish=finish,
    extract=extract,
    score=score,
    slots=Slots(score=lambda task: (0,), frozen=0),
    sums=Sums(statistics, accumulate),
    draw=draw,
)


def replaying(config: Config) -> Learner:
    """`LEARNER`; with settings that let no feature be drawn, without `draw`."""
    drawn = config.alignment.epochs > 0 and config.replay.old == "drawn"
    return LEARNER if drawn else LEARNER._replace(draw=None)


register(
    replaying,
    name="replay",
    alignment=AlignmentSettings,
    drift=DriftSettings,
    head=HeadSettings,
    replay=ReplaySettings,
)
