"""QKD: an adapter per task, a quantum gate for relevance, weighted distillation and fusion.

Li et al., "Quantum-Gated Task-interaction Knowledge Distillation for Pre-trained Model-based
Class-Incremental Learning", CVPR 2026, arXiv 2604.11112. In training, relevance alpha weights the
old adapters as teachers of the new one; at test it mixes the logits of all adapters. No task id is
given. What the paper leaves open is a setting; the preset `paper` makes the literal choices.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from qkd_jax.errors import ConfigError
from qkd_jax.learners.ease import freeze
from qkd_jax.learners.qkd import frozen, gate
from qkd_jax.learners.qkd.finish import (
    add_to_sums,
    empty_sums,
    finish,
    num_metrics,
    num_row_slots,
)
from qkd_jax.learners.qkd.fusion import (
    FusionSettings,
    most_relevant,
    passes,
    predict,
    predict_with_task,
    route,
    score,
    score_with_task,
)
from qkd_jax.learners.shape import Learner, Slots, Sums, class_columns, register
from qkd_jax.learners.state import local_labels, old_classes, valid_task_classes
from qkd_jax.learners.task_adapters import (
    adapter_of,
    empty_adapters,
    encode_with,
    encode_with_chosen,
    first_adapter_block,
    new_adapter,
    on_host,
)
from qkd_jax.learners.task_heads import HeadSettings, new_head, next_head
from qkd_jax.nn.adapters import AdapterSpec
from qkd_jax.nn.heads import head_logits, unit
from qkd_jax.nn.inputs import num_inputs
from qkd_jax.nn.losses import (
    cross_entropy,
    distillation,
    entropy,
    feature_distillation,
    sparsity,
)
from qkd_jax.nn.whitening import identity_metric
from qkd_jax.settings.ranges import setting


@dataclass(frozen=True)
class QkdAdapterSpec(AdapterSpec):
    """Adapters, where the adapter of a new task starts, and where those of finished tasks stand."""

    # As the last task's ended, so that what was learned goes on, or anew.
    start: Literal["previous", "random"] = "previous"
    # On the host they take no memory of the device, and are sent to it for every pass.
    memory: Literal["device", "host"] = "device"


@dataclass(frozen=True)
class QkdHeadSettings(HeadSettings):
    """The classifier over a feature.

    `prototypes`: the head rows of a task's classes after the task. `none` keeps the trained rows;
    `own` replaces them by the class means under the task's own adapter; `all` keeps one row for
    each (adapter, class): the class mean under every adapter known when the class is learned, and
    for later adapters the mean under its own; `drift` moves the latter by how much similar classes
    moved.
    `covariance`: the classes whose spread is the metric of an adapter. `seen` are those that came
    with it or later; `all` are the older ones too, as each spread under its own task's adapter.
    """

    prototypes: Literal["none", "own", "all", "drift"] = "drift"
    whiten: bool = True  # at test, compare in the metric of the stored within-class covariance
    covariance: Literal["all", "seen"] = "all"


@dataclass(frozen=True)
class DistillationSettings:
    """Task-interaction knowledge distillation (TIKD, Eq. 13)."""

    weight: float = 1.0
    # The most relevant old adapters of each image teach it, alpha renormalised over them.
    top_k: int = setting(0, low=0, zero="all old adapters")
    columns: Literal["seen", "all", "own"] = "seen"
    temperature: float = setting(1.0, above=0)
    target: Literal["logits", "features"] = "logits"
    # What the old adapters see of an image that is augmented: the same view, in every step anew; or
    # the image itself ("test"), once per task.
    teacher_view: Literal["training", "test"] = "training"


@dataclass(frozen=True)
class SparsitySettings:
    """Sparsity of the relevance (Eq. 11); the literal `l1_softmax` is constant."""

    kind: Literal["l1_softmax", "l1_scores", "entropy"] = "entropy"
    weight: float = 0.05


PRESETS = {
    "qkd": (),  # the defaults, chosen to work
    # The literal choices of the paper: fidelity scores at temperature 1, no calibration of the
    # gate, the constant L1.
    "paper": (
        "adapter.start=random",
        "gate.encoding=angle",
        "gate.num_qubits=9",
        "gate.whiten=false",
        "head.whiten=false",
        "gate.theta_scale=6.283185307179586",
        "gate.states=weights",
        "gate.score=fidelity",
        "gate.temperature=1.0",
        "gate.calibration_steps=0",
        "sparsity.kind=l1_softmax",
        "head.prototypes=own",
        "fusion.frozen_weight=0",
    ),
}


def init(key, backbone, config):
    if on_host(config) and config.fusion.kind == "block_mix":
        raise ConfigError(
            "adapter.memory: expected device, since fusion.kind=block_mix reads all adapters at "
            "once, found host; set adapter.memory=device or fusion.kind=routed"
        )
    width = backbone.spec.width
    adapter = new_adapter(jax.random.fold_in(key, 0), backbone, config)
    trainable = {
        "adapter": adapter,
        "head": new_head(jax.random.fold_in(key, 1), backbone, config),
        "gate": gate.init_gate(
            jax.random.fold_in(key, 2), config.gate, width, config.shapes.max_tasks
        ),
    }
    slots, metric_slots = num_row_slots(config), num_metrics(config)
    identity = identity_metric(width)
    memory = {
        "adapters": empty_adapters(backbone, config),
        "start": adapter,
        "rows": jnp.zeros((slots, config.shapes.num_classes, width)),
        "task_states": jnp.zeros((config.shapes.max_tasks, width)),
        "class_means": jnp.zeros((config.shapes.num_classes, width)),
        "scatter": jnp.zeros((metric_slots, width, width)),
        "count": jnp.zeros(metric_slots),
        "metrics": jax.tree.map(lambda a: jnp.stack([a] * metric_slots), identity),
    }
    if config.head.whiten:
        memory["whitened_rows"] = jnp.zeros_like(memory["rows"])
    if config.gate.kind == "measurement":
        memory["measurement"] = jnp.zeros((config.shapes.num_classes,) * 2)
    if frozen.is_read(config):
        memory["frozen"] = frozen.empty(config, width)
    return trainable, memory


def begin(state, key):
    key_adapter, key_head = jax.random.split(key)
    adapter = new_adapter(key_adapter, state.backbone, state.config)
    if state.config.adapter.start == "previous":
        follow = state.task > 0
        previous = adapter_of(state, jnp.maximum(state.task - 1, 0))
        adapter = jax.tree.map(lambda new, old: jnp.where(follow, old, new), adapter, previous)
    trainable = {
        "adapter": adapter,
        "head": next_head(state, key_head),
        "gate": state.trainable["gate"],
    }
    return trainable, {**state.memory, "start": adapter}


class Teachers(NamedTuple):
    """The old adapters that teach each image.

    Attributes:
      slots: int [B, K], or [1, T] where all teach every image.
      features: [B, K, D], under the adapters of these slots.
      weights: [B, K], alpha, or alpha renormalised over the K most relevant.
    """

    slots: jax.Array
    features: jax.Array
    weights: jax.Array


def teachers_of(state, gate_params, inputs, batch):
    """(`Teachers`, `gate.Relevance` of the old tasks); features from the batch, or computed: of all
    old adapters in a pass of each, of K chosen ones in 1 + K passes, however many tasks there are.
    """
    config, tasks = state.config, jnp.arange(state.config.shapes.max_tasks)
    kept, old = batch.get("features"), tasks < state.task
    if kept is not None:
        kept = kept[:, : len(tasks)]  # without the frozen model's
    if config.distillation.top_k in range(1, len(tasks)):
        if kept is None:
            query = encode_with(state, adapter_of(state, 0), inputs)
        else:
            query = kept[:, 0]
        relevance = route(state, gate_params, lax.stop_gradient(query), old)
        weights, slots = most_relevant(relevance.weights, config.distillation.top_k)
        if kept is None:
            features = encode_with_chosen(state, slots, inputs)
        else:
            features = jnp.take_along_axis(kept, slots[:, :, None], axis=1)
    else:
        features = _every_feature(state, inputs) if kept is None else kept
        relevance = route(state, gate_params, lax.stop_gradient(features[:, 0]), old)
        weights, slots = relevance.weights, tasks[None]
    return Teachers(slots, lax.stop_gradient(features), weights), relevance


def _every_feature(state, inputs):
    """Features [B, T, D] under all old adapters."""
    shape = (num_inputs(inputs), state.config.shapes.max_tasks, state.backbone.spec.width)

    def fill(slot, features):
        return features.at[:, slot].set(encode_with(state, adapter_of(state, slot), inputs))

    return lax.fori_loop(0, state.task, fill, jnp.zeros(shape))


def teacher_logits(state, teachers, scale):
    """z^(i) [B, K, C] of `Teachers`, each on the rows of its slot."""
    rows, kind = state.memory["rows"], state.config.head.kind

    def on_rows(features, rows):
        return head_logits(features, rows, scale, kind)

    if len(rows) == 1:
        return on_rows(teachers.features, rows[0])
    if teachers.slots.shape[1] == len(rows):  # every slot, the same for all images
        return jax.vmap(on_rows, in_axes=(1, 0), out_axes=1)(teachers.features, rows)
    # One teacher of every image after the other: the rows of all at once would be [B, K, C, D].
    own = jax.vmap(lambda slot, feature: on_rows(feature[None], rows[slot])[0])
    by_teacher = teachers.slots.T, jnp.moveaxis(teachers.features, 1, 0)
    return jnp.moveaxis(lax.map(lambda one: own(*one), by_teacher), 0, 1)


def loss(trainable, state, inputs, batch, context):
    """Eq. 15: L = L_CE + lambda_kd L_QKD + lambda_s L_s, for each image."""
    config = state.config
    head = trainable["head"]
    feature = encode_with(state, trainable["adapter"], inputs, context.keys)
    logits = head_logits(feature, head["rows"], head["scale"], config.head.kind)
    labels, valid = local_labels(state, batch["label"]), valid_task_classes(state)
    ce = cross_entropy(logits, labels, valid)

    gate_params = _still_learning(state, trainable["gate"])
    teachers, relevance = teachers_of(state, gate_params, inputs, batch)
    if config.distillation.target == "features":
        kd = feature_distillation(unit(teachers.features), unit(feature), teachers.weights)
    else:
        kd = _distil_logits(state, trainable, feature, teachers)
    sparse = sparsity(config.sparsity.kind, relevance.weights, relevance.scores)
    total = ce + config.distillation.weight * kd + config.sparsity.weight * sparse
    correct = jnp.argmax(jnp.where(valid, logits, -jnp.inf), axis=1) == labels
    return {
        "loss": total,
        "loss_ce": ce,
        "loss_kd": kd,
        "loss_sparsity": sparse,
        "gate_entropy": entropy(relevance.weights),
        "train_accuracy": 100.0 * correct.astype(jnp.float32),
    }


def _still_learning(state, params):
    """The gate's parameters, without gradients once the gate is frozen (`gate.freeze_after`)."""
    last = state.config.gate.freeze_after
    if last < 0:
        return params
    frozen = lax.stop_gradient(params)
    return jax.tree.map(lambda a, b: jnp.where(state.task > last, a, b), frozen, params)


