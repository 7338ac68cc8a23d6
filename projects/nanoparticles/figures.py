"""Pictures: G(r) of candidates, atoms in three dimensions, decoders under noise.

Every function returns a `matplotlib.figure.Figure`; none needs a display.
"""

from itertools import cycle
from typing import TYPE_CHECKING

import numpy as np

from projects.nanoparticles.laplacian import NoiseStudy, aligned, best_assignment

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Colours that the colour-blind can tell apart (Okabe and Ito).
MEASURED, COLOURS = "#333333", ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
BOND = 1.25  # atoms nearer than this many median nearest-neighbour distances are joined


def pdf_figure(r: np.ndarray, measured: np.ndarray, candidates: dict[str, np.ndarray]) -> "Figure":
    """G(r) measured [R] against that of each named candidate [R], and the difference below it.

    r is in angstrom, G in 1 / angstrom^2; each line's name stands with R_w, the root of the squared
    difference as a part of the measured square.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 2.2 * len(candidates) + 0.6), layout="constrained", dpi=130)
    grid = figure.subplots(len(candidates), 1, squeeze=False, sharex=True)[:, 0]
    measured = np.asarray(measured, np.float64)
    drop = 1.35 * np.abs(measured).max()
    for axes, (name, pdf), colour in zip(grid, candidates.items(), cycle(COLOURS), strict=False):
        difference = measured - np.asarray(pdf, np.float64)
        residual = np.sqrt(np.sum(difference**2) / np.sum(measured**2))
        axes.plot(r, measured, "o", ms=2.2, mfc="none", mew=0.6, color=MEASURED, label="measured")
        axes.plot(r, pdf, color=colour, lw=1.2, label=f"{name}, R$_w$ = {residual:.2f}")
        axes.axhline(-drop, color="#bbbbbb", lw=0.6)
        axes.plot(r, difference - drop, color="#888888", lw=0.8, label="difference")
        axes.legend(loc="upper right", fontsize=7, ncols=3, frameon=False)
        axes.set_ylabel(r"G(r) / $\mathrm{\AA}^{-2}$")
        axes.set_ylim(top=1.45 * max(np.abs(measured).max(), np.abs(pdf).max()))
        axes.spines[["top", "right"]].set_visible(False)
    grid[-1].set_xlabel(r"r / $\mathrm{\AA}$")
    return figure


def atoms_figure(truth: np.ndarray | None, candidates: dict[str, np.ndarray]) -> "Figure":
    """The true cluster [N, 3] and candidates [N', 3] in three dimensions, on the same scale.

    A candidate with as many atoms as the truth is turned onto it, and its atoms are joined by grey
    lines to where they should be. Without a truth the candidates stand alone.
    """
    from matplotlib.figure import Figure

    panels = {} if truth is None else {"truth": np.asarray(truth)}
    panels |= {name: np.asarray(atoms) for name, atoms in candidates.items()}
    figure = Figure(figsize=(3.2 * len(panels), 3.4), layout="constrained", dpi=130)
    sizes = [np.abs(atoms - atoms.mean(axis=0)).max() for atoms in panels.values()]
    # A candidate that flies apart does not make the truth tiny.
    size = 1.02 * (max(sizes) if truth is None else min(max(sizes), 1.4 * sizes[0]))
    for k, (name, atoms) in enumerate(panels.items()):
        axes = figure.add_subplot(1, len(panels), k + 1, projection="3d", computed_zorder=False)
        is_truth = truth is not None and k == 0
        colour = COLOURS[(k - (truth is not None)) % len(COLOURS)]  # as in `pdf_figure`
        atoms = atoms - atoms.mean(axis=0)
        if truth is not None and not is_truth and atoms.shape == np.shape(truth):
            centre = truth - np.mean(truth, axis=0)
            atoms = aligned(atoms, centre)
            places = centre[np.argsort(best_assignment(atoms, centre))]
            for pair in zip(atoms, places, strict=True):
                axes.plot(*np.transpose(pair), color="#888888", lw=0.8, zorder=1)
        draw_atoms(axes, atoms, colour if not is_truth else "#777777")
        axes.set(xlim=(-size, size), ylim=(-size, size), zlim=(-size, size))
        axes.set_box_aspect((1, 1, 1), zoom=1.35)
        axes.set_axis_off()
        axes.view_init(elev=18, azim=35)
        axes.set_title(name, fontsize=9)
    return figure


def draw_atoms(axes, atoms: np.ndarray, colour: str) -> None:
    """Spheres, paler behind, and bonds between nearest neighbours."""
    gaps = np.linalg.norm(atoms[:, None] - atoms[None], axis=-1)
    np.fill_diagonal(gaps, np.inf)
    bonded = np.argwhere(np.triu(gaps < BOND * np.median(gaps.min(axis=1))))
    for first, second in bonded:
        axes.plot(*atoms[[first, second]].T, color=colour, lw=0.9, alpha=0.35, zorder=1)
    axes.scatter(
        *atoms.T, s=110, color=colour, edgecolors="white", linewidths=0.8, depthshade=True, zorder=2
    )


def decoders_figure(study: NoiseStudy) -> "Figure":
    """Median RMSD of every decoder against the noise on W, with quartiles, on logarithmic axes."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = Figure(figsize=(9.6, 3.6), layout="constrained", dpi=130)
    whole, ratio = figure.subplots(1, 2)
    shown = study.levels > 0
    levels = study.levels[shown]
    styles = dict(zip(study.rmsd, ("-", "--", "-", "--", "-", "--"), strict=False))
    for (name, found), colour in zip(study.rmsd.items(), COLOURS, strict=False):
        low, middle, high = np.percentile(found[shown], [25, 50, 75], axis=1)
        whole.plot(levels, middle, styles[name], marker="o", ms=3.5, color=colour, label=name)
        whole.fill_between(levels, low, high, color=colour, alpha=0.12, lw=0)
    whole.set(xscale="log", yscale="log", ylabel=r"RMSD / $\mathrm{\AA}$, median and quartiles")
    whole.legend(fontsize=8, frameon=False)
    base_name = next(iter(study.rmsd))
    base = study.rmsd[base_name][shown]
    for (name, found), colour in zip(study.rmsd.items(), COLOURS, strict=False):
        relative = np.median(found[shown] / base, axis=1)
        ratio.plot(levels, relative, styles[name], marker="o", ms=3.5, color=colour, label=name)
    ratio.set(xscale="log", yscale="log", ylabel=f"RMSD / RMSD of {base_name}, median")
    ratio.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    ratio.yaxis.set_major_formatter("{x:g}")
    ratio.yaxis.set_minor_formatter(NullFormatter())
    for axes in (whole, ratio):
        axes.set_xlabel("standard deviation of the noise on W")
        axes.spines[["top", "right"]].set_visible(False)
    return figure
