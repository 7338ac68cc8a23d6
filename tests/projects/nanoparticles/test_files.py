"""Measured .gr files and structures of a user, and what is written for one."""

import numpy as np
import pytest

from projects.nanoparticles.files import read_cluster, read_pdf, write_cluster, write_pdf
from projects.nanoparticles.scattering import PdfSettings
from qkd_jax.errors import DataError

SETTINGS = PdfSettings(r_max=8.0)
R = np.arange(0.0, 10.0, 0.02)
PDF = np.sin(2 * R) * np.exp(-R / 4)
HEADER = "[DEFAULT]\nversion = pdfgetx3-2.1.1\nqmax = 24.0\n#### start data\n#L r(A) G(A^-2)\n"


def file_of(path, *columns, header=HEADER):
    rows = "\n".join(
        " ".join(f"{value:.8g}" for value in row) for row in zip(*columns, strict=True)
    )
    path.write_text(f"{header}{rows}\n")
    return path


@pytest.fixture
def path(tmp_path):
    return tmp_path / "measured.gr"


def test_a_file_is_brought_onto_the_grid(path):
    """Linear interpolation between steps of 0.02: h^2 / 8 max|G''| = 2.1e-4."""
    pytest.importorskip("diffpy.utils")
    expected = np.sin(2 * SETTINGS.r()) * np.exp(-SETTINGS.r() / 4)
    for more in ((), (0 * R, 0 * R + 0.1)):
        found = read_pdf(file_of(path, R, PDF, *more), SETTINGS)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, atol=2.2e-4)


def test_what_is_written_is_read_again(path):
    """Six digits after the point are written, and float32 holds values of size 1 to 6e-8."""
    pytest.importorskip("diffpy.utils")
    pdf = np.cos(SETTINGS.r())
    write_pdf(path, pdf, SETTINGS)
    np.testing.assert_allclose(read_pdf(path, SETTINGS), pdf, atol=6e-7)
    with pytest.raises(DataError, match=r"G\(r\): expected 140 values"):
        write_pdf(path, pdf[1:], SETTINGS)


def broken(column, row, value):
    changed = column.copy()
    changed[row] = value
    return changed


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ((R, broken(PDF, 40, np.nan)), "found r = 0.8, G = nan in row 41"),
        ((R, broken(PDF, 3, np.inf)), "expected finite numbers"),
        ((R,), "found 1 column"),
        ((R[:1], PDF[:1]), "found one row of 2 columns"),
        ((R[:6], PDF[:6]), "expected 10 rows or more of r and G, found 6"),
        ((R[:300], PDF[:300]), "expected r from 1 to 7.95 angstrom, found 0 to 5.98"),
        ((R / 10, PDF), "is r in angstrom"),
        ((R[::-1], PDF), "expected r to go upwards"),
        ((R[::10], PDF[::10]), "at most pi / q_max = 0.126 angstrom, found 0.2"),
        ((R, 0 * PDF), "not zero everywhere"),
    ],
)
def test_a_file_that_cannot_be_used_says_why(path, columns, message):
    pytest.importorskip("diffpy.utils")
    with pytest.raises(DataError, match=message) as raised:
        read_pdf(file_of(path, *columns), SETTINGS)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected columns of numbers"),
        (b"r and G\nhave no numbers\n", "expected columns of numbers"),
        (b"\xff\xfe\x00\x81" * 30, "expected text"),
        (b"1 2\n" * 20 + b"3 four\n", "the same number of columns in every row"),
    ],
)
def test_a_file_that_is_none_says_why(path, content, message):
    pytest.importorskip("diffpy.utils")
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_pdf(path, SETTINGS)
    path.unlink()
    with pytest.raises(DataError, match=r"expected a \.gr file that can be read"):
        read_pdf(path, SETTINGS)


def test_structures_come_back_from_xyz_and_cif(tmp_path):
    """Both formats keep six digits or more after the point; a CIF those of a fraction of 20."""
    io = pytest.importorskip("ase.io")
    positions = np.random.default_rng(0).normal(scale=4.0, size=(20, 3))
    positions -= positions.mean(axis=0)
    write_cluster(tmp_path / "a.xyz", "Pt", positions, comment="candidate 1")
    assert (tmp_path / "a.xyz").read_text().splitlines()[:2] == ["20", "candidate 1"]
    element, found = read_cluster(tmp_path / "a.xyz", 64)
    assert element == "Pt" and found.dtype == np.float32
    np.testing.assert_allclose(found, positions, atol=2e-6)
    write_cluster(tmp_path / "a.cif", "Pt", positions)
    atoms = io.read(tmp_path / "a.cif")
    assert set(atoms.get_chemical_symbols()) == {"Pt"}
    found = atoms.get_positions() - atoms.get_positions().mean(axis=0)
    np.testing.assert_allclose(found, positions, atol=1e-4)


def lines(*atoms):
    return "\n".join([str(len(atoms)), "comment", *atoms, ""])


ATOMS = ["Pt 0 0 0", "Pt 2.7 0 0", "Pt 0 2.7 0", "Pt 0 0 2.7"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (lines(*ATOMS[:3], "Au 0 0 2.7"), "expected atoms of one element, found Au, Pt"),
        (lines(*ATOMS[:3]), "expected 4 to 5 atoms, as many as the model holds, found 3"),
        (lines(*ATOMS, "Pt 5 5 5", "Pt 6 7 8"), "expected 4 to 5 atoms, .* found 6"),
        (lines(*ATOMS[:3], "Pt 0 nan 2.7"), "expected finite coordinates"),
        (lines(*ATOMS).replace("4\n", "9\n", 1), "expected an XYZ file"),
        (lines(*ATOMS[:3], "Pt 0 0"), "expected an XYZ file"),
        ("no structure\n", "expected an XYZ file"),
        ("", "expected an XYZ file"),
    ],
)
def test_an_xyz_that_cannot_be_used_says_why(tmp_path, text, message):
    pytest.importorskip("ase")
    path = tmp_path / "mine.xyz"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        read_cluster(path, 5)
    with pytest.raises(DataError, match="expected an XYZ file"):
        read_cluster(tmp_path / "missing.xyz", 5)


def test_a_structure_that_cannot_be_written_says_why(tmp_path):
    pytest.importorskip("ase")
    atoms = np.eye(3)
    with pytest.raises(DataError, match=r"ends with \.xyz or \.cif"):
        write_cluster(tmp_path / "a.pdb", "Pt", atoms)
    with pytest.raises(DataError, match="found Qq"):
        write_cluster(tmp_path / "a.xyz", "Qq", atoms)
    with pytest.raises(DataError, match="expected finite coordinates"):
        write_cluster(tmp_path / "a.xyz", "Pt", atoms * np.nan)
