"""The trained circuit of a run, for one text, as an OpenQASM 3 program."""

import json
from pathlib import Path

import numpy as np

from qkd_jax.engine.verbs import predict, slot_features
from qkd_jax.errors import ConfigError
from qkd_jax.learners import qd_llm
from qkd_jax.learners.state import LearnerState
from qkd_jax.nn.tokens import tokenize
from qkd_jax.quantum import circuit_parameters, classifier_circuit, to_openqasm
from qkd_jax.runs.load import LoadedRun, load_run
from qkd_jax.settings.config import Config

CIRCUIT_RUN = "a run of qd_llm with qd_llm.student=circuit"


def export_circuit(folder: str | Path, text: str, *, weights: str | None = None) -> str:
    """The program that a run's circuit is for `text`, with its angles and with comments that say
    how measured bits become a class. Arguments and errors as `trained_circuit`.
    """
    trained = trained_circuit(folder, weights=weights)
    return program(trained.state, trained.class_names, text)


def trained_circuit(folder: str | Path, *, weights: str | None = None) -> LoadedRun:
    """A run whose student is a circuit.

    Args:
      folder: the folder of a run of `qd_llm` with `qd_llm.student=circuit`.
      weights: the encoder's weight file, if it is not where the run recorded it.

    Raises:
      ConfigError: a run of another method, or of a classical twin.
      CheckpointError, WeightsError: as `load_run`.
    """
    trained = load_run(folder, weights=weights)
    check_circuit(folder, trained.config)
    return trained


def check_circuit(folder: str | Path, config: Config, expected: str = CIRCUIT_RUN) -> None:
    """Raises ConfigError unless these are settings of a student that is a circuit."""
    student = config.qd_llm.student if config.method == "qd_llm" else config.method
    if student != "circuit":
        raise ConfigError(f"{folder}: expected {expected}, found {student}")


def program(state: LearnerState, class_names: tuple[str, ...], text: str) -> str:
    """The program of a trained state for one text."""
    fields = tokenize(state.backbone, [text])
    feature = slot_features(state, fields, (0,))[:, 0, : state.backbone.spec.width]
    inputs = qd_llm.data_angles(state, state.trainable, feature)
    measured = np.asarray(qd_llm.measured(state, state.trainable, feature))[0]
    scores = np.asarray(predict(state, fields))[0]
    rows, biases = (np.asarray(state.memory[name]) for name in ("rows", "bias"))
    seen = np.flatnonzero(np.isfinite(scores))
    best = seen[np.argmax(scores[seen])]

    def shown(values):
        return json.dumps([round(float(value), 6) for value in np.atleast_1d(values)])

    notes = [
        f"The circuit of a run of qkd_jax ({state.config.experiment}, qd_llm), with the angles",
        f"that it has learned and those of the text {json.dumps(text)}.",
        "",
        "Run it many times and measure every qubit. With m[j] the mean over the shots of +1 for a",
        "bit 0 and -1 for a bit 1 on q[j], the score of a class is bias + sum_j weights[j] m[j],",
        "and the class with the largest score is the answer.",
        "PennyLane reads the program once the line with include is left out.",
        "",
        f"exact m: {shown(measured)}",
        *(
            f"class {json.dumps(class_names[c])}: bias {shown(biases[c])[1:-1]}, "
            f"weights {shown(rows[c])}, exact score {shown(scores[c])[1:-1]}"
            for c in seen
        ),
        f"answer: {json.dumps(class_names[best])}",
    ]
    circuit = classifier_circuit(inputs.shape[1])
    parameters = circuit_parameters(inputs[0], state.trainable["angles"])
    comments = "".join(f"// {note}".rstrip() + "\n" for note in notes)
    return comments + to_openqasm(circuit, parameters, define_gates=False)
