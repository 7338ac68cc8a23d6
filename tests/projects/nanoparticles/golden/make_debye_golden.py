"""Writes debye.npz beside it: I(Q) and G(r) of known clusters by `debyecalculator`.

    python -m venv .venv-debye
    .venv-debye/bin/pip install torch debyecalculator==1.1.1
    .venv-debye/bin/python tests/projects/nanoparticles/golden/make_debye_golden.py

It imports nothing of this project. Version 1.1.1 counts every pair and every atom half; the values
are stored as they come.
"""

import warnings
from pathlib import Path

import numpy as np
import torch
from ase.build import bulk
from ase.cluster import Icosahedron, Octahedron
from debyecalculator import DebyeCalculator

NAMES = ("q_min", "q_max", "q_step", "q_damp", "b_iso", "r_min", "r_max", "r_step")
SETTINGS = {
    "fine": (0.5, 25.0, 0.1, 0.04, 0.3, 1.0, 17.0, 0.05),
    "coarse": (1.0, 15.05, 0.15, 0.1, 1.0, 0.0, 12.0, 0.1),
}


def clusters():
    """An icosahedron, a truncated octahedron, and balls cut from a bcc and an hcp lattice."""
    yield Icosahedron("Au", 2, 4.08)
    yield Octahedron("Pt", 4, 1, 3.92)
    for element, atoms in (("W", 15), ("Co", 64)):
        lattice = bulk(element).repeat(8)
        places = lattice.get_positions()
        middle = places[len(places) // 2]
        yield lattice[np.argsort(np.linalg.norm(places - middle, axis=1), kind="stable")[:atoms]]


def main():
    warnings.simplefilter("ignore")
    stored = {}
    for k, cluster in enumerate(clusters()):
        positions = cluster.get_positions().astype(np.float32)
        stored[f"positions_{k}"] = positions
        stored[f"element_{k}"] = np.array(cluster.get_chemical_symbols()[0])
        for name, settings in SETTINGS.items():
            calculator = DebyeCalculator(
                **{key.replace("_", ""): value for key, value in zip(NAMES, settings, strict=True)},
                device="cpu",
                dtype=torch.float64,
                pair_sum="direct",
            )
            source = cluster.get_chemical_symbols(), torch.tensor(positions, dtype=torch.float64)
            stored[f"intensity_{name}_{k}"] = calculator.iq(source).i
            stored[f"pdf_{name}_{k}"] = calculator.gr(source).g.astype(np.float32)
    for name, settings in SETTINGS.items():
        stored[f"settings_{name}"] = np.array(settings)
    np.savez_compressed(Path(__file__).parent / "debye.npz", **stored)


if __name__ == "__main__":
    main()
