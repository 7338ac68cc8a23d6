"""docs/results.md and README.md show what the recorded runs in results/ say, nothing else."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from qkd_jax.cli import main
from qkd_jax.reports.files import read_run
from qkd_jax.reports.ledger import LEDGER
from qkd_jax.reports.predictions import PACKED
from qkd_jax.reports.records import RECORDED
from qkd_jax.reports.results import write_results
from qkd_jax.reports.tables import format_number

ROOT = Path(__file__).parents[2]
# Headings that are not the experiment's name.
TITLES = {
    "cifar100_few": "CIFAR-100, few images",
    "caltech101_few": "Caltech-101, few images",
    "cifar100_more": "CIFAR-100, more images of each class",
}
EXPERIMENTS = sorted(path.name for path in (ROOT / "results").iterdir() if path.is_dir())
COLUMNS = (
    *("average_accuracy", "last_accuracy", "forgetting", "routing_accuracy"),
    "trainable_parameters",
)


def tables(page):
    """{title: {first cell: other cells}} of the page's tables below `## ` headings."""
    found, title = {}, ""
    for line in (ROOT / page).read_text().splitlines():
        if line.startswith("## "):
            title = line.removeprefix("## ")
        if line.startswith("| `"):
            name, *cells = [cell.strip() for cell in line.strip("|").split("|")]
            found.setdefault(title, {})[name.strip("`")] = cells
    return found


def cells_of(row):
    cells = [str(row["n"])]
    for key in COLUMNS:
        column = row.get(key)
        if column is None:
            cells.append("–")
            continue
        text = format_number(key, column["mean"])
        if column["sd"] is not None and key != "trainable_parameters":
            text += f" ± {format_number(key, column['sd'])}"
        cells.append(text)
    return cells


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_the_tables_are_those_of_the_recorded_runs(experiment, tmp_path):
    recorded = json.loads((ROOT / "results" / experiment / "results.json").read_text())
    title = TITLES.get(experiment, experiment.capitalize())
    shown = tables("docs/results.md").get(title, {})
    elsewhere = set().union(
        *(rows_of(title) for title in FURTHER if FURTHER[title][0] == experiment)
    )
    assert set(shown) == {name for name in recorded["methods"] if "-" not in name} - elsewhere
    for name, cells in shown.items():
        assert cells == cells_of(recorded["methods"][name]), name
    if experiment == "renditions":
        front = tables("README.md")["Results"]
        assert "qkd" in front and len(front) > 5
        for name, cells in front.items():
            assert cells == shown[name], name
    # The best average first.
    averages = [recorded["methods"][name]["average_accuracy"]["mean"] for name in shown]
    assert averages == sorted(averages, reverse=True)


CDL = ("average_accuracy", "last_accuracy", "teacher.last_accuracy", "trainable_parameters")
QD_LLM = ("last_accuracy", "teacher.last_accuracy", "trainable_parameters")
REPLAY = ("average_accuracy", "last_accuracy", "draws_energy_distance")
# {title: (experiment, pattern of its rows' names, what its columns show)} of further tables.
FURTHER = {
    "What a generator remembers": ("renditions", r"replay-.*", REPLAY),
    "What a generator remembers of more images": ("cifar100_small", r"replay-.*", REPLAY),
    "Q-tuning and its parts": (
        "glosses",
        r"(q_tuning|prog_prompt|prompt_per_task)(-.*)?",
        (
            *("within_task_average_accuracy", "within_task_last_accuracy"),
            *("average_accuracy", "last_accuracy", "routing_accuracy"),
        ),
    ),
    "Adapters in all blocks": (
        "renditions",
        r"qkd-(before|late)",
        (
            *("average_accuracy", "last_accuracy", "forgetting", "routing_accuracy"),
            "trainable_parameters",
        ),
    ),
    "A run with equal weights": (
        "cifar100_few",
        r"qkd-uniform",
        (
            *("average_accuracy", "last_accuracy", "forgetting", "routing_accuracy"),
            "trainable_parameters",
        ),
    ),
    "Students of larger prompts": ("renditions", r"cdl-.*", CDL),
    "A circuit and its twins": ("glosses", r"qd_llm(-(cos|tanh))?(-alone)?", QD_LLM),
    "A circuit and its twins on four classes": ("glosses", r"qd_llm-four.*", QD_LLM),
    "A circuit that learns class by class": (
        "glosses",
        r"qd_llm-incremental.*",
        ("average_accuracy", "last_accuracy", "within_task_last_accuracy", "teacher.last_accuracy"),
    ),
}


def rows_of(title):
    """The recorded rows that belong into one of the further tables."""
    experiment, pattern, _ = FURTHER[title]
    folders = (ROOT / "results" / experiment).iterdir()
    return {folder.name for folder in folders if re.fullmatch(pattern, folder.name)}


def cells_over_seeds(folder, keys):
    """n and the means of some numbers of a row, over the seeds that are recorded."""
    files = sorted(folder.glob("seed*/summary.json"))
    cells = [str(len(files))]
    for key in keys:
        values = [json.loads(file.read_text()) for file in files]
        for part in key.split("."):
            values = [value and value.get(part) for value in values]
        if None in values:
            cells.append("–")
        elif key == "trainable_parameters":
            cells.append(f"{values[0]:,}")
        else:
            spread = f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.2f}{spread}")
    return cells


