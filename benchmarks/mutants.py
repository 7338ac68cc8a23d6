"""Plants one mistake at a time in the code and runs the tests: `make mutants MUTANTS=20`.

Of every chosen module, so many mutants of Cosmic Ray (https://cosmic-ray.readthedocs.io) are drawn:
an operator replaced, a number changed by one, a condition negated, a loop left out. A mutant is
killed when a test fails or hangs. All happens in a copy of the last commit, in a folder that an
interrupted campaign is continued from. Survivors are to be read by a person: some change nothing
that a test could tell. What that person finds is written beside a survivor in the record, as its
`reason`, and stays there when the module is tried again. After new tests were committed,
`--survivors` tries once more those that survived and are not the same program.
"""

import argparse
import ast
import json
import logging
import os
import random
import shlex
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from cosmic_ray.commands import execute, init
from cosmic_ray.config import ConfigDict
from cosmic_ray.testing import run_tests
from cosmic_ray.work_db import WorkDB, use_db
from cosmic_ray.work_item import MutationSpec, TestOutcome, WorkerOutcome, WorkResult

ROOT = Path(__file__).parents[1]
QKD = "tests/learners/qkd"
# The tests of each module, the most special first: the first that fails ends a mutant.
MODULES = {
    "learners/qkd/learner": QKD,
    "learners/qkd/gate": f"{QKD}/test_gate.py {QKD}",
    "learners/qkd/fusion": f"{QKD}/test_fusion.py {QKD}",
    "learners/qkd/measurement": f"{QKD}/test_measurement.py",
    "learners/step": (
        "tests/learners/test_optimiser.py tests/learners/test_clare.py tests/engine/test_verbs.py "
        + QKD
    ),
    "learners/state": (
        f"tests/learners/test_state.py tests/learners/test_kept.py tests/engine/test_verbs.py {QKD}"
    ),
    "nn/heads": f"tests/nn/test_heads.py tests/learners/test_ease.py {QKD}",
    "nn/losses": f"tests/nn/test_losses.py {QKD} tests/learners/test_golden_coda_prompt.py",
    "nn/whitening": f"tests/nn/test_whitening.py {QKD}",
    "protocol/metrics": "tests/protocol tests/test_laws.py tests/runs/test_evaluation.py",
    "protocol/tasks": "tests/protocol tests/settings/test_config.py",
    "protocol/calibration": "tests/protocol",
    "protocol/comparison": "tests/protocol tests/reports/test_ranks.py",
}
# Mutants that mostly change nothing but speed: `jax.jit` is the decorator most often removed.
EQUAL = ("core/RemoveDecorator",)
# A mutant that takes so many times the unchanged tests' seconds hangs.
PATIENCE = 5
# How the reason of a survivor begins that no test could kill.
SAME = "the same program"
SKIPPED = WorkResult(worker_outcome=WorkerOutcome.SKIPPED)


