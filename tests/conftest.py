"""Strict settings for every test: eight simulated devices, no silent promotion of dtype or rank."""

import ctypes
import os
import tempfile
from importlib.metadata import version
from pathlib import Path

# Most of the suite's time is compilation, and tests look at numbers, not at speed. Subprocesses
# inherit it. JAX_DISABLE_MOST_OPTIMIZATIONS=0 runs the suite as users compile.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# Must stand before jax is imported: XLA reads it once. The older code generator compiles in two
# thirds of the time; newer versions have it no more, and end a process that asks for it.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_cpu_use_fusion_emitters=false"
        if os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1"
        and tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11)
        else "",
    ]
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Programs that a test's command line keeps, out of the user's own.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR",
    f"{tempfile.gettempdir()}/qkd_jax_tests/{os.environ.get('PYTEST_XDIST_WORKER', 'alone')}",
)

import jax
import pytest
from hypothesis import settings

if not hasattr(jax, "enable_x64"):  # as it was called before jax 0.8
    from jax.experimental import enable_x64

    jax.enable_x64 = enable_x64

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

settings.register_profile("default", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("default")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """The folder of compiled programs: what several runs share is compiled once in a session, and
    processes that are given it start fast.
    """
    names = (
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
    )
    before = [getattr(jax.config, name) for name in names]
    folder = str(tmp_path_factory.getbasetemp() / "compiled")
    for name, value in zip(names, (folder, 0.0, -1), strict=True):
        jax.config.update(name, value)
    yield folder
    for name, value in zip(names, before, strict=True):
        jax.config.update(name, value)


@pytest.fixture(scope="module", autouse=True)
def forgotten_programs():
    """Compiled programs of finished files are dropped once they fill memory: the whole suite's
    would take 6 GB in each worker.
    """
    yield
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        give_back = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):  # not Linux, not glibc
        return
    if pages * os.sysconf("SC_PAGE_SIZE") > 2 * 1024**3:
        jax.clear_caches()
        give_back(0)  # freed memory stays with the process otherwise


@pytest.fixture
def key():
    """A fresh typed key, the same in every run."""
    return jax.random.key(0)
