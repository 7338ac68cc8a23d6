"""Clusters of metals: cut from lattices or grown as polyhedra by `ase`, strained and displaced.

Six kinds: pieces of the fcc, bcc and hcp lattice around a random centre, and icosahedra, decahedra
and (truncated) octahedra. A polyhedron is complete in half of the cases and else a piece of a
larger one, so that every kind comes in every size. The atoms of a cluster stand in an order that
follows from the ideal sites alone (`canonical_order`).
"""

import functools
import itertools
from typing import NamedTuple

import numpy as np

from qkd_jax.errors import ConfigError

LEAST_ATOMS, MOST_ATOMS = 8, 256
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
      ConfigError: `max_atoms` is not between 8 and 256, or no cluster is asked for.
    """
    if not LEAST_ATOMS <= max_atoms <= MOST_ATOMS:
        raise ConfigError(f"max_atoms: expected {LEAST_ATOMS} to {MOST_ATOMS}, found {max_atoms}")
    if count < 1:
        raise ConfigError(f"count: expected 1 cluster or more, found {count}")
    positions = np.zeros((count, max_atoms, 3), np.float32)
    counts, elements, kinds = [], [], []
    for k in range(count):
        draws = np.random.default_rng([seed, k])  # a cluster does not depend on the others
        kind = KINDS[draws.integers(len(KINDS))]
        element = METALS[kind][draws.integers(len(METALS[kind]))]
        sites = ideal_sites(draws, kind, max_atoms) * nearest_distance(element)
        atoms = sites[canonical_order(sites)]
        strain = draws.normal(scale=STRAIN, size=(3, 3))
        strain = (1 + draws.normal(scale=SCALE)) * np.eye(3) + (strain + strain.T) / 2
        atoms = atoms @ strain + draws.normal(scale=DISPLACEMENT, size=atoms.shape)
        positions[k, : len(atoms)] = atoms - atoms.mean(axis=0)
        counts.append(len(atoms)), elements.append(element), kinds.append(kind)
    return Clusters(positions, np.array(counts, np.int32), np.array(elements), np.array(kinds))


def ideal_sites(draws: np.random.Generator, kind: str, max_atoms: int) -> np.ndarray:
    """Sites [N, 3] of one cluster, the nearest two at distance 1."""
    if kind not in LATTICES and draws.random() < 0.5:
        complete = [s for s in polyhedra(kind) if LEAST_ATOMS <= len(s) <= max_atoms]
        if complete:
            return complete[draws.integers(len(complete))]
    atoms = draws.integers(LEAST_ATOMS, max_atoms + 1)
    if kind in LATTICES:
        whole = lattice_ball(kind, max_atoms)
    else:
        whole = next(sites for sites in polyhedra(kind) if len(sites) >= max_atoms)
    # The centre of the ball may be any point of a lattice, but stays near a polyhedron's own.
    centre = draws.uniform(-0.5, 0.5, size=3)
    return whole[np.argsort(np.linalg.norm(whole - centre, axis=1), kind="stable")[:atoms]]


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
