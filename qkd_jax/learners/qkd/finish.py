"""The end of a task in QKD: sums over its features become head rows, metrics and a taught gate.

Of the task's images nothing else is kept. Older classes keep what their own time knew of them.
"""

import jax
import jax.numpy as jnp
from jax import lax

from qkd_jax.learners.qkd import frozen, gate, measurement
from qkd_jax.learners.qkd.fusion import anchors, gate_inputs, metric_of
from qkd_jax.learners.shape import add_classes, class_columns
from qkd_jax.learners.task_adapters import complemented, means_in_slots, store_rows
from qkd_jax.nn.heads import class_means, empty_statistics, within_class_scatter
from qkd_jax.nn.whitening import isotropic_share, learned_metric, shrunk_factor, whiten

# The drift of similar classes has weights exp(20 cos), nearly the mean over all classes of a slot.
DRIFT_SHARPNESS = 20.0


def num_row_slots(config):
    """How many slots have rows of their own: each, or one set for all."""
    return config.shapes.max_tasks if config.head.prototypes in ("all", "drift") else 1


def num_metrics(config):
    """The number of slots with a metric: as many as have rows for a whitened head, else slot 0."""
    return num_row_slots(config) if config.head.whiten else 1


def empty_sums(config, num_slots, width):
    """Class sums of the adapters' slots, with second moments for the metrics; those of the frozen
    model's, if it is read.
    """
    adapters, classes = config.shapes.max_tasks, config.shapes.max_task_classes
    own = empty_statistics(adapters, classes, width, num_metrics(config))
    return own, frozen.empty_sums(config, width) if frozen.is_read(config) else ()


def add_to_sums(state, sums, features, labels, mask):
    """`sums` with a batch added: features [B, S, D] with labels [B]."""
    own, of_frozen = sums
    adapted = features[:, : state.config.shapes.max_tasks]
    own = add_classes(state, own, adapted, labels, mask)
    if frozen.is_read(state.config):
        of_frozen = frozen.add(state, of_frozen, features, labels, mask)
    return own, of_frozen


def finish(state, sums, key):
    """Head rows, task state (Eq. 3-4), statistics and metrics; then the gate is calibrated."""
    config, memory = state.config, state.memory
    statistics, of_frozen = sums
    means, columns = class_means(statistics), class_columns(state)
    rows = memory["rows"]
    if config.head.prototypes == "none":
        rows = store_rows(rows, columns, state.trainable["head"]["rows"])
    elif config.head.prototypes == "own":
        rows = store_rows(rows, columns, means[state.task])
    else:
        rows = store_rows(rows, columns, means_in_slots(means, state.task))
    if config.head.prototypes == "drift":
        rows = complemented(rows, state, sharpness=DRIFT_SHARPNESS, drift=True)
    vector = gate.task_embedding(state.trainable["adapter"], memory["start"], config.gate)
    scatter, count = memory["scatter"], memory["count"]
    if config.head.covariance == "all" and len(count) > 1:
        scatter, count = (_carried_on(sums, state.task) for sums in (scatter, count))
    # Later slots have no features of this task.
    known = (jnp.arange(len(count)) <= state.task).astype(jnp.float32)
    memory = {
        **memory,
        "rows": rows,
        "task_states": memory["task_states"].at[state.task].set(vector),
        "class_means": memory["class_means"].at[columns].set(means[0], mode="drop"),
        "scatter": scatter + within_class_scatter(statistics) * known[:, None, None],
        "count": count + statistics.count.sum() * known,
    }
    if frozen.is_read(config):
        memory["frozen"] = frozen.with_task(state, of_frozen)
    state = state.replace(memory={**memory, "metrics": _learned_metrics(state, memory)})
    if config.head.whiten:
        whitened = jax.vmap(whiten)(_row_metrics(state), rows)
        state = state.replace(memory={**state.memory, "whitened_rows": whitened})
    if config.gate.kind == "measurement":
        (vectors, owner), settings = anchors(state), config.gate
        root = measurement.root(vectors, owner >= 0, settings.copies, settings.ridge)
        state = state.replace(memory={**state.memory, "measurement": root})
    return state.replace(trainable={**state.trainable, "gate": _taught_gate(state, key)})


def _carried_on(sums, task):
    """`sums` [S, ...] of all slots, where that of a new task starts from the last task's."""
    last = jnp.where(task > 0, sums[jnp.maximum(task - 1, 0)], 0.0)
    return sums.at[task].set(last)


def _learned_metrics(state, memory):
    """The metric of each slot, centred at the classes that its adapter has seen."""
    owner = state.task_of_class

    def one(slot):
        members = (owner >= slot) & (owner >= 0)
        # Centred at its own mean a single class would have no direction: then at all rows' mean.
        members = jnp.where(members.sum() == 1, owner >= 0, members)
        rows = memory["rows"][jnp.minimum(slot, len(memory["rows"]) - 1)]
        means = jnp.where(slot == 0, memory["class_means"], rows)
        count = memory["count"][slot]
        return learned_metric(
            memory["scatter"][slot], count, means, members, _isotropic_share(state, count)
        )

    return lax.map(one, jnp.arange(len(memory["count"])))


def _isotropic_share(state, count):
    """Share of the isotropic part in a covariance of so many images."""
    config, width = state.config.gate, state.backbone.spec.width
    return isotropic_share(config.shrinkage, config.prior, count, width)


def _row_metrics(state):
    """One metric for each slot with rows."""
    return jax.vmap(lambda slot: metric_of(state, slot))(jnp.arange(len(state.memory["rows"])))


def _taught_gate(state, key):
    """The gate's parameters after calibration on pseudo-features of all classes seen."""
    config, memory = state.config, state.memory
    factor = jnp.eye(state.backbone.spec.width)  # whitened noise has unit covariance
    if not config.gate.whiten:
        count = memory["count"][0]
        factor = shrunk_factor(memory["scatter"][0], count, _isotropic_share(state, count))
    means, before = gate_inputs(state, memory["class_means"]), state.trainable["gate"]
    taught = gate.calibrate(
        key,
        before,
        config.gate,
        means,
        state.task_of_class,
        factor,
        *anchors(state),
        config.shapes.max_tasks,
    )
    if config.gate.freeze_after < 0:
        return taught
    kept = state.task > config.gate.freeze_after
    return jax.tree.map(lambda a, b: jnp.where(kept, a, b), before, taught)
