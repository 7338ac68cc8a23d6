"""Loads a trained run: its learner, class names and settings."""

from pathlib import Path
from typing import Any, NamedTuple

import jax

from qkd_jax.engine.verbs import init_state, teacher_config
from qkd_jax.errors import CheckpointError, ConfigError, DataError, check_system
from qkd_jax.learners.state import LearnerState
from qkd_jax.nn.backbone import Backbone
from qkd_jax.paths import expanded, in_utf8
from qkd_jax.reports.files import read_json
from qkd_jax.reports.ledger import missing_files
from qkd_jax.settings import config as configuration
from qkd_jax.settings.config import Config
from qkd_jax.weights.load import backbone_of


class LoadedRun(NamedTuple):
    """A state for `predict` or the next task, the names of labels, and the run's settings."""

    state: LearnerState
    class_names: tuple[str, ...]
    config: Config


def load_run(
    folder: str | Path,
    *,
    weights: str | Path | None = None,
    teacher_weights: str | Path | None = None,
    allow_older: bool = False,
) -> LoadedRun:
    """What a run has learned so far, from its folder `runs/<experiment>/<method>/seed<k>`.

        trained = qkd_jax.load_run("runs/renditions/qkd/seed1993")
        scores = qkd_jax.predict(trained.state, images)              # [B, C]
        names = [trained.class_names[label] for label in scores.argmax(axis=1)]

    The newest checkpoint is put on the default device, wherever the run was made. Training data is
    not needed, and nothing in the folder is changed.

    Args:
      folder: the run folder.
      weights: the backbone's weight file, if it is not where the run recorded it.
      teacher_weights: that of a student's teacher, in the same way.
      allow_older: if the newest checkpoint is damaged or gone, take the one before it.

    Raises:
      CheckpointError: a file is missing or not what the run wrote, fewer tasks are there than the
        summary reports, the backbone is not the run's, a process is training in the folder, or the
        run is in the middle of a task, where half-learned classes have no valid scores.
      WeightsError: the backbone cannot be loaded.
    """
    # Imported here, so that `import qkd_jax` does not import orbax.
    from qkd_jax.runs.checkpoint import Checkpoints
    from qkd_jax.runs.lock import reading

    check_system()
    folder = in_utf8(expanded(folder, CheckpointError), "folder", CheckpointError)
    try:
        missing_files(folder)
    except DataError as error:
        raise CheckpointError(str(error)) from None
    settings, order, environment = (
        _read(folder / name) for name in ("config.json", "class_order.json", "environment.json")
    )
    try:
        config = configuration.from_dict(settings)
    except ConfigError as error:
        raise CheckpointError(f"{folder / 'config.json'} cannot be used: {error}") from None
    state = untrained(folder, config, environment, weights, teacher_weights)
    if not (folder / "checkpoints").is_dir():
        raise CheckpointError(f"{folder / 'checkpoints'} is missing; nothing was saved yet")
    with reading(folder), Checkpoints(folder / "checkpoints", read_only=True) as checkpoints:
        found = checkpoints.restore(state)
        skipped = checkpoints.skipped
    if skipped and not allow_older:
        raise CheckpointError(
            f"the newest checkpoint of {folder} cannot be read:\n  "
            + "\n  ".join(skipped)
            + "\nrestore it from a copy, continue the run with the command that began it, or take "
            "the checkpoint before it: load_run(..., allow_older=True)"
        )
    if found is None:
        raise CheckpointError(f"{folder / 'checkpoints'} holds no checkpoint; run it again")
    state, meta = found
    # The learner that is furthest: a teacher is a task ahead of its student while it learns.
    ahead = state if state.teacher is None else state.teacher
    if meta["finished_tasks"] != int(ahead.task) + 1:
        raise CheckpointError(
            f"{folder}: expected a run at the end of a task, found it in the middle of task "
            f"{int(ahead.task) + 1} (step {int(ahead.step)}); continue it with the command that "
            "began it, at least to the end of this task"
        )
    told = len(_read(folder / "summary.json", needed=False).get("accuracy_curve", []))
    if meta["finished_tasks"] < told and not allow_older:
        raise CheckpointError(
            f"{folder}: expected a checkpoint of the {told} tasks that summary.json reports, found "
            f"one of {meta['finished_tasks']}; restore it from a copy, run the command that began "
            "the run, which learns the lost tasks again, or take what there is: load_run(..., "
            "allow_older=True)"
        )
    return LoadedRun(state, tuple(order["class_names"]), config)


def backbones_of(
    config: Config,
    weights: str | Path | None = None,
    teacher_weights: str | Path | None = None,
) -> tuple[Backbone, Backbone | None]:
    """The backbone of a learner, and that of its teacher if it has one: the same one where both
    have the same settings, wherever its file is.

    Args:
      weights, teacher_weights: as in `load_run`.

    Raises:
      WeightsError: a backbone cannot be loaded.
    """
    backbone, teaching = backbone_of(config.backbone, weights), teacher_config(config)
    if teaching is None:
        return backbone, None
    if teaching.backbone == config.backbone and teacher_weights is None:
        return backbone, backbone
    return backbone, backbone_of(teaching.backbone, teacher_weights)


def untrained(
    folder: Path,
    config: Config,
    recorded: dict[str, Any],
    weights: str | Path | None = None,
    teacher_weights: str | Path | None = None,
) -> LearnerState:
    """The state before the first task, on the backbones that a folder's learner was trained on.

    Args:
      folder: in messages.
      recorded: the hashes of the backbones, as `runs.folder.fingerprints` names them.
      weights, teacher_weights: as in `load_run`.

    Raises:
      CheckpointError: the backbone is not the recorded one.
      WeightsError: the backbone cannot be loaded.
    """
    from qkd_jax.runs.folder import fingerprints

    backbone, teacher = backbones_of(config, weights, teacher_weights)
    for name, now in fingerprints(backbone, teacher).items():
        if recorded.get(name) not in (None, now):
            option = "weights" if name == "weights_fingerprint" else "teacher_weights"
            raise CheckpointError(
                f"{folder} was trained on another backbone ({name} {recorded[name]}, loaded "
                f"{now}); give the run's own weight file as `{option}`"
            )
    return init_state(jax.random.key(config.seed), backbone, config, teacher=teacher)


def _read(path: Path, *, needed: bool = True) -> dict:
    try:
        content = read_json(path)
    except DataError as error:
        raise CheckpointError(str(error)) from None
    if needed and not content:
        raise CheckpointError(
            f"{path.parent}: expected a run folder, runs/<experiment>/<method>/seed<k>, found "
            f"{path.name} missing or empty"
        )
    return content