def campaign(
    module: str, count: int, seed: int, folder: Path, settled: Collection[str] | None = None
) -> dict[str, Any]:
    """Tries mutants of a module, or goes on with what was begun in the folder.

    Args:
      module: a key of `MODULES`.
      count: how many mutants are drawn; all if there are fewer.
      seed: of the draw.
      folder: of this module alone.
      settled: if given, survivors are tried again by the tests of the last commit, but for those
        with these diffs.

    Returns:
      How many mutants there are, were tried and killed, the survivors as `place` and `diff`, and
      seconds.

    Raises:
      RuntimeError: the unchanged tests fail, or the module is another than that of the survivors.
    """
    tree, original, path = folder / "tree", folder / "original.py", f"qkd_jax/{module}.py"
    if settled is not None:
        copy_commit(tree)
        if original.read_bytes() != (tree / path).read_bytes():
            raise RuntimeError(f"{path} has changed since its mutants were drawn")
        forget_survivors(folder / "session.sqlite", settled)
    elif not original.exists():
        copy_commit(tree)
        shutil.copy(tree / path, original)
    shutil.copy(original, tree / path)  # a campaign that was killed has left a mutant there
    os.chdir(tree)  # Cosmic Ray's paths and its test command are relative to it
    python = shlex.quote(sys.executable)
    command = f"{python} -m pytest -x -q -p no:cacheprovider {MODULES[module]}"
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder.parent / "compiled")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    began = time.monotonic()
    with use_db(folder / "session.sqlite", WorkDB.Mode.create) as work:
        if not work.num_work_items:
            init([Path(path)], work, {})
            keep_a_sample(work, Path(path).read_text(), count, seed)
        baseline = unchanged(command)
        config = ConfigDict(
            {
                "module-path": path,
                "timeout": max(60.0, PATIENCE * baseline),
                "test-command": command,
                "distributor": {"name": "local"},
            }
        )
        execute(work, config)
        total, tried = work.num_work_items, []
        for item, result in work.completed_work_items:
            if result.worker_outcome != WorkerOutcome.SKIPPED:
                tried.append((item.mutations[0], result))
    survivors = sorted(
        ({"place": place_of(spec), "diff": changed_lines(result.diff)} for spec, result in tried
         if result.test_outcome == TestOutcome.SURVIVED),
        key=lambda survivor: survivor["diff"],
    )  # fmt: skip
    return {
        "mutants": total,
        "tried": len(tried),
        "killed": len(tried) - len(survivors),
        "survivors": survivors,
        "seconds": round(time.monotonic() - began),
    }


def copy_commit(tree: Path) -> None:
    """The files of the last commit."""
    shutil.rmtree(tree, ignore_errors=True)
    tree.mkdir(parents=True)
    archive = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, capture_output=True, check=True)
    subprocess.run(["tar", "-x", "-C", tree], input=archive.stdout, check=True)


def forget_survivors(session: Path, settled: Collection[str]) -> None:
    """Makes survivors with other diffs mutants that were not tried yet."""
    with sqlite3.connect(session) as base:
        found = base.execute(
            "SELECT job_id, diff FROM work_results WHERE test_outcome = ?",
            (TestOutcome.SURVIVED.name,),
        ).fetchall()
        again = [(job,) for job, diff in found if changed_lines(diff) not in settled]
        base.executemany("DELETE FROM work_results WHERE job_id = ?", again)


def unchanged(command: str) -> float:
    """Seconds of the tests without a mutant, which must pass: else each would be killed."""
    run_tests(command, None)  # compiles
    began = time.monotonic()
    outcome, output = run_tests(command, None)
    if outcome != TestOutcome.SURVIVED:
        raise RuntimeError(f"the tests fail without any mutant:\n{output[-3000:]}")
    return time.monotonic() - began


def keep_a_sample(work: WorkDB, source: str, count: int, seed: int) -> None:
    """Skips all but a random sample of the mutants; no two at one place."""
    notes = annotations(source)
    places: dict[tuple, list[str]] = {}
    for item in sorted(work.work_items, key=lambda item: sort_key(item.mutations[0])):
        spec = item.mutations[0]
        if spec.operator_name not in EQUAL and not inside(spec, notes):
            places.setdefault((spec.start_pos, spec.end_pos), []).append(item.job_id)
    draw = random.Random(seed)
    candidates = [draw.choice(jobs) for jobs in places.values()]
    kept = set(draw.sample(candidates, min(count, len(candidates))))
    skipped = [item.job_id for item in work.work_items if item.job_id not in kept]
    work.set_multiple_results(skipped, SKIPPED)


def sort_key(spec: MutationSpec) -> tuple:
    """Ids of jobs are random, places are not."""
    return spec.start_pos, spec.end_pos, spec.operator_name, spec.occurrence


