"""docs/gate.md quotes `benchmarks/results/gate_noise.json`, a record of a run in results/."""

import json
from pathlib import Path

import pytest

from qkd_jax.quantum import amplitude_circuit, resources

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "gate.md").read_text().partition("## Shots and noise\n")[2]
RECORD = json.loads((ROOT / "benchmarks" / "results" / "gate_noise.json").read_text())


def row(name, values):
    return f"| {name} | " + " | ".join(f"{value:.1f}" for value in values) + " |"


def test_the_tables_are_the_record_s():
    shown = [line for line in PAGE.splitlines() if line.startswith(("| routing", "| accuracy"))]
    readout = [
        row(f"{name}, {100 * kind['probability']:g} % of bits flipped", kind[name][0])
        for name in ("routing", "accuracy")
        for kind in RECORD["readout"]
    ]
    gates = [
        row(name, [kind[name][0] for kind in RECORD["gates"]]) for name in ("routing", "accuracy")
    ]
    assert shown == readout + gates
    probabilities = [f"{100 * kind['probability']:g} %" for kind in RECORD["gates"]]
    for name, heads in (
        ("shots for each fidelity", [f"{shots:,}" for shots in RECORD["shots"]]),
        ("errors after a two-qubit gate", probabilities),
    ):
        assert "\n".join([f"| {name} | {' | '.join(heads)} |", "| --- |"]) in PAGE


def test_the_sentences_are_the_record_s():
    words = " ".join(PAGE.split())
    (exact,), (routing,) = RECORD["exact"], RECORD["exact_routing"]
    assert f"the exact gate routes {routing:.1f} of the images to their task" in words
    assert f"names {exact:.1f} correctly" in words
    by_probability = {kind["probability"]: kind for kind in RECORD["gates"]}
    assert f"routing falls to {by_probability[0.003]['routing'][0]:.1f}; at 1 %" in words
    accuracies = [kind["accuracy"][0] for kind in RECORD["gates"]]
    accuracies += [accuracy for kind in RECORD["readout"] for accuracy in kind["accuracy"][0]]
    widest = max(abs(accuracy - exact) for accuracy in accuracies)
    assert f"within {widest:.1f} points of the exact gate's everywhere" in words
    assert f"and is {by_probability[0.01]['accuracy'][0]:.1f} with routing at chance" in words
    # Preparing a state of 10 qubits and undoing another.
    counts = resources(amplitude_circuit(10))
    one, two = counts.one_qubit_gates, counts.two_qubit_gates
    assert f"twice {one:,} RY and {two:,} CNOTs" in words
    assert f"a circuit has {2 * (two * 0.003 + one * 0.0003):.1f} errors on average" in words


def test_the_exact_numbers_are_those_of_the_recorded_run():
    (seed,) = RECORD["run_seeds"]
    folder = ROOT / "results" / RECORD["experiment"] / "qkd-late" / f"seed{seed}"
    summary = json.loads((folder / "summary.json").read_text())
    # All test images, so that nothing but the rounding to 4 places is between them.
    assert RECORD["exact"] == [pytest.approx(summary["last_accuracy"], abs=5.1e-5)]
    assert RECORD["exact_routing"] == [pytest.approx(summary["routing_accuracy"], abs=5.1e-5)]
