"""The comparison: what each method finds for the G(r) of clusters that were not trained on.

Everything is judged twice: by how far the atoms are from the true ones, and by how well the G(r) of
the found cluster fits the given one, which is all that a user can see.
"""

import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from projects.nanoparticles.data import DataSet, Examples
from projects.nanoparticles.diffusion import calls_of
from projects.nanoparticles.laplacian import (
    DECODERS,
    NoiseStudy,
    best_assignment,
    count_atoms,
    decode_laplacian,
    orientations,
    rmsd,
)
from projects.nanoparticles.model import Model, generate_all, generate_by_vae
from projects.nanoparticles.networks import scaled
from projects.nanoparticles.scattering import PdfSettings, form_factors, pair_distribution
from qkd_jax.reports.writing import write_atomically

LEAST_ATOMS = 4  # a decoder needs three axes
MEASURES = {
    "rmsd_chosen": "RMSD of the chosen / Å",
    "rmsd_all": "RMSD of all / Å",
    "residual_chosen": "R_w of the chosen",
    "residual_all": "R_w of all",
    "right_count": "right number of atoms",
}


class Candidates(NamedTuple):
    """C candidates for each of K clusters.

    Attributes:
      positions: float32 [K, C, A, 3] in angstrom, padded by zeros.
      count: int32 [K, C] atoms.
      pdf: float32 [K, C, R], their G(r) without noise.
      residual: [K, C], R_w = sqrt(sum (G - G_given)^2 / sum G_given^2).
    """

    positions: np.ndarray
    count: np.ndarray
    pdf: np.ndarray
    residual: np.ndarray


def compared(positions, count, given: jax.Array, factors: jax.Array, settings: PdfSettings):
    """Candidates with their G(r) and its residual.

    Args:
      positions, count: [K, C, A, 3] and [K, C].
      given: G(r) [K, R].
      factors: form factors [K, Q].
    """
    shape = (*count.shape, factors.shape[-1])
    factors = jnp.broadcast_to(jnp.asarray(factors, jnp.float32)[:, None], shape)
    positions, count = jnp.asarray(positions), jnp.asarray(count)
    pdf = np.asarray(pair_distribution(positions, count, factors, settings))
    given = np.asarray(given)[:, None]
    square = ((pdf - given) ** 2).sum(-1, dtype=np.float64)
    residual = np.sqrt(square / (given**2).sum(-1, dtype=np.float64))
    return Candidates(np.asarray(positions), np.asarray(count), pdf, residual)


def decoded(
    weights: jax.Array, given: jax.Array, factors: jax.Array, settings: PdfSettings
) -> Candidates:
    """Candidates of predicted W [K, C, A, A]: the atoms are counted, then placed by the Laplacian
    decoder with refinement. The count is cut to 4 or more.
    """
    count = jnp.maximum(count_atoms(weights), LEAST_ATOMS)
    return compared(decode_laplacian(weights, count), count, given, factors, settings)


def nearest(train: Examples, given: jax.Array, how_many: int) -> np.ndarray:
    """Indices [K, how_many] of the training clusters whose scaled G(r) is nearest to `given`."""
    known, asked = (np.asarray(scaled(jnp.asarray(pdf))) for pdf in (train.pdf, given))
    square = (known**2).sum(1)[None] - 2 * asked @ known.T
    return np.argsort(square, axis=1)[:, :how_many]


def distance(found: np.ndarray, truth: np.ndarray) -> float:
    """RMSD [angstrom] of atoms [N, 3] to [M, 3] at best alignment and assignment.

    If the numbers of atoms differ, the atoms of the larger cluster that match the smaller one best
    count; an atom too many or too few is seen in `right_count`, not here. The search is that of
    `laplacian.rmsd`, once for each orientation.
    """
    if len(found) == len(truth):
        return rmsd(found, truth, reorder=True)
    small, large = sorted((found, truth), key=len)
    large = large - large.mean(axis=0)
    small = small - small.mean(axis=0)
    chosen = (best_assignment(turned, small) for turned in orientations(large, small))
    return min(rmsd(large[rows], small) for rows in chosen)


def summary(found: Candidates, test: Examples) -> dict[str, Any]:
    """Measures of one method: medians over clusters, and the numbers behind them.

    "Chosen" is the candidate with the least residual, as a user would choose; "all" is the median
    over all candidates of all clusters.
    """
    distances = np.array(
        [
            [
                distance(positions[:count], true[:atoms])
                for positions, count in zip(found.positions[k], found.count[k], strict=True)
            ]
            for k, (true, atoms) in enumerate(zip(test.positions, test.count, strict=True))
        ]
    )
    rows = np.arange(len(distances)), found.residual.argmin(axis=1)
    right = found.count == test.count[:, None]
    return {
        "rmsd_chosen": float(np.median(distances[rows])),
        "rmsd_all": float(np.median(distances)),
        "residual_chosen": float(np.median(found.residual[rows])),
        "residual_all": float(np.median(found.residual)),
        "right_count": float(right.mean()),
        "rmsd": np.round(distances, 4).tolist(),
        "residual": np.round(found.residual, 4).tolist(),
        "count": found.count.tolist(),
    }