def annotations(source: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Where types of arguments and results stand: nothing reads them."""
    found: list[ast.expr | None] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.arg | ast.AnnAssign):
            found.append(node.annotation)
        elif isinstance(node, ast.FunctionDef):
            found.append(node.returns)
    return [
        ((note.lineno, note.col_offset), (note.end_lineno, note.end_col_offset))
        for note in found
        if note is not None
    ]


def inside(spec: MutationSpec, spans: Iterable[tuple]) -> bool:
    return any(begin <= spec.start_pos and spec.end_pos <= end for begin, end in spans)


def place_of(spec: MutationSpec) -> str:
    return f"{spec.definition_name or 'module'}, {spec.operator_name.removeprefix('core/')}"


def changed_lines(diff: str) -> str:
    """The lines of a diff that a mutant changes."""
    lines = [
        line for line in diff.splitlines() if line[:1] in "+-" and line[:3] not in ("+++", "---")
    ]
    return "\n".join(line[:1] + " " + line[1:].strip() for line in lines)


def keep_reasons(survivors: Iterable[dict], before: Iterable[dict]) -> None:
    """Gives survivors the reasons that the same ones had."""
    known = {survivor["diff"]: survivor["reason"] for survivor in before if "reason" in survivor}
    for survivor in survivors:
        if survivor["diff"] in known:
            survivor["reason"] = known[survivor["diff"]]


def table(rows: dict[str, dict]) -> str:
    """A record as a Markdown table."""
    lines = ["| file | tried | killed | survived, the same program | survived |"]
    lines.append("| --- | ---: | ---: | ---: | ---: |")
    for module, row in rows.items():
        same = sum(survivor.get("reason", "").startswith(SAME) for survivor in row["survivors"])
        cells = row["tried"], row["killed"], same, len(row["survivors"]) - same
        lines.append(f"| `{module}.py` | " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def reasons(rows: dict[str, dict]) -> str:
    """The survivors of a record as a Markdown table: what was changed to what, and why it lives."""
    lines = ["| file | the line | as mutant | why it survives |", "| --- | --- | --- | --- |"]
    for module, row in rows.items():
        for survivor in row["survivors"]:
            old, _, new = survivor["diff"].partition("\n+ ")
            why = survivor.get("reason", "not read")
            cells = (f"`{module}.py`", f"`{old[2:]}`", f"`{new}`", why)
            shown = (" ".join(cell.split()).replace("|", r"\|") for cell in cells)
            lines.append("| " + " | ".join(shown) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("modules", nargs="*", metavar="MODULE", help=", ".join(MODULES))
    parser.add_argument("--mutants", type=int, default=20, help="of each module")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "mutants")
    parser.add_argument("--survivors", action="store_true", help="try those that survived again")
    parser.add_argument(
        "--record", type=Path, help="a JSON whose rows of these modules are replaced"
    )
    options = parser.parse_args(arguments)
    chosen = options.modules or list(MODULES)
    if unknown := set(chosen) - MODULES.keys():
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(MODULES)}")
    logging.disable(logging.INFO)
    record = options.record and options.record.resolve()
    for module in chosen:
        name = module.replace("/", "_")
        folder = options.folder.resolve() / f"seed{options.seed}" / name
        rows = json.loads(record.read_text()) if record and record.exists() else {}
        before = rows.get(module, {}).get("survivors", ())
        same = {s["diff"] for s in before if s.get("reason", "").startswith(SAME)}
        settled = same if options.survivors else None
        found = campaign(module, options.mutants, options.seed, folder, settled)
        print(f"{module:24} {found['killed']} of {found['tried']} killed", flush=True)
        for survivor in found["survivors"]:
            print(f"  {survivor['place']}\n    " + survivor["diff"].replace("\n", "\n    "))
        if record:
            keep_reasons(found["survivors"], before)
            rows[module] = {"seed": options.seed, **found}
            rows = {known: rows[known] for known in MODULES if known in rows}
            record.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