def _distil_logits(state, trainable, feature, teachers):
    """Eq. 13 on the columns of `distillation.columns`: [B]."""
    config, head = state.config, trainable["head"]
    scale = lax.stop_gradient(head["scale"])
    taught = teacher_logits(state, teachers, scale)
    rows = state.memory["rows"]
    own_rows = rows[jnp.minimum(state.task, rows.shape[0] - 1)]
    student = head_logits(feature, own_rows, scale, config.head.kind)
    owner, columns = state.task_of_class, old_classes(state)[None, None]
    if config.distillation.columns == "own":
        columns = owner[None, None] == teachers.slots[:, :, None]
    if config.distillation.columns == "all":
        columns = (owner >= 0)[None, None]
        current = class_columns(state)
        local = head_logits(feature, head["rows"], scale, config.head.kind)
        student = student.at[:, current].set(local, mode="drop")
        local = head_logits(teachers.features, head["rows"], scale, config.head.kind)
        taught = taught.at[:, :, current].set(local, mode="drop")
    return distillation(taught, student, columns, teachers.weights, config.distillation.temperature)


def extract(state, inputs, slot, features):
    """The feature under a slot's adapter; zeros stand for the frozen model."""
    last = frozen.slot_of(state.config) - 1
    adapter = adapter_of(state, jnp.minimum(slot, last))
    if frozen.is_read(state.config):
        adapter = jax.tree.map(lambda a: jnp.where(slot > last, 0.0, a), adapter)
    return encode_with(state, adapter, inputs)


