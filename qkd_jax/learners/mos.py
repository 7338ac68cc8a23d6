"""MOS: adapters merged in training, a head aligned on Gaussians, adapters retrieved in rounds.

Sun et al., "MOS: Model Surgery for Pre-Trained Model-Based Class-Incremental Learning", AAAI 2025,
arXiv 2412.09441. One adapter is trained on from task to task; after every step it moves a tenth
of the way to the mean of the adapters stored so far. Its loss is cross-entropy on the task's own
classes plus a term that keeps the features of a batch, and the means of old classes, apart. A task
leaves its adapter and a Gaussian for each class under it; from the second task on, the linear head
over all classes is trained once more on draws from them. At test, class means under the first
adapter give a class and hence a task; the prediction of its adapter gives a task again, for up to
four adapters. The score is the softmax of the last one plus that of the number of tasks times the
cosines to the class means.

Slot i is adapter i. Published settings: adapter.bottleneck 16, scale 0.1, dropout 0.1;
train.head_rate 0.1, momentum 0.9, cosine, decay on every leaf (train.decay_leaves=
kernel,bias,rows); merge rate and orthogonality weight 0.1; alignment of 30 epochs at 0.005 on
covariances (variances for ImageNet-A). Rate, batch, decay, epochs: 0.03, 48, 5e-4, 20 (CIFAR-100);
0.01, 32, 5e-4, 10 (CUB); 0.05, 16, 0.005, 10 (ImageNet-R); 0.05, 32, 0.005, 10 (ImageNet-A); 0.03,
32, 0.005, 20 (VTAB).

Where we differ from the authors' code:
- It merges in every block of every forward pass, by changing the stored weights: L + 1 times per
  step, and again in every pass over class statistics and test images, so that a slot drifts to the
  mean of the older trained adapters and what its own task learned is lost. We merge once per step,
  and a slot never changes. `mos.merge=every_pass` is what the authors' code amounts to: training
  merges as theirs; slot i > 0 holds the mean of the older trained adapters, which theirs reaches
  after a few batches. One thing is left: their backward pass reads weights merged a few times more
  than the forward pass did; ours is the gradient of the forward pass.
- Rows of old and coming classes do not decay while a task trains; theirs shrink by less than 1 %.
- No batch mean depends on how a batch is split over devices: the orthogonality term sees all rows.
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from qkd_jax.generators.gaussian import add_to_moments, empty_moments
from qkd_jax.generators.learned import DriftSettings
from qkd_jax.learners.shape import Learner, Slots, Sums, class_columns, register
from qkd_jax.learners.state import local_labels, old_classes
from qkd_jax.learners.task_adapters import (
    adapter_of,
    empty_adapters,
    encode_with,
    first_adapter_block,
    new_adapter,
    store_adapter,
)
from qkd_jax.learners.task_heads import (
    AlignmentSettings,
    aligned,
    class_terms,
    empty_linear_head,
    generator_of,
    mask_unseen,
    new_linear_head,
    stored_head,
    with_term,
)
from qkd_jax.nn.adapters import AdapterSpec
from qkd_jax.nn.heads import linear_logits, unit
from qkd_jax.nn.losses import MASKED
from qkd_jax.settings.ranges import setting


@dataclass(frozen=True)
class MosSettings:
    """MOS (arXiv 2412.09441): adapter merging, orthogonality, self-refined retrieval."""

    # Alpha: the step of an adapter towards the mean of the older ones.
    merge_rate: float = setting(0.1, low=0, below=1)
    # After every optimisation step; or, as in the authors' code, also in every block of every
    # forward pass, which leaves the mean of the older adapters in each slot.
    merge: Literal["step", "every_pass"] = "step"
    # Weight of the loss that keeps features and class means apart.
    orthogonality: float = setting(0.1, low=0)
    retrievals: int = setting(4, low=1)  # at most this many adapters for each image
    ensemble: bool = True  # add the first adapter's prototypes to the prediction


TEMPERATURE = 0.8  # of the similarities in the orthogonality loss


def init(key, backbone, config):
    width, classes = backbone.spec.width, config.shapes.num_classes
    adapters = empty_adapters(backbone, config)
    trainable = {
        "adapter": new_adapter(jax.random.fold_in(key, 0), backbone, config),
        "head": new_linear_head(jax.random.fold_in(key, 1), backbone, config),
    }
    memory = {
        "adapters": adapters,
        "sum": jax.tree.map(lambda a: jnp.zeros(a.shape[1:]), adapters),  # of trained adapters
        "head": empty_linear_head(backbone, config),
        "prototypes": jnp.zeros((classes, width)),  # class means under the first adapter
        "generator": generator_of(config).empty(classes, width),
    }
    return trainable, memory


def logits_of(head, features):
    """Logits [..., C] of features [..., D] on rows [C, D] with biases [C]."""
    return linear_logits(features, head["rows"], head["bias"])


def begin(state, key):
    """The adapter of the last task is trained on; the head is new."""
    previous = adapter_of(state, jnp.maximum(state.task - 1, 0))
    adapter = jax.tree.map(
        lambda new, old: jnp.where(state.task > 0, old, new), state.trainable["adapter"], previous
    )
    if state.config.mos.merge == "every_pass":
        adapter = merged(state, adapter, num_blocks(adapter))
    head = new_linear_head(key, state.backbone, state.config)
    return {"adapter": adapter, "head": head}, state.memory


def num_blocks(adapter):
    return adapter["down"]["bias"].shape[0]


def merged(state, adapter, times):
    """`adapter` after A <- (1 - alpha) A + alpha mean(A_0 .. A_t-1), repeated `times` times: a
    number, or one for each block [L]. The first task has nothing to merge with.
    """
    kept = jnp.power(1.0 - state.config.mos.merge_rate, jnp.asarray(times, jnp.float32))
    kept = jnp.broadcast_to(kept, num_blocks(adapter))
    kept = jnp.where(state.task > 0, kept, 1.0)

    def towards(own, total):
        mean = total / jnp.maximum(state.task, 1).astype(jnp.float32)
        share = kept.reshape(-1, *[1] * (own.ndim - 1))
        return mean + share * (own - mean)

    return jax.tree.map(towards, adapter, state.memory["sum"])


def as_in_forward(state, adapter):
    """The adapter as the forward pass of `every_pass` sees it: `adapter` was merged L times since
    the last step, but block l ran when it had been merged l + 1 times. Gradients belong to the
    merged weights.
    """
    blocks = num_blocks(adapter)
    seen = merged(state, adapter, jnp.arange(1.0, blocks + 1) - blocks)
    return jax.tree.map(lambda own, used: own + lax.stop_gradient(used - own), adapter, seen)


def project(trainable, state):
    """After a step: merged once, or with `every_pass` also as the next forward pass does."""
    adapter, times = trainable["adapter"], 1
    if state.config.mos.merge == "every_pass":
        times += num_blocks(adapter)
    return {**trainable, "adapter": merged(state, adapter, times)}


def orthogonality(state, features, mask):
    """Mean over vectors r of -log softmax_s(r . s / 0.8)[s = r]. The vectors are the means of old
    classes and the features [N, D] of a batch where `mask` [N] holds.
    """
    vectors = jnp.concatenate([state.memory["generator"].mean, features])
    real = jnp.concatenate([old_classes(state), mask])
    similarity = jnp.where(real[None, :], vectors @ vectors.T / TEMPERATURE, MASKED)
    own = jnp.diagonal(jax.nn.log_softmax(similarity))
    return -jnp.mean(own, where=real)


def loss(trainable, state, inputs, batch, context):
    adapter = trainable["adapter"]
    if state.config.mos.merge == "every_pass":
        adapter = as_in_forward(state, adapter)
    features = encode_with(state, adapter, inputs, context.keys)
    terms = class_terms(state, logits_of(trainable["head"], features), batch["label"])
    apart = orthogonality(state, context.gather(features), context.gather(context.mask))
    return with_term(terms, "orthogonality", state.config.mos.orthogonality, apart)


def freeze(state):
    """The adapter fills its slot and is added to the sum that later ones merge with."""
    trained, used = state.trainable["adapter"], state.trainable["adapter"]
    if state.config.mos.merge == "every_pass":
        blocks = num_blocks(trained)
        trained = merged(state, trained, -blocks)  # undoes the forward pass after the last step
        mean = merged(state, trained, jnp.inf)
        used = jax.tree.map(lambda a, b: jnp.where(state.task > 0, b, a), trained, mean)
    state = state.replace(trainable={**state.trainable, "adapter": used})
    total = jax.tree.map(jnp.add, state.memory["sum"], trained)
    return state.replace(memory={**state.memory, "adapters": store_adapter(state), "sum": total})


def statistics(config, num_slots, width):
    """What the generator collects under the task's own adapter; moments under the first one."""
    count = config.shapes.max_task_classes
    own = generator_of(config).statistics(count, width)
    return own, empty_moments(count, width, "variance")


