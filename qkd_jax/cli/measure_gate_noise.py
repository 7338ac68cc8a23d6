"""How a trained gate of qkd would route on a quantum computer: shots and errors."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qkd_jax.engine.verbs import slot_features
from qkd_jax.learners.qkd import noisy
from qkd_jax.quantum import sample_fidelity
from qkd_jax.quantum.noise import Noise
from qkd_jax.runs.load import LoadedRun
from qkd_jax.runs.plan import plan

SHOTS = (4, 16, 64, 256, 1024, 4096, 16384)
READOUT = (0.0, 0.01, 0.05)
# Probabilities of an error after a gate on two qubits; after one on one qubit it is a tenth of it.
GATES = (0.0, 0.00001, 0.0001, 0.0003, 0.001, 0.003, 0.01)
TRAJECTORIES = 32
IMAGES_AT_A_TIME = 50

_sampled = partial(jax.jit, static_argnames="shots")(sample_fidelity)
_scores = jax.jit(noisy.scores_of)


def measure_gate(run: LoadedRun, num_images: int, seed: int) -> dict[str, Any]:
    """Accuracies of predictions and of routing in percent, each by `exact`, `readout`
    [by probability][by shots] and `gates` [by probability].

    Args:
      run: of qkd with a quantum gate and `fusion.kind=logits`.
      num_images: how many test images are drawn; all of them if there are fewer.
      seed: of the drawn images, shots and errors.

    Raises:
      ConfigError: another gate or fusion.
    """
    state, test = run.state, plan(run.config).data.test
    rows = np.random.default_rng(seed).permutation(len(test))[:num_images]
    labels = test.labels[rows]
    tasks = np.asarray(state.task_of_class)[labels]
    parts = [
        slot_features(state, test.load(rows[first : first + IMAGES_AT_A_TIME], state.backbone))
        for first in range(0, len(rows), IMAGES_AT_A_TIME)
    ]
    features = jnp.concatenate(parts)

    def percent(scores, relevance):
        return {
            name: round(100 * float(np.mean(np.asarray(found).argmax(axis=1) == expected)), 4)
            for name, found, expected in (
                ("accuracy", scores, labels),
                ("routing", relevance, tasks),
            )
        }

    def noisy_by_shots(number, noise, many_shots):
        key_errors, key_shots = jax.random.split(jax.random.fold_in(jax.random.key(seed), number))
        p = noisy.noisy_fidelities(key_errors, state, features, noise, TRAJECTORIES)
        return [
            percent(*_scores(state, features, _sampled(key, p, shots=shots)))
            for key, shots in zip(
                jax.random.split(key_shots, len(many_shots)), many_shots, strict=True
            )
        ]

    p = noisy.noisy_fidelities(jax.random.key(seed), state, features, Noise(), 1)
    return {
        "num_inputs": len(rows),
        "exact": percent(*_scores(state, features, p)),
        "readout": [noisy_by_shots(i, Noise(readout=p), SHOTS) for i, p in enumerate(READOUT)],
        "gates": [
            noisy_by_shots(1000 + i, Noise(p / 10, p), SHOTS[-1:])[0] for i, p in enumerate(GATES)
        ],
    }
