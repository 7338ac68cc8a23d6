"""Clusters of metals: shells of a lattice or polyhedra grown by `ase`, strained and displaced.

Six kinds. Of the fcc, bcc and hcp lattice all atoms within a radius of a symmetric point: a site,
the middle of a bond, or a hole between atoms. Of icosahedra, decahedra and (truncated) octahedra
the complete ones, and all atoms within a radius of the centre of larger ones. So every cluster is
one of a few hundred shapes (104 of 8 to 64 atoms), of some metal, strained and displaced. The atoms
of a cluster stand in an order that follows from its shape alone (`canonical_order`).
"""

import functools
import itertools
from typing import NamedTuple

import numpy as np

from qkd_jax.errors import ConfigError

LEAST_ATOMS, MOST_ATOMS = 8, 256
SMALLEST_LIMIT = 16  # so that every kind has a shape
# Each kind, and the metals that it is made of.
FCC_METALS = ("Ni", "Cu", "Pd", "Ag", "Pt", "Au")
METALS = {
    "fcc": FCC_METALS,
    "bcc": ("Fe", "Mo", "W"),
    "hcp": ("Co", "Ti", "Ru"),
    "icosahedral": FCC_METALS,
    "decahedral": FCC_METALS,
    "octahedral": FCC_METALS,
}
KINDS = tuple(METALS)
LATTICES = ("fcc", "bcc", "hcp")
SCALE = 0.02  # standard deviation of a cluster's size around the tabulated distances
STRAIN = 0.01  # of every entry of its symmetric strain
DISPLACEMENT = 0.05  # of every coordinate of an atom, in angstrom


class Clusters(NamedTuple):
    """K clusters of at most A atoms.

    Attributes:
      positions: float32 [K, A, 3] in angstrom, centred on the mean of the atoms, zeros as padding.
      count: int32 [K] atoms.
      element: [K] symbols.
      kind: [K] names out of `KINDS`.
    """

    positions: np.ndarray
    count: np.ndarray
    element: np.ndarray
    kind: np.ndarray


def make_clusters(seed: int, count: int, max_atoms: int) -> Clusters:
    """`count` clusters of 8 to `max_atoms` atoms; the same seed gives the same ones.

    Raises:
      ConfigError: `max_atoms` is not between 16 and 256, or no cluster is asked for.
    """
    if not SMALLEST_LIMIT <= max_atoms <= MOST_ATOMS:
        raise ConfigError(
            f"max_atoms: expected {SMALLEST_LIMIT} to {MOST_ATOMS}, found {max_atoms}"
        )
    if count < 1:
        raise ConfigError(f"count: expected 1 cluster or more, found {count}")
    positions = np.zeros((count, max_atoms, 3), np.float32)
    counts, elements, kinds = [], [], []
    for k in range(count):
        draws = np.random.default_rng([seed, k])  # a cluster does not depend on the others
        kind = KINDS[draws.integers(len(KINDS))]
        element = METALS[kind][draws.integers(len(METALS[kind]))]
        known = shapes(kind, max_atoms)
        atoms = known[draws.integers(len(known))] * nearest_distance(element)
        strain = draws.normal(scale=STRAIN, size=(3, 3))
        strain = (1 + draws.normal(scale=SCALE)) * np.eye(3) + (strain + strain.T) / 2
        atoms = atoms @ strain + draws.normal(scale=DISPLACEMENT, size=atoms.shape)
        positions[k, : len(atoms)] = atoms - atoms.mean(axis=0)
        counts.append(len(atoms)), elements.append(element), kinds.append(kind)
    return Clusters(positions, np.array(counts, np.int32), np.array(elements), np.array(kinds))


@functools.cache
def shapes(kind: str, max_atoms: int) -> tuple[np.ndarray, ...]:
    """All shapes of one kind, [N, 3] in canonical order, nearest neighbours at distance 1."""
    if kind in LATTICES:
        sites = lattice_ball(kind, max_atoms)
        found = [ball for centre in centres(sites) for ball in balls(sites, centre, max_atoms)]
    else:
        found = [s for s in polyhedra(kind) if len(s) <= max_atoms]
        found += [ball for s in polyhedra(kind) for ball in balls(s, np.zeros(3), max_atoms)]
    different = {}
    for sites in found:
        if len(sites) >= LEAST_ATOMS:
            pairs = np.linalg.norm(sites[:, None] - sites[None], axis=-1)
            # Sums of a smooth function tell shapes apart and forgive rounding.
            profile = len(sites), *(round(np.exp(-pairs / width).sum(), 4) for width in (1, 3))
            different.setdefault(profile, sites)
    return tuple(sites[canonical_order(sites)] for _, sites in sorted(different.items()))


def balls(sites: np.ndarray, centre: np.ndarray, max_atoms: int) -> list[np.ndarray]:
    """All sites [N, 3] within a radius of the centre, for each radius up to `max_atoms` sites."""
    distances = np.linalg.norm(sites - centre, axis=1)
    order = np.argsort(distances, kind="stable")
    ends = np.flatnonzero(np.diff(distances[order]) > 1e-3) + 1
    return [sites[order[:end]] for end in ends if end <= max_atoms]


