"""Methods and data sets from outside the package: files, and entry points of installed packages.

A plugin is a module that calls `learners.shape.register` or `data.sources.register_source` when it
is imported. A package offers one by an entry point of the group `qkd_jax.plugins`.
"""

import hashlib
import importlib.util
import logging
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from types import ModuleType

from qkd_jax.errors import ConfigError, QkdError
from qkd_jax.paths import expanded
from qkd_jax.settings.methods import method_named, method_names

GROUP = "qkd_jax.plugins"
PREFIX = "qkd_jax_plugin_"  # of the names of modules from files

logger = logging.getLogger("qkd_jax")


def load_plugins(files: Iterable[str | Path] = ()) -> None:
    """Imports the plugins of installed packages, and then these files; each of them once.

    A broken plugin of an installed package is a warning, since not every command needs it.

    Raises:
      ConfigError: a file is missing or fails, or a plugin registers a method under a name that is
        taken.
    """
    for entry in metadata.entry_points(group=GROUP):
        with _new_names(f"plugin {entry.name} ({entry.value})"):
            try:
                entry.load()
            except Exception as error:  # of whatever another package does
                logger.warning("plugin %s (%s) is left out: %s", entry.name, entry.value, error)
    for file in files:
        path = expanded(file).resolve()
        if not path.is_file():
            raise ConfigError(f"--plugin: expected a Python file, found none at {file}")
        name = PREFIX + path.stem + "_" + hashlib.sha256(str(path).encode()).hexdigest()[:8]
        if name in sys.modules:
            continue
        with _new_names(str(file)):
            module_at(path, name)


@contextmanager
def _new_names(plugin: str) -> Iterator[None]:
    """Raises ConfigError if `plugin`, which is imported here, replaces a method."""
    before = {method: method_named(method) for method in method_names()}
    yield
    taken = [method for method in before if method_named(method) is not before[method]]
    if taken:
        raise ConfigError(
            f"{plugin}: expected a method of a new name, found {taken[0]!r}, which is taken; "
            "choose another name"
        )


def loaded_plugins() -> dict[str, str]:
    """What was loaded: the name of each file -> a hash of its content, and the name of each package
    whose plugin was imported -> its version.
    """
    files = [
        Path(module.__file__) for name, module in sys.modules.items() if name.startswith(PREFIX)
    ]
    found = {file.name: hashlib.sha256(file.read_bytes()).hexdigest()[:16] for file in files}
    for entry in metadata.entry_points(group=GROUP):
        if entry.dist is not None and entry.module in sys.modules:
            found[entry.dist.name] = entry.dist.version
    return dict(sorted(found.items()))


def module_at(path: Path, name: str) -> ModuleType:
    """Imports the file at `path` under `name`.

    Raises:
      ConfigError: the file fails; the message names the line.
    """
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # as dataclasses in it need
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if isinstance(error, QkdError) or not isinstance(error, Exception):
            raise
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(path)]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else "?"
        raise ConfigError(f"{path}, line {line}: {type(error).__name__}: {error}") from error
    return module