def closed_cell(name):
    """How much of the gap between a student of `cdl` alone and its teacher a form closes, in
    percent of means over seeds: by average and by last accuracy.
    """
    host, _, form = name.removeprefix("cdl-").rpartition("-")
    if form == "none":
        return "–"

    def mean(folder, *parts):
        files = (ROOT / "results" / "renditions" / folder).glob("seed*/summary.json")
        values = [json.loads(file.read_text()) for file in files]
        for part in parts:
            values = [value[part] for value in values]
        return np.mean(values)

    closed = []
    for measure in ("average_accuracy", "last_accuracy"):
        alone, teacher = mean(f"cdl-{host}-none", measure), mean(name, "teacher", measure)
        closed.append(100 * (mean(name, measure) - alone) / (teacher - alone))
    return " / ".join(f"{share:.0f} %" for share in closed)


@pytest.mark.parametrize("title", FURTHER)
def test_further_tables_are_those_of_the_recorded_runs(title):
    experiment, _, keys = FURTHER[title]
    shown = tables("docs/results.md")[title]
    assert set(shown) == rows_of(title)
    for name, cells in shown.items():
        expected = cells_over_seeds(ROOT / "results" / experiment / name, keys)
        if keys is CDL:
            expected.append(closed_cell(name))
        assert cells == expected, name


def speeds_of(name):
    """Cells of the table of speeds, from the run of seed 1995."""
    file = ROOT / "results" / "renditions" / name / "seed1995" / "summary.json"
    summary = json.loads(file.read_text())
    keys = ("training_images_per_second", "inference_images_per_second", "peak_memory_mb")
    values = [summary[key] for key in (*keys, "wall_seconds")]
    return ["–" if value is None else f"{value:,.{int(value < 100)}f}" for value in values]


def test_speeds_are_those_of_the_recorded_runs():
    shown = tables("docs/results.md")["Speed and memory"]
    assert "qkd-late" in shown and len(shown) > 4
    for name, cells in shown.items():
        assert cells == speeds_of(name), name


def test_the_front_page_tells_the_cost_of_the_cheapest_and_the_dearest():
    page = (ROOT / "README.md").read_text()
    [line] = [line for line in page.splitlines() if "does it cost" in line]
    shown = tables("docs/results.md")["Speed and memory"]
    minutes = {name: float(cells[-1]) / 60 for name, cells in shown.items()}
    told = re.findall(r"(\d+) minutes? \(`(\w+)`\)", line)
    assert [name for _, name in told] == [f(minutes, key=minutes.get) for f in (min, max)]
    assert [int(value) for value, _ in told] == [round(minutes[name]) for _, name in told]
    memory = sorted(float(cells[2].replace(",", "")) / 1024 for cells in shown.values())
    assert f"{memory[0]:.1f} to {memory[-1]:.1f} GiB" in line
    runs = (ROOT / "results/renditions/qkd").glob("seed*/summary.json")
    took = [json.loads(path.read_text())["wall_seconds"] / 60 for path in runs]
    assert f"for `qkd` {min(took):.0f} to {max(took):.0f} minutes" in line


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_the_recorded_table_is_made_of_the_recorded_runs(experiment, tmp_path):
    folder, copy = ROOT / "results" / experiment, tmp_path / experiment
    for path in folder.rglob("seed*/*"):
        assert path.name in (*RECORDED, PACKED, LEDGER)
        target = copy / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    write_results(copy)
    for name in ("results.json", "results.md"):
        assert (copy / name).read_text() == (folder / name).read_text()


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_recorded_accuracies_follow_from_the_recorded_matrices(experiment):
    for folder in sorted((ROOT / "results" / experiment).glob("*/seed*")):
        run = read_run(folder)
        curve = 100.0 * run.correct.sum(axis=1) / run.total.sum(axis=1)
        assert run.summary["accuracy_curve"] == pytest.approx(curve.tolist(), abs=1e-9)
        assert run.summary["finished"] is True
        assert not re.search(r'"/|\.\./', json.dumps([run.config, run.environment])), folder


def rank_commands():
    """(arguments of `rank`, what is shown below) for each such command in docs/results.md."""
    page = (ROOT / "docs/results.md").read_text()
    blocks = re.finditer(r"```\n(python -m qkd_jax rank .*)\n```\n\n", page)
    return [(shlex.split(block[1])[3:], page[block.end() :]) for block in blocks]


@pytest.mark.parametrize(("arguments", "below"), rank_commands())
def test_a_command_that_ranks_is_followed_by_what_it_prints(arguments, below, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main(arguments) == 0
    _, printed = capsys.readouterr().out.split("\n\n", 1)
    assert below.startswith(printed)


def test_every_command_that_ranks_is_found():
    assert len(rank_commands()) == (ROOT / "docs/results.md").read_text().count("qkd_jax rank ") > 1
