"""`noise` of a run of qkd: its exact numbers, and those of endless shots, are those of the run."""

import json

import pytest

from qkd_jax import cli
from qkd_jax.cli import measure_gate_noise


@pytest.mark.slow
def test_accuracies_with_noise_begin_at_those_of_the_run(learned, tmp_path, monkeypatch):
    # With so many shots a fraction is its probability, as far as float32 can tell.
    monkeypatch.setattr(measure_gate_noise, "SHOTS", (1, 2**30))
    monkeypatch.setattr(measure_gate_noise, "READOUT", (0.0,))
    monkeypatch.setattr(measure_gate_noise, "GATES", (0.0, 0.2))
    monkeypatch.setattr(measure_gate_noise, "TRAJECTORIES", 2)
    qubits = str(tmp_path / "new")
    assert cli.main(["noise", str(learned), "--images", "500", "--out", qubits]) == 0
    assert (tmp_path / "new/noise.png").stat().st_size > 1000
    found = json.loads((tmp_path / "new/noise.json").read_text())
    summary = json.loads((learned / "summary.json").read_text())
    assert (found["num_tasks"], found["num_classes"], found["shots"]) == (2, 4, [1, 2**30])
    exact = {
        "accuracy": round(summary["last_accuracy"], 4),
        "routing": round(summary["routing_accuracy"], 4),
    }
    assert (found["exact"], found["exact_routing"]) == ([exact["accuracy"]], [exact["routing"]])
    for name, value in exact.items():
        assert found["readout"][0][name][0][-1] == found["gates"][0][name][0] == value
        assert 0 <= found["gates"][1][name][0] <= 100
    # One shot of each fidelity finds zeros or nothing.
    assert found["readout"][0]["routing"][0][0] != exact["routing"]
