"""Finds and loads experiment files."""

import importlib.util
from pathlib import Path
from types import ModuleType

from qkd_jax.errors import ConfigError
from qkd_jax.paths import expanded
from qkd_jax.settings.methods import unknown


def experiment_folder() -> Path:
    """Where experiment files are: beside the package in a checkout, inside it when installed."""
    package = Path(__file__).parents[1]
    inside = package / "experiments"
    return inside if inside.is_dir() else package.parent / "experiments"


def experiment_names() -> list[str]:
    """The experiments that can be named without a path."""
    return sorted(p.stem for p in experiment_folder().glob("*.py") if p.stem != "__init__")


def load_experiment(name: str) -> ModuleType:
    """The module of the experiment file called `name`, or at the path `name`.

    Raises:
      ConfigError: no such file (the message lists the known ones), or it has no `get_config`.
    """
    path = expanded(name) if name.endswith(".py") else experiment_folder() / f"{name}.py"
    if not path.is_file():
        raise unknown("experiment", name, experiment_names())
    spec = importlib.util.spec_from_file_location(f"experiment_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ConfigError(f"{path}: expected get_config(method) -> Config in it, found none")
    return module
