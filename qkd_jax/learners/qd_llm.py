"""QD-LLM: a circuit of 11 qubits that learns to classify texts from a larger teacher.

Li et al., arXiv 2505.13205 (v2, August 2025); the circuit and the loss follow the authors' code
(Lilingxiao-bupt/QD-LLM). The frozen encoder's feature e of a text becomes Q = 11 angles, min-max
scaled for each text to [0, 10] radians, which wraps; the circuit gives <Z> of every qubit; a linear
layer makes logits of them:

    a = W_1 e + b_1,  x = 10 (a - min a) / (max a - min a + 1e-9),  m = <Z>(x),  z = W_2 m + b_2

With C = 2 classes and a feature of width 768 that is 8,627 numbers, of which 96 of the circuit's
144 change nothing or only as a sum (`quantum.classifier_circuit`). The loss, over the classes of
the task, with the teacher's logits z_T,

    loss = (1 - alpha) CE(z, y) + alpha tau^2 KL( softmax(z_T / tau) || softmax(z / tau) )
           + alpha JS                                                   alpha 0.5, tau 2

The JS term is off by default. The authors' code (`js=repo`) gives it log-probabilities and
probabilities in place of logits, so that the softmax is taken again; `proper` is the Jensen-Shannon
divergence of the softened probabilities. Without a teacher the loss is CE alone.

Always compare with `student=cos`, the same with m = cos(x), which is the circuit without its
trained part, and `student=tanh`, m = tanh(a) without scaling: the same bottleneck of 11 numbers
without a quantum computer, and 144 numbers less.

Where we differ: the teacher is a method of this library on the same encoder (`qd_llm.teacher`),
where the paper has language models of 1 to 8 billion parameters. The feature is the encoder's own
(`backbone.pooling`: the mean of a text's tokens, or the class token); the authors read the last
position of a text padded to its full length, which is a padding token (`feature=repo_last`). The
paper learns all classes at once, the default protocol here. In a class-incremental run, which is
ours, layers and circuit are trained on from task to task, and each task has rows of W_2.

Published: Adam at 0.06; batch and epochs cannot be read from the authors' files.
"""

from dataclasses import dataclass, replace
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qkd_jax.errors import ConfigError
from qkd_jax.learners import passes
from qkd_jax.learners.features import pooled_feature
from qkd_jax.learners.shape import (
    NO_SUMS,
    Learner,
    Slots,
    Teacher,
    class_columns,
    feature_width,
    learner_of,
    register,
    teacher_settings,
)
from qkd_jax.learners.state import LearnerState, valid_task_classes
from qkd_jax.learners.task_heads import class_terms, finish_with_head, mask_unseen, with_term
from qkd_jax.nn.encode import encode
from qkd_jax.nn.heads import linear_logits
from qkd_jax.nn.losses import MASKED, jensen_shannon, softened_kl
from qkd_jax.quantum.classifier_circuit import (
    circuit_parameters,
    classifier_circuit,
    classifier_expectations,
    init_angles,
)
from qkd_jax.quantum.noise import Noise, noisy_expectations
from qkd_jax.settings.config import Config
from qkd_jax.settings.methods import method_named
from qkd_jax.settings.ranges import setting


@dataclass(frozen=True)
class QdLlmSettings:
    """Distillation into a small circuit (arXiv 2505.13205), or into its classical twins."""

    student: Literal["circuit", "cos", "tanh"] = "circuit"
    qubits: int = setting(11, low=5)  # of the twins, the width of the bottleneck
    feature: Literal["pooled", "repo_last"] = "pooled"
    angle_range: float = setting(10.0, above=0)  # radians, from the least angle to the largest
    teacher: str = "linear_probe"  # a method that reads texts; none = no teacher
    # Of the teacher's steps, which otherwise are like the student's.
    teacher_rate: float = setting(0.0, low=0, zero="as train.learning_rate", of_steps=True)
    alpha: float = setting(0.5, low=0, high=1)  # weight of the teacher, against the labels
    temperature: float = setting(2.0, above=0)  # tau
    js: Literal["off", "repo", "proper"] = "off"


def teacher_config(config: Config) -> Config | None:
    """The teacher's settings: its method on the student's encoder; None with
    `qd_llm.teacher=none`.

    Raises:
      ConfigError: the teacher is no method, or one that has a teacher itself.
    """
    settings = config.qd_llm
    if settings.teacher == "none":
        return None
    method_named(settings.teacher)
    teacher = teacher_settings(config, settings.teacher, config.backbone, settings.teacher_rate)
    if learner_of(teacher).teacher is not None:
        raise ConfigError(
            f"qd_llm.teacher: expected a method without a teacher, found {settings.teacher}"
        )
    return teacher


