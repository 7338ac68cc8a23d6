"""Heads that tasks train: rows for a task's own classes, kept in memory when the task ends.

There are three: cosine with a learnable scale or, by `head.kind`, linear without bias (`new_head`);
linear with bias (`new_linear_head`); and cosine with a fixed scale (`new_cosine_rows`). Each trains
M rows, one for every class of the task, by cross-entropy over these classes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from qkd_jax.errors import ConfigError
from qkd_jax.generators.gaussian import gaussian
from qkd_jax.generators.generator import Generator
from qkd_jax.generators.learned import learned
from qkd_jax.learners.shape import class_columns
from qkd_jax.learners.state import LearnerState, local_labels, seen_classes, valid_task_classes
from qkd_jax.nn.backbone import Backbone
from qkd_jax.nn.fit import cosine_factor, fit, sgd
from qkd_jax.nn.heads import head_logits, init_rows
from qkd_jax.nn.losses import cross_entropy
from qkd_jax.settings.config import Config
from qkd_jax.settings.ranges import setting


@dataclass(frozen=True)
class HeadSettings:
    """The classifier over a feature."""

    kind: Literal["cosine", "linear"] = "cosine"
    scale: float = setting(20.0, above=0)  # start of the learnable scale of the cosine head


@dataclass(frozen=True)
class AlignmentSettings:
    """How mos, tuna, ssiat and care train the head again after a task: SGD on pseudo-features of
    all classes seen.
    """

    # What draws them: a Gaussian for each class, or a network with the settings `drift`.
    generator: Literal["gaussian", "drifting", "gradient_flow"] = "gaussian"
    # What a Gaussian keeps of each class beside its mean: its covariance, the diagonal of it, one
    # covariance for all classes, or nothing.
    statistics: Literal["covariance", "variance", "shared", "mean"] = "covariance"
    # Added to every variance; with few images the covariance is singular.
    jitter: float = setting(1e-4, above=0)
    epochs: int = setting(30, low=0)
    learning_rate: float = setting(0.005, low=0, end_rate="*")
    # Features drawn per class and epoch, and per batch; 0 = five times train.batch_size.
    samples: int = setting(0, low=0)
    # Epochs from the full rate to zero, then up again; 0 = `epochs`.
    period: int = setting(0, low=0)


def new_head(key: jax.Array, backbone: Backbone, config: Config) -> dict:
    """Rows of one task's classes [M, D] and the learnable scale of the cosine head."""
    rows = init_rows(key, config.shapes.max_task_classes, backbone.spec.width)
    return {"rows": rows, "scale": jnp.float32(config.head.scale)}


def next_head(state: LearnerState, key: jax.Array) -> dict:
    """New rows for the classes of the task that starts; the scale is trained on."""
    head = new_head(key, state.backbone, state.config)
    scale = jnp.where(state.task == 0, head["scale"], state.trainable["head"]["scale"])
    return {**head, "scale": scale}


def new_linear_head(
    key: jax.Array, backbone: Backbone, config: Config, start: str = "uniform"
) -> dict:
    """Rows [M, D] and bias [M] of one task's classes: zero, or uniform in +-1 / sqrt(D)."""
    width, size = backbone.spec.width, config.shapes.max_task_classes
    if start == "zeros":
        return {"rows": jnp.zeros((size, width)), "bias": jnp.zeros(size)}
    bound = width**-0.5
    drawn = jax.random.uniform(key, (size, width + 1), minval=-bound, maxval=bound)
    return {"rows": drawn[:, :width], "bias": drawn[:, width]}


def empty_linear_head(backbone: Backbone, config: Config) -> dict:
    """Room in memory for the rows and biases of every class."""
    shape = (config.shapes.num_classes, backbone.spec.width)
    return {"rows": jnp.zeros(shape), "bias": jnp.zeros(config.shapes.num_classes)}


