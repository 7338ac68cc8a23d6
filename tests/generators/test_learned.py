"""A network that draws features: it learns what classes look like, and keeps what it has learned.

How near draws are to features is the energy distance 2 E|x - y| - E|x - x'| - E|y - y'|, which is
zero between equal laws. Features of a class are a ring around its mean, which no Gaussian is.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkd_jax.generators.bank import add_to_bank, empty_bank, pick, rows_by_class
from qkd_jax.generators.learned import DriftSettings, learned
from qkd_jax.protocol.metrics import energy_distance

WIDTH, CLASSES, PER_TASK, SIZE = 4, 5, 2, 130
SMALL = {"steps": 400, "learning_rate": 5e-3, "labels": 4, "noise": 4, "hidden": 32}
KINDS = {
    "drifting": ("drifting", DriftSettings(**SMALL)),
    "gradient_flow": ("gradient_flow", DriftSettings(**SMALL)),
    "sphere": ("gradient_flow", DriftSettings(**SMALL, sphere=True)),
}


def ring(label, size, seed):
    """Features [size, D] on a circle of radius 1.5 in a plane of the class, around its mean."""
    draws = np.random.default_rng([label, seed])
    angle = draws.uniform(0, 2 * np.pi, size)
    features = 0.1 * draws.normal(size=(size, WIDTH))
    features[:, label % 2] += 1.5 * np.cos(angle)
    features[:, 2 + label % 2] += 1.5 * np.sin(angle)
    return (features + 5.0 + 2.0 * label).astype(np.float32)


def collected(generator, labels, seed=0, garbage=np.nan):
    """Statistics of the features of two classes, in padded batches."""
    found = generator.statistics(PER_TASK, WIDTH)
    features = np.concatenate([ring(label, 60, seed) for label in labels])
    position = np.repeat(np.arange(len(labels)), 60)
    order = np.random.default_rng(1).permutation(len(features))
    add = jax.jit(generator.add)
    for rows in np.array_split(order, 3):
        batch = np.full((48, WIDTH), garbage, np.float32)
        batch[: len(rows)] = features[rows]
        at = np.zeros(48, np.int32)
        at[: len(rows)] = position[rows]
        found = add(found, jnp.asarray(batch), jnp.asarray(at), jnp.arange(48) < len(rows))
    return found


@functools.cache
def history(name):
    """The generator, its memory after each of three tasks, and how often `fit` was compiled."""
    generator = learned(*KINDS[name], SIZE)
    fit = jax.jit(generator.fit)
    memories = [generator.empty(CLASSES, WIDTH)]
    for task, labels in enumerate(((0, 1), (2, 3), (4,))):
        columns = jnp.asarray([*labels, *[CLASSES] * (PER_TASK - len(labels))])
        statistics = collected(generator, labels)
        memories.append(fit(memories[-1], statistics, columns, jax.random.key(task)))
    return generator, memories[1:], fit._cache_size()


def draws_of(generator, memory, label, size=400, seed=5):
    return np.asarray(generator.draw(memory, jax.random.key(seed), jnp.full(size, label)))


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n == "drifting" else pytest.mark.slow) for n in KINDS]
)
def test_draws_are_like_features_also_of_classes_whose_features_are_gone(name):
    generator, memories, compilations = history(name)
    assert compilations == 1
    for label in range(CLASSES):
        real = ring(label, 400, seed=9)
        draws = draws_of(generator, memories[-1], label)
        mean = np.broadcast_to(real.mean(0), real.shape) + 1e-3 * ring(0, 400, 3)
        gaussian = real.mean(0) + np.random.default_rng(0).normal(size=real.shape) * real.std(0)
        found, of_means = energy_distance(draws, real), energy_distance(mean, real)
        if name == "sphere":  # which has no lengths, a part of what makes these rings
            assert found < 0.3 * of_means
            continue
        # Nearer than means alone by far; and, fresh from its task, than a diagonal Gaussian.
        assert found < 0.1 * of_means, label
        assert label < 4 or found < energy_distance(gaussian, real)
    assert np.asarray(memories[1].known).tolist() == [True] * 4 + [False]


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n == "drifting" else pytest.mark.slow) for n in KINDS]
)
def test_a_generator_remembers_by_its_own_draws_alone(name):
    """Its memory has the size that it had before; without its draws the first classes are lost."""
    generator, memories, _ = history(name)
    sizes = [jax.tree.map(jnp.shape, memory) for memory in memories]
    assert sizes[0] == sizes[1] == sizes[2]
    statistics, columns = collected(generator, (2, 3)), jnp.asarray([2, 3])
    forgot = memories[0].replace(known=jnp.zeros(CLASSES, bool))
    lost = jax.jit(generator.fit)(forgot, statistics, columns, jax.random.key(1))
    real = ring(0, 400, seed=9)
    kept = energy_distance(draws_of(generator, memories[1], 0), real)
    assert kept < 0.5 * energy_distance(draws_of(generator, lost, 0), real)


def test_equal_keys_give_equal_memories_and_padding_counts_for_nothing():
    generator, memories, _ = history("drifting")
    for garbage in (np.nan, 7.0):
        statistics = collected(generator, (0, 1), garbage=garbage)
        fit = functools.partial(jax.jit(generator.fit), generator.empty(CLASSES, WIDTH), statistics)
        again = fit(jnp.asarray([0, 1]), jax.random.key(0))
        for one, other in zip(jax.tree.leaves(again), jax.tree.leaves(memories[0]), strict=True):
            np.testing.assert_array_equal(one, other)
    other = fit(jnp.asarray([0, 1]), jax.random.key(1))
    assert not np.allclose(draws_of(generator, other, 0), draws_of(generator, memories[0], 0))


def test_what_is_drawn_moves_with_the_mean_of_its_class():
    generator, memories, _ = history("drifting")
    memory, shift = memories[-1], np.arange(WIDTH, dtype=np.float32)
    moved = memory.replace(mean=memory.mean.at[1].add(shift))
    for label, by in ((0, 0), (1, shift)):
        expected = draws_of(generator, memory, label) + by
        np.testing.assert_allclose(draws_of(generator, moved, label), expected, atol=1e-5)


def test_moments_are_those_of_the_features():
    generator, memories, _ = history("sphere")
    for label in (0, 3, 4):
        features = np.float64(ring(label, 60, 0))
        np.testing.assert_allclose(memories[-1].mean[label], features.mean(0), rtol=1e-5)
        spread = np.sqrt(np.mean((features - features.mean(0)) ** 2))
        np.testing.assert_allclose(memories[-1].spread[label], spread, rtol=1e-4)
        length = np.linalg.norm(features, axis=1).mean()
        np.testing.assert_allclose(memories[-1].length[label], length, rtol=1e-5)
        draws = draws_of(generator, memories[-1], label)
        np.testing.assert_allclose(np.linalg.norm(draws, axis=1), length, rtol=1e-5)


def test_a_bank_picks_every_feature_of_a_class_equally_often():
    bank, features = empty_bank(9, 1), jnp.arange(8.0)[:, None]
    positions = jnp.array([2, 0, 2, 1, 0, 2, 2, 0])
    bank = add_to_bank(bank, features[:5], positions[:5], jnp.array([True] * 4 + [False]))
    bank = add_to_bank(bank, features[4:], positions[4:], jnp.ones(4, bool))
    assert int(bank.count) == 8
    places = rows_by_class(bank, 4)
    assert places.count.tolist() == [3, 1, 4, 0]
    asked = jnp.asarray(np.repeat([[2, 1], [0, 2]], 600, axis=0))
    found = np.asarray(pick(places, jax.random.key(0), asked))
    assert found.shape == (1200, 2, 1)
    for label in range(3):
        mine, counts = np.unique(found[np.asarray(asked) == label], return_counts=True)
        assert mine.tolist() == np.flatnonzero(np.asarray(positions) == label).tolist()
        # Five standard deviations of a count with mean n / k.
        share = counts.sum() / len(counts)
        assert (np.abs(counts - share) <= 5 * np.sqrt(share)).all()
    full = add_to_bank(bank, features[:5] + 50, positions[:5], jnp.ones(5, bool))
    np.testing.assert_array_equal(full.features[:, 0], [*range(8), 50])