def alone(config: Config) -> Config:
    """The settings of the same student without a teacher."""
    taught = ("teacher_rate", "alpha", "temperature", "js")
    defaults = {name: getattr(QdLlmSettings, name) for name in taught}
    return config.replace(qd_llm=replace(config.qd_llm, teacher="none", **defaults))


def teacher_outputs(state: LearnerState, inputs) -> dict:
    """{"logits": [B, C]}: the teacher's scores, -inf for classes that it has not seen."""
    return {"logits": scores_of(state.teacher, inputs)}


def scores_of(state: LearnerState, inputs) -> jax.Array:
    """Scores [B, C] of any learner, with the slots that its task asks for."""
    config, learner = state.config, learner_of(state.config)
    if learner.predict(config) is not None:
        return passes.predict(state, inputs)[0]
    size, asked = learner.num_slots(config), []
    for task in range(config.shapes.max_tasks):
        asked.append(tuple(learner.slots.score(task)))
    padded = np.array([[*slots, *[0] * (size - len(slots))] for slots in asked], np.int32)
    counts = np.array([len(slots) for slots in asked], np.int32)
    batch, task = len(jax.tree.leaves(inputs)[0]), jnp.maximum(state.task, 0)
    empty = jnp.zeros((batch, size, feature_width(state)))
    features = passes.extract(
        state, inputs, empty, jnp.asarray(padded)[task], jnp.asarray(counts)[task]
    )
    return passes.score(state, features)[0]


def init(key, backbone, config):
    settings, shapes = config.qd_llm, config.shapes
    keys = jax.random.split(key, 3)
    reduce, bias = _uniform(keys[0], settings.qubits, backbone.spec.width)
    trainable = {
        "reduce": {"kernel": reduce.T, "bias": bias},
        "head": _new_head(keys[1], config),
    }
    if settings.student == "circuit":
        trainable["angles"] = init_angles(keys[2], settings.qubits)
    memory = {
        "rows": jnp.zeros((shapes.num_classes, settings.qubits)),
        "bias": jnp.zeros(shapes.num_classes),
    }
    return trainable, memory


def begin(state, key):
    return {**state.trainable, "head": _new_head(key, state.config)}, state.memory


def _new_head(key, config):
    """Rows [M, Q] and bias [M] of one task's classes."""
    rows, bias = _uniform(key, config.shapes.max_task_classes, config.qd_llm.qubits)
    return {"rows": rows, "bias": bias}


def _uniform(key, outputs, inputs):
    """Weights [outputs, inputs] and biases [outputs], uniform in +-1 / sqrt(inputs)."""
    bound = inputs**-0.5
    drawn = jax.random.uniform(key, (outputs, inputs + 1), minval=-bound, maxval=bound)
    return drawn[:, :-1], drawn[:, -1]


def feature_of(state, inputs):
    """[B, D]: the frozen encoder's feature."""
    if state.config.qd_llm.feature == "pooled":
        return pooled_feature(state, inputs)
    fields, room = inputs.fields, state.backbone.spec.num_tokens
    mask = fields["token_mask"]
    # As the authors' tokenizer pads: token 0, up to the full length.
    ids = jnp.where(mask, fields["token_ids"], 0)
    missing = ((0, 0), (0, room - mask.shape[1]))
    padded = {"token_ids": jnp.pad(ids, missing), "token_mask": jnp.pad(mask, missing)}
    dtype = jnp.dtype(state.config.backbone.compute_dtype)
    rows = encode(
        state.backbone, inputs.replace(fields=padded), rows=(room - 1,), compute_dtype=dtype
    )
    return rows[:, 0].astype(jnp.float32)


def data_angles(state: LearnerState, trainable: dict, features: jax.Array) -> jax.Array:
    """The angles x [B, Q] in radians that features [B, D] are encoded with."""
    values = _reduced(trainable, features)
    least, largest = (f(values, axis=1, keepdims=True) for f in (jnp.min, jnp.max))
    return state.config.qd_llm.angle_range * (values - least) / (largest - least + 1e-9)


def _reduced(trainable, features):
    return features @ trainable["reduce"]["kernel"] + trainable["reduce"]["bias"][None]


def measured(state: LearnerState, trainable: dict, features: jax.Array) -> jax.Array:
    """m [B, Q] of features [B, D]: what the circuit measures, or its twin in its place."""
    student = state.config.qd_llm.student
    if student == "tanh":
        return jnp.tanh(_reduced(trainable, features))
    inputs = data_angles(state, trainable, features)
    if student == "cos":
        return jnp.cos(inputs)
    return classifier_expectations(inputs, trainable["angles"])


