"""All benchmarks and one table: `make bench`, or `python -m benchmarks [SUBJECT ...]`.

Writes results/latest.json; given subjects replace their own rows in it. Each subject keeps the
machine that it was timed on, and has a process of its own: what one has compiled or allocated is
not the next one's.

With --smoke all is tiny and nothing is written: it shows that every benchmark runs, and that its
peers still compute the same.
"""

import argparse
import importlib
import multiprocessing
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor

from benchmarks.pairs import RESULTS, Row, read, table, timed_here, write

# With its arguments for a quick try.
SUBJECTS = {
    "gate": "--qubits 3 --pairs 1",
    "circuits": "--qubits 4 --layers 1 --gates 9 --pairs 1",
    "quantum_student": "--batch 4 --qubits 5 --pairs 1",
    "drifting_field": "--batch 8 --width 6 --pairs 1",
    "debye": "--clusters 2 --atoms 8 --pairs 1",
    "transformer": "--sizes 32 --batch 2 --pairs 1",
    "text": "--batch 2 --tokens 8 --pairs 1",
    "start": "--experiment smoke --repeats 1",
    "qkd_step": "--sizes 32 --batch 2 --pairs 1",
    "compile_time": "--size 32 --batch 2 --pairs 1",
    "inference": "--size 32 --tasks 2 3 --pairs 1",
    "whole_run": "--epochs 1 --set data.num_classes=20",
    "many_tasks": "--tasks 4 --classes 2",
    "constant_cost": "--tasks 2 3 4 --rounds 1",
    "many_prompts": "--tasks 4 --length 2",
    "pipeline": "--images 16 --pairs 1",
}


def run(subject: str, arguments: str = "") -> list[Row]:
    warnings.simplefilter("ignore")  # the peers' own
    module = importlib.import_module(f"benchmarks.{subject}")
    print(f"\n{subject}\n", flush=True)
    return module.main(arguments.split())


def main() -> int:
    # A spawned process finds `run` in this module by its full name, not as part of `__main__`.
    from benchmarks.__main__ import run

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("subjects", nargs="*", metavar="SUBJECT", help=", ".join(SUBJECTS))
    parser.add_argument("--smoke", action="store_true", help="tiny, to see that it runs")
    options = parser.parse_args()
    chosen = options.subjects or list(SUBJECTS)
    if unknown := set(chosen) - set(SUBJECTS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(SUBJECTS)}")
    path = RESULTS / "latest.json"
    subjects = {} if options.smoke else read(path)
    failed: list[str] = []
    spawn = multiprocessing.get_context("spawn")
    for subject in chosen:
        try:
            with ProcessPoolExecutor(1, mp_context=spawn) as pool:
                arguments = SUBJECTS[subject] if options.smoke else ""
                subjects[subject] = timed_here(pool.submit(run, subject, arguments).result())
        except Exception as error:  # the other subjects still count
            failed.append(f"{subject}: {type(error).__name__}: {error}")
            print(failed[-1], flush=True)
            continue
        if not options.smoke:
            write({name: subjects[name] for name in SUBJECTS if name in subjects}, path)
    for subject, timed in subjects.items():
        print(f"\n{subject}, {timed.machine['processor']}\n\n{table(timed.rows)}")
    for line in failed:
        print(f"FAILED {line}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
