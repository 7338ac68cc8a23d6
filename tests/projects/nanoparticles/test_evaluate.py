"""How candidates are judged."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from projects.nanoparticles.data import Examples
from projects.nanoparticles.evaluate import (
    MEASURES,
    Candidates,
    compared,
    distance,
    nearest,
    save_results,
    summary,
    table,
)
from projects.nanoparticles.laplacian import NoiseStudy
from projects.nanoparticles.scattering import PdfSettings

COARSE = PdfSettings(q_max=12.0, r_max=9.0, r_step=0.1)


def cluster(atoms=8, seed=0):
    """A distorted grid of atoms, 3 angstrom apart, with no symmetry."""
    grid = 3.0 * np.stack(np.meshgrid(*3 * [np.arange(3)], indexing="ij"), -1).reshape(-1, 3)
    positions = grid[:atoms] + 0.4 * np.random.default_rng(seed).normal(size=(atoms, 3))
    return positions - positions.mean(axis=0)


def turned(positions, seed=1):
    draws = np.random.default_rng(seed)
    rotation = np.linalg.qr(draws.normal(size=(3, 3)))[0]
    return draws.permutation(positions @ rotation + 5.0)


def test_distance_ignores_motion_and_order_and_sees_displacement():
    truth = cluster()
    assert distance(turned(truth), truth) < 1e-6  # float64 rounding of a rotation
    moved = truth.copy()
    moved[0] += [0.0, 0.0, 0.8]
    # One of 8 atoms: sqrt(0.64 / 8) = 0.28 before alignment, which can only lower it.
    assert 0.1 < distance(turned(moved), truth) <= 0.8 / np.sqrt(8) + 1e-9


def test_distance_of_other_numbers_of_atoms_is_that_of_the_matching_ones():
    """The orientation of the larger cluster is found from its own axes, so it is near, not exact,
    and the last alignment is of the matching atoms: much less than the 3 angstrom of a wrong match.
    """
    truth = cluster(12)
    for found, true in ((truth[:11], turned(truth)), (turned(truth), truth[:11])):
        assert distance(found, true) < 0.3


def test_the_true_cluster_has_no_residual_and_another_one_has():
    positions = np.zeros((1, 3, 16, 3), np.float32)
    positions[0, 0, :8] = positions[0, 1, :8] = cluster()
    positions[0, 1, :8] *= 1.1
    positions[0, 2, :9] = cluster(9)
    count = np.array([[8, 8, 9]], np.int32)
    factors = np.full((1, len(COARSE.q())), 10.0, np.float32)
    first = compared(positions, count, np.ones((1, len(COARSE.r()))), factors, COARSE)
    found = compared(positions, count, first.pdf[:, 0], factors, COARSE)
    assert found.residual.shape == (1, 3) and found.residual[0, 0] == 0.0
    assert found.residual[0, 1:].min() > 0.1
    square = np.sum((found.pdf[0, 1].astype(np.float64) - found.pdf[0, 0]) ** 2)
    expected = np.sqrt(square / np.sum(found.pdf[0, 0].astype(np.float64) ** 2))
    np.testing.assert_allclose(found.residual[0, 1], expected, rtol=1e-5)


def test_nearest_neighbours_are_those_of_the_scaled_curves():
    curves = np.abs(np.random.default_rng(0).normal(size=(6, 20))).astype(np.float32)
    train = Examples(*(np.zeros(6),) * 4, pdf=curves)
    asked = 7 * curves[[4, 1]] + 0.001
    found = nearest(train, jnp.asarray(asked), 3)
    assert found[:, 0].tolist() == [4, 1] and found.shape == (2, 3)
    scaled, goal = curves / curves.max(1, keepdims=True), asked / asked.max(1, keepdims=True)
    expected = np.linalg.norm(scaled[None] - goal[:, None], axis=-1).argsort(axis=1)[:, :3]
    np.testing.assert_array_equal(found, expected)


def made(residual):
    """Two clusters with two candidates each: the second candidates are the true clusters."""
    truth = np.zeros((2, 16, 3), np.float32)
    truth[0, :8], truth[1, :10] = cluster(8), cluster(10, seed=2)
    positions = np.stack([truth * 1.2, truth], axis=1)
    count = np.array([[8, 8], [10, 9]], np.int32)
    found = Candidates(positions, count, np.zeros((2, 2, 5)), np.array(residual))
    names = np.array(["Au", "Au"])
    return found, Examples(truth, np.array([8, 10]), names, names, np.zeros((2, 5)))


def test_the_candidate_with_the_least_residual_is_chosen():
    chosen = summary(*made([[0.5, 0.1], [0.3, 0.2]]))
    other = summary(*made([[0.1, 0.5], [0.2, 0.3]]))
    assert chosen["rmsd_chosen"] < 1e-3 < 0.3 < other["rmsd_chosen"]  # of float32 positions
    assert chosen["rmsd_all"] == other["rmsd_all"]
    np.testing.assert_allclose(chosen["residual_chosen"], 0.15)
    assert chosen["right_count"] == 0.75
    assert np.shape(chosen["rmsd"]) == (2, 2)
    json.dumps(chosen)


STUDY = NoiseStudy(np.array([0.0, 0.01]), {"Laplacian": np.array([[0.0, 1.0, 3.0], [4.0, 2, 9]])})
NOISE = {"levels": [0.01], "rmsd": {"Laplacian": [[0.5]]}}


def test_the_table_has_means_over_seeds_and_medians_under_noise(tmp_path):
    def row(value):
        return {"method": "m", "calls": 90} | dict.fromkeys(MEASURES, value)

    results = [{"rows": [row(v)], "decoders": {"Laplacian": v}} for v in (1.0, 2.0)]
    text = save_results(tmp_path, results, STUDY, {"a": 1})
    assert "| m | 90 | 1.50 ± 0.71 |" in text and "| Laplacian | 1.50 ± 0.71 |" in text
    assert (tmp_path / "table.md").read_text() == text
    recorded = json.loads((tmp_path / "results.json").read_text())
    assert "| 0 | 1 |\n| 0.01 | 4 |" in text
    assert recorded["settings"] == {"a": 1}
    assert table(recorded["results"], recorded["decoders_under_noise"]) == text
    assert "±" not in table(results[:1], NOISE)


@pytest.mark.parametrize("rows", [1, 3])
def test_every_line_of_the_table_has_as_many_cells(rows):
    given = [{"method": "m", "calls": 0} | dict.fromkeys(MEASURES, 0.5) for _ in range(rows)]
    text = table([{"rows": given, "decoders": {}}], NOISE)
    lines = text.split("\n\n")[0].splitlines()
    assert len(lines) == 2 + rows
    assert {line.count("|") for line in lines} == {3 + len(MEASURES)}
