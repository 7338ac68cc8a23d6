"""A trained learner in a folder of its own: one file of arrays, one of JSON, and a model card.

The frozen backbone is not in it: as in a run, its weights are named, with their hash. What is in it
is read back to the same state, so that every prediction is the same to the last bit.
"""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from qkd_jax.errors import CheckpointError, ConfigError, DataError, WeightsError
from qkd_jax.learners.state import LearnerState
from qkd_jax.paths import expanded, in_utf8
from qkd_jax.reports.card import model_card
from qkd_jax.reports.files import read_json, read_run
from qkd_jax.reports.writing import write_atomically
from qkd_jax.runs.load import LoadedRun, load_run, untrained
from qkd_jax.settings import config as configuration
from qkd_jax.settings.config import Config
from qkd_jax.weights.registry import lookup

ARRAYS, MEANING, CARD = "model.safetensors", "learner.json", "README.md"
FORMAT = 1  # of learner.json


def export_run(
    folder: str | Path,
    target: str | Path,
    *,
    licence: str = "unknown",
    weights: str | Path | None = None,
    teacher_weights: str | Path | None = None,
) -> Path:
    """Writes what a run has learned to a folder that `load_learner` reads; returns that folder.

    Args:
      folder: of the run.
      target: a folder, made if it is not there; an older export in it is replaced.
      licence: of what was learned, as model hubs abbreviate it, such as "apache-2.0".
      weights, teacher_weights: as in `load_run`.

    Raises:
      ConfigError: `target` is the run folder.
      CheckpointError, WeightsError: as `load_run`.
    """
    from qkd_jax.runs.folder import fingerprints
    from qkd_jax.runs.writer import encoded_json

    target = in_utf8(expanded(target), "target")
    trained = load_run(folder, weights=weights, teacher_weights=teacher_weights)
    if (target / "config.json").exists():
        raise ConfigError(f"{target}: expected a folder for the export, found a run in it")
    content = safetensors.numpy.save(_kept(trained.state), {"format": "qkd_jax"})
    teacher = None if trained.state.teacher is None else trained.state.teacher.backbone
    meaning = {
        "format": FORMAT,
        "sha256": hashlib.sha256(content).hexdigest(),
        **fingerprints(trained.state.backbone, teacher),
        "class_names": list(trained.class_names),
        "config": configuration.to_dict(_without_places(trained.config)),
    }
    card = model_card(
        read_run(expanded(folder)),
        trained.class_names,
        task_of_class=np.asarray(trained.state.task_of_class).tolist(),
        licence=licence,
        backbone=_described(trained.config),
        reads_texts=trained.state.reader.spec.unit == "tokens",
    )
    target.mkdir(parents=True, exist_ok=True)
    # The JSON has the hash of the arrays, so that a kill in between cannot pair old with new.
    write_atomically(target / ARRAYS, content)
    write_atomically(target / MEANING, encoded_json(meaning))
    write_atomically(target / CARD, card.encode())
    return target


def load_learner(
    folder: str | Path,
    *,
    weights: str | Path | None = None,
    teacher_weights: str | Path | None = None,
) -> LoadedRun:
    """What `export_run` wrote, as `load_run` gives a run.

        trained = qkd_jax.load_learner("exported")
        scores = qkd_jax.predict(trained.state, images)              # [B, C]

    Args:
      folder: an exported folder.
      weights: the backbone's weight file, if it is not where `load_backbone` looks for it.
      teacher_weights: that of a student's teacher, in the same way.

    Raises:
      CheckpointError: a file is missing or damaged, or the backbone is another one.
      WeightsError: the backbone cannot be loaded.
    """
    from qkd_jax.runs.checkpoint import named_arrays, with_named_arrays

    folder = in_utf8(expanded(folder, CheckpointError), "folder", CheckpointError)
    meaning, content = _read(folder)
    try:
        config = configuration.from_dict(meaning["config"])
        arrays = safetensors.numpy.load(content)
    except (ConfigError, SafetensorError) as error:
        raise CheckpointError(f"{folder} cannot be used: {error}") from None
    state = untrained(folder, config, meaning, weights, teacher_weights)
    fresh = named_arrays(state)
    if missing := sorted(_without_optimiser(fresh).keys() - arrays.keys()):
        raise CheckpointError(f"{folder / ARRAYS}: expected {missing[0]}, found none; export again")
    return LoadedRun(
        with_named_arrays(state, fresh | arrays), tuple(meaning["class_names"]), config
    )


def load_trained(
    folder: Path, *, weights: str | Path | None = None, teacher_weights: str | Path | None = None
) -> LoadedRun:
    """`load_learner` of an exported folder, `load_run` of a run folder.

    Raises:
      CheckpointError: it is neither, or as these two.
      WeightsError: the backbone cannot be loaded.
    """
    exported = (folder / MEANING).is_file()
    if not exported and not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder}: expected a run folder, runs/<experiment>/<method>/seed<k>, or one that "
            f"`export` wrote, found neither config.json nor {MEANING} in it"
        )
    load = load_learner if exported else load_run
    return load(folder, weights=weights, teacher_weights=teacher_weights)


def _kept(state: LearnerState) -> dict[str, np.ndarray]:
    from qkd_jax.runs.checkpoint import named_arrays

    arrays = _without_optimiser(named_arrays(state))
    return {name: np.asarray(array, order="C") for name, array in arrays.items()}


def _without_optimiser(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Predicting needs no optimiser, and the next task begins with a new one."""
    return {name: array for name, array in arrays.items() if "opt_state" not in name.split(".")}


def _without_places(config: Config) -> Config:
    """The settings without files and folders of this machine."""
    changeable = configuration.changeable_settings()
    places = (
        key
        for key, value, _ in configuration.settings(config)
        if key in changeable and isinstance(value, str)
    )
    return configuration.override(config, *(f"{key}=" for key in places))


def _read(folder: Path) -> tuple[dict[str, Any], bytes]:
    """(learner.json, the bytes of the arrays), which belong together."""
    try:
        meaning = read_json(folder / MEANING)
    except DataError as error:
        raise CheckpointError(str(error)) from None
    if not meaning:
        raise CheckpointError(f"{folder}: expected an exported folder, found no {MEANING} in it")
    needed = {"format": int, "sha256": str, "class_names": list, "config": dict}
    wrong = [name for name, kind in needed.items() if not isinstance(meaning.get(name), kind)]
    if wrong:
        raise CheckpointError(
            f"{folder / MEANING}: expected {', '.join(needed)}, found {wrong[0]} missing or of "
            "another type; restore it from a copy, or export again"
        )
    if meaning["format"] != FORMAT:
        raise CheckpointError(
            f"{folder / MEANING}: expected format {FORMAT}, found {meaning['format']}; use the "
            "version of qkd_jax that wrote it, or export again"
        )
    try:
        content = (folder / ARRAYS).read_bytes()
    except OSError as error:
        raise CheckpointError(f"{error.filename}: {error.strerror}; export again") from None
    if hashlib.sha256(content).hexdigest() != meaning["sha256"]:
        raise CheckpointError(
            f"{folder / ARRAYS} is not what {MEANING} says (SHA-256); restore it from a copy, or "
            "export again"
        )
    return meaning, content


def _described(config: Config) -> dict[str, str]:
    """Name, licence and notes of the frozen backbone, as the registry has them."""
    try:
        entry = lookup(config.backbone.name)
    except WeightsError:  # small random ones
        return {"name": config.backbone.name, "licence": "none", "notes": "Random weights."}
    return {"name": entry.name, "licence": entry.licence, "notes": entry.notes}
