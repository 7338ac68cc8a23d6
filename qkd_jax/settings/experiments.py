"""The experiment files: where they are, and how one is read."""

import importlib.util
from pathlib import Path
from types import ModuleType

from qkd_jax.errors import ConfigError
from qkd_jax.settings.methods import unknown


def experiment_folder() -> Path:
    """The experiment files: beside the package in a checkout, inside it when installed."""
    package = Path(__file__).parents[1]
    inside = package / "experiments"
    return inside if inside.is_dir() else package.parent / "experiments"


def experiment_names() -> list[str]:
    """Experiments that `run` knows by name."""
    return sorted(p.stem for p in experiment_folder().glob("*.py") if p.stem != "__init__")


def load_experiment(name: str) -> ModuleType:
    """The experiment file called `name`, or at the path `name`.

    Raises:
      ConfigError: there is none; the message lists the known ones.
    """
    path = Path(name).expanduser() if name.endswith(".py") else experiment_folder() / f"{name}.py"
    if not path.is_file():
        raise unknown("experiment", name, experiment_names())
    spec = importlib.util.spec_from_file_location(f"experiment_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ConfigError(f"{path} defines no get_config(method) -> Config")
    return module