def new_cosine_rows(key: jax.Array, backbone: Backbone, config: Config) -> dict:
    """{"rows": [M, D]} of one task's classes, normal with deviation 0.02 at width 768.

    How fast SGD turns a row depends on its length, which is the same at every width.
    """
    shape = (config.shapes.max_task_classes, backbone.spec.width)
    return {"rows": 0.02 * (768 / shape[1]) ** 0.5 * jax.random.normal(key, shape)}


def head_loss(head: dict, state: LearnerState, features: jax.Array, labels: jax.Array) -> dict:
    """`class_terms` of features [B, D] under a head of `new_head`."""
    logits = head_logits(features, head["rows"], head["scale"], state.config.head.kind)
    return class_terms(state, logits, labels)


def class_terms(state: LearnerState, logits: jax.Array, labels: jax.Array, margin=0.0) -> dict:
    """Terms [B] of cross-entropy over the current task's classes, for logits [B, M].

    `margin` is subtracted from the logit of each image's own class (CosFace, arXiv 1801.09414,
    where logits are s cos: s times its m).
    """
    labels, valid = local_labels(state, labels), valid_task_classes(state)
    own = jax.nn.one_hot(labels, logits.shape[1])
    ce = cross_entropy(logits - margin * own, labels, valid)
    correct = jnp.argmax(jnp.where(valid, logits, -jnp.inf), axis=1) == labels
    return {"loss": ce, "loss_ce": ce, "train_accuracy": 100.0 * correct.astype(jnp.float32)}


def with_term(terms: dict, name: str, weight: float | jax.Array, term: jax.Array) -> dict:
    """`terms` with weight * term added to the loss; `term` is [B], or one number for all rows."""
    term = jnp.broadcast_to(term, terms["loss"].shape)
    return {**terms, "loss": terms["loss"] + weight * term, f"loss_{name}": term}


def stored_head(state: LearnerState, memory: dict, head: dict | None = None) -> dict:
    """`memory` {"rows", "bias"?} with the trained head of the current task's classes put in.
    `head`: None = that of the state.
    """
    columns, head = class_columns(state), head or state.trainable["head"]
    stored = {n: memory[n].at[columns].set(head[n], mode="drop") for n in head if n in memory}
    return {**memory, **stored}


def finish_with_head(state: LearnerState, statistics: Any, key: jax.Array) -> LearnerState:
    """`Learner.finish` of methods whose classifier is the trained head."""
    return state.replace(memory=stored_head(state, state.memory))


def class_logits(state: LearnerState, features: jax.Array) -> jax.Array:
    """Logits [B, C] of features [B, D] on the stored rows, for heads of `new_head`."""
    scale, kind = state.trainable["head"]["scale"], state.config.head.kind
    return head_logits(features, state.memory["rows"], scale, kind)


def mask_unseen(state: LearnerState, scores: jax.Array) -> jax.Array:
    """`scores` [..., C] with -inf in the columns of classes not seen."""
    return jnp.where(seen_classes(state)[None, :], scores, -jnp.inf)


