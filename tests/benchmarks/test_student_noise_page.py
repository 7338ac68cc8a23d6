"""docs/results.md quotes `benchmarks/results/student_noise.json`, a record of runs in results/."""

import json
from pathlib import Path

import numpy as np

from qkd_jax.quantum import resources
from qkd_jax.quantum.classifier_circuit import classifier_circuit

ROOT = Path(__file__).parents[2]
TITLE = "### The circuit on a noisy device\n"
PAGE = (ROOT / "docs" / "results.md").read_text().partition(TITLE)[2].partition("\n## ")[0]
WORDS = " ".join(PAGE.split())
RECORD = json.loads((ROOT / "benchmarks" / "results" / "student_noise.json").read_text())
EXACT = np.mean(RECORD["exact"])


def row(name, values):
    return f"| {name} | " + " | ".join(f"{value:.1f}" for value in values) + " |"


def test_the_tables_are_the_record_s():
    shown = [line for line in PAGE.splitlines() if " of bits flipped |" in line]
    assert shown == [
        row(f"{100 * kind['probability']:g} % of bits flipped", np.mean(kind["accuracy"], axis=0))
        for kind in RECORD["readout"]
    ]
    assert row("1,024 shots", [np.mean(kind["accuracy"]) for kind in RECORD["gates"]]) in PAGE
    for name, heads in (
        ("shots for each text", [f"{shots:,}" for shots in RECORD["shots"]]),
        (
            "errors after a two-qubit gate",
            [f"{100 * k['probability']:g} %" for k in RECORD["gates"]],
        ),
    ):
        assert f"| {name} | {' | '.join(heads)} |\n| --- |" in PAGE
    assert f"with exact expectations it is {EXACT:.1f}" in WORDS


def test_the_sentences_are_the_record_s():
    first = RECORD["shots"].index(64)
    means = np.array([np.mean(kind["accuracy"], axis=0)[first:] for kind in RECORD["readout"]])
    assert f"every mean is within {np.abs(means - EXACT).max():.1f} points" in WORDS
    by_probability = {kind["probability"]: np.mean(kind["accuracy"]) for kind in RECORD["gates"]}
    assert by_probability[0.03] >= EXACT
    assert f"falls to {by_probability[0.1]:.1f}" in WORDS
    counts = resources(classifier_circuit(11))
    errors = {p: counts.two_qubit_gates * p + counts.one_qubit_gates * p / 10 for p in (0.03, 0.1)}
    assert f"At 3 % a circuit has {errors[0.03]:.1f} errors" in WORDS
    assert f"at 10 % it has {errors[0.1]:.1f}" in WORDS


def test_the_exact_numbers_can_be_those_of_the_recorded_runs():
    """Of the drawn texts, within three standard errors of what the run has on all 1,900."""
    runs = ROOT / "results" / RECORD["experiment"] / "qd_llm"
    for seed, exact in zip(RECORD["run_seeds"], RECORD["exact"], strict=True):
        summary = json.loads((runs / f"seed{seed}" / "summary.json").read_text())
        expected = summary["last_accuracy"] / 100
        left_out = 1 - RECORD["num_texts"] / 1900
        error = (expected * (1 - expected) / RECORD["num_texts"] * left_out) ** 0.5
        assert abs(exact / 100 - expected) < 3 * error
