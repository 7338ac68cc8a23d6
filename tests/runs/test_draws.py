"""What a run says of the features that its method draws."""

import numpy as np
import pytest

from qkd_jax.engine.verbs import slot_features
from qkd_jax.protocol.metrics import energy_distance
from qkd_jax.runs.load import load_run
from qkd_jax.runs.loop import run, run_folder
from qkd_jax.runs.plan import plan
from qkd_jax.settings.config import override
from qkd_jax.settings.experiments import load_experiment
from qkd_jax.weights.load import load_backbone

pytestmark = pytest.mark.usefixtures("compiled")


def ended(out, *settings):
    config = override(
        load_experiment("smoke").get_config("replay"),
        *("alignment.samples=8", "alignment.epochs=1", *settings),
    )
    summary = run(config, load_backbone("tiny_random", image_size=32), out)
    return summary, run_folder(out, config)


def test_the_distance_is_that_of_draws_to_test_features_of_their_class(tmp_path):
    """Where means are drawn, which leaves nothing to chance. Float32 features near 1: 1e-5."""
    summary, folder = ended(tmp_path, "alignment.statistics=mean")
    trained = load_run(folder)
    state, test = trained.state, plan(trained.config).data.test
    fields = test.load(np.arange(len(test)), state.backbone)
    features, distances = np.asarray(slot_features(state, fields, (0,))[:, 0]), []
    for label in range(len(trained.class_names)):
        drawn = np.repeat(np.asarray(state.memory["generator"].mean[label])[None], 200, axis=0)
        distances.append(energy_distance(drawn, features[test.labels == label]))
    assert summary["draws_energy_distance"] == pytest.approx(np.mean(distances), abs=1e-4)


def test_means_alone_are_farther_away_than_gaussians(tmp_path):
    gaussians, _ = ended(tmp_path / "gaussians")
    means, _ = ended(tmp_path / "means", "alignment.statistics=mean")
    assert means["draws_energy_distance"] > gaussians["draws_energy_distance"]


@pytest.mark.parametrize("nothing_drawn", ["replay.old=none", "alignment.epochs=0"])
def test_where_nothing_is_drawn_nothing_is_said(tmp_path, nothing_drawn):
    summary, _ = ended(tmp_path, nothing_drawn)
    assert summary["finished"] and "draws_energy_distance" not in summary
