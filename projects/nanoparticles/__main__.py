"""From a pair distribution function to a nanoparticle: CbLDM at reduced size.

    python -m projects.nanoparticles                  # everything, from nothing to a report
    python -m projects.nanoparticles data             # clusters and their G(r)
    python -m projects.nanoparticles train            # the three networks; goes on where it stopped
    python -m projects.nanoparticles sample --gr FILE --element Au     # candidates as XYZ and CIF
    python -m projects.nanoparticles evaluate         # the comparison, as JSON and as a table

The same settings must be given to all of them; a folder made with others is refused.
"""

import argparse
import importlib.util
import sys
import time
from dataclasses import asdict
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from qkd_jax.errors import ConfigError, DataError, QkdError
from qkd_jax.runs.lock import exclusive

WORDS = ("data", "train", "sample", "evaluate")
NEEDED = ("ase", "xraydb", "diffpy.utils")
NOISE_LEVELS = [0.0, 1e-5, 1e-4, 1e-3, 3e-3, 1e-2, 3e-2]
STUDIED = 24  # clusters of the decoders' comparison under noise


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        _need_packages()
        work = Work(options)
        with exclusive(options.out):
            for word in WORDS if options.word == "all" else (options.word,):
                getattr(work, word)()
    except QkdError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a full disk, a folder that cannot be written
        print(f"error: {options.out}: {error}; what was saved is whole", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


class Work:
    """The four words, with the settings of one command line.

    Raises:
      ConfigError, DataError: a setting or a given file is no good; nothing has been done then.
    """

    def __init__(self, options: argparse.Namespace):
        from projects.nanoparticles.diffusion import Diffusion, calls_of
        from projects.nanoparticles.files import read_cluster, read_pdf
        from projects.nanoparticles.networks import Sizes
        from projects.nanoparticles.scattering import PdfSettings, form_factors
        from projects.nanoparticles.training import Training

        self.options, self.out, self.began = options, options.out, time.perf_counter()
        self.seeds = _seeds(options.seeds)
        self.settings = PdfSettings()
        self.sizes = Sizes(pdf_points=len(self.settings.r()))
        self.diffusion = Diffusion(stride=options.stride, eta=options.eta)
        self.training = Training(
            pdf_steps=options.pdf_steps,
            matrix_steps=options.matrix_steps,
            denoiser_steps=options.denoiser_steps,
            batch=options.batch,
        )
        for name in ("clusters", "test_clusters", "candidates"):
            if getattr(options, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')}: expected 1 or more")
        if options.candidates > options.clusters:
            raise ConfigError(
                f"--candidates: expected at most the {options.clusters} training clusters, since "
                f"as many nearest neighbours are compared, found {options.candidates}"
            )
        if not 0 <= options.noise < 1:
            raise ConfigError(f"--noise: expected 0 to below 1, found {options.noise}")
        for skip in (options.skip, 100, 400):
            calls_of(self.diffusion, skip)
        self.given = self.truth = None
        if options.gr is not None:
            self.given = read_pdf(options.gr, self.settings)
        elif options.truth is not None:
            raise DataError("--truth: expected a --gr file that belongs to it, found none")
        form_factors([options.element], self.settings)  # refuses what is no element
        if options.truth is not None:
            self.truth = read_cluster(options.truth, self.sizes.atoms)[1]

    def data(self) -> None:
        """Makes the clusters of each seed, unless they are there."""
        from projects.nanoparticles.data import make_data, save_data
        from projects.nanoparticles.training import check_record

        counts = (self.options.clusters, 128, self.options.test_clusters)
        for seed in self.seeds:
            record = {
                "seed": seed,
                "clusters": list(counts),
                "max_atoms": self.sizes.atoms,
                "noise": self.options.noise,
                "pdf": asdict(self.settings),
            }
            check_record(self._folder(seed), "data", record)
            if self._file(seed).exists():
                self.tell(f"seed {seed}: data: already made")
                continue
            made = make_data(seed, counts, self.sizes.atoms, self.settings, self.options.noise)
            save_data(self._file(seed), made)
            self.tell(f"seed {seed}: data: {counts[0]:,} clusters to train on, {counts[2]} to test")

    def train(self) -> None:
        """Trains the networks of each seed, or goes on with it."""
        from projects.nanoparticles.model import train_model

        for seed in self.seeds:
            train_model(
                self._file(seed),
                self._folder(seed),
                seed,
                self.sizes,
                self.diffusion,
                self.training,
                tell=lambda line, seed=seed: self.tell(f"seed {seed}: {line}"),
            )

    def sample(self) -> None:
        """Writes candidates for one G(r), the given one or that of a test cluster."""
        from projects.nanoparticles.data import load_data
        from projects.nanoparticles.evaluate import decoded
        from projects.nanoparticles.figures import atoms_figure, pdf_figure
        from projects.nanoparticles.files import write_cluster, write_pdf
        from projects.nanoparticles.model import generate
        from projects.nanoparticles.scattering import form_factors

        options, seed = self.options, self.seeds[0]
        model = self._model(seed)
        folder = self.out / "sample"
        folder.mkdir(parents=True, exist_ok=True)
        given, truth, element = self.given, self.truth, options.element
        if given is None:
            test = load_data(self._file(seed)).test
            given, element = test.pdf[0], str(test.element[0])
            truth = test.positions[0, : test.count[0]]
            write_pdf(folder / "given.gr", given, self.settings)
            write_cluster(folder / "truth.xyz", element, truth)
            self.tell(f"no --gr: taking the first test cluster, {len(truth)} atoms of {element}")
        key = jax.random.fold_in(jax.random.key(seed), 300)
        weights = generate(model, key, given, options.candidates, options.skip)
        factors = form_factors([element], self.settings)
        found = decoded(weights[None], jnp.asarray(given)[None], factors, self.settings)
        ranks = np.argsort(found.residual[0])
        for rank, k in enumerate(ranks):
            atoms = found.positions[0, k, : found.count[0, k]]
            residual = found.residual[0, k]
            for ending in ("xyz", "cif"):
                path = folder / f"candidate_{rank + 1}.{ending}"
                write_cluster(path, element, atoms, f"R_w = {residual:.4f}")
            self.tell(f"candidate {rank + 1}: {len(atoms)} atoms, R_w {residual:.3f}")
        shown = {"best": ranks[0], "median": ranks[len(ranks) // 2]}
        pdfs = {name: found.pdf[0, k] for name, k in shown.items()}
        atoms = {name: found.positions[0, k, : found.count[0, k]] for name, k in shown.items()}
        pdf_figure(self.settings.r(), given, pdfs).savefig(folder / "pdf.png")
        atoms_figure(truth, atoms).savefig(folder / "atoms.png")
        self.tell(f"candidates, best first, and figures are in {folder}")

    def evaluate(self) -> None:
        """Compares all methods on the test clusters of each seed; writes table and figures."""
        from projects.nanoparticles.data import load_data
        from projects.nanoparticles.evaluate import evaluate, save_results
        from projects.nanoparticles.figures import atoms_figure, decoders_figure, pdf_figure
        from projects.nanoparticles.laplacian import study_noise

        results = []
        for seed in self.seeds:
            model, data = self._model(seed), load_data(self._file(seed))
            rows, decoders, found = evaluate(
                model,
                data,
                seed,
                self.settings,
                self.options.candidates,
                tell=lambda line, seed=seed: self.tell(f"seed {seed}: {line}"),
            )
            results.append({"seed": seed, "rows": rows, "decoders": decoders})
            if seed != self.seeds[0]:
                continue
            # The cluster whose chosen candidate is neither lucky nor unlucky.
            k = int(np.argsort(found.residual.min(axis=1))[len(found.residual) // 2])
            ranks = np.argsort(found.residual[k])
            shown = {"best": ranks[0], "median": ranks[len(ranks) // 2]}
            atoms = {name: found.positions[k, c, : found.count[k, c]] for name, c in shown.items()}
            pdfs = {name: found.pdf[k, c] for name, c in shown.items()}
            truth = data.test.positions[k, : data.test.count[k]]
            pdf_figure(self.settings.r(), data.test.pdf[k], pdfs).savefig(self.out / "pdf.png")
            atoms_figure(truth, atoms).savefig(self.out / "atoms.png")
            studied = data.test.rows(slice(STUDIED))
            key = jax.random.fold_in(jax.random.key(seed), 400)
            study = study_noise(key, studied.positions, studied.count, NOISE_LEVELS)
            decoders_figure(study).savefig(self.out / "decoders.png")
        settings = {
            "pdf": asdict(self.settings),
            "sizes": asdict(self.sizes),
            "diffusion": asdict(self.diffusion),
            "training": asdict(self.training),
            "noise": self.options.noise,
            "clusters": self.options.clusters,
            "test_clusters": self.options.test_clusters,
            "candidates": self.options.candidates,
        }
        print(f"\n{save_results(self.out, results, study, settings)}")
        self.tell(f"table, numbers and figures are in {self.out}")

    def tell(self, line: str) -> None:
        print(f"{time.perf_counter() - self.began:5.0f} s  {line}", flush=True)

    def _folder(self, seed: int) -> Path:
        return self.out / f"seed_{seed}"

    def _file(self, seed: int) -> Path:
        return self._folder(seed) / "data.npz"

    def _model(self, seed: int):
        from projects.nanoparticles.model import load_model

        return load_model(self._folder(seed), self.sizes, self.diffusion)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m projects.nanoparticles",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("word", nargs="?", choices=("all", *WORDS), default="all")
    add("--out", type=Path, default=Path("runs/nanoparticles"), help="folder of everything")
    add("--seeds", default="0", help='of data and networks, such as "0 1 2"; the first one samples')
    add("--clusters", type=int, default=4000, help="to train on")
    add("--test-clusters", type=int, default=24)
    add("--noise", type=float, default=0.02, help="on G(r), as a part of its largest value")
    add("--pdf-steps", type=int, default=1000)
    add("--matrix-steps", type=int, default=3000)
    add("--denoiser-steps", type=int, default=4000)
    add("--batch", type=int, default=64)
    add("--stride", type=int, default=10, help="levels of 1000 between network calls in sampling")
    add("--eta", type=float, default=1.0, help="noise added in sampling: 1 ancestral, 0 DDIM")
    add("--candidates", type=int, default=4, help="for each G(r)")
    add("--skip", type=int, default=100, help="levels that `sample` jumps over by the prior")
    add("--gr", type=Path, help="a measured G(r) for `sample`; without it that of a test cluster")
    add("--element", default="Au", help="of the atoms behind --gr")
    add("--truth", type=Path, help="an XYZ file of the cluster behind --gr, shown beside it")
    return parser


def _seeds(text: str) -> list[int]:
    try:
        seeds = [int(word) for word in text.replace(",", " ").split()]
    except ValueError:
        seeds = []
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise ConfigError(f'--seeds: expected different numbers like "0 1 2", found "{text}"')
    return seeds


def _need_packages() -> None:
    def found(name):
        try:
            return importlib.util.find_spec(name) is not None
        except ModuleNotFoundError:  # the package around a module is missing
            return False

    missing = [name for name in NEEDED if not found(name)]
    if missing:
        raise ConfigError(
            f"packages: expected those of this project, found no {', '.join(missing)}; install "
            'them with pip install -e ".[nanoparticles]"'
        )


if __name__ == "__main__":
    raise SystemExit(main())
