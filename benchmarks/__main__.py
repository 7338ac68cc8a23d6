"""All benchmarks and one table: `make bench`, or `python -m benchmarks`; writes latest.json.

Each subject has a process of its own: what one has compiled or allocated is not the next one's.
"""

import importlib
import multiprocessing
import warnings
from concurrent.futures import ProcessPoolExecutor

from benchmarks.pairs import RESULTS, Row, report

SUBJECTS = (
    "gate",
    "transformer",
    "qkd_step",
    "compile_time",
    "inference",
    "whole_run",
    "many_tasks",
    "pipeline",
)


def run(subject: str) -> tuple[list[Row], tuple[str, ...]]:
    """(rows, packages) of one subject."""
    warnings.simplefilter("ignore")  # the peers' own
    module = importlib.import_module(f"benchmarks.{subject}")
    print(f"\n{subject}\n", flush=True)
    return module.main([]), module.PACKAGES


def main() -> None:
    rows: list[Row] = []
    packages: dict[str, None] = {}
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as pool:
        for found, names in pool.map(run, SUBJECTS):
            rows += found
            packages |= dict.fromkeys(names)
    print("\nAll rows:\n")
    report(rows, list(packages), RESULTS / "latest.json")


if __name__ == "__main__":
    main()
