"""The folder of a run: begun once, continued only by the same run, whole after any kill."""

import dataclasses
import json
import os
import platform
import sys
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

import jax
import numpy as np

from qkd_jax import config as configuration
from qkd_jax import protocol
from qkd_jax.config import Config
from qkd_jax.data.sources import fingerprint as data_fingerprint
from qkd_jax.errors import CheckpointError, ConfigError
from qkd_jax.gate import drawing
from qkd_jax.nn.vit import Backbone
from qkd_jax.plan import Plan
from qkd_jax.run_files import write_atomically


def run_folder(out: Path, config: Config, variant: str = "") -> Path:
    """Where a run lives."""
    name = f"{config.method}-{variant}" if variant else config.method
    return Path(out) / config.experiment / name / f"seed{config.seed}"


def is_begun(folder: Path) -> bool:
    """True where there is something to continue; before the first checkpoint nothing is lost."""
    kept = (folder / "checkpoints").glob("[0-9]*")
    return (folder / "config.json").exists() and ((folder / "summary.json").exists() or any(kept))


def stored_summary(folder: Path, planned: Plan, backbone: Backbone | None = None) -> dict | None:
    """The summary of a finished run; None if there is work to do.

    Without `backbone` the weights are not compared.

    Raises:
      CheckpointError: the folder holds a run with other settings, data or weights, or is damaged.
    """
    if not is_begun(folder):
        return None
    settings = folder / "config.json"
    try:
        stored = configuration.from_dict(read_json(settings))
    except ConfigError as error:
        raise CheckpointError(f"{settings} cannot be used: {error}") from None
    # Follows from tasks and data; that the data is another is said better below.
    stored = dataclasses.replace(stored, max_task_images=planned.config.max_task_images)
    changed = configuration.difference(stored, planned.config)
    if changed:
        raise CheckpointError(
            f"{folder} holds a run with other settings:\n  "
            + "\n  ".join(changed)
            + "\nuse the same settings to continue it, or another --out or --variant for a new run"
        )
    environment_then = read_json(folder / "environment.json")
    for name, now in _identity(planned, backbone).items():
        then = environment_then.get(name, now)
        if then != now:
            raise CheckpointError(
                f"{folder} was begun with other {name.split('_')[0]} ({name}: {then} -> {now}); "
                "use another --out or --variant for a new run"
            )
    if not (folder / "summary.json").exists():
        return None
    summary = read_json(folder / "summary.json")
    return summary if summary.get("finished") else None


def _identity(planned: Plan, backbone: Backbone | None) -> dict[str, str]:
    """What must not change while a run is continued, beside its settings."""
    weights = {} if backbone is None else {"backbone_fingerprint": fingerprint(backbone)}
    return weights | {"data_fingerprint": data_fingerprint(planned.data)}


def begin_folder(folder: Path, planned: Plan, backbone: Backbone) -> None:
    """Writes what is needed to run again."""
    config = planned.config
    write_json(
        folder / "class_order.json",
        {
            "order": planned.order.tolist(),
            "order_seed": config.protocol.order_seed if config.protocol.shuffle else None,
            "split": _split_name(planned),
            "tasks": [list(task.classes) for task in planned.tasks],
            "class_names": list(planned.data.train.class_names),
        },
    )
    write_json(folder / "environment.json", environment(backbone) | _identity(planned, backbone))
    circuit = drawing(config.gate) if config.method == "qkd" else ""
    if circuit:
        write_atomically(folder / "circuit.txt", circuit.encode())
    write_json(folder / "config.json", configuration.to_dict(config))  # last: now all is there


def _split_name(planned: Plan) -> str:
    """B0-Inc10; a method that learns all classes at once has its own split, whatever was asked."""
    if len(planned.tasks) == 1:
        return protocol.split_name(0, planned.config.num_classes)
    wanted = planned.config.protocol
    return protocol.split_name(wanted.base, wanted.increment)


def versions() -> dict[str, str]:
    """Versions of Python and the packages that numbers depend on."""
    found = {"python": platform.python_version()}
    names = ("qkd_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "pillow")
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed as a package"
    return found


def environment(backbone: Backbone) -> dict[str, Any]:
    """Versions, devices and weights that a run was made with."""
    return {
        "platform": platform.platform(),
        "versions": versions(),
        "devices": [str(device) for device in jax.local_devices()],
        "command": ["python", "-m", "qkd_jax", *sys.argv[1:]],
        "backbone": backbone.name,
    }


def fingerprint(backbone: Backbone) -> str:
    """A short hash of the backbone: a run is continued with the same weights only."""
    import hashlib

    digest = hashlib.sha256(repr(backbone.spec).encode())
    for leaf in jax.tree.leaves(backbone.params):
        array = np.asarray(leaf, np.float32).ravel()
        digest.update(np.ascontiguousarray(array[:: max(1, array.size // 4096)]).tobytes())
    return digest.hexdigest()[:16]


def trim_log(path: Path, task: int, step: int) -> None:
    """Drops log lines that the restored state has not seen yet; they will be written again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            record = json.loads(line)
            seen = (record["task"], record["step"]) <= (task, step)
        except (ValueError, KeyError, TypeError):
            break  # the line that a kill cut in two
        if seen:
            kept.append(line)
    write_atomically(path, "".join(line + "\n" for line in kept).encode())


class Writer:
    """Writes the files of a run; on all hosts but the first it writes nothing."""

    def __init__(self, folder: Path, writes: bool = True):
        self.folder, self.writes = folder, writes

    def json(self, name: str, value: Any) -> None:
        if self.writes:
            write_json(self.folder / name, value)

    def arrays(self, name: str, arrays: dict[str, np.ndarray]) -> None:
        if self.writes:
            path = self.folder / name
            path.parent.mkdir(exist_ok=True)
            save_arrays(path, arrays)

    def log(self, name: str) -> TextIO:
        """A file open for more lines."""
        return open(self.folder / name if self.writes else os.devnull, "a")

    def trim_log(self, name: str, task: int, step: int) -> None:
        if self.writes:
            trim_log(self.folder / name, task, step)


@contextmanager
def exclusive(folder: Path, locks: bool = True):
    """Refuses two processes in one run folder; of several hosts only the first one locks it."""
    if not locks:
        yield
        return
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise CheckpointError(f"another process is running in {folder}") from None
        yield


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; the run folder is damaged") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"{path} is damaged ({error}); delete the run folder or restore it"
        ) from None
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{path} is damaged (no JSON object); delete the run folder or restore it"
        )
    return value


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, (json.dumps(value, indent=1) + "\n").encode())


def save_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    temporary = path.with_name(path.name + ".part")
    with open(temporary, "wb") as file:
        np.savez_compressed(file, **arrays)
    os.replace(temporary, path)
