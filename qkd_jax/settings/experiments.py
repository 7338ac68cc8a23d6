"""Finds and loads experiment files."""

from pathlib import Path
from types import ModuleType

from qkd_jax.errors import ConfigError
from qkd_jax.paths import expanded
from qkd_jax.settings.methods import unknown
from qkd_jax.settings.plugins import module_at


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
      ConfigError: no such file (the message lists the known ones), one that fails, or one
        without `get_config`.
    """
    path = expanded(name) if name.endswith(".py") else experiment_folder() / f"{name}.py"
    if not path.is_file():
        raise unknown("experiment", name, experiment_names())
    module = module_at(path, f"qkd_jax_experiment_{path.stem}")
    if not hasattr(module, "get_config"):
        raise ConfigError(f"{path}: expected get_config(method) -> Config in it, found none")
    return module