def alignment_loss(state: LearnerState, logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean cross-entropy of logits [N, C] over all classes seen."""
    return jnp.mean(cross_entropy(logits, labels, seen_classes(state)))


def generator_of(config: Config) -> Generator:
    """The generator of learners whose head is `aligned`.

    Raises:
      ConfigError: it keeps a task's features, and their largest number is not known.
    """
    settings = config.alignment
    if settings.generator == "gaussian":
        return gaussian(settings.statistics, settings.jitter)
    need_task_images(config, f"alignment.generator={settings.generator}")
    return learned(settings.generator, config.drift, config.shapes.max_task_images)


def age_factors(state: LearnerState, decay: float = 0.1) -> jax.Array:
    """[C]: 1 - decay (1 - (i + 1) / (t + 1)) for classes of task i, which scales the means that
    alignment draws around: the older a class, the less.
    """
    age = (state.task_of_class + 1).astype(jnp.float32) / (state.task + 1).astype(jnp.float32)
    return 1.0 - decay * (1.0 - age)


def need_task_images(config: Config, who: str) -> None:
    """Raises ConfigError unless the images of the largest task are known, for `who` keeps the
    features of a task until it ends.
    """
    if config.shapes.max_task_images < 1:
        raise ConfigError(
            f"shapes.max_task_images: expected at least 1, since {who} keeps a task's features "
            f"until it ends, found {config.shapes.max_task_images}; set it to the number of "
            "training images of the largest task"
        )


def aligned(
    state: LearnerState,
    key: jax.Array,
    head: Any,
    logits_of: Callable[[Any, jax.Array], jax.Array],
    generator: Generator,
    memory: Any,
) -> Any:
    """The head of all classes after training on draws of every class seen, from the second task on;
    the first task's head has seen all classes.

    Args:
      logits_of: (head, features [N, D]) -> [N, C].
      memory: the memory of `generator`.
    """
    settings, train, seen = state.config.alignment, state.config.train, seen_classes(state)
    if settings.epochs == 0:
        return head

    def train_again():
        return align_head(
            key,
            head,
            lambda head, f, labels: alignment_loss(state, logits_of(head, f), labels),
            generator,
            memory,
            seen,
            epochs=settings.epochs,
            samples=settings.samples or 5 * train.batch_size,
            learning_rate=settings.learning_rate,
            weight_decay=train.weight_decay,
            period=settings.period,
        )

    return lax.cond(state.task > 0, train_again, lambda: head)


def align_head(
    key: jax.Array,
    head: Any,
    objective: Callable[[Any, jax.Array, jax.Array], jax.Array],
    generator: Generator,
    memory: Any,
    seen: jax.Array,
    *,
    epochs: int,
    samples: int,
    learning_rate: float,
    weight_decay: float,
    momentum: float = 0.9,
    period: int = 0,
) -> Any:
    """The head after SGD on drawn features: SLCA, arXiv 2303.05118, after PASS (CVPR 2021).

    An epoch draws `samples` features of each class seen, shuffles them all and cuts them into as
    many batches as there are classes. The rate follows `cosine_factor`, one value for each epoch.

    Args:
      key: typed key.
      head: pytree of parameters, e.g. {"rows": [C, D], "bias": [C]}.
      objective: (head, features [N, D], labels [N]) -> scalar; masks classes not seen.
      memory: the memory of `generator`; classes not seen are not drawn.
      seen: bool [C].
      samples: N, per class and epoch, and the size of a batch.
      period: epochs from the full rate to zero, after which it rises again; 0 = `epochs`.
    """
    count, num_classes = jnp.sum(seen), len(seen)
    order_of_seen = jnp.argsort(~seen, stable=True)
    optimiser = sgd(
        lambda step: learning_rate * cosine_factor(step // count, period or epochs),
        momentum,
        weight_decay,
    )

    def pool(key):
        """Drawn features [C * N, D], one class after the other."""

        def draw(i, drawn):
            c = order_of_seen[i]
            labels = jnp.full(samples, c)
            return drawn.at[c].set(generator.draw(memory, jax.random.fold_in(key, c), labels))

        one = jax.eval_shape(generator.draw, memory, key, jnp.zeros(samples, jnp.int32))
        empty = jnp.zeros((num_classes, *one.shape), one.dtype)
        return lax.fori_loop(0, count, draw, empty).reshape(-1, one.shape[1])

    def epoch(carry, index):
        key_noise, key_order = jax.random.split(jax.random.fold_in(key, index))
        # A random order of all samples; those of classes not seen go to the end.
        place = jax.random.uniform(key_order, (num_classes, samples))
        place = jnp.argsort(jnp.where(seen[:, None], place, 2.0).ravel())
        drawn = pool(key_noise) if generator.one_class else None

        def batch(i):
            chosen = lax.dynamic_slice(place, (i * samples,), (samples,))
            labels = chosen // samples
            if generator.one_class:
                return drawn[chosen], labels
            return generator.draw(memory, jax.random.fold_in(key_noise, i), labels), labels

        return fit(*carry, lambda head, b: objective(head, *b), batch, optimiser, count), None

    (head, _), _ = lax.scan(epoch, (head, optimiser.init(head)), jnp.arange(epochs))
    return head
