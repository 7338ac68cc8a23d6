"""The data file: made reproducibly, read back, refused when damaged."""

import jax.numpy as jnp
import numpy as np
import pytest

from projects.nanoparticles.data import (
    BLOCK,
    DataSet,
    Examples,
    load_data,
    make_data,
    make_examples,
    save_data,
)
from projects.nanoparticles.scattering import PdfSettings, form_factors, pair_distribution
from qkd_jax.errors import DataError

COARSE = PdfSettings(q_max=8.0, q_step=0.2, r_max=9.0, r_step=0.25)


@pytest.fixture
def few():
    draws = np.random.default_rng(0)

    def part(count):
        names = np.array(["Au", "Ni"])[np.arange(count) % 2]
        positions = draws.normal(size=(count, 8, 3)).astype(np.float32)
        pdf = draws.normal(size=(count, 5)).astype(np.float32)
        return Examples(positions, np.full(count, 8, np.int32), names, names, pdf)

    return DataSet(part(4), part(2), part(3))


def test_data_come_back_from_their_file(few, tmp_path):
    save_data(tmp_path / "new" / "data.npz", few)
    found = load_data(tmp_path / "new" / "data.npz")
    for part, examples in few._asdict().items():
        for name, array in examples._asdict().items():
            kept = getattr(getattr(found, part), name)
            np.testing.assert_array_equal(kept, array)
            assert kept.dtype == array.dtype
    assert found.train.rows(slice(1, 3)).element.tolist() == ["Ni", "Au"]


def test_missing_damaged_and_not_finite_data_are_refused(few, tmp_path):
    path = tmp_path / "data.npz"
    with pytest.raises(DataError, match="run `data` first"):
        load_data(path)
    path.write_bytes(b"no archive")
    with pytest.raises(DataError, match="delete it and run `data`"):
        load_data(path)
    few.validation.pdf[1, 2] = np.nan
    save_data(path, few)
    with pytest.raises(DataError, match=r"found others in validation\.pdf"):
        load_data(path)


def test_examples_have_the_pdf_of_their_clusters_with_noise_on_it():
    """More clusters than one block, so that the filled last block is met. Of the noise, 70 x 32
    numbers: its deviation is known to 1 / sqrt(2 * 2240) of itself; five of those are allowed.
    """
    for package in ("ase", "xraydb"):
        pytest.importorskip(package)
    count = BLOCK + 6
    found = make_examples(5, count, 16, COARSE, 0.1)
    factors = form_factors(found.element, COARSE)
    exact = pair_distribution(
        jnp.asarray(found.positions), jnp.asarray(found.count), factors, COARSE
    )
    largest = np.abs(exact).max(axis=1, keepdims=True)
    noise = (found.pdf - np.asarray(exact)) / largest
    assert abs(noise.std() / 0.1 - 1) < 5 / np.sqrt(2 * noise.size)


def test_the_same_seed_makes_the_same_data_and_parts_differ():
    for package in ("ase", "xraydb"):
        pytest.importorskip(package)
    data = make_data(1, (3, 3, 3), 16, COARSE, 0.02)
    again = make_data(1, (3, 3, 3), 16, COARSE, 0.02)
    other = make_data(2, (3, 3, 3), 16, COARSE, 0.02)
    curves = [part.pdf for part in (*data, *other)]
    for k, part in enumerate(again):
        np.testing.assert_array_equal(part.pdf, curves[k])
    for first in range(6):
        assert not [k for k in range(first) if np.allclose(curves[first], curves[k])]
