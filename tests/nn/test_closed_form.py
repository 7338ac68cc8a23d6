"""Classifiers in closed form: one after several tasks is the one of all images, in any order; and
what the formulas say, in plain NumPy.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies

from qkd_jax.nn import closed_form
from qkd_jax.nn.closed_form import HEADS
from qkd_jax.nn.moments import (
    Pair,
    add_moments,
    as_float64,
    as_pair,
    empty_moments,
    within_class_scatter,
)
from qkd_jax.nn.whitening import isotropic_share, learned_metric, whiten
from qkd_jax.settings.sections import ClassifierConfig

WIDTH, CLASSES = 6, 5
CHOSEN = ClassifierConfig(projection_dim=16, ridge=0.5, rank=3, kernel_gamma=0.05)


def inputs(seed=0, each=8, scale=1.0):
    """features [N, 6] and labels [N] of five classes, class by class."""
    generator = np.random.default_rng(seed)
    labels = np.repeat(np.arange(CLASSES), each)
    features = generator.normal(size=(CLASSES, WIDTH))[labels] * 2
    return np.float32(scale * (features + generator.normal(size=features.shape))), labels


@functools.cache
def drawn_of(kind):
    chosen = ClassifierConfig(**{**vars(CHOSEN), "kind": kind})
    return chosen, HEADS[kind].draw(chosen, jax.random.key(1), WIDTH)


def stored(sums):
    """`sums` as a state keeps them from task to task."""
    pairs = jax.tree.map(as_pair, sums)
    return jax.tree.map(as_float64, pairs, is_leaf=lambda leaf: isinstance(leaf, Pair))


def scores_of(kind, tasks, features, labels, queries, **changes):
    """Scores after tasks, each a list of rows of `features`, with changed settings."""
    chosen, drawn = drawn_of(kind)
    chosen = dataclasses.replace(chosen, **changes)
    head = HEADS[kind]
    sums = head.empty(chosen, drawn, CLASSES, WIDTH)
    for rows in tasks:
        sums = head.add(chosen, drawn, sums, features[rows], labels[rows], jax.random.key(2))
        sums = stored(sums)
    if kind == "ranpac":  # it is chosen anew by every task; here the order of sums is asked for
        sums["ridge"] = np.float64(0.5)
    rule = head.solve(chosen, drawn, sums, jax.random.key(3))
    rule = {name: jnp.asarray(array, jnp.float32) for name, array in rule.items()}
    return np.asarray(head.scores(drawn, rule, jnp.asarray(queries)))


@functools.cache
def batch_scores(kind, **changes):
    features, labels = inputs()
    every = np.arange(len(labels))
    return scores_of(kind, [every], features, labels, features[::7], **changes)


@pytest.mark.parametrize("kind", HEADS)
@settings(max_examples=8)
@given(data=strategies.data())
def test_tasks_in_any_order_give_the_classifier_of_all_images(kind, data):
    """Budget: sums are good to 2^-48 and solutions carry that times a condition below 1e4, which
    float32 scores (10 eps of the largest) do not show.
    """
    order = data.draw(strategies.permutations(range(CLASSES)))
    cuts = sorted(data.draw(strategies.sets(strategies.integers(1, CLASSES - 1))))
    features, labels = inputs()
    shuffle = np.random.default_rng(data.draw(strategies.integers(0, 9))).permutation(len(labels))
    tasks = [shuffle[np.isin(labels[shuffle], part)] for part in np.split(order, cuts)]
    found = scores_of(kind, tasks, features, labels, features[::7])
    expected = batch_scores(kind)
    np.testing.assert_allclose(found, expected, atol=10 * 1.2e-7 * np.abs(expected).max())


def test_a_small_ridge_beside_large_eigenvalues_needs_float64():
    """Eigenvalues up to 1e8 beside a ridge of 0.1: of sums in float32 nothing would be left (1e-7
    times 1e9). Pairs carry 4e-15 times 1e9. The dual problem of fewer images than M, in float64,
    is the oracle.
    """
    features, labels = inputs(each=2, scale=500.0)
    chosen = ClassifierConfig(kind="rls", projection_dim=64, ridge=0.1)
    head = HEADS["rls"]
    drawn = head.draw(chosen, jax.random.key(0), WIDTH)
    sums = head.empty(chosen, drawn, CLASSES, WIDTH)
    sums = stored(head.add(chosen, drawn, sums, features, labels, None))
    assert np.linalg.eigvalsh(sums["moments"][0].outer).max() > 1e8
    rows = head.solve(chosen, drawn, sums, None)["rows"]
    z = np.float64(head.vectors(drawn, jnp.asarray(features))[0])
    dual = np.linalg.solve(z @ z.T + 0.1 * np.eye(len(z)), np.eye(CLASSES)[labels])
    np.testing.assert_allclose(rows, (z.T @ dual).T, atol=1e-4 * np.abs(rows).max())


def test_a_pair_keeps_48_bits():
    values = np.random.default_rng(0).normal(size=1000) * 10.0 ** np.arange(-10, 10).repeat(50)
    np.testing.assert_allclose(as_float64(as_pair(values)), values, rtol=2.0**-48)


@pytest.mark.parametrize("shrinkage", [0.6, 0.0])
def test_whitened_is_the_metric_of_the_whitened_head(shrinkage):
    """`nn.whitening` computes it in float32: eps times the condition of the covariance, below 10
    here.
    """
    features, labels = inputs()
    found = batch_scores("whitened", shrinkage=shrinkage)
    moments = add_moments(empty_moments(CLASSES, WIDTH), features, labels)
    means = jnp.asarray(moments.total / moments.count[:, None], jnp.float32)
    scatter = jnp.asarray(within_class_scatter(moments), jnp.float32)
    count = jnp.float32(len(labels))
    share = isotropic_share(shrinkage, 0.5, count, WIDTH)
    metric = learned_metric(scatter, count, means, jnp.ones(CLASSES, bool), share)
    a, b = np.asarray(whiten(metric, features[::7])), np.asarray(whiten(metric, means))
    cosine = (a @ b.T) / np.linalg.norm(a, axis=1)[:, None] / np.linalg.norm(b, axis=1)
    np.testing.assert_allclose(found, cosine, atol=100 * 1.2e-7)


def test_lr_rgda_keeps_the_leading_directions_of_each_class():
    """The log density with the truncated covariances, by plain inverses."""
    features, labels = inputs()
    found, expected = batch_scores("lr_rgda"), []
    wide = np.float64(features)
    covariances = np.stack([np.cov(wide[labels == c].T) for c in range(CLASSES)])
    for c in range(CLASSES):
        values, vectors = np.linalg.eigh(covariances[c])
        leading = (vectors[:, -3:] * values[-3:]) @ vectors[:, -3:].T
        full = 0.2 * leading + 0.2 * covariances.mean(0) + 0.2 * np.eye(WIDTH)
        gap = wide[::7] - wide[labels == c].mean(0)
        distance = np.einsum("nd,de,ne->n", gap, np.linalg.inv(full), gap)
        expected.append(-0.5 * distance - 0.5 * np.linalg.slogdet(full)[1])
    expected = np.stack(expected, axis=1)
    found, expected = (s - s.mean(axis=1, keepdims=True) for s in (found, expected))
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("kind", HEADS)
def test_a_class_of_one_image_and_classes_not_seen_yet_leave_finite_scores(kind):
    features, labels = inputs()
    found = scores_of(kind, [np.array([0, 8, 9])], features, labels, features[:3])
    assert np.isfinite(found).all()
    assert found[0, :2].argmax() == 0


def test_ranpac_takes_the_ridge_with_the_least_error_on_held_out_images():
    """Errors by 17 solves in float64, on the fifth that the key leaves out."""
    features, labels = inputs(each=12)
    chosen, drawn = drawn_of("ranpac")
    head, key = HEADS["ranpac"], jax.random.key(5)
    sums = head.empty(chosen, drawn, CLASSES, WIDTH)
    ridge = float(head.add(chosen, drawn, sums, features, labels, key)["ridge"])
    order = np.asarray(jax.random.permutation(key, len(labels)))
    z = np.float64(head.vectors(drawn, jnp.asarray(features))[0])[order]
    y, count, errors = np.eye(CLASSES)[labels[order]], 4 * len(labels) // 5, []
    for value in closed_form.RIDGES:
        gram = z[:count].T @ z[:count] + value * np.eye(z.shape[1])
        rows = np.linalg.solve(gram, z[:count].T @ y[:count])
        errors.append(np.mean((z[count:] @ rows - y[count:]) ** 2))
    np.testing.assert_allclose(closed_form.held_out_errors(z, y), errors, rtol=1e-6)
    assert ridge == closed_form.RIDGES[int(np.argmin(errors))] != 1.0
    alone = head.add(chosen, drawn, {**sums, "ridge": np.float64(ridge)}, features[:1], [0], key)
    assert float(alone["ridge"]) == ridge
