"""Weights, and positions from them: exactly from exact ones, and under noise."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from projects.nanoparticles.laplacian import (
    DECODERS,
    T,
    count_atoms,
    decode_distances,
    decode_laplacian,
    rmsd,
    study_noise,
    weights_of,
)
from projects.nanoparticles.structures import KINDS, make_clusters
from qkd_jax.errors import DataError

ATOMS = 40


@functools.cache
def clusters():
    """Two clusters of each kind, of 8 to 40 atoms: positions [12, 40, 3] and counts [12]."""
    pytest.importorskip("ase")
    made = make_clusters(11, 200, ATOMS)
    rows = np.concatenate([np.flatnonzero(made.kind == kind)[:2] for kind in KINDS])
    return made.positions[rows], made.count[rows]


def ball(seed=0, atoms=10, size=2.6):
    grid = np.stack(np.meshgrid(*[np.arange(3.0)] * 3), axis=-1).reshape(-1, 3)[:atoms]
    noise = np.random.default_rng(seed).normal(scale=0.2, size=grid.shape)
    return (size * grid + noise).astype(np.float32)


def padded(positions, atoms=16, value=0.0):
    full = np.full((atoms, 3), value, np.float32)
    full[: len(positions)] = positions
    return full


def test_weights_are_those_of_loops_and_padding_is_zero():
    """Float32: 1e-7 of |x|^2 / t = 1 or so."""
    positions = ball()
    expected = np.zeros((16, 16))
    for i, a in enumerate(positions.astype(float)):
        for j, b in enumerate(positions.astype(float)):
            expected[i, j] = np.exp(-np.sum((a - b) ** 2) / 30)
    found = weights_of(padded(positions, value=9.0), np.int32(10), 30.0)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert found.dtype == jnp.float32
    assert not np.asarray(found)[10:].any() and not np.asarray(found)[:, 10:].any()
    assert int(count_atoms(found, 30.0)) == 10


def test_atoms_are_counted_in_a_noisy_matrix():
    """The threshold exp(-64 / 100) = 0.53 is nine standard deviations away from 0 and from 1."""
    positions, count = clusters()
    exact = weights_of(positions, count)
    noise = 0.05 * np.random.default_rng(0).normal(size=exact.shape).astype(np.float32)
    np.testing.assert_array_equal(count_atoms(exact + noise), count)


@pytest.mark.parametrize("decode", [decode_laplacian, decode_distances])
def test_exact_weights_give_exact_positions(decode):
    """Of every kind of cluster. A weight in float32 is known to 6e-8, a distance from it to
    t 6e-8 / (2 W d) < 1e-5 angstrom; the bound asked for is 1e-3, what is found about 1e-6.
    """
    positions, count = clusters()
    found = np.asarray(decode(weights_of(positions, count), count))
    for a, b, n in zip(found, positions, count, strict=True):
        assert rmsd(a[:n], b[:n]) < 5e-5
        assert not a[n:].any() and np.abs(a.mean(axis=0)).max() < 1e-4


def test_eigenvectors_alone_are_near():
    """They are no isometry: for these clusters they miss by less than a tenth of the distance of
    neighbours, while all atoms in one point would miss by the radius, 2 angstrom and more.
    """
    positions, count = clusters()
    found = np.asarray(decode_laplacian(weights_of(positions, count), count, refine=False))
    errors = [rmsd(a[:n], b[:n]) for a, b, n in zip(found, positions, count, strict=True)]
    assert np.median(errors) < 0.1 and max(errors) < 0.3
    spread = [rmsd(0 * b[:n], b[:n]) for b, n in zip(positions, count, strict=True)]
    assert min(spread) > 2


def test_padding_changes_nothing():
    positions = ball()
    exact = np.asarray(weights_of(positions, np.int32(10)))
    noise = 0.01 * np.random.default_rng(1).normal(size=exact.shape).astype(np.float32)
    tight = exact + noise + noise.T
    wide = np.full((16, 16), 0.7, np.float32)  # what stands outside is not read
    wide[:10, :10] = tight
    for decode in DECODERS.values():
        found = [np.asarray(decode(w, np.int32(10))) for w in (tight, wide)]
        assert rmsd(found[0], found[1][:10]) < 2e-4


def test_the_refinement_finds_the_minimum_of_scipy():
    """Of the same sum, in float64 from the truth. A sum near its minimum is flat: float32 tells
    its value to 1e-6, so that positions agree to 1e-3 of their scale.
    """
    optimize = pytest.importorskip("scipy.optimize")
    positions = ball(2)
    exact = np.asarray(weights_of(positions, np.int32(10)), np.float64)
    noise = np.triu(0.02 * np.random.default_rng(4).normal(size=exact.shape), k=1)
    noisy = exact + noise + noise.T
    first, second = np.triu_indices(10, k=1)

    def residuals(flat):
        x = flat.reshape(-1, 3)
        return np.exp(-np.sum((x[first] - x[second]) ** 2, axis=1) / T) - noisy[first, second]

    best = optimize.least_squares(residuals, positions.astype(float).ravel(), xtol=1e-12)
    for decode in (DECODERS["Laplacian, refined"], DECODERS["distances, refined"]):
        found = np.asarray(decode(noisy.astype(np.float32), np.int32(10)))
        value = np.sum(residuals(found.astype(float).ravel()) ** 2)
        assert value < 2 * best.cost * (1 + 1e-4)
        assert rmsd(found, best.x.reshape(-1, 3)) < 5e-3


def test_scaling_reaches_a_stress_as_low_as_scipy():
    """Metric scaling minimises sum (|x_i - x_j| - d_ij)^2; 300 steps from the classical solution
    come within 1 % of what a general minimiser finds from the same distances.
    """
    optimize = pytest.importorskip("scipy.optimize")
    positions = ball(5)
    exact = np.asarray(weights_of(positions, np.int32(10)), np.float64)
    noise = np.triu(0.02 * np.random.default_rng(4).normal(size=exact.shape), k=1)
    noisy = (exact + noise + noise.T).astype(np.float32)
    first, second = np.triu_indices(10, k=1)
    distances = np.sqrt(-T * np.log(np.clip(noisy[first, second], None, 1)))

    def residuals(flat):
        x = flat.reshape(-1, 3)
        return np.linalg.norm(x[first] - x[second], axis=1) - distances

    best = 2 * optimize.least_squares(residuals, positions.astype(float).ravel()).cost
    found = decode_distances(noisy, np.int32(10))
    assert np.sum(residuals(np.asarray(found, float).ravel()) ** 2) < 1.01 * best


def test_nonsense_is_decoded_to_numbers():
    """Negative weights, weights over 1 and nothing at all: finite positions come back."""
    draws = np.random.default_rng(0)
    given = draws.normal(size=(3, 16, 16)).astype(np.float32) * np.float32([[[1]], [[30]], [[0]]])
    for decode in DECODERS.values():
        assert np.isfinite(decode(given, np.full(3, 12, np.int32))).all()


def test_rmsd_is_that_of_the_best_motion_or_reflection():
    atoms = ball(7, 12).astype(float)
    turn = np.linalg.qr(np.random.default_rng(2).normal(size=(3, 3)))[0]
    for moved in (atoms @ turn + 5, atoms @ -turn):
        assert rmsd(moved, atoms) < 1e-12
    # Two atoms moved apart by the same length along their line cannot be made up for.
    line = np.array([[0.0, 0, 0], [1, 0, 0]])
    assert rmsd(line * 3, line) == pytest.approx(1.0)
    assert rmsd(atoms[::-1], atoms) > 1


def test_rmsd_finds_the_order_of_a_symmetric_cluster():
    """Every kind, turned, mirrored and shuffled, with noise of 0.05: what is found is no worse than
    the true order, up to what another assignment gains.
    """
    positions, count = clusters()
    for k, (atoms, n) in enumerate(zip(positions, count, strict=True)):
        draws = np.random.default_rng(k)
        turn = np.linalg.qr(draws.normal(size=(3, 3)))[0]
        moved = atoms[:n] @ turn + draws.normal(scale=0.05, size=(n, 3))
        known = rmsd(moved, atoms[:n])
        assert rmsd(moved[draws.permutation(n)], atoms[:n], reorder=True) <= known * (1 + 1e-6)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (np.zeros((4, 3)), r"expected two arrays \[N, 3\] of as many atoms, found \(4, 3\)"),
        (np.full((5, 3), np.nan), "expected finite numbers"),
    ],
)
def test_what_cannot_be_compared_is_refused(found, message):
    with pytest.raises(DataError, match=message):
        rmsd(found, np.zeros((5, 3)))


def test_the_study_of_noise_measures_every_decoder():
    """Without noise all but the plain eigenvectors are exact; errors grow with the noise. The two
    refined decoders end in the same minimum.
    """
    positions, count = (a[:3] for a in clusters())
    study = study_noise(jax.random.key(0), positions, count, [0.0, 0.003, 0.03])
    assert list(study.rmsd) == list(DECODERS)
    for name, found in study.rmsd.items():
        assert found.shape == (3, 3)
        assert (np.diff(found, axis=0) > 0).all() or name == "Laplacian"
        assert found[0].max() < (0.3 if name == "Laplacian" else 5e-5)
    refined = [study.rmsd[name] for name in ("Laplacian, refined", "distances, refined")]
    np.testing.assert_allclose(*refined, rtol=0.02, atol=1e-5)
