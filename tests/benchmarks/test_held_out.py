"""The choice of settings on held-out examples: the rule, and what is recorded."""

import json
from pathlib import Path

import pytest

from benchmarks import held_out
from qkd_jax.errors import QkdError
from qkd_jax.runs.folder import run_folder
from qkd_jax.runs.loop import Interrupted
from qkd_jax.settings.experiments import load_experiment

ROOT = Path(__file__).parents[2]


def made_with(commit, config, out, variant):
    """What a run leaves of the code that it was made with."""
    folder = run_folder(out, config, variant)
    folder.mkdir(parents=True)
    made = {"commit": commit, "dirty": commit == "2"}
    (folder / "environment.json").write_text(json.dumps(made))


@pytest.mark.parametrize(
    ("best", "grid"),
    [
        (0.05, [0.0125, 0.05, 0.2]),
        (0.2, [0.0125, 0.05, 0.2, 0.8]),
        (3.2, [0.0125, 0.05, 0.2, 0.8, 3.2, 12.8]),
        (0.00313, [0.000781, 0.00313, 0.0125, 0.05, 0.2]),
    ],
)
def test_the_grid_goes_on_until_its_best_value_has_neighbours(best, grid):
    tried = []

    def score(value):
        tried.append(value)
        return -abs(value - best)

    scores = held_out.searched(score, start=0.05, factor=4.0)
    assert list(scores) == grid
    assert sorted(tried) == grid  # no value twice
    assert held_out.chosen(scores) == best


def test_a_grid_whose_end_stays_the_best_ends_after_five_steps():
    flat = held_out.searched(lambda value: 1.0, start=1.0, factor=10.0)
    assert list(flat) == [1e-5, 1e-4, 1e-3, 0.01, 0.1, 1.0, 10.0]
    assert held_out.chosen(flat) == 1e-5
    rising = held_out.searched(lambda value: value, start=1.0, factor=10.0)
    assert list(rising) == [0.1, 1.0, 10.0, 100.0, 1e3, 1e4, 1e5]


def test_of_equal_values_the_smallest_is_chosen():
    scores = held_out.searched(lambda value: min(value, 1.0), start=2.0, factor=2.0)
    assert list(scores) == [0.5, 1.0, 2.0, 4.0]
    assert held_out.chosen(scores) == 1.0


def test_the_choice_is_recorded_with_all_that_was_tried(monkeypatch, tmp_path):
    averages, seen = {0.2: 80.0, 0.8: None, 0.05: 81.004}, []

    def run(config, backbone, out, variant):
        seen.append((config, variant))
        made_with(str(len(seen)), config, out, variant)
        if averages[config.train.learning_rate] is None:
            raise QkdError("task 1, step 3: expected finite numbers, found loss nan")
        return {"average_accuracy": averages[config.train.learning_rate], "last_accuracy": 70.0}

    monkeypatch.setattr(held_out, "run", run)
    monkeypatch.setattr(held_out, "backbone_of", lambda settings: None)
    record = tmp_path / "chosen.json"
    averages[0.0125] = 60.0
    held_out.main(
        f"renditions --methods qkd --start 0.2 --runs {tmp_path} --record {record}".split()
    )
    ((name, row),) = json.loads(record.read_text())["renditions"].items()
    assert name == "qkd train.learning_rate"
    assert row["chosen"] == "0.05"
    assert row["accuracies"] == {
        "0.0125": [60.0, 70.0], "0.05": [81.0, 70.0], "0.2": [80.0, 70.0], "0.8": None,
    }  # fmt: skip
    # Each run's own, since a command finds finished runs of other commits: not the command's.
    assert row["commits"] == {"0.0125": "4", "0.05": "1", "0.2": "2 and changes", "0.8": "3"}
    assert row["examples"] == 100  # two held-out styles of 50 classes
    assert {config.data.validation for config, _ in seen} == {0.34}
    assert len({variant for _, variant in seen}) == 4


def test_the_page_shows_what_is_recorded():
    page = (ROOT / "docs" / "results.md").read_text()
    record = json.loads((ROOT / "benchmarks" / "results" / "held_out.json").read_text())
    for rows in record.values():
        assert held_out.table(rows) in page


def test_experiments_have_the_rates_that_were_chosen():
    record = json.loads((ROOT / "benchmarks" / "results" / "held_out.json").read_text())
    compared = 0
    for experiment, rows in record.items():
        for name, row in rows.items():
            method, setting = name.split(" ")
            if setting == "train.learning_rate" and "-" not in method:
                config = load_experiment(experiment).get_config(method)
                assert config.train.learning_rate == float(row["chosen"]), (experiment, method)
                compared += 1
    assert compared >= 14


def test_a_signal_ends_the_command_as_it_ends_a_run(monkeypatch, tmp_path):
    def run(config, backbone, out, variant):
        raise Interrupted

    monkeypatch.setattr(held_out, "run", run)
    monkeypatch.setattr(held_out, "backbone_of", lambda settings: None)
    with pytest.raises(SystemExit) as ended:
        held_out.main(f"renditions --methods qkd --runs {tmp_path}".split())
    assert ended.value.code == 130


def test_another_error_is_not_taken_for_a_bad_rate(monkeypatch, tmp_path):
    def run(config, backbone, out, variant):
        raise QkdError("folder: expected images, found none")

    monkeypatch.setattr(held_out, "run", run)
    monkeypatch.setattr(held_out, "backbone_of", lambda settings: None)
    with pytest.raises(QkdError, match="found none"):
        held_out.main(f"renditions --methods qkd --runs {tmp_path}".split())


def test_values_that_are_words_are_tried_in_their_order(monkeypatch, tmp_path):
    averages = {"random": 80.0, "previous": 80.0}

    def run(config, backbone, out, variant):
        made_with("1", config, out, variant)
        return {"average_accuracy": averages[config.adapter.start], "last_accuracy": 70.0}

    monkeypatch.setattr(held_out, "run", run)
    monkeypatch.setattr(held_out, "backbone_of", lambda settings: None)
    record = tmp_path / "chosen.json"
    held_out.main(
        "renditions --methods qkd --setting adapter.start --values random previous".split()
        + f"--runs {tmp_path} --record {record}".split()
    )
    assert json.loads(record.read_text())["renditions"]["qkd adapter.start"]["chosen"] == "random"
