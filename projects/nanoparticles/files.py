"""A user's measured G(r) and structures, and structures to be opened elsewhere."""

from pathlib import Path

import numpy as np

from projects.nanoparticles.scattering import PdfSettings
from qkd_jax.errors import DataError

LEAST_ROWS = 10
VACUUM = 5.0  # angstrom around a cluster in the cell of a CIF


def read_pdf(path: Path | str, settings: PdfSettings) -> np.ndarray:
    """G(r) of a `.gr` file on the grid of the settings, float32 [R], by linear interpolation.

    The file is what PDFgetX3, PDFgui and the like write: a header, then columns of numbers, r in
    angstrom first and G in 1 / angstrom^2 second; further columns, such as errors, are not read.

    Raises:
      DataError: the file is missing, is not text, has fewer than two columns or ten rows, holds
        NaN or infinity, does not go upwards in r, does not reach over the grid of the settings, or
        is too coarse for what a measurement up to q_max resolves.
    """
    from diffpy.utils.parsers import load_data

    try:
        table = np.atleast_1d(load_data(str(path), minrows=LEAST_ROWS))
    except OSError as error:
        raise DataError(f"{path}: expected a .gr file that can be read, found {error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: expected text, columns of r and G, found bytes") from error
    except ValueError as error:
        raise DataError(
            f"{path}: expected the same number of columns in every row, found {error}"
        ) from error
    if not table.size:
        raise DataError(f"{path}: expected columns of numbers, r and G, found none")
    # A single row or a single column comes as one dimension.
    if table.ndim == 1:
        first = len(table) if len(table) < LEAST_ROWS else 1
        raise DataError(
            f"{path}: expected two columns, r and G, and {LEAST_ROWS} rows or more, found "
            f"{'one row of ' if first > 1 else ''}{first} column{'s' if first > 1 else ''}"
        )
    if len(table) < LEAST_ROWS:
        raise DataError(
            f"{path}: expected {LEAST_ROWS} rows or more of r and G, found {len(table)}"
        )
    r, pdf = table[:, 0], table[:, 1]
    if not (np.isfinite(r).all() and np.isfinite(pdf).all()):
        row = int(np.argmin(np.isfinite(r) & np.isfinite(pdf)))
        raise DataError(
            f"{path}: expected finite numbers, found r = {r[row]}, G = {pdf[row]} in row {row + 1} "
            "of the data; cut the file or measure the gap again"
        )
    if not (np.diff(r) > 0).all():
        row = int(np.argmin(np.diff(r) > 0))
        raise DataError(
            f"{path}: expected r to go upwards in the first column, found {r[row]} and then "
            f"{r[row + 1]}"
        )
    grid = settings.r()
    if r[0] > grid[0] + 1e-6 or r[-1] < grid[-1] - 1e-6:
        raise DataError(
            f"{path}: expected r from {grid[0]:.4g} to {grid[-1]:.4g} angstrom, found "
            f"{r[0]:.4g} to {r[-1]:.4g}; is r in angstrom, and is the file long enough?"
        )
    coarsest, resolved = np.diff(r).max(), np.pi / settings.q_max
    if coarsest > resolved:
        raise DataError(
            f"{path}: expected steps of r of at most pi / q_max = {resolved:.3g} angstrom, found "
            f"{coarsest:.3g}; write the file with a finer grid"
        )
    if not np.abs(pdf).max() > 0:
        raise DataError(f"{path}: expected a G(r) that is not zero everywhere, found zeros")
    return np.interp(grid, r, pdf).astype(np.float32)


def write_pdf(path: Path | str, pdf: np.ndarray, settings: PdfSettings) -> None:
    """Writes G(r) [R] on the grid of the settings as a `.gr` file with two columns.

    Raises:
      DataError: there are not as many values as the grid has.
    """
    r = settings.r()
    if np.shape(pdf) != r.shape:
        raise DataError(f"G(r): expected {len(r)} values, found an array of {np.shape(pdf)}")
    header = f"qmin = {settings.q_min}\nqmax = {settings.q_max}\nqdamp = {settings.q_damp}\n"
    header += "start data\nr (A)  G (A^-2)"
    np.savetxt(path, np.column_stack([r, pdf]), fmt="%.6f", header=header)


def read_cluster(path: Path | str, max_atoms: int) -> tuple[str, np.ndarray]:
    """The element and the centred positions, float32 [N, 3] in angstrom, of an XYZ file.

    Raises:
      DataError: the file cannot be read as XYZ, has several elements, fewer than 4 atoms or more
        than `max_atoms`, or a coordinate that is not finite.
    """
    from ase.io import read
    from ase.io.extxyz import XYZError

    try:
        atoms = read(path, format="extxyz")
    except (OSError, ValueError, KeyError, IndexError, StopIteration, XYZError) as error:
        raise DataError(
            f"{path}: expected an XYZ file (the number of atoms, a comment, one line for each "
            f"atom), found {type(error).__name__}: {error}"
        ) from error
    elements = sorted(set(atoms.get_chemical_symbols()))
    if len(elements) != 1:
        raise DataError(f"{path}: expected atoms of one element, found {', '.join(elements)}")
    if not 4 <= len(atoms) <= max_atoms:
        raise DataError(
            f"{path}: expected 4 to {max_atoms} atoms, as many as the model holds, found "
            f"{len(atoms)}"
        )
    positions = atoms.get_positions()
    if not np.isfinite(positions).all():
        raise DataError(f"{path}: expected finite coordinates, found NaN or infinity")
    return elements[0], (positions - positions.mean(axis=0)).astype(np.float32)


def write_cluster(path: Path | str, element: str, positions: np.ndarray, comment: str = "") -> None:
    """Writes atoms [N, 3] in angstrom by `ase`, as XYZ or CIF by the ending of the path.

    A CIF needs a cell: the cluster stands in the middle of one with 5 angstrom of vacuum around it.

    Raises:
      DataError: the ending is neither .xyz nor .cif, the symbol is no element, or a coordinate is
        not finite.
    """
    from ase import Atoms
    from ase.data import atomic_numbers
    from ase.io import write

    path, positions = Path(path), np.asarray(positions, np.float64)
    if element not in atomic_numbers or not atomic_numbers[element]:
        raise DataError(f"element: expected a chemical symbol such as Pt, found {element}")
    if not np.isfinite(positions).all():
        raise DataError(f"{path}: expected finite coordinates, found NaN or infinity")
    atoms = Atoms([element] * len(positions), positions=positions)
    if path.suffix == ".xyz":
        write(path, atoms, format="xyz", comment=comment, fmt="%12.6f")
    elif path.suffix == ".cif":
        atoms.center(vacuum=VACUUM)
        atoms.pbc = True
        write(path, atoms, format="cif")
    else:
        raise DataError(f"{path}: expected a file name that ends with .xyz or .cif")
