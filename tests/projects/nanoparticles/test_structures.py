"""Clusters of metals: sizes, distances, reproducibility, and the order of atoms."""

import numpy as np
import pytest

from projects.nanoparticles.structures import (
    KINDS,
    METALS,
    canonical_order,
    make_clusters,
    nearest_distance,
    polyhedra,
    shapes,
)
from qkd_jax.errors import ConfigError

pytest.importorskip("ase")


def gaps_of(positions):
    return np.linalg.norm(positions[:, None] - positions[None], axis=-1)


@pytest.fixture(scope="module")
def clusters():
    return make_clusters(3, 120, 64)


def test_all_kinds_and_sizes_come_centred_and_padded(clusters):
    assert clusters.positions.shape == (120, 64, 3) and clusters.positions.dtype == np.float32
    assert clusters.count.dtype == np.int32
    assert set(clusters.kind) == set(KINDS)
    assert clusters.count.min() >= 8 and clusters.count.max() <= 64
    assert len(set(clusters.count.tolist())) > 30
    for atoms, count, element, kind in zip(*clusters, strict=True):
        assert element in METALS[kind]
        assert not atoms[count:].any() and atoms[:count].any(axis=1).sum() >= count - 1
        assert np.abs(atoms.mean(axis=0)).max() < 1e-5


def test_nearest_neighbours_are_where_the_crystal_has_them(clusters):
    """Scale 2 %, strain 1 % and 0.05 angstrom for each atom: the median is within 10 %, and no two
    atoms come nearer than 0.8 of the distance (of a stretched icosahedron 5 % are its own).
    """
    for atoms, count, element, kind in zip(*clusters, strict=True):
        gaps = gaps_of(atoms[:count].astype(float)) / nearest_distance(str(element))
        nearest = (gaps + 9 * np.eye(count)).min(axis=1)
        assert abs(np.median(nearest) - 1) < 0.1, kind
        assert 0.8 < nearest.min() and nearest.max() < 1.25, kind


def test_tabulated_distances():
    """fcc copper a / sqrt 2, bcc iron a sqrt(3) / 2, hcp cobalt between its two shortest."""
    assert nearest_distance("Cu") == pytest.approx(3.61 / 2**0.5, rel=1e-6)
    assert nearest_distance("Fe") == pytest.approx(2.87 * 0.75**0.5, rel=1e-6)
    assert 2.49 < nearest_distance("Co") < 2.51
    with pytest.raises(ConfigError, match="found Si"):
        nearest_distance("Si")


def test_a_cluster_depends_on_its_seed_and_its_place_alone(clusters):
    again, shorter = make_clusters(3, 120, 64), make_clusters(3, 5, 64)
    for whole, same, part in zip(clusters, again, shorter, strict=True):
        np.testing.assert_array_equal(whole, same)
        np.testing.assert_array_equal(whole[:5], part)
    other = make_clusters(4, 5, 64)
    assert not np.array_equal(other.count, shorter.count)


def test_polyhedra_are_the_known_ones():
    """Magic numbers: Mackay icosahedra, and octahedra with their truncations."""
    assert [len(sites) for sites in polyhedra("icosahedral")] == [13, 55, 147, 309]
    assert {6, 13, 19, 38, 44, 55} <= {len(sites) for sites in polyhedra("octahedral")}
    assert {7, 13, 23, 54} <= {len(sites) for sites in polyhedra("decahedral")}
    for kind in KINDS[3:]:
        for sites in polyhedra(kind):
            # The spokes of an icosahedron are 5 % shorter than its edges.
            assert 0.94 < (gaps_of(sites) + 9 * np.eye(len(sites))).min() < 1.001
    biggest = make_clusters(0, 30, 256)
    assert biggest.count.max() > 200


def test_shapes_are_the_known_shells():
    """Around a site 12, 6, 24 and 12 neighbours in fcc, 8, 6, 12, 24 and 8 in bcc; around an
    octahedral hole 6, 8 and 24 in fcc. Every shape is another one.
    """
    sizes = {kind: [len(sites) for sites in shapes(kind, 64)] for kind in KINDS}
    assert {13, 19, 43, 55, 14, 38} <= set(sizes["fcc"])
    assert {9, 15, 27, 51, 59} <= set(sizes["bcc"])
    assert {13, 19, 21, 39, 51, 57} <= set(sizes["hcp"])
    assert sizes["icosahedral"] == [13, 43, 55]
    assert sum(map(len, sizes.values())) == 104 and all(min(kind) >= 8 for kind in sizes.values())
    for kind in KINDS:
        pairs = [np.sort(gaps_of(sites), axis=None) for sites in shapes(kind, 16)]
        for k, first in enumerate(pairs):
            assert not any(len(first) == len(p) and np.allclose(first, p) for p in pairs[:k])


@pytest.mark.parametrize("kind", KINDS[3:])
def test_the_order_is_that_of_the_distances_alone(kind):
    """Turned, mirrored and shuffled, polyhedra keep their matrix of distances; to 1e-6, since
    float64 coordinates were turned.
    """
    for sites in [s for s in polyhedra(kind) if 8 <= len(s) <= 64]:
        draws = np.random.default_rng(len(sites))
        expected = gaps_of(sites[canonical_order(sites)])
        turn = np.linalg.qr(draws.normal(size=(3, 3)))[0]
        for _ in range(2):
            moved = (sites @ turn + 4)[draws.permutation(len(sites))]
            found = gaps_of(moved[canonical_order(moved)])
            np.testing.assert_allclose(found, expected, atol=1e-6)
            turn = -turn


def test_the_order_goes_from_shell_to_shell(clusters):
    """Outwards by one nearest-neighbour distance at most, with what noise moves (0.3 of it)."""
    for atoms, count, element, _ in zip(*clusters, strict=True):
        radius = np.linalg.norm(atoms[:count], axis=1) / nearest_distance(str(element))
        assert (np.maximum.accumulate(radius) - radius).max() < 1.3
        assert sorted(canonical_order(atoms[:count].astype(float))) == list(range(count))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 3, 15), "max_atoms: expected 16 to 256, found 15"),
        ((0, 3, 300), "max_atoms: expected 16 to 256, found 300"),
        ((0, 0, 64), "count: expected 1 cluster or more, found 0"),
    ],
)
def test_impossible_wishes_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        make_clusters(*arguments)
