"""How accurate the trained circuits of runs would be on a quantum computer: shots and errors."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qkd_jax.cli import measure_gate_noise
from qkd_jax.cli.export_circuit import CIRCUIT_RUN, check_circuit
from qkd_jax.cli.measure_gate_noise import measure_gate
from qkd_jax.engine.verbs import predict, slot_features
from qkd_jax.errors import ConfigError
from qkd_jax.learners import qd_llm
from qkd_jax.quantum.noise import Noise
from qkd_jax.runs.load import LoadedRun, load_run
from qkd_jax.runs.plan import plan
from qkd_jax.settings.config import override

SHOTS = (16, 32, 64, 128, 256, 512, 1024)
READOUT = (0.0, 0.02, 0.1)
# Probabilities of an error after a gate on two qubits; after one on one qubit it is a tenth of it.
GATES = (0.0, 0.001, 0.003, 0.01, 0.03, 0.1)
TEXTS_AT_A_TIME = 64


def measure_noise(
    folders: list[Path],
    num_inputs: int,
    seed: int = 0,
    *,
    data: str | None = None,
    weights: str | None = None,
) -> dict[str, Any]:
    """Accuracies of the circuits of some runs on test inputs, in percent.

    Args:
      folders: of runs of qd_llm with a circuit, or of qkd with a quantum gate, that differ in their
        seeds alone.
      num_inputs: how many test texts or images are drawn; all of them if there are fewer.
      seed: of the drawn inputs, shots and errors.
      data: the folder of the data, if it is not where the runs had it.
      weights: the backbone's weight file, if it is not where the runs recorded it.

    Returns:
      `exact` [R] of R runs without any noise; `readout`, for each probability of a flipped bit, and
      `gates`, for each probability of an error after a gate on two qubits, [R] lists of accuracies:
      by the number of `shots`, and with the largest of these; and what was measured. Of qkd each
      comes with the routing accuracy too, and `exact_routing`.

    Raises:
      ConfigError: a run of another method or without a circuit; runs with different settings.
      CheckpointError, WeightsError: as `load_run`.
    """
    runs = [load_run(folder, weights=weights) for folder in folders]
    if data is not None:
        place = f"data.path={data}"
        runs = [run._replace(config=override(run.config, place)) for run in runs]
    for folder, run in zip(folders, runs, strict=True):
        if run.config.method != "qkd":
            check_circuit(folder, run.config, f"a run of qkd, or {CIRCUIT_RUN}")
    settings = [dataclasses.replace(run.config, seed=0) for run in runs]
    for folder, other in zip(folders, settings, strict=True):
        if other != settings[0]:
            raise ConfigError(
                f"{folder}: expected the settings of {folders[0]} but for the seed, found others"
            )
    config = runs[0].config
    if config.method == "qkd":
        measured = [measure_gate(run, num_inputs, seed) for run in runs]
        grid = measure_gate_noise.SHOTS, measure_gate_noise.READOUT, measure_gate_noise.GATES
        noun, names = "images", ("accuracy", "routing")
        chance = {"num_tasks": int(runs[0].state.task) + 1}
    else:
        measured = [_measure(run, num_inputs, seed) for run in runs]
        grid, noun, names, chance = (SHOTS, READOUT, GATES), "texts", ("accuracy",), {}
    shots, readout, gates = grid
    return {
        "experiment": config.experiment,
        "num_classes": config.shapes.num_classes,
        **chance,
        "run_seeds": [run.config.seed for run in runs],
        f"num_{noun}": measured[0]["num_inputs"],
        "seed": seed,
        "shots": list(shots),
        "exact": [found["exact"]["accuracy"] for found in measured],
        **{f"exact_{name}": [found["exact"][name] for found in measured] for name in names[1:]},
        "readout": [
            {"probability": p}
            | {
                name: [[s[name] for s in found["readout"][i]] for found in measured]
                for name in names
            }
            for i, p in enumerate(readout)
        ],
        "gates": [
            {"probability": p}
            | {name: [found["gates"][i][name] for found in measured] for name in names}
            for i, p in enumerate(gates)
        ],
    }


def _measure(run: LoadedRun, num_inputs: int, seed: int) -> dict[str, Any]:
    """Of a run of qd_llm: `exact`, `readout` [by probability][by shots] and `gates`."""
    state, test = run.state, plan(run.config).data.test
    rows = np.random.default_rng(seed).permutation(len(test))[:num_inputs]
    features, exact = [], []
    for first in range(0, len(rows), TEXTS_AT_A_TIME):
        fields = test.load(rows[first : first + TEXTS_AT_A_TIME], state.backbone)
        features.append(slot_features(state, fields, (0,))[:, 0, : state.backbone.spec.width])
        exact.append(predict(state, fields))
    inputs = jnp.concatenate(features)

    def accuracy(scores):
        correct = np.asarray(scores).argmax(axis=1) == test.labels[rows]
        return {"accuracy": round(100 * float(np.mean(correct)), 4)}

    def noisy(number, noise, shots):
        key = jax.random.fold_in(jax.random.key(seed), number)
        return accuracy(qd_llm.noisy_scores(key, state, inputs, noise, shots))

    return {
        "num_inputs": len(rows),
        "exact": accuracy(np.concatenate(exact)),
        "readout": [
            [noisy(len(SHOTS) * i + j, Noise(readout=p), shots) for j, shots in enumerate(SHOTS)]
            for i, p in enumerate(READOUT)
        ],
        "gates": [noisy(1000 + i, Noise(p / 10, p), SHOTS[-1]) for i, p in enumerate(GATES)],
    }


def write_noise(measured: dict[str, Any], folder: Path) -> Path:
    """Writes `noise.json` and `noise.png`; returns the latter's path."""
    from qkd_jax.reports.figures import noise_curves
    from qkd_jax.reports.writing import save_figure, write_atomically

    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "noise.json", (json.dumps(measured, indent=1) + "\n").encode())
    path = folder / "noise.png"
    save_figure(path, noise_curves(measured), dpi=150, bbox_inches="tight")
    return path
