"""Where the numbers of a run come from: the version of the code, and the machine."""

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from qkd_jax.runs.store import package_code
from qkd_jax.settings.plugins import loaded_plugins

CPU_FACTS = Path("/proc/cpuinfo")  # Linux
GIT_SECONDS = 10
PACKAGES = ("qkd_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "pillow")
PACKAGES += ("tokenizers",)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed as a package"
    return found


def provenance() -> dict[str, Any]:
    """Machine and version of the code, as environment.json has them."""
    plugins = loaded_plugins()
    return machine() | code_version() | ({"plugins": plugins} if plugins else {})


def code_version() -> dict[str, Any]:
    """The version of this package's source: `commit`, whether a file of the package differs from it
    (`dirty`), both None where the package does not lie in a git repository; and `code`, a hash of
    its Python files, which names the version there too.
    """
    package = Path(__file__).parents[1]
    commit = changed = None
    if _git(package, "ls-files", "__init__.py"):  # not a repository that it is installed inside of
        commit = _git(package, "rev-parse", "HEAD")
        changed = _git(package, "status", "--porcelain", "--", ".")
    return {
        "commit": commit,
        "dirty": None if changed is None else bool(changed),
        "code": package_code()[:16],
    }


def machine() -> dict[str, Any]:
    """Name of the processor, and how many of its cores this process may use."""
    facts = CPU_FACTS.read_text().splitlines() if CPU_FACTS.exists() else []
    names = [line.split(":")[1].strip() for line in facts if line.startswith("model name")]
    affinity = getattr(os, "sched_getaffinity", None)  # Linux
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
    }


def _git(folder: Path, *arguments: str) -> str | None:
    """What git prints about a folder; None without git or a repository."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=GIT_SECONDS,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