def noisy_scores(
    key: jax.Array, state: LearnerState, features: jax.Array, noise: Noise, shots: int
) -> jax.Array:
    """Scores [B, C] as a device would give them, with its errors and from so many shots.

    Args:
      key: a random key.
      state: of a trained circuit.
      features: [B, D] of the frozen encoder: slot 0.
      noise: how probable errors are.
      shots: of each text.

    Raises:
      ConfigError: the student is a classical twin.
    """
    if state.config.qd_llm.student != "circuit":
        raise ConfigError(
            f"qd_llm.student: expected circuit, which has shots, found "
            f"{state.config.qd_llm.student}"
        )
    inputs = data_angles(state, state.trainable, features)
    angles = state.trainable["angles"]
    parameters = jax.vmap(lambda row: circuit_parameters(row, angles))(inputs)
    circuit = classifier_circuit(inputs.shape[1])
    return _scores(state, noisy_expectations(key, circuit, parameters, noise, shots))


def _scores(state, values):
    return mask_unseen(state, linear_logits(values, state.memory["rows"], state.memory["bias"]))


def loss(trainable, state, inputs, batch, context):
    features = batch["features"][:, 0] if "features" in batch else feature_of(state, inputs)
    values = measured(state, trainable, lax.stop_gradient(features))
    logits = linear_logits(values, trainable["head"]["rows"], trainable["head"]["bias"])
    terms = class_terms(state, logits, batch["label"])
    if "teacher" not in batch:
        return terms
    settings = state.config.qd_llm
    columns = jnp.minimum(class_columns(state), state.config.shapes.num_classes - 1)
    teacher, valid = batch["teacher"]["logits"][:, columns], valid_task_classes(state)[None]
    terms = {**terms, "loss": (1 - settings.alpha) * terms["loss"]}
    divergence = softened_kl(teacher, logits, valid, settings.temperature)
    terms = with_term(terms, "distillation", settings.alpha, divergence)
    if settings.js != "off":
        form = repeated_softmax_js if settings.js == "repo" else jensen_shannon
        soft = (values / settings.temperature for values in (teacher, logits))
        terms = with_term(terms, "js", settings.alpha, form(*soft, valid))
    return terms


def repeated_softmax_js(teacher: jax.Array, student: jax.Array, columns: jax.Array) -> jax.Array:
    """[B]: what the authors' code computes in place of a Jensen-Shannon divergence.

    With log p of the student and q of the teacher taken for logits, and m the mean of softmax(log
    p) = p and softmax(q): the mean over classes of (KL(m || p) + KL(m || softmax(q))) / 2.

    Args:
      teacher, student: [B, M] logits.
      columns: bool [1, M], the classes that count.
    """

    def log_softmax(logits):
        return jax.nn.log_softmax(jnp.where(columns, logits, MASKED))

    log_student = log_softmax(student)
    log_teacher = log_softmax(lax.stop_gradient(jnp.exp(log_softmax(teacher))))
    mean = 0.5 * (jnp.exp(log_student) + jnp.exp(log_teacher))
    log_mean = jnp.log(jnp.where(columns, mean, 1.0))
    terms = mean * (log_mean - 0.5 * (log_student + log_teacher))
    return jnp.sum(jnp.where(columns, terms, 0.0), axis=1) / jnp.sum(columns).astype(jnp.float32)


def score(state, features):
    return _scores(state, measured(state, state.trainable, features[:, 0])), None


def slots(config):
    """Slot 0 is the frozen encoder's feature, which training and scoring read."""
    shared = config.qd_llm.feature == "pooled"
    return Slots(
        score=lambda task: (0,),
        finish=lambda task: (),
        loss=lambda task: (0,),
        frozen=0 if shared else None,
    )


LEARNER = register(
    Learner(
        name="qd_llm",
        init=init,
        begin=begin,
        loss=loss,
        freeze=lambda state: state,
        finish=finish_with_head,
        extract=lambda state, inputs, slot, features: feature_of(state, inputs),
        score=score,
        slots=slots,
        sums=NO_SUMS,
        teacher=Teacher(teacher_config, alone, teacher_outputs, rate="qd_llm.teacher_rate"),
        has_features=False,
    ),
    defaults=("protocol.kind=joint", "train.optimizer=adam", "train.weight_decay=0"),
    reads="token_ids",
    qd_llm=QdLlmSettings,
)