def slots(config):
    """The slots that are read; rows that all slots share need the task's own slot and the gate's
    alone when a task ends.
    """

    unmoved = [frozen.slot_of(config)] if frozen.is_read(config) else []

    def every(task):
        return [*range(task + 1), *unmoved]

    return Slots(
        score=every,
        finish=every if num_row_slots(config) > 1 else lambda task: sorted({0, task, *unmoved}),
        loss=range,
        loss_view=config.distillation.teacher_view,
        frozen=unmoved[0] if unmoved else None,
    )


def describe(config):
    """The gate's circuit as text, if it has one."""
    circuit = gate.drawing(config.gate)
    return {"circuit.txt": circuit} if circuit else {}


LEARNER = register(
    Learner(
        name="qkd",
        init=init,
        begin=begin,
        loss=loss,
        freeze=freeze,
        finish=finish,
        extract=extract,
        score=score,
        slots=slots,
        score_with_task=score_with_task,
        sums=Sums(empty=empty_sums, add=add_to_sums),
        predict=lambda config: None if config.fusion.kind == "logits" else predict,
        predict_with_task=lambda config: (
            None if config.fusion.kind == "logits" else predict_with_task
        ),
        passes=passes,
        first_block=first_adapter_block,
        describe=describe,
    ),
    presets=PRESETS,
    adapter=QkdAdapterSpec,
    head=QkdHeadSettings,
    gate=gate.GateSettings,
    distillation=DistillationSettings,
    sparsity=SparsitySettings,
    fusion=FusionSettings,
)
