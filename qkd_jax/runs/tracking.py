"""Logs that people already watch, if the settings ask for them: TensorBoard, Weights & Biases.

What they show is also in metrics.jsonl, which is always written. The horizontal axis is the number
of examples seen so far, every epoch counted, since steps begin again in every task.
"""

import importlib.util
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from qkd_jax.errors import ConfigError
from qkd_jax.reports.writing import write_atomically
from qkd_jax.settings import config as configuration
from qkd_jax.settings.config import Config

# Setting -> (module, extra).
NEEDED = {"tensorboard": ("tensorboardX", "tensorboard"), "wandb": ("wandb", "wandb")}

# What a killed run may miss in TensorBoard; metrics.jsonl has every step.
SECONDS_TO_WRITE = 5


class Tracker(Protocol):
    """Where numbers go while a learner is trained."""

    def log(self, kind: str, values: Mapping[str, float], images_seen: int) -> None:
        """Numbers of one `kind`, "train" or "test", when `images_seen` examples were seen."""

    def close(self) -> None:
        """Writes what is left."""


def need_trackers(config: Config) -> None:
    """Raises ConfigError where the settings ask for a log whose package is not installed."""
    for setting, (module, extra) in NEEDED.items():
        if getattr(config.log, setting) and importlib.util.find_spec(module) is None:
            raise ConfigError(
                f"log.{setting}: expected {module} to be installed, found it missing; "
                f'pip install "qkd_jax[{extra}]"'
            )


def new_trackers(config: Config, folder: Path, name: str, images_seen: int) -> list[Tracker]:
    """The logs of one learner that the settings ask for.

    Args:
      folder: of the run.
      name: of the learner; "" for that of the run itself.
      images_seen: by what is continued. Later numbers of an earlier session are not shown.
    """
    trackers: list[Tracker] = []
    if config.log.tensorboard:
        trackers.append(_TensorBoard(folder / "tensorboard" / name, images_seen))
    if config.log.wandb:
        trackers.append(_WeightsAndBiases(config, folder, name))
    return trackers


class _TensorBoard:
    """Event files in `folder`: `tensorboard --logdir runs` shows all runs."""

    def __init__(self, folder: Path, images_seen: int):
        from tensorboardX import SummaryWriter

        later = images_seen + 1 if images_seen else None
        self._writer = SummaryWriter(str(folder), purge_step=later, flush_secs=SECONDS_TO_WRITE)

    def log(self, kind: str, values: Mapping[str, float], images_seen: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(f"{kind}/{name}", value, images_seen)

    def close(self) -> None:
        self._writer.close()


class _WeightsAndBiases:
    """A run of Weights & Biases in `<folder>/wandb`, to be sent by `wandb sync`; WANDB_MODE=online
    sends it at once.

    Raises:
      ConfigError: it cannot begin.
    """

    def __init__(self, config: Config, folder: Path, name: str):
        import wandb

        place = folder / "wandb" / name
        place.mkdir(parents=True, exist_ok=True)
        identity = place / "id"  # so that a continued run is the same one
        if not identity.exists():
            write_atomically(identity, secrets.token_hex(8).encode())
        try:
            self._run = wandb.init(
                project="qkd_jax",
                group=f"{config.experiment}/{folder.parent.name}",
                name="/".join([*folder.parts[-3:], *([name] if name else [])]),
                id=identity.read_text(),
                resume="allow",
                dir=str(folder),
                config=configuration.to_dict(config),
                mode=os.environ.get("WANDB_MODE", "offline"),
                reinit="create_new",
                # Nothing but the numbers: no output, no repository, no use of the machine.
                settings=wandb.Settings(
                    silent=True, console="off", disable_git=True, x_disable_stats=True
                ),
            )
        except wandb.errors.Error as error:  # such as no account, when it shall send
            raise ConfigError(f"log.wandb: expected a run to begin, found: {error}") from None
        self._run.define_metric("images_seen")
        self._run.define_metric("*", step_metric="images_seen")

    def log(self, kind: str, values: Mapping[str, float], images_seen: int) -> None:
        named: dict[str, Any] = {f"{kind}/{name}": value for name, value in values.items()}
        self._run.log(named | {"images_seen": images_seen})

    def close(self) -> None:
        self._run.finish()
