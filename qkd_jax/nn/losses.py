"""Losses for each image: cross-entropy, distillation of several kinds, sparsity of relevance."""

import jax
import jax.numpy as jnp

# Far below any logit, finite so that a fully masked row gives a uniform softmax instead of NaN.
MASKED = -1e9


def cross_entropy(logits: jax.Array, labels: jax.Array, valid: jax.Array) -> jax.Array:
    """[B]: -log softmax(logits)[label] over the columns where `valid` [M] holds.

    Args:
      logits: [B, M].
      labels: int [B].
    """
    log_probabilities = jax.nn.log_softmax(jnp.where(valid, logits, MASKED))
    return -jnp.take_along_axis(log_probabilities, labels[:, None], axis=1)[:, 0]


def masked_kl(teacher: jax.Array, student: jax.Array, columns: jax.Array) -> jax.Array:
    """[...]: KL( softmax(teacher) || softmax(student) ) over the columns where `columns` holds.

    No gradient reaches the teacher (Eq. 13). Without any column the result is 0.

    Args:
      teacher, student: [..., C].
      columns: bool, broadcast to them.
    """
    teacher = jax.lax.stop_gradient(teacher)
    log_teacher = jax.nn.log_softmax(jnp.where(columns, teacher, MASKED))
    log_student = jax.nn.log_softmax(jnp.where(columns, student, MASKED))
    terms = jnp.exp(log_teacher) * (log_teacher - log_student)
    return jnp.sum(jnp.where(columns, terms, 0.0), axis=-1)


def softened_kl(
    teacher: jax.Array, student: jax.Array, columns: jax.Array, temperature: float
) -> jax.Array:
    """[...]: tau^2 KL( softmax(teacher / tau) || softmax(student / tau) ), arXiv 1503.02531; see
    `masked_kl`.
    """
    return temperature**2 * masked_kl(teacher / temperature, student / temperature, columns)


def decoupled_kl(
    teacher: jax.Array,
    student: jax.Array,
    labels: jax.Array,
    columns: jax.Array,
    temperature: float,
    other_weight: float,
) -> jax.Array:
    """[B]: decoupled knowledge distillation, arXiv 2203.08679: tau^2 (TCKD + beta NCKD).

    TCKD is the KL between the pairs (probability of the own class, of all others); NCKD is the KL
    between the distributions over the other classes alone, which is 0 where there are none.

    Args:
      teacher, student: logits [B, C]; no gradient reaches the teacher.
      labels: int [B], columns of the own classes.
      columns: bool [C], the classes that are compared.
      other_weight: beta.
    """
    own = jax.nn.one_hot(labels, student.shape[1], dtype=bool)
    others = columns[None] & ~own

    def own_and_others(logits):
        log = jax.nn.log_softmax(jnp.where(columns[None], logits / temperature, MASKED))
        rest = jax.nn.logsumexp(jnp.where(others, log, MASKED), axis=-1)
        return jnp.stack([jnp.sum(jnp.where(own, log, 0.0), axis=-1), rest], axis=-1)

    log_teacher, log_student = map(own_and_others, (jax.lax.stop_gradient(teacher), student))
    of_own = jnp.sum(jnp.exp(log_teacher) * (log_teacher - log_student), axis=-1)
    of_others = softened_kl(teacher, student, others, temperature)
    return temperature**2 * of_own + other_weight * of_others


def mean_square(teacher: jax.Array, student: jax.Array) -> jax.Array:
    """[B]: the mean of (teacher - student)^2 over all axes but the first; no gradient reaches the
    teacher.
    """
    gap = jax.lax.stop_gradient(teacher) - student
    return jnp.mean(gap * gap, axis=tuple(range(1, gap.ndim)))


def jensen_shannon(teacher: jax.Array, student: jax.Array, columns: jax.Array) -> jax.Array:
    """[...]: (KL(p || m) + KL(q || m)) / 2 of p = softmax(student), q = softmax(teacher) and their
    mean m, over the columns where `columns` holds. No gradient reaches the teacher.

    Args:
      teacher, student: [..., C].
      columns: bool, broadcast to them.
    """
    logits = student, jax.lax.stop_gradient(teacher)
    logs = [jax.nn.log_softmax(jnp.where(columns, values, MASKED)) for values in logits]
    log_mean = jnp.logaddexp(*logs) - jnp.log(2.0)
    terms = sum(0.5 * jnp.exp(values) * (values - log_mean) for values in logs)
    return jnp.sum(jnp.where(columns, terms, 0.0), axis=-1)


def distillation(
    teachers: jax.Array,
    student: jax.Array,
    columns: jax.Array,
    relevance: jax.Array,
    temperature: float = 1.0,
) -> jax.Array:
    """TIKD (Eq. 13): sum_i alpha_i KL_i, [B].

    Args:
      teachers: [B, T, C] logits of the old adapters.
      student: [B, C] logits of the current adapter.
      columns: bool, broadcast to [B, T, C]: the classes that each teacher is compared on.
      relevance: [B, T] weights alpha; zero for tasks that are not old.
      temperature: divides both logits; the loss is multiplied by its square (Hinton 2015).
    """
    kl = masked_kl(teachers / temperature, student[:, None] / temperature, columns)
    return temperature**2 * jnp.sum(relevance * kl, axis=-1)


def feature_distillation(
    teachers: jax.Array, student: jax.Array, relevance: jax.Array
) -> jax.Array:
    """[B]: sum_i alpha_i |f_i - f_t|^2 of teachers f_i [B, T, D] and student f_t [B, D], all of
    length 1, with relevance alpha [B, T].
    """
    gap = jax.lax.stop_gradient(teachers) - student[:, None]
    return jnp.sum(relevance * jnp.sum(gap * gap, axis=-1), axis=-1)


def entropy(weights: jax.Array) -> jax.Array:
    """-sum_i w_i log w_i of weights [..., T], in nats; 0 log 0 = 0, also in the gradient."""
    safe = jnp.where(weights > 0, weights, 1.0)
    return -jnp.sum(weights * jnp.log(safe), axis=-1)


def sparsity(kind: str, weights: jax.Array, scores: jax.Array) -> jax.Array:
    """L_s [B] of relevance `weights` alpha [B, T] and raw `scores` p [B, T] in [0, 1].

    `l1_softmax`: |alpha|_1 (Eq. 11, literal), which is always 1 and has no gradient.
    `l1_scores`: |p|_1, before the softmax. `entropy`: the entropy of alpha.
    """
    if kind == "l1_softmax":
        return jnp.sum(jnp.abs(weights), axis=-1)
    if kind == "l1_scores":
        return jnp.sum(jnp.abs(scores), axis=-1)
    return entropy(weights)