def accumulate(state, statistics, features, labels, mask):
    own, first = statistics
    positions = local_labels(state, labels)
    return (
        generator_of(state.config).add(own, features[:, state.task], positions, mask),
        add_to_moments(first, features[:, 0], positions, mask),
    )


def finish(state, statistics, key):
    own, first = statistics
    memory, columns = state.memory, class_columns(state)
    head = stored_head(state, memory["head"])
    prototypes = memory["prototypes"].at[columns].set(first.mean, mode="drop")
    generator = generator_of(state.config)
    drawn = generator.fit(memory["generator"], own, columns, key)
    head = aligned(state, key, head, logits_of, generator, drawn)
    memory = {**memory, "head": head, "prototypes": prototypes, "generator": drawn}
    return state.replace(memory=memory)


def extract(state, inputs, slot, features):
    return encode_with(state, adapter_of(state, slot), inputs)


def prototype_cosines(state, features):
    """[B, C]: of features [B, S, D] in slot 0 to the class means under the first adapter."""
    return mask_unseen(state, unit(features[:, 0]) @ unit(state.memory["prototypes"]).T)


def slot_logits(state, features):
    """[B, S, C]: of features [B, S, D] on the one head."""
    head = state.memory["head"]
    return jax.vmap(lambda f: mask_unseen(state, logits_of(head, f)), in_axes=1, out_axes=1)(
        features
    )


