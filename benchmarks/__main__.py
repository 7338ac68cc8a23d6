"""All benchmarks and one table: `make bench`, or `python -m benchmarks`; writes latest.json.

Each subject has a process of its own: what one has compiled or allocated is not the next one's.
"""

import importlib
import multiprocessing
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor

from benchmarks.pairs import RESULTS, Row, table, write

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


def main() -> int:
    # A spawned process finds `run` in this module by its full name, not as part of `__main__`.
    from benchmarks.__main__ import run

    rows: list[Row] = []
    packages: dict[str, None] = {}
    failed: list[str] = []
    spawn = multiprocessing.get_context("spawn")
    for subject in SUBJECTS:
        try:
            with ProcessPoolExecutor(1, mp_context=spawn) as pool:
                found, names = pool.submit(run, subject).result()
        except Exception as error:  # the other subjects still count
            failed.append(f"{subject}: {type(error).__name__}: {error}")
            print(failed[-1], flush=True)
            continue
        rows += found
        packages |= dict.fromkeys(names)
        write(rows, list(packages), RESULTS / "latest.json")
    print("\nAll rows:\n\n" + table(rows))
    for line in failed:
        print(f"FAILED {line}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
