"""Clusters and their PDFs: made once, kept in one file, read by training and evaluation."""

import io
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from projects.nanoparticles.scattering import (
    PdfSettings,
    form_factors,
    pair_distribution,
    with_noise,
)
from projects.nanoparticles.structures import make_clusters
from qkd_jax.errors import DataError
from qkd_jax.npz import read_npz
from qkd_jax.reports.writing import write_atomically

BLOCK = 64  # clusters whose G(r) is computed at once


class Examples(NamedTuple):
    """K clusters with their PDFs.

    Attributes:
      positions: float32 [K, A, 3] in angstrom, padded by zeros.
      count: int32 [K] atoms.
      element, kind: strings [K].
      pdf: float32 [K, R], G(r) with noise, as measured.
    """

    positions: np.ndarray
    count: np.ndarray
    element: np.ndarray
    kind: np.ndarray
    pdf: np.ndarray

    def rows(self, which) -> "Examples":
        """Those with these indices, or of this slice."""
        return Examples(*(array[which] for array in self))


class DataSet(NamedTuple):
    """Examples to train on, to validate on while training, and to evaluate on."""

    train: Examples
    validation: Examples
    test: Examples


def make_examples(
    seed: int, count: int, max_atoms: int, settings: PdfSettings, noise: float
) -> Examples:
    """`count` random clusters and their PDFs; `noise` as in `scattering.with_noise`.

    Raises:
      ConfigError: see `structures.make_clusters`.
    """
    clusters = make_clusters(seed, count, max_atoms)
    positions, atoms = np.asarray(clusters.positions), np.asarray(clusters.count)
    factors = np.asarray(form_factors(clusters.element, settings), np.float32)
    parts = []
    for begin in range(0, count, BLOCK):
        # The last block is filled up with its last cluster, so that all have one shape.
        rows = np.minimum(np.arange(begin, begin + BLOCK), count - 1)
        parts.append(
            pair_distribution(
                jnp.asarray(positions[rows]), jnp.asarray(atoms[rows]), factors[rows], settings
            )
        )
    pdf = jnp.concatenate(parts)[:count]
    pdf = with_noise(jax.random.fold_in(jax.random.key(seed), 1), pdf, noise)
    return Examples(
        positions.astype(np.float32),
        atoms.astype(np.int32),
        np.asarray(clusters.element),
        np.asarray(clusters.kind),
        np.asarray(pdf, np.float32),
    )


def make_data(
    seed: int,
    counts: tuple[int, int, int],
    max_atoms: int,
    settings: PdfSettings,
    noise: float,
) -> DataSet:
    """Data with `counts` clusters in its three parts, each from a seed of its own."""
    parts = (
        make_examples(3 * seed + part, count, max_atoms, settings, noise)
        for part, count in enumerate(counts)
    )
    return DataSet(*parts)


def save_data(path: Path, data: DataSet) -> None:
    """Writes one .npz file, visible only when it is complete."""
    arrays = {
        f"{part}.{name}": array
        for part, examples in data._asdict().items()
        for name, array in examples._asdict().items()
    }
    file = io.BytesIO()
    np.savez(file, **arrays)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, file.getvalue())


def load_data(path: Path) -> DataSet:
    """The data of `save_data`.

    Raises:
      DataError: there is no such file, or it is damaged or of something else.
    """
    try:
        file = read_npz(path)
        data = DataSet(
            *(
                Examples(*(file[f"{part}.{name}"] for name in Examples._fields))
                for part in DataSet._fields
            )
        )
    except FileNotFoundError:
        raise DataError(f"{path}: expected the data, found no file; run `data` first") from None
    except Exception as error:  # zipfile and numpy raise many types for damaged files
        raise DataError(
            f"{path}: expected clusters and their PDFs, found {error}; delete it and run `data`"
        ) from error
    for part, examples in data._asdict().items():
        for name in ("positions", "pdf"):
            if not np.isfinite(getattr(examples, name)).all():
                raise DataError(f"{path}: expected finite numbers, found others in {part}.{name}")
    return data