def ensemble(state, logits, cosines):
    """softmax(z) + softmax(t cos) of the logits [B, C] of one adapter; without `mos.ensemble` z."""
    if not state.config.mos.ensemble:
        return mask_unseen(state, logits)
    num_tasks = (state.task + 1).astype(jnp.float32)
    return mask_unseen(state, jax.nn.softmax(logits) + jax.nn.softmax(num_tasks * cosines))


def score(state, features):
    """Self-refined retrieval: a_1 is the task of the nearest prototype, a_k+1 that of the class
    that adapter a_k predicts. The score is softmax(z_a) + softmax(t cos(f_0, prototypes)).
    """
    cosines, logits = prototype_cosines(state, features), slot_logits(state, features)
    owner, image = state.task_of_class, jnp.arange(len(features))
    following = owner[jnp.argmax(logits, axis=2)]  # [B, S]
    used = owner[jnp.argmax(cosines, axis=1)]
    for _ in range(state.config.mos.retrievals - 1):
        used = following[image, used]
    relevance = jax.nn.one_hot(used, state.config.shapes.max_tasks)
    return ensemble(state, logits[image, used], cosines), relevance


def score_with_task(state, features, tasks):
    """The adapter of the given task instead of the retrieved one; the ensemble stays."""
    logits = slot_logits(state, features)[jnp.arange(len(tasks)), tasks]
    return ensemble(state, logits, prototype_cosines(state, features))


LEARNER = register(
    Learner(
        name="mos",
        init=init,
        begin=begin,
        loss=loss,
        freeze=freeze,
        finish=finish,
        extract=extract,
        score=score,
        score_with_task=score_with_task,
        slots=Slots(score=lambda task: range(task + 1), finish=lambda task: sorted({0, task})),
        sums=Sums(statistics, accumulate),
        first_block=first_adapter_block,
        project=project,
    ),
    adapter=AdapterSpec,
    alignment=AlignmentSettings,
    drift=DriftSettings,
    mos=MosSettings,
)
