"""Q-tuning: a queue of soft prompts in front of a text; with prompt_per_task and prog_prompt.

Guo et al., "Q-tuning: Queue-based Prompt Tuning for Lifelong Few-shot Language Learning", Findings
of NAACL 2024, arXiv 2404.14607. The encoder is frozen. Task i trains a soft prompt theta_i of l
rows, which enters the front of a queue Q^i = [theta_i; Q^(i-1)] with room for C rows. A text is
read after [theta_*; W^i * Q^i], where theta_* is a prefix shared by all tasks and W^i = u v^T
reweights the queue, entry by entry; a linear head per task on the feature of the text classifies.
No code was published and the body of the paper could not be read, so each part has its grade:

- from the abstract: the queue, old prompts fixed in it; eviction by principal components when it is
  full; a prefix shared by all tasks, and information theory (mutual information) to retain memory;
- from the public reviews: W of rank one; the decomposition of the queue is that of singular values;
  the prompt is reparametrised by a residual perceptron in training; the retained quantity is the
  prediction of theta_* alone, without the queue;
- from the code of Progressive Prompts (arXiv 2301.12314), which the method extends: the new prompt
  stands first; prompts start as random rows of the token table; one head per task; a perceptron of
  800 hidden units;
- unverified memory: W as an elementwise product that also covers theta_i; the loss below; rows are
  centred and the first C - l components kept; the Jensen-Shannon estimator;
- our choices, all of them settings where there was another way: see `QTuningSettings`, `queue`
  and `retention`, and what follows.

Loss: cross-entropy over the task's own classes + retention_weight * -I(student; teacher). The
teacher is the prediction after [theta_*; W * Q] as the last task left them, the student that after
theta_* alone, both under the current head. Gradients of this term reach theta_* and the critic,
neither the teacher nor the head; the first task has no teacher. theta_* gets the gradient of both
terms. Each task starts with u = v = 1, the only start that changes nothing (derived), a new prompt,
critic and head; theta_* goes on. The queue holds rows without W, so W is not passed on to the next
task; the perceptron's second layer starts at zero. Room that is not filled yet is masked out of
attention, so shapes do not depend on the task.

`prompt_per_task` has no queue: the text is read after theta_i. `prog_prompt` is Progressive Prompts
(arXiv 2301.12314): room for every task, no prefix, no W, no retention.

Evaluation. The authors give the task at test time; `predict` here has no such argument. A text is
classified by the head of every task, on the feature under that task's model; a task is the more
relevant the lower the entropy of its prediction (ours). Scores are log relevance + log p, so that
within a task they rank as the method does: `within_task_accuracy` is the number that compares.
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from qkd_jax.errors import ConfigError
from qkd_jax.learners.features import pooled_feature
from qkd_jax.learners.q_tuning import queue as queues
from qkd_jax.learners.q_tuning.retention import mutual_information, new_critic
from qkd_jax.learners.shape import NO_SUMS, Learner, Slots, register
from qkd_jax.learners.state import valid_task_classes
from qkd_jax.learners.task_heads import (
    class_terms,
    empty_linear_head,
    finish_with_head,
    mask_unseen,
    new_linear_head,
    with_term,
)
from qkd_jax.nn.heads import linear_logits
from qkd_jax.nn.inserts import Inserts
from qkd_jax.nn.losses import MASKED, entropy
from qkd_jax.nn.prompts import vocabulary_rows
from qkd_jax.settings.ranges import Conflicts, setting


@dataclass(frozen=True)
class PromptPerTaskSettings:
    """A soft prompt of its own for each task, the baseline of arXiv 2404.14607."""

    prompt_length: int = setting(10, low=1)  # l rows
    # Hidden units of the residual perceptron through which a prompt is trained.
    reparametrise: int = setting(800, low=0, zero="none")
    # Of the softmax over tasks; entropies lie between 0 and 1.
    temperature: float = setting(0.1, above=0)

    # What the baselines do without. They are no settings of theirs: no field is declared.
    queue_size = 1  # prompts; 0 = of every task
    prefix_length = 0
    eviction = "fifo"
    reweight = "none"
    retention_weight = 0.0
    evaluation = "snapshot"


@dataclass(frozen=True)
class ProgPromptSettings(PromptPerTaskSettings):
    """Progressive Prompts (arXiv 2301.12314): the prompts of all tasks, the newest first."""

    # An old task is read with the prompts up to its own, or with those of all tasks.
    evaluation: Literal["snapshot", "final"] = "snapshot"
    queue_size = 0


@dataclass(frozen=True)
class QTuningSettings(PromptPerTaskSettings):
    """Q-tuning (arXiv 2404.14607): the queue, what leaves it, and what is retained.

    `evaluation`: an old task is read with the prefix and queue that it left, of which a copy is
    kept for each task, so that nothing is forgotten; or with the last ones, in constant memory.
    The abstract's constant memory fits `final`, its setting without forgetting of tasks `snapshot`.
    """

    queue_size: int = setting(5, low=1)  # prompts
    prefix_length: int = setting(10, low=0, zero="none")  # rows of theta_*
    eviction: Literal["pca", "fifo", "random"] = "pca"
    keep_mean: bool = False  # add the mean row of the queue to its principal rows
    fix_sign: bool = True  # principal rows point along the mean row
    reweight: Literal["rank_one", "none"] = "rank_one"
    retention_weight: float = setting(0.01, low=0, zero="none")  # eta
    retention_hidden: int = setting(64, low=1)  # units in each hidden layer of the critic
    evaluation: Literal["snapshot", "final"] = "snapshot"

    def conflicts(self) -> Conflicts:
        if self.retention_weight and not self.prefix_length:
            yield "retention_weight", "0 with q_tuning.prefix_length=0, since it trains the prefix"


def settings_of(config):
    """The section of whichever of the three methods this is."""
    return getattr(config, config.method)


def room(config):
    """How many prompts the queue has room for; more than there are tasks would never be used."""
    tasks = config.shapes.max_tasks
    return min(settings_of(config).queue_size or tasks, tasks)


def in_one_queue(config):
    """Whether the last queue holds all earlier ones: nothing leaves it and nothing changes it, so
    that no copies are needed.
    """
    settings = settings_of(config)
    whole = room(config) == config.shapes.max_tasks
    return whole and not settings.prefix_length and settings.reweight == "none"


def init(key, backbone, config):
    settings, shapes, spec = settings_of(config), config.shapes, backbone.spec
    size = settings.prefix_length + room(config) * settings.prompt_length
    if size + spec.num_tokens > spec.positions:
        raise ConfigError(
            f"{config.method}.prompt_length: expected at most {spec.positions - spec.num_tokens} "
            f"rows in front of {spec.num_tokens} tokens, since the encoder has {spec.positions} "
            f"positions, found {size}: {settings.prefix_length} of the prefix and "
            f"{room(config)} prompts of {settings.prompt_length}"
        )
    trainable = new_trainable(key, backbone, config)
    if settings.prefix_length:
        key_prefix = jax.random.fold_in(key, 4)
        trainable["prefix"] = vocabulary_rows(key_prefix, backbone, settings.prefix_length)
    copies = settings.evaluation == "snapshot" and not in_one_queue(config)
    memory = {
        "queue": jnp.zeros((size - settings.prefix_length, spec.width)),
        # What stands in front of a text after each task, or after the last: [prefix; W * queue].
        "models": jnp.zeros((shapes.max_tasks if copies else 1, size, spec.width)),
        **empty_linear_head(backbone, config),
    }
    return trainable, memory


def new_trainable(key, backbone, config):
    """What every task trains anew: all but the prefix."""
    settings, width = settings_of(config), backbone.spec.width
    keys = [jax.random.fold_in(key, i) for i in range(4)]
    trainable = {
        "prompt": vocabulary_rows(keys[0], backbone, settings.prompt_length),
        "head": new_linear_head(keys[1], backbone, config),
    }
    if hidden := settings.reparametrise:
        first = jax.random.normal(keys[2], (width, hidden)) * (2 / width) ** 0.5
        trainable["perceptron"] = {
            "down": {"kernel": first, "bias": jnp.zeros(hidden)},
            "up": {"kernel": jnp.zeros((hidden, width)), "bias": jnp.zeros(width)},
        }
    if settings.reweight == "rank_one":
        rows = room(config) * settings.prompt_length
        trainable["reweighting"] = {"u": jnp.ones(rows), "v": jnp.ones(width)}
    if settings.retention_weight:
        inputs = 2 * config.shapes.max_task_classes
        trainable["critic"] = new_critic(keys[3], inputs, settings.retention_hidden)
    return trainable


def begin(state, key):
    """Room for the new prompt in front of the queue, and all that the task trains."""
    settings, config, queue = settings_of(state.config), state.config, state.memory["queue"]
    length, key_rows = settings.prompt_length, jax.random.fold_in(key, 5)
    kept = queues.shifted(queue, length)
    if settings.eviction != "fifo" and room(config) < config.shapes.max_tasks:

        def trimmed():
            if settings.eviction == "random":
                return queues.random_rows(key_rows, queue, length)
            options = {"keep_mean": settings.keep_mean, "fix_sign": settings.fix_sign}
            return queues.principal_rows(queue, length, **options)

        kept = lax.cond(state.task >= room(config), trimmed, lambda: kept)
    queue = jnp.concatenate([jnp.zeros((length, queue.shape[1])), kept])
    trainable = new_trainable(key, state.backbone, config)
    if settings.prefix_length:
        trainable["prefix"] = state.trainable["prefix"]
    return trainable, {**state.memory, "queue": queue}


def prompt_of(trainable):
    """theta_i [l, D], which the perceptron makes of the trained rows."""
    rows = trainable["prompt"]
    if "perceptron" not in trainable:
        return rows
    down, up = trainable["perceptron"]["down"], trainable["perceptron"]["up"]
    hidden = jax.nn.relu(rows @ down["kernel"] + down["bias"][None])
    return rows + hidden @ up["kernel"] + up["bias"][None]


def queue_of(trainable, state):
    """Q^i [C, D]: the prompt of the task in front of the older rows, without W."""
    prompt = prompt_of(trainable)
    return jnp.concatenate([prompt, state.memory["queue"][prompt.shape[0] :]])


def model_of(trainable, state):
    """[theta_*; W * Q^i] of the current task, rows that are not filled included."""
    rows = queue_of(trainable, state)
    if "reweighting" in trainable:
        rows = rows * trainable["reweighting"]["u"][:, None] * trainable["reweighting"]["v"][None]
    return jnp.concatenate([trainable["prefix"], rows]) if "prefix" in trainable else rows


def filled(config, task, newer=0):
    """bool: which rows belong to the model of `task`, where `newer` prompts stand before its own.

    The prefix always does. Of a queue that keeps everything, older tasks read the last rows.
    """
    settings = settings_of(config)
    row = jnp.arange(room(config) * settings.prompt_length)
    count = jnp.minimum(task + 1, room(config))
    first, stop = newer * settings.prompt_length, (newer + count) * settings.prompt_length
    return jnp.pad((row >= first) & (row < stop), (settings.prefix_length, 0), constant_values=True)


def stored_model(state, slot, newest):
    """(rows, which of them are filled) of the model after task `slot`, when `newest` was the last
    task whose model was stored.
    """
    models = state.memory["models"]
    newer = newest - slot if in_one_queue(state.config) else 0
    return models[slot if len(models) > 1 else 0], filled(state.config, slot, newer)


def feature_after(state, inputs, rows, mask):
    """[B, D]: the feature of texts with `rows` in front."""
    return pooled_feature(state, inputs, Inserts(prompt=rows, prompt_mask=mask))


def loss(trainable, state, inputs, batch, context):
    settings, head = settings_of(state.config), trainable["head"]
    rows, mask = model_of(trainable, state), filled(state.config, state.task)
    features = feature_after(state, inputs, rows, mask)
    terms = class_terms(state, logits_of(head, features), batch["label"])
    if not settings.retention_weight:
        return terms

    def prediction(features):
        logits = logits_of(lax.stop_gradient(head), features)
        return jax.nn.softmax(jnp.where(valid_task_classes(state)[None], logits, MASKED))

    last = state.task - 1
    if "features" in batch:
        teacher = batch["features"][:, last]
    else:
        teacher = feature_after(state, inputs, *stored_model(state, last, last))
    student = feature_after(state, inputs, trainable["prefix"], None)
    information = mutual_information(
        trainable["critic"],
        prediction(student),
        lax.stop_gradient(prediction(teacher)),
        context.mask,
        context.gather,
    )
    retained = jnp.where(state.task > 0, -information, 0.0)
    return with_term(terms, "retention", settings.retention_weight, retained)


def logits_of(head, features):
    return linear_logits(features, head["rows"], head["bias"])


def freeze(state):
    """The queue with the new prompt, and the model as it stands in front of texts."""
    models = state.memory["models"]
    slot = state.task if len(models) > 1 else 0
    models = models.at[slot].set(model_of(state.trainable, state))
    queue = queue_of(state.trainable, state)
    return state.replace(memory={**state.memory, "queue": queue, "models": models})


def extract(state, inputs, slot, features):
    return feature_after(state, inputs, *stored_model(state, slot, state.task))


def members(state):
    """bool [T, C]: which classes belong to which task."""
    return state.task_of_class[None, :] == jnp.arange(state.config.shapes.max_tasks)[:, None]


def log_probabilities(state, features):
    """[B, T, C]: log p of the classes of each task among themselves, from features [B, S, D]."""
    if settings_of(state.config).evaluation == "snapshot":
        own = features[:, state.task_of_class]  # of each class the feature under its task's model
        logits = jnp.einsum("bcd,cd->bc", own, state.memory["rows"]) + state.memory["bias"][None]
    else:
        logits = logits_of(state.memory, features[:, state.task])
    return jax.nn.log_softmax(jnp.where(members(state)[None], logits[:, None], MASKED))


def joint_scores(state, log_relevance, log_p):
    """[B, C]: log relevance [B, T] of the class's task + log p [B, T, C] within it."""
    own = jnp.sum(jnp.where(members(state)[None], log_p, 0.0), axis=1)
    return mask_unseen(state, log_relevance[:, state.task_of_class] + own)


