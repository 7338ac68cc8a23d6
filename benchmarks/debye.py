"""G(r) of a batch of clusters by the Debye equation, beside `debyecalculator` (PyTorch).

    python -m benchmarks.debye [--clusters 64] [--atoms 64] [--pairs 7]

Both compute in float32 on the CPU from the same positions, on the same grids. Ours takes the padded
batch in one call; `debyecalculator` takes a list and does one structure after another, by default
on a grid of distances. Its version 1.1.1 counts every pair half, so that its values are doubled for
the comparison. Without it, or without the table of form factors, the row says what is missing.
"""

import argparse
import importlib.util
import warnings
from collections.abc import Callable, Iterator

import jax
import numpy as np

from benchmarks.gate import blocking
from benchmarks.pairs import Row, check, compare, median_seconds, table
from projects.nanoparticles.scattering import PdfSettings, pair_distribution

CLUSTERS, ATOMS = 64, 64
ELEMENT = "Pt"


def missing() -> str:
    """What has to be installed for the peer, or nothing."""
    absent = [name for name in ("debyecalculator", "torch") if not importlib.util.find_spec(name)]
    return f"{', '.join(absent)} not installed" if absent else ""


def peer_of(positions: np.ndarray, settings: PdfSettings) -> Callable[[], np.ndarray]:
    """() -> G(r) [K, R] by `debyecalculator`."""
    import torch
    from debyecalculator import DebyeCalculator

    names = ("q_min", "q_max", "q_step", "q_damp", "b_iso", "r_min", "r_max", "r_step")
    calculator = DebyeCalculator(
        **{name.replace("_", ""): getattr(settings, name) for name in names},
        device="cpu",
        dtype=torch.float32,
    )
    sources = [([ELEMENT] * len(atoms), torch.tensor(atoms)) for atoms in positions]
    return lambda: 2 * np.stack([one.g for one in calculator.gr(sources)])


def rows(clusters: int, atoms: int, pairs: int) -> Iterator[Row]:
    settings = PdfSettings()
    # Cubes of atoms with disorder; what the atoms are cancels out of G(r).
    side = int(np.ceil(atoms ** (1 / 3)))
    grid = 2.8 * np.stack(np.meshgrid(*[np.arange(side)] * 3), axis=-1).reshape(-1, 3)[:atoms]
    noise = np.random.default_rng(0).normal(scale=0.1, size=(clusters, atoms, 3))
    positions = (grid + noise).astype(np.float32)
    factors = np.ones((clusters, len(settings.q())), np.float32)
    arrays = jax.device_put((positions, np.full(clusters, atoms, np.int32), factors))

    def ours(positions, count, factors):
        return pair_distribution(positions, count, factors, settings)

    run = blocking(ours, arrays)
    name, peer_name = f"G(r) of {clusters} clusters of {atoms} atoms", "debyecalculator"
    if note := missing():
        nan = float("nan")
        yield Row(name, 1e3 * median_seconds(run, pairs), nan, peer_name, "ms", nan, 1.0, note)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peer = peer_of(positions, settings)
        check(peer_name, np.asarray(ours(*arrays)), peer())
        yield compare(name, run, peer, peer_name, 1.0, pairs=pairs)


def main(arguments: list[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clusters", type=int, default=CLUSTERS)
    parser.add_argument("--atoms", type=int, default=ATOMS)
    parser.add_argument("--pairs", type=int, default=7)
    options = parser.parse_args(arguments)
    found = list(rows(options.clusters, options.atoms, options.pairs))
    print(table(found), flush=True)
    return found


if __name__ == "__main__":
    main()
