"""Losses against NumPy in float64.

Error budget: inputs below 8 in size and at most 16 terms. A float32 log-softmax is off by a few eps
of its largest term (8 + log 16), so values agree within 16 * 11 * eps = 2e-5.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkd_jax.nn.losses import (
    cross_entropy,
    decoupled_kl,
    distillation,
    entropy,
    feature_distillation,
    jensen_shannon,
    masked_kl,
    mean_square,
    softened_kl,
    sparsity,
)

BUDGET = 2e-5
EPS = float(np.finfo(np.float32).eps)


def draw(*shape, seed=0, scale=2.0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32) * np.float32(scale)


def log_softmax(logits, columns):
    """float64 over the columns that hold; -inf elsewhere."""
    logits = np.where(columns, np.float64(logits), -np.inf)
    top = logits.max(-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))


def kl_reference(teacher, student, columns):
    """Row by row over the chosen columns only; 0 without any."""
    out = np.zeros(teacher.shape[:-1])
    columns = np.broadcast_to(columns, teacher.shape)
    for index in np.ndindex(out.shape):
        chosen = columns[index]
        if chosen.any():
            p = log_softmax(teacher[index][chosen], True)
            q = log_softmax(student[index][chosen], True)
            out[index] = (np.exp(p) * (p - q)).sum()
    return out


COLUMNS = np.array([True, False, True, True, False, True])


def test_cross_entropy():
    logits, labels = draw(5, 6), np.array([0, 2, 3, 5, 0])
    found = cross_entropy(jnp.asarray(logits), jnp.asarray(labels), jnp.asarray(COLUMNS))
    expected = -log_softmax(logits, COLUMNS)[np.arange(5), labels]
    np.testing.assert_allclose(found, expected, atol=BUDGET, rtol=0)


def test_cross_entropy_ignores_masked_columns_and_sends_them_no_gradient():
    logits, labels = draw(5, 6), jnp.array([0, 2, 3, 5, 0])
    moved = np.where(COLUMNS, logits, 1e4).astype(np.float32)
    columns = jnp.asarray(COLUMNS)
    np.testing.assert_array_equal(
        cross_entropy(jnp.asarray(logits), labels, columns),
        cross_entropy(jnp.asarray(moved), labels, columns),
    )
    gradient = jax.grad(lambda x: cross_entropy(x, labels, columns).sum())(jnp.asarray(moved))
    expected = np.exp(log_softmax(logits, COLUMNS)) - np.eye(6)[np.asarray(labels)]
    np.testing.assert_allclose(gradient, expected, atol=BUDGET)
    np.testing.assert_array_equal(np.asarray(gradient)[:, ~COLUMNS], 0)


def test_kl_against_float64_with_columns_of_each_row():
    teacher, student = draw(4, 3, 6), draw(4, 3, 6, seed=1)
    columns = np.random.default_rng(2).random((3, 6)) < 0.6
    columns[1] = False
    found = masked_kl(jnp.asarray(teacher), jnp.asarray(student), jnp.asarray(columns)[None])
    expected = kl_reference(teacher, student, columns[None])
    assert (expected[:, 1] == 0).all() and expected[:, 0].max() > 0.1
    np.testing.assert_allclose(found, expected, atol=BUDGET, rtol=EPS * 64)


@pytest.mark.parametrize("seed", range(5))
def test_kl_is_never_negative_and_zero_for_equal_logits(seed):
    teacher = jnp.asarray(draw(8, 6, seed=seed))
    nearly = teacher + 1e-3 * jnp.asarray(draw(8, 6, seed=seed + 9))
    columns = jnp.asarray(COLUMNS)[None]
    assert (np.asarray(masked_kl(teacher, nearly, columns)) > -8 * EPS).all()
    np.testing.assert_array_equal(masked_kl(teacher, teacher, columns), 0)
    # A constant added to all logits is no difference.
    np.testing.assert_allclose(masked_kl(teacher, teacher + 3.0, columns), 0, atol=BUDGET)
    gradient = jax.grad(lambda s: masked_kl(teacher, s, columns).sum())(teacher)
    np.testing.assert_allclose(gradient, 0, atol=4 * EPS)


def test_kl_ignores_masked_columns():
    teacher, student = draw(4, 6), draw(4, 6, seed=1)
    columns = jnp.asarray(COLUMNS)[None]
    other = [jnp.asarray(np.where(COLUMNS, x, v)) for x, v in ((teacher, 1e5), (student, -1e5))]
    np.testing.assert_array_equal(
        masked_kl(jnp.asarray(teacher), jnp.asarray(student), columns),
        masked_kl(*[x.astype(jnp.float32) for x in other], columns),
    )


def test_no_gradient_reaches_the_teacher():
    teacher, student = jnp.asarray(draw(4, 6)), jnp.asarray(draw(4, 6, seed=1))
    columns = jnp.asarray(COLUMNS)[None]
    to_teacher, to_student = jax.grad(lambda t, s: masked_kl(t, s, columns).sum(), argnums=(0, 1))(
        teacher, student
    )
    np.testing.assert_array_equal(to_teacher, 0)
    # d KL / d student = softmax(student) - softmax(teacher).
    expected = np.exp(log_softmax(student, COLUMNS)) - np.exp(log_softmax(teacher, COLUMNS))
    np.testing.assert_allclose(to_student, expected, atol=BUDGET)


def test_a_row_without_columns_gives_zero_and_a_finite_gradient():
    none = jnp.zeros((1, 6), bool)
    teacher, student = jnp.asarray(draw(4, 6)), jnp.asarray(draw(4, 6, seed=1))
    value, gradient = jax.value_and_grad(lambda s: masked_kl(teacher, s, none).sum())(student)
    assert float(value) == 0.0
    np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_distillation_is_the_weighted_sum(temperature):
    teachers, student = draw(4, 3, 6), draw(4, 6, seed=1)
    columns = np.array([[COLUMNS, ~COLUMNS, np.zeros(6, bool)]] * 4)
    columns[3] = columns[3, ::-1]  # an image may have its own
    alpha = np.random.default_rng(3).dirichlet(np.ones(3), 4).astype(np.float32)
    expected = np.zeros(4)
    for b in range(4):
        for i in range(3):
            t, s = teachers[b, i] / np.float64(temperature), student[b] / np.float64(temperature)
            expected[b] += temperature**2 * alpha[b, i] * kl_reference(t, s, columns[b, i])
    found = distillation(
        *map(jnp.asarray, (teachers, student, columns, alpha)), temperature=temperature
    )
    np.testing.assert_allclose(found, expected, atol=temperature**2 * BUDGET)


def test_distillation_gradient_reaches_relevance_and_student_only():
    teachers, student = jnp.asarray(draw(4, 3, 6)), jnp.asarray(draw(4, 6, seed=1))
    alpha, columns = jnp.full((4, 3), 1 / 3), jnp.ones((1, 3, 6), bool)
    to_teacher, to_student, to_alpha = jax.grad(
        lambda t, s, a: distillation(t, s, columns, a).sum(), argnums=(0, 1, 2)
    )(teachers, student, alpha)
    np.testing.assert_array_equal(to_teacher, 0)
    assert np.abs(to_student).max() > 1e-2
    np.testing.assert_array_equal(to_alpha, masked_kl(teachers, student[:, None], columns))


def test_feature_distillation():
    teachers, student = draw(4, 3, 5), draw(4, 5, seed=1)
    alpha = np.random.default_rng(3).dirichlet(np.ones(3), 4).astype(np.float32)
    gap = np.float64(teachers) - np.float64(student)[:, None]
    expected = (alpha * (gap**2).sum(-1)).sum(-1)
    arguments = [jnp.asarray(x) for x in (teachers, student, alpha)]
    np.testing.assert_allclose(feature_distillation(*arguments), expected, rtol=16 * EPS)
    to_teacher = jax.grad(lambda *a: feature_distillation(*a).sum())(*arguments)
    np.testing.assert_array_equal(to_teacher, 0)


def test_entropy_also_at_the_corners():
    weights = np.array([[0.25] * 4, [1, 0, 0, 0], [0.5, 0.5, 0, 0], [0, 0, 0, 0]], np.float32)
    expected = [np.log(4), 0, np.log(2), 0]
    np.testing.assert_allclose(entropy(jnp.asarray(weights)), expected, atol=4 * EPS)
    gradient = np.asarray(jax.grad(lambda w: entropy(w).sum())(jnp.asarray(weights)))
    assert np.isfinite(gradient).all() and (gradient[weights == 0] == 0).all()
    np.testing.assert_allclose(gradient[0], -(1 + np.log(0.25)), rtol=8 * EPS)


def sparsity_of_evidence(kind, evidence):
    return sparsity(kind, jax.nn.softmax(evidence), jax.nn.sigmoid(evidence)).sum()


def test_sparsity_values():
    evidence = draw(4, 3)
    weights = np.exp(log_softmax(evidence, True))
    scores = 1 / (1 + np.exp(-np.float64(evidence)))
    expected = {
        "l1_softmax": np.ones(4),
        "l1_scores": scores.sum(-1),
        "entropy": -(weights * np.log(weights)).sum(-1),
    }
    for kind, value in expected.items():
        found = sparsity(kind, jnp.asarray(weights, jnp.float32), jnp.asarray(scores, jnp.float32))
        np.testing.assert_allclose(found, value, rtol=16 * EPS)


def test_literal_l1_has_no_gradient_and_the_others_have():
    evidence = jnp.asarray(draw(4, 3))
    # alpha (1 - sum alpha): zero but for the rounding of a sum of three terms.
    literal = jax.grad(lambda e: sparsity_of_evidence("l1_softmax", e))(evidence)
    assert np.abs(literal).max() <= 4 * EPS
    for kind in ("l1_scores", "entropy"):
        gradient = jax.grad(lambda e, kind=kind: sparsity_of_evidence(kind, e))(evidence)
        assert np.abs(gradient).max() > 1e-2


def test_softened_kl():
    """Divided by the temperature before, multiplied by its square after."""
    teacher, student = draw(5, 6), draw(5, 6, seed=1)
    found = softened_kl(jnp.asarray(teacher), jnp.asarray(student), jnp.asarray(COLUMNS)[None], 2.0)
    expected = 4.0 * kl_reference(np.float64(teacher) / 2, np.float64(student) / 2, COLUMNS[None])
    # The square of the temperature multiplies the error too.
    np.testing.assert_allclose(found, expected, atol=4 * BUDGET, rtol=0)


def decoupled_reference(teacher, student, labels, columns, temperature, weight):
    """Image by image: the two-way KL of (own, others), and the KL within the others."""
    out = np.zeros(len(teacher))
    for b, label in enumerate(labels):
        chosen = list(np.flatnonzero(columns))
        p, q = (
            np.exp(log_softmax(np.float64(row[b][chosen]) / temperature, True))
            for row in (teacher, student)
        )
        own = chosen.index(label)
        pairs = [(p[own], q[own]), (1 - p[own], 1 - q[own])]
        out[b] = sum(a * np.log(a / c) for a, c in pairs if a > 0)
        p, q = (np.delete(x, own) / np.delete(x, own).sum() for x in (p, q))
        out[b] += weight * (p * np.log(p / q)).sum()
    return temperature**2 * out


def test_decoupled_kl():
    teacher, student, labels = draw(5, 6), draw(5, 6, seed=1), np.array([0, 2, 3, 5, 0])
    found = decoupled_kl(*map(jnp.asarray, (teacher, student, labels, COLUMNS)), 4.0, 8.0)
    expected = decoupled_reference(teacher, student, labels, COLUMNS, 4.0, 8.0)
    # tau^2 (1 + beta) terms, each with the error of a KL of logits divided by tau.
    np.testing.assert_allclose(found, expected, atol=16 * 9 * BUDGET / 4, rtol=0)
    assert np.abs(expected).min() > 0.1


def test_decoupled_kl_where_a_task_has_one_class():
    """There are no others: the loss is zero, and so is its gradient."""
    teacher, student, labels = draw(3, 6), draw(3, 6, seed=1), jnp.array([2, 2, 2])
    only = jnp.arange(6) == 2
    value, gradient = jax.value_and_grad(
        lambda s: decoupled_kl(jnp.asarray(teacher), s, labels, only, 4.0, 4.0).sum()
    )(jnp.asarray(student))
    assert float(value) == 0.0 and not np.asarray(gradient).any()


def test_losses_of_a_teacher_send_it_no_gradient():
    teacher, student, labels = (
        jnp.asarray(draw(4, 6)),
        jnp.asarray(draw(4, 6, seed=1)),
        jnp.arange(4),
    )
    columns = jnp.ones(6, bool)
    losses = (
        lambda t, s: softened_kl(t, s, columns[None], 2.0),
        lambda t, s: decoupled_kl(t, s, labels, columns, 4.0, 4.0),
        mean_square,
    )
    for loss in losses:
        of_teacher, of_student = jax.grad(lambda t, s, f=loss: f(t, s).sum(), (0, 1))(
            teacher, student
        )
        assert not np.asarray(of_teacher).any() and np.abs(of_student).max() > 0.01


def test_mean_square():
    teacher, student = draw(3, 4, 5), draw(3, 4, 5, seed=1)
    found = mean_square(jnp.asarray(teacher), jnp.asarray(student))
    expected = ((np.float64(teacher) - student) ** 2).reshape(3, -1).mean(1)
    np.testing.assert_allclose(found, expected, rtol=20 * EPS)


def test_jensen_shannon():
    """Of columns that hold alone, whatever stands in the others; also -inf, of a class not seen."""
    teacher, student = draw(2, 3, 6), draw(2, 3, 6, seed=1)
    p, q = (np.exp(log_softmax(values[..., COLUMNS], True)) for values in (student, teacher))
    mean = (p + q) / 2
    expected = 0.5 * (p * np.log(p / mean) + q * np.log(q / mean)).sum(-1)
    for unseen in (teacher, np.where(COLUMNS, teacher, -np.inf)):
        found = jensen_shannon(jnp.asarray(unseen), jnp.asarray(student), jnp.asarray(COLUMNS))
        np.testing.assert_allclose(found, expected, atol=BUDGET)
    to_teacher = jax.grad(lambda t: jensen_shannon(t, student, COLUMNS).sum())(teacher)
    assert not np.asarray(to_teacher).any()
