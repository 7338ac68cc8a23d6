"""The frozen model beside the adapters, with a weight of its own in the answer.

    z = (1 - w) sum_i alpha_i z^(i) + w z^(frozen),    w = fusion.frozen_weight

Its features never move, so that class means and covariance are those of all images seen, where an
adapter has never seen the classes of older tasks. This is the whitened nearest class mean of
`simplecil` with `classifier.kind=whitened`. APER joins frozen and adapted features for the same
reason (arXiv 2303.07338). Not in the paper of QKD.
"""

import jax.numpy as jnp

from qkd_jax.learners.shape import add_classes, class_columns
from qkd_jax.learners.state import seen_classes
from qkd_jax.nn.heads import class_means, empty_statistics, head_logits, within_class_scatter
from qkd_jax.nn.whitening import identity_metric, isotropic_share, learned_metric, whiten


def is_read(config):
    """Whether the frozen model has a part in the answer."""
    return config.fusion.frozen_weight > 0


def slot_of(config):
    """The slot of the frozen model's feature, behind those of all adapters."""
    return config.shapes.max_tasks


def empty(config, width):
    """What is kept before the first task."""
    rows = jnp.zeros((config.shapes.num_classes, width))
    if not config.head.whiten:
        return {"rows": rows}
    sums = {"scatter": jnp.zeros((width, width)), "count": jnp.float32(0)}
    return {"rows": rows, "whitened_rows": rows, "metric": identity_metric(width), **sums}


def empty_sums(config, width):
    """Sums over a task's features in this slot, with second moments where the metric needs them."""
    classes = config.shapes.max_task_classes
    return empty_statistics(1, classes, width, int(config.head.whiten))


def add(state, sums, features, labels, mask):
    """`sums` with a batch added: features [B, S, D] of all slots, labels [B]."""
    slot = slot_of(state.config)
    return add_classes(state, sums, features[:, slot : slot + 1], labels, mask)


def with_task(state, sums):
    """What is kept after the current task, whose `sums` are over all of its inputs."""
    kept, config = state.memory["frozen"], state.config
    rows = kept["rows"].at[class_columns(state)].set(class_means(sums)[0], mode="drop")
    if not config.head.whiten:
        return {"rows": rows}
    scatter = kept["scatter"] + within_class_scatter(sums)[0]
    count = kept["count"] + sums.count.sum()
    share = isotropic_share(config.gate.shrinkage, config.gate.prior, count, rows.shape[1])
    metric = learned_metric(scatter, count, rows, seen_classes(state), share)
    moments = {"metric": metric, "scatter": scatter, "count": count}
    return {"rows": rows, "whitened_rows": whiten(metric, rows), **moments}


def logits(state, feature):
    """z^(frozen) [B, C] of the frozen model's features [B, D]."""
    kept, head = state.memory["frozen"], state.config.head
    rows = kept["rows"]
    if head.whiten:
        feature, rows = whiten(kept["metric"], feature), kept["whitened_rows"]
    return head_logits(feature, rows, state.trainable["head"]["scale"], head.kind)


def joined(state, adapted, feature):
    """z [B, C] of the adapters' part [B, C] and the frozen model's features [B, D]."""
    weight = state.config.fusion.frozen_weight
    return (1.0 - weight) * adapted + weight * logits(state, feature)