def score_with_task(state, features, tasks):
    """Relevance 1 for the given task: classes of other tasks are as good as excluded."""
    given = jax.nn.one_hot(tasks, state.config.shapes.max_tasks) > 0
    log_relevance = jnp.where(given, 0.0, MASKED)
    return joint_scores(state, log_relevance, log_probabilities(state, features))


def score(state, features):
    """(log relevance + log p [B, C], relevance [B, T]): see the module docstring.

    Of K classes the entropy is divided by log K. A task of one class is always certain, which says
    nothing of the text; it gets the mean of the other tasks' entropies.
    """
    settings, log_p = settings_of(state.config), log_probabilities(state, features)
    size = jnp.sum(members(state), axis=1)
    seen = jnp.arange(len(size)) <= state.task
    informs = seen & (size > 1)
    uncertainty = entropy(jnp.exp(log_p)) / jnp.log(jnp.maximum(size, 2).astype(jnp.float32))[None]
    mean = jnp.sum(jnp.where(informs[None], uncertainty, 0.0), axis=1, keepdims=True)
    mean = mean / jnp.maximum(jnp.sum(informs), 1).astype(jnp.float32)
    uncertainty = jnp.where(informs[None], uncertainty, mean)
    certainty = jnp.where(seen[None], -uncertainty / settings.temperature, MASKED)
    log_relevance = jax.nn.log_softmax(certainty)
    return joint_scores(state, log_relevance, log_p), jnp.exp(log_relevance)


def slots(config):
    """Of copies, slot j is the model after task j; else there is a slot for each last model. The
    loss reads the last task's, its teacher.
    """
    settings = settings_of(config)
    snapshot, retains = settings.evaluation == "snapshot", settings.retention_weight > 0
    return Slots(
        score=(lambda task: range(task + 1)) if snapshot else (lambda task: (task,)),
        finish=lambda task: (),
        loss=lambda task: (task - 1,) if retains and task > 0 else (),
    )


def learner_named(name):
    return Learner(
        name=name,
        init=init,
        begin=begin,
        loss=loss,
        freeze=freeze,
        finish=finish_with_head,
        extract=extract,
        score=score,
        score_with_task=score_with_task,
        slots=slots,
        sums=NO_SUMS,
    )


TEXTS = "token_ids"
Q_TUNING = register(learner_named("q_tuning"), reads=TEXTS, q_tuning=QTuningSettings)
PROG_PROMPT = register(learner_named("prog_prompt"), reads=TEXTS, prog_prompt=ProgPromptSettings)
PROMPT_PER_TASK = register(
    learner_named("prompt_per_task"), reads=TEXTS, prompt_per_task=PromptPerTaskSettings
)