def centres(sites: np.ndarray) -> np.ndarray:
    """A site of a lattice, and the middles between it and its nearest and second-nearest ones.

    The middle of two nearest sites is that of a bond; that of second-nearest ones is an octahedral
    hole in fcc and hcp, and the centre of a cell's face in bcc. Equivalent points may come several
    times.
    """
    distances = np.linalg.norm(sites, axis=1)
    steps = np.unique(np.round(distances, 3))
    return sites[np.round(distances, 3) <= steps[2]] / 2


@functools.cache
def lattice_ball(kind: str, max_atoms: int) -> np.ndarray:
    """Sites of a lattice around the origin, enough for `max_atoms` around any point near it."""
    from ase.build import bulk

    cell = {"fcc": 2**0.5, "bcc": 2 / 3**0.5, "hcp": 1.0}[kind]
    unit = bulk("X", kind, a=cell, **({"c": (8 / 3) ** 0.5} if kind == "hcp" else {}))
    repeats = 2 * int(np.ceil(max_atoms ** (1 / 3))) + 3
    sites = unit.repeat(repeats).get_positions()
    middle = sites[np.argmin(np.linalg.norm(sites - sites.mean(axis=0), axis=1))]
    distances = np.linalg.norm(sites - middle, axis=1)
    return (sites - middle)[np.argsort(distances, kind="stable")[: 8 * max_atoms]]


@functools.cache
def polyhedra(kind: str) -> tuple[np.ndarray, ...]:
    """Complete polyhedra [N, 3] centred on their mean, by size; the largest have over 256 atoms."""
    from ase.cluster import Decahedron, Icosahedron, Octahedron

    cell = 2**0.5  # fcc with nearest neighbours at distance 1
    if kind == "icosahedral":
        made = [Icosahedron("X", shells, cell) for shells in (2, 3, 4, 5)]
    elif kind == "decahedral":
        sizes = itertools.product((1, 2, 3, 4), (1, 2, 3, 4, 5), (0, 1))
        made = [Decahedron("X", p, q, r, cell) for p, q, r in sizes if (p, q) != (1, 1)]
    else:
        sizes = [(length, cut) for length in range(2, 9) for cut in range((length + 1) // 2)]
        made = [Octahedron("X", length, cut, cell) for length, cut in sizes]
    sites = sorted((cluster.get_positions() for cluster in made), key=len)
    return tuple(points / nearest_gap(points) for points in (s - s.mean(axis=0) for s in sites))


def nearest_distance(element: str) -> float:
    """Nearest-neighbour distance of a metal's crystal in angstrom, from the table of `ase`.

    Raises:
      ConfigError: the table has no fcc, bcc or hcp crystal of that symbol.
    """
    from ase.data import atomic_numbers, reference_states

    state = reference_states[atomic_numbers.get(element, 0)] or {}
    symmetry = state.get("symmetry")
    if symmetry not in LATTICES:
        raise ConfigError(
            f"element: expected a metal with an fcc, bcc or hcp crystal, found {element}"
        )
    if symmetry == "hcp":  # of the two shortest distances of a stretched cell the mean
        return state["a"] * (1 + np.sqrt(1 / 3 + state["c/a"] ** 2 / 4)) / 2
    return state["a"] * {"fcc": 0.5**0.5, "bcc": 0.75**0.5}[symmetry]


def nearest_gap(positions: np.ndarray) -> float:
    """The median over atoms [N, 3] of the distance to the nearest other one."""
    gaps = np.linalg.norm(positions[:, None] - positions[None], axis=-1)
    np.fill_diagonal(gaps, np.inf)
    return float(np.median(gaps.min(axis=1)))


def canonical_order(positions: np.ndarray) -> np.ndarray:
    """Indices [N] that put atoms [N, 3] in an order which follows from their distances alone.

    Shell by shell from the mean of the atoms outwards, a shell being one nearest-neighbour distance
    thick. Inside a shell the next atom is the one that is closest to those that stand before it, by
    the sum of 1 / d^2 in which every earlier atom counts 0.9 of the one after it, so that
    neighbours follow one another. Rotated, reflected or permuted, a cluster keeps its matrix of
    distances in this order: a network sees the same cluster always the same way. Principal axes
    would not do, since those of a symmetric cluster are any. Atoms that tie are as far from each
    atom before them, and equivalent in a symmetric cluster; the first one is taken.
    """
    gap = nearest_gap(positions)
    squared = np.sum((positions[:, None] - positions[None]) ** 2, axis=-1) / gap**2
    centred = positions - positions.mean(axis=0)
    shell = np.floor(np.linalg.norm(centred, axis=1) / gap + 0.5 + 1e-6)
    closeness_of_pairs = 1 / np.maximum(squared, 1e-6)
    # The first atom of all is the innermost, and of equally far ones that with the most around it.
    surrounded = closeness_of_pairs.sum(axis=1) * 1e-6 / len(positions)
    order, closeness = [], surrounded
    left = np.ones(len(positions), bool)
    while left.any():
        now = left & (shell == shell[left].min())
        tied = np.round(np.where(now, closeness, -1), 9)
        chosen = int(np.argmax(tied))
        order.append(chosen)
        left[chosen] = False
        closeness = 0.9 * closeness + closeness_of_pairs[chosen] + surrounded
    return np.array(order)
