"""SimpleCIL: the cosine to class means of the frozen model's features; nothing is trained.

Zhou et al., "Revisiting Class-Incremental Learning with Pre-Trained Models", arXiv 2303.07338. Its
last accuracy does not depend on the class order, so it tests weights, preprocessing and split.

With `simplecil.whiten`, means and features are compared in the metric of the pooled covariance
within classes, accumulated over tasks and shrunk towards a multiple of the identity, as in QKD's
head and gate: this is the part of QKD that needs no adapter. The score is the cosine between
whitened vectors, centred at the mean of the class means. Related: Deep SLDA (Hayes and Kanan, CVPRW
2020, arXiv 1909.01520) also has a running covariance, but scores by the linear discriminant, which
depends on lengths; FeCAM (Goswami et al., NeurIPS 2023, arXiv 2309.14062) has a covariance for each
class, a power transform of the feature, and scores by Mahalanobis distance.
"""

from dataclasses import dataclass

import jax.numpy as jnp

from qkd_jax.learners.features import pooled_feature
from qkd_jax.learners.shape import Learner, Slots, Sums, class_columns, register
from qkd_jax.learners.state import seen_classes
from qkd_jax.learners.task_heads import mask_unseen
from qkd_jax.nn.heads import class_means, empty_statistics, head_logits, within_class_scatter
from qkd_jax.nn.whitening import identity_metric, learned_metric, whiten
from qkd_jax.settings.ranges import setting


@dataclass(frozen=True)
class SimplecilSettings:
    """SimpleCIL (arXiv 2303.07338), optionally in the within-class metric."""

    whiten: bool = False  # compare in the metric of the stored within-class covariance
    shrinkage: float = setting(0.6, low=0, high=1)  # share of the isotropic part in it


def init(key, backbone, config):
    width = backbone.spec.width
    rows = jnp.zeros((config.shapes.num_classes, width))
    if not config.simplecil.whiten:
        return {}, {"rows": rows}
    return {}, {
        "rows": rows,
        "scatter": jnp.zeros((width, width)),
        "count": jnp.float32(0),
        "metric": identity_metric(width),
        "whitened_rows": rows,
    }


def statistics(config, num_slots, width):
    """Empty class sums, with second moments only where the metric needs them."""
    moments = int(config.simplecil.whiten)
    return empty_statistics(num_slots, config.shapes.max_task_classes, width, moments)


def finish(state, statistics, key):
    means = class_means(statistics)[0]
    rows = state.memory["rows"].at[class_columns(state)].set(means, mode="drop")
    if not state.config.simplecil.whiten:
        return state.replace(memory={"rows": rows})
    scatter = state.memory["scatter"] + within_class_scatter(statistics)[0]
    count = state.memory["count"] + statistics.count.sum()
    shrinkage = state.config.simplecil.shrinkage
    metric = learned_metric(scatter, count, rows, seen_classes(state), shrinkage)
    memory = {"rows": rows, "scatter": scatter, "count": count, "metric": metric}
    return state.replace(memory={**memory, "whitened_rows": whiten(metric, rows)})


def extract(state, inputs, slot, features):
    return pooled_feature(state, inputs)


def score(state, features):
    feature, rows = features[:, 0], state.memory["rows"]
    if state.config.simplecil.whiten:
        feature, rows = whiten(state.memory["metric"], feature), state.memory["whitened_rows"]
    return mask_unseen(state, head_logits(feature, rows, jnp.float32(1.0), "cosine")), None


LEARNER = register(
    Learner(
        name="simplecil",
        init=init,
        begin=lambda state, key: ({}, state.memory),
        loss=None,
        freeze=lambda state: state,
        finish=finish,
        extract=extract,
        score=score,
        slots=Slots(score=lambda task: (0,), frozen=0),
        sums=Sums(empty=statistics),
    ),
    simplecil=SimplecilSettings,
)
