"""What this machine has, what is cached on it, what is missing, and the command that gets it."""

import importlib.util
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from qkd_jax.data.sources import BENCHMARKS
from qkd_jax.runs.provenance import machine, versions
from qkd_jax.runs.store import store_folder
from qkd_jax.settings.plugins import loaded_plugins
from qkd_jax.weights.fetch import cache_folder
from qkd_jax.weights.registry import ENTRIES

WIDTH = 26  # of the names
# Extra -> modules that it brings.
EXTRAS = {
    "serve": ("starlette", "uvicorn"),
    "tensorboard": ("tensorboardX",),
    "wandb": ("wandb",),
    "completion": ("shtab",),
    "heif": ("pillow_heif",),
    "notebook": ("ipykernel", "nbclient", "nbformat"),
    "tfds": ("tensorflow",),
}


def report() -> Iterator[str]:
    """The lines of `doctor`."""
    yield from _machine()
    yield from _devices()
    yield from _cached()
    yield from _extras()
    if plugins := loaded_plugins():
        yield ""
        yield "plugins"
        yield from (_line(name, version) for name, version in plugins.items())


def _machine() -> Iterator[str]:
    facts = machine()
    yield "machine"
    yield _line("processor", facts["processor"])
    yield _line("cores", facts["cores"])
    yield _line("memory", _gib(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")))
    yield ""
    yield "versions"
    yield from (_line(name, version) for name, version in versions().items())


def _devices() -> Iterator[str]:
    import jax

    devices = jax.local_devices()
    memory = (devices[0].memory_stats() or {}).get("bytes_limit")
    each = f", {_gib(memory)} each" if memory else ""
    yield ""
    yield _line(
        "devices", f"{len(devices)} x {devices[0].platform} ({devices[0].device_kind}){each}"
    )
    if devices[0].platform == "cpu":
        yield "  No accelerator is in use. On a GPU or TPU machine"
        yield "  the jax wheel does not match it:"
        yield '    pip install -U "jax[tpu]"'
        yield '    pip install -U "jax[cuda13]"'


def _cached() -> Iterator[str]:
    cache = cache_folder()
    yield ""
    yield f"cache {cache}"
    # The first run makes the folder; until then the disk is that of the folder it will lie in.
    place = next(folder for folder in (cache, *cache.absolute().parents) if folder.exists())
    yield _line("room on the disk", _gib(shutil.disk_usage(place).free))
    yield _line("compiled programs", _size(cache / "compiled"))
    yield _line("frozen features", f"{_size(store_folder())}, bound by data.store_gib")
    yield ""
    yield "weights"
    for entry in ENTRIES:
        file = cache / entry.file
        if file.is_file():
            yield _line(entry.name, f"in the cache, {_gib(file.stat().st_size)}")
        else:
            yield from _missing(entry.name, f"qkd-jax weights {entry.name}")
    if given := os.environ.get("QKD_JAX_WEIGHTS"):
        yield _line("QKD_JAX_WEIGHTS", given)
    yield ""
    yield "data sets"
    yield _line("in the package", "renditions, glosses, synthetic")
    prepared = Path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()
    for source, name in BENCHMARKS.items():
        if name is None:
            yield from _missing(source, "--data FOLDER (train/<class>/*, test/<class>/*)")
        elif any((prepared / name).rglob("dataset_info.json")):
            yield _line(source, "prepared")
        else:
            yield from _missing(source, f"qkd-jax data prepare {source}")


def _extras() -> Iterator[str]:
    yield ""
    yield "extras"
    for extra, modules in EXTRAS.items():
        if all(importlib.util.find_spec(module) for module in modules):
            yield _line(extra, "installed")
        else:
            yield from _missing(extra, f'pip install "qkd_jax[{extra}]"')


def _line(name: str, value: object) -> str:
    return f"  {name:{WIDTH}} {value}"


def _missing(name: str, command: str) -> Iterator[str]:
    """That something is not here, and on a line of its own how to get it."""
    yield _line(name, "missing")
    yield f"    {command}"


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**29 else f"{size / 2**20:.0f} MiB"


def _size(folder: Path) -> str:
    """How many files are in a folder, and their size; files may go away meanwhile."""
    number = size = 0
    for at, _, names in os.walk(folder):
        for name in names:
            try:
                size += os.stat(os.path.join(at, name)).st_size
                number += 1
            except OSError:
                pass
    return f"{number:,} files, {_gib(size)}" if number else "none yet"