def evaluate(
    model: Model,
    data: DataSet,
    seed: int,
    settings: PdfSettings,
    how_many: int,
    skips: Sequence[int] = (100, 400),
    tell: Callable[[str], None] = print,
) -> tuple[list[dict], dict, Candidates]:
    """(a row for each method, RMSD of each decoder on the same predicted W, candidates of CbLDM).

    Latent diffusion from noise and CbLDM without a jump are one method: with nothing skipped, the
    jump multiplies by 1 and adds 0. Candidates are those of the first of `skips`.

    Args:
      how_many: candidates for each cluster; of the nearest neighbours as many.

    Raises:
      DataError, ConfigError: see `model.generate`.
    """
    test, given = data.test, jnp.asarray(data.test.pdf)
    factors = form_factors(test.element, settings)
    keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), 200), 2 + len(skips))
    rows = []

    def add(method, calls, found, began):
        seconds = time.perf_counter() - began
        rows.append({"method": method, "calls": calls, **summary(found, test)})
        last = rows[-1]
        tell(
            f"{method}: RMSD {last['rmsd_chosen']:.2f} Å, R_w {last['residual_chosen']:.2f} "
            f"(median of the chosen), {seconds:.0f} s"
        )

    began = time.perf_counter()
    rows_of_train = nearest(data.train, given, how_many)
    near = data.train.rows(rows_of_train)
    found = compared(near.positions, near.count, given, factors, settings)
    add("nearest neighbours in G(r)", 0, found, began)

    began = time.perf_counter()
    weights = generate_by_vae(model, keys[0], given, how_many)
    add("conditional VAE alone", 0, decoded(weights, given, factors, settings), began)

    shown, decoders = None, {}
    for key, skip in zip(keys[1:], (0, *skips), strict=True):
        began = time.perf_counter()
        weights = generate_all(model, key, given, how_many, skip)
        found = decoded(weights, given, factors, settings)
        calls = sum(map(len, calls_of(model.diffusion, skip)))
        name = f"CbLDM, {skip} skipped" if skip else "latent diffusion from noise (0 skipped)"
        add(name, calls, found, began)
        if shown is None and skip == skips[0]:
            shown, decoders = found, compare_decoders(weights[:, 0], test)
    return rows, decoders, shown


def compare_decoders(weights: jax.Array, test: Examples) -> dict[str, float]:
    """Median RMSD [angstrom] of each decoder on the same predicted W [K, A, A]."""
    count = jnp.maximum(count_atoms(weights), LEAST_ATOMS)
    result = {}
    for name, decode in DECODERS.items():
        positions = np.asarray(decode(weights, count))
        result[name] = statistics.median(
            distance(found[:n], true[:m])
            for found, n, true, m in zip(
                positions, np.asarray(count), test.positions, test.count, strict=True
            )
        )
    return result


def table(results: list[dict], noise: dict[str, Any]) -> str:
    """Markdown: means over seeds, with standard deviations if there are several, and the study.

    Args:
      results: for each seed {"rows": of `evaluate`, "decoders": of `evaluate`}.
      noise: "levels" and "rmsd" of a `laplacian.NoiseStudy`, as lists.
    """

    def cell(values, digits):
        text = f"{statistics.mean(values):.{digits}f}"
        several = len(values) > 1
        return f"{text} ± {statistics.stdev(values):.{digits}f}" if several else text

    lines = [
        f"| method | network calls | {' | '.join(MEASURES.values())} |",
        f"| --- | ---: |{' ---: |' * len(MEASURES)}",
    ]
    for rows in zip(*(result["rows"] for result in results), strict=True):
        cells = [cell([row[measure] for row in rows], 2) for measure in MEASURES]
        lines.append(f"| {rows[0]['method']} | {rows[0]['calls']} | {' | '.join(cells)} |")
    lines += ["", "| decoder of the same predicted W | RMSD / Å |", "| --- | ---: |"]
    for name in results[0]["decoders"]:
        lines.append(f"| {name} | {cell([result['decoders'][name] for result in results], 2)} |")
    names, found = zip(*noise["rmsd"].items(), strict=True)
    lines += ["", f"| noise on W | {' | '.join(names)} |", f"| ---: |{' ---: |' * len(names)}"]
    for level, *row in zip(noise["levels"], *found, strict=True):
        cells = [f"{statistics.median(distances):.2g}" for distances in row]
        lines.append(f"| {level:g} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def save_results(
    folder: Path, results: list[dict], study: NoiseStudy, settings: dict[str, Any]
) -> str:
    """Writes results.json and table.md; returns the table."""
    folder.mkdir(parents=True, exist_ok=True)
    rmsd = {name: np.round(found, 6).tolist() for name, found in study.rmsd.items()}
    noise = {"levels": study.levels.tolist(), "rmsd": rmsd}
    recorded = {"settings": settings, "results": results, "decoders_under_noise": noise}
    write_atomically(folder / "results.json", (json.dumps(recorded) + "\n").encode())
    text = table(results, noise)
    write_atomically(folder / "table.md", text.encode())
    return text
