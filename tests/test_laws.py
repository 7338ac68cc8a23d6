"""Laws that hold for any input: what is collected does not depend on batches, memories not on the
order of tasks, relevance not on the order of anchors or the names of tasks, and what a store gives
not on what it was asked before.

Shapes are fixed, so that each program is compiled once. The laws of metrics, protocol, circuits and
classifiers in closed form stand in their own files.
"""

import itertools
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qkd_jax.generators.gaussian import gaussian
from qkd_jax.learners.qkd import gate
from qkd_jax.nn import heads
from qkd_jax.runs.store import Store

EPS = float(np.finfo(np.float32).eps)
IMAGES, CLASSES, WIDTH, BATCH = 12, 3, 4, 8
KINDS = ("covariance", "variance", "shared", "mean")
seeds = st.integers(0, 2**32 - 1)


def images_of(seed):
    """Features [N, D] of length about 2, and the position of each among the classes."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(IMAGES, WIDTH)) + rng.normal(size=WIDTH)
    return np.float32(features), rng.integers(0, CLASSES, IMAGES)


def batches_of(features, positions, cuts, order):
    """The images in this order, cut into batches of one padded size; padding holds numbers."""
    edges = [0, *sorted(cuts), IMAGES]
    for first, last in itertools.pairwise(edges):
        for start in range(first, last, BATCH):
            rows = order[start : min(start + BATCH, last)]
            padded = np.resize(rows, BATCH) if len(rows) else np.zeros(BATCH, int)
            yield features[padded], positions[padded], np.arange(BATCH) < len(rows)


cuts_and_orders = (
    st.lists(st.integers(0, IMAGES), max_size=4),
    st.permutations(range(IMAGES)).map(np.array),
)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=10)
@given(seeds, *cuts_and_orders)
def test_moments_are_those_of_all_images_whatever_the_batches(kind, seed, cuts, order):
    """Budget: sums of 12 terms below 4^2, each rounded, and merged at most 7 times."""
    generator = gaussian(kind, 1e-4)
    features, positions = images_of(seed)
    found, add = generator.statistics(CLASSES, WIDTH), jax.jit(generator.add)
    for batch in batches_of(features, positions, cuts, order):
        found = add(found, *map(jnp.asarray, batch))
    for c in range(CLASSES):
        own = np.float64(features[positions == c])
        assert int(found.count[c]) == len(own)
        mean = own.mean(0) if len(own) else np.zeros(WIDTH)
        scatter = (own - mean).T @ (own - mean)
        if found.scatter.ndim == 2:
            scatter = np.diagonal(scatter)
        np.testing.assert_allclose(found.mean[c], mean, atol=64 * EPS)
        np.testing.assert_allclose(found.scatter[c], scatter, atol=1024 * EPS)


@settings(max_examples=10)
@given(seeds, *cuts_and_orders)
def test_class_means_are_those_of_all_images_whatever_the_batches(seed, cuts, order):
    features, positions = images_of(seed)
    found, add = heads.empty_statistics(1, CLASSES, WIDTH, 1), jax.jit(heads.add_to_statistics)
    for vectors, where, mask in batches_of(features, positions, cuts, order):
        found = add(found, jnp.asarray(vectors)[:, None], jnp.asarray(where), jnp.asarray(mask))
    means = heads.class_means(found)[0]
    wide, scatter = np.float64(features), np.zeros((WIDTH, WIDTH))
    for c in range(CLASSES):
        own = wide[positions == c]
        mean = own.mean(0) if len(own) else np.zeros(WIDTH)
        scatter += (own - mean).T @ (own - mean)
        np.testing.assert_allclose(means[c], mean, atol=64 * EPS)
    np.testing.assert_allclose(heads.within_class_scatter(found)[0], scatter, atol=1024 * EPS)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=4)
@given(seeds, st.permutations(range(3)))
def test_a_generator_remembers_its_tasks_in_any_order(kind, seed, order):
    """To the bit, but for the covariance that all classes share: a sum over tasks."""
    generator = gaussian(kind, 1e-2)
    add, fit = jax.jit(generator.add), jax.jit(generator.fit)
    key, mask = jax.random.key(0), jnp.ones(IMAGES, bool)

    def memory(order):
        kept = generator.empty(3 * CLASSES, WIDTH)
        for task in order:
            features, positions = images_of([seed, task])
            empty = generator.statistics(CLASSES, WIDTH)
            collected = add(empty, jnp.asarray(features), jnp.asarray(positions), mask)
            columns = task * CLASSES + jnp.arange(CLASSES)
            kept = fit(kept, collected, columns, key)
        return jax.tree.leaves(kept)

    for one, other in zip(memory(range(3)), memory(order), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=2048 * EPS * (kind == "shared"))


ANCHORS, TASKS = 5, 3
GATES = ("quantum", "pqk", "cosine", "rbf", "mlp", "attention", "uniform")
relevance = jax.jit(gate.relevance, static_argnums=1)


@pytest.mark.parametrize("kind", GATES)
@settings(max_examples=8)
@given(
    seed=seeds,
    owner=st.lists(st.integers(-1, TASKS - 1), min_size=ANCHORS, max_size=ANCHORS).map(np.array),
    is_open=st.lists(st.booleans(), min_size=TASKS, max_size=TASKS).map(np.array),
    order=st.permutations(range(ANCHORS)).map(np.array),
    names=st.permutations(range(TASKS)).map(np.array),
    rows=st.permutations(range(4)).map(np.array),
)
def test_relevance_follows_from_images_and_anchors_alone(
    kind, seed, owner, is_open, order, names, rows
):
    """Not from the order of anchors, the numbers of tasks, or the place of an image in its batch.
    An open task without an anchor, which no run has, takes no part. Budget: a softmax of evidence
    below 10 over at most 5 anchors.
    """
    config = gate.GateSettings(
        kind=kind, num_qubits=3, num_layers=1, encoding="angle", temperature=0.5
    )
    params = gate.init_gate(jax.random.key(1), config, 8, TASKS)
    rng = np.random.default_rng(seed)
    query, anchors = (np.float32(rng.normal(size=(n, 8))) for n in (4, ANCHORS))
    is_open = is_open & np.isin(np.arange(TASKS), owner)
    weights = np.asarray(relevance(params, config, query, anchors, owner, is_open).weights)
    if is_open.any():
        np.testing.assert_allclose(weights.sum(1), 1, atol=32 * EPS)
    assert (weights >= 0).all() and (weights[:, ~is_open] == 0).all()
    renamed = np.where(owner >= 0, names[owner], -1)[order]
    open_now = np.zeros(TASKS, bool)
    open_now[names] = is_open
    again = relevance(params, config, query[rows], anchors[order], renamed, open_now).weights
    np.testing.assert_allclose(np.asarray(again)[:, names], weights[rows], atol=256 * EPS)


requests = st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=4), min_size=1, max_size=5)
LIKE = jax.ShapeDtypeStruct((1, 3), np.float32)


@given(requests, st.lists(st.integers(0, 5), max_size=3), st.sampled_from([0, 60, 2**20]))
def test_a_store_gives_what_it_would_compute_whatever_it_was_asked_before(asked, harmed, limit):
    """In any order, with repeated inputs, damaged files, and any amount of room."""

    def digests(numbers):
        return np.array([[number] * 16 for number in numbers], np.uint8)

    with tempfile.TemporaryDirectory() as folder:
        for numbers in asked:
            shelf = Store(Path(folder), limit, "w").shelf("x")
            for number in harmed:
                path = shelf.folder / digests([number])[0].tobytes().hex()
                if path.exists():
                    path.write_bytes(b"abc" + path.read_bytes()[3:])
            values = np.float32(numbers)[:, None] * np.ones((1, 3), np.float32)
            found = shelf.rows(digests(numbers), LIKE, lambda missing, v=values: v[missing])
            np.testing.assert_array_equal(found, values)
