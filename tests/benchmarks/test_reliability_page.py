"""docs/reliability.md shows what the records of `make faults`, `make fuzz`, `make mutants`,
`benchmarks.devices` and `benchmarks.long_run` say, nothing else.
"""

import itertools
import json
from pathlib import Path

from benchmarks import mutants

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "reliability.md").read_text()
WORDS = " ".join(PAGE.split())


def record(name):
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def rows_below(head):
    """The cells of the rows of the table that begins with this line."""
    below = PAGE.partition(head + "\n")[2].splitlines()
    _, *rows = itertools.takewhile(lambda line: line.startswith("|"), below)
    return [[cell.strip() for cell in row[1:-1].split("|")] for row in rows]


def test_kills():
    found = record("faults")
    assert found["runs_with_faults"] == 0 and "**no difference**" in WORDS
    by_method = ", ".join(f"{name} {row['kills']}" for name, row in found["by_method"].items())
    assert f"{found['kills']} kills of {len(found['runs'])} runs ({by_method})" in WORDS
    names = {
        "a step": "an optimisation step",
        "end_task": "`end_task`",
        "begin_task": "`begin_task`",
        "features before the steps": "computing features before the steps",
        "elsewhere": "elsewhere, or its place was not told in time",
    }
    places = [[names.get(p, p), str(n)] for p, n in found["by_place"].items()]
    assert rows_below("| killed in | kills |") == places


def test_hostile_files():
    found = record("fuzz")
    kinds = {
        "npz": "`.npz`",
        "safetensors": "`.safetensors`",
        "onnx": "`.onnx`",
        "config": "`config.json`",
        "run": "a file of a run folder, from which page and table are made",
        "image": "images of ten formats",
        "text": "texts, tables, split files",
    }
    assert rows_below("| files | accepted | answered | crashed |") == [
        [kinds[kind], *(f"{row[name]:,}" for name in ("accepted", "answered", "crashed"))]
        for kind, row in found["kinds"].items()
    ]
    assert f"make fuzz INPUTS={found['inputs']} FUZZ_SEED={found['seed']} " in WORDS
    counts = ("accepted", "answered", "crashed")
    total = sum(row[name] for row in found["kinds"].values() for name in counts)
    assert f"{total:,} inputs" in WORDS and total + len(kinds) > found["inputs"]


def test_planted_mistakes():
    """Every file was tried, and each survivor is the same program."""
    found = record("mutants")
    assert mutants.table(found) in PAGE and mutants.reasons(found) in PAGE
    survivors = [survivor for row in found.values() for survivor in row["survivors"]]
    assert all(survivor["reason"].startswith(mutants.SAME) for survivor in survivors)
    tried = sum(row["tried"] for row in found.values())
    assert f"{tried - len(survivors)} of {tried} were killed: all that change" in WORDS
    assert list(found) == list(mutants.MODULES)


def test_devices():
    found, expected = record("devices")["methods"], []
    for method, row in found.items():
        assert row["again"] == []
        for place in ("eight devices", "two processes"):
            first = place == "eight devices"
            numbers = [f"{row[place][n]:.0e}" for n in ("trained", "stored", "log_probability")]
            differ = f"{row[place]['different']} of {row[place]['predictions']}"
            start = [method, "the same bytes"] if first else ["", ""]
            expected.append([*start, place, *numbers, differ])
    head = "| method | again | | trained | stored | log-probability | predictions that differ |"
    assert rows_below(head) == expected


def test_the_first_notebook_repeats_a_recorded_run():
    path = ROOT / "results" / "renditions" / "qkd" / "seed1993" / "summary.json"
    recorded = json.loads(path.read_text())
    average, last = (f"{recorded[f'{name}_accuracy']:.2f}" for name in ("average", "last"))
    assert f"ends with the recorded {average} / {last}" in WORDS
    notebook = (ROOT / "notebooks" / "01_quickstart_colab_tpu.ipynb").read_text()
    assert f"average {average}   last {last}" in notebook


def test_a_long_run():
    found = record("long_run")
    later = [task for run in ("after_task", "after_task_one_arena") for task in found[run][10:]]
    files, threads = ([task[name] for task in later] for name in ("open_files", "threads"))
    for run in ("after_task", "after_task_one_arena"):  # nothing grows
        for name in ("open_files", "threads"):
            *before, last = (
                max(t[name] for t in found[run][n : n + 10]) for n in range(10, 100, 10)
            )
            assert last <= max(before), (run, name)
    expected = f"{min(files)} to {max(files)} open files and {min(threads)} to {max(threads)} thr"
    assert expected in WORDS
    steps, memory = found["growth"]["step_ms"], found["growth"]["memory_mib"]
    assert f"takes {steps[0]:.1f} and {steps[1]:.1f} ms" in WORDS
    assert f"memory rises from {memory[0]:.0f} to {memory[1]:.0f} MiB" in WORDS
    memory = found["growth_one_arena"]["memory_mib"]
    assert f"goes from {memory[0]:.0f} to {memory[1]:.0f} MiB" in WORDS
