"""The table of classifiers in closed form: docs/methods.md shows what is recorded, and a cell is
what a run with that classifier gives.
"""

import json
from pathlib import Path

import pytest

from benchmarks.heads_table import RECORD, correct_with, features_of, table
from qkd_jax.runs.load import load_run
from qkd_jax.runs.loop import run, run_folder
from qkd_jax.runs.plan import plan
from qkd_jax.settings.config import override
from qkd_jax.settings.experiments import load_experiment
from qkd_jax.weights.load import load_backbone


def test_the_page_shows_what_is_recorded():
    page = (Path(__file__).parents[2] / "docs" / "methods.md").read_text()
    assert table(json.loads(RECORD.read_text())["counts"]) in page


@pytest.mark.slow
@pytest.mark.parametrize("features", ["newest", "joined"])
def test_a_cell_is_what_a_run_with_that_classifier_gives(features, tmp_path):
    backbone = load_backbone("tiny_random", image_size=32)
    config = load_experiment("smoke").get_config("ease")
    run(config, backbone=backbone, out=tmp_path / "own")
    state = load_run(run_folder(tmp_path / "own", config)).state
    chosen = ("classifier.kind=klda", f"classifier.features={features}")
    train, test = features_of(state, plan(config))
    found = correct_with(state, plan(config), train, test, *chosen)
    config = override(config, "classifier.projection_dim=2000", *chosen)
    run(config, backbone=backbone, out=tmp_path / "closed")
    matrix = json.loads((run_folder(tmp_path / "closed", config) / "matrix.json").read_text())
    assert found == sum(matrix["correct"][-1])
