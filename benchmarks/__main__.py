"""All benchmarks and one table: `make bench`, or `python -m benchmarks [SUBJECT ...]`.

Writes results/latest.json; given subjects replace their own rows in it. Each subject keeps the
machine that it was timed on, and has a process of its own: what one has compiled or allocated is
not the next one's.
"""

import argparse
import importlib
import multiprocessing
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor

from benchmarks.pairs import RESULTS, Row, read, table, timed_here, write

SUBJECTS = (
    "gate",
    "quantum_student",
    "drifting_field",
    "debye",
    "transformer",
    "text",
    "start",
    "qkd_step",
    "compile_time",
    "inference",
    "whole_run",
    "many_tasks",
    "constant_cost",
    "many_prompts",
    "pipeline",
)


def run(subject: str) -> list[Row]:
    warnings.simplefilter("ignore")  # the peers' own
    module = importlib.import_module(f"benchmarks.{subject}")
    print(f"\n{subject}\n", flush=True)
    return module.main([])


def main() -> int:
    # A spawned process finds `run` in this module by its full name, not as part of `__main__`.
    from benchmarks.__main__ import run

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("subjects", nargs="*", metavar="SUBJECT", help=", ".join(SUBJECTS))
    chosen = parser.parse_args().subjects or SUBJECTS
    if unknown := set(chosen) - set(SUBJECTS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(SUBJECTS)}")
    path = RESULTS / "latest.json"
    subjects = read(path)
    failed: list[str] = []
    spawn = multiprocessing.get_context("spawn")
    for subject in chosen:
        try:
            with ProcessPoolExecutor(1, mp_context=spawn) as pool:
                subjects[subject] = timed_here(pool.submit(run, subject).result())
        except Exception as error:  # the other subjects still count
            failed.append(f"{subject}: {type(error).__name__}: {error}")
            print(failed[-1], flush=True)
            continue
        write({name: subjects[name] for name in SUBJECTS if name in subjects}, path)
    for subject, timed in subjects.items():
        print(f"\n{subject}, {timed.machine['processor']}\n\n{table(timed.rows)}")
    for line in failed:
        print(f"FAILED {line}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
