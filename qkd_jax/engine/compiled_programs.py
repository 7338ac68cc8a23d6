"""Keeps compiled programs on disk, so that a second run compiles nothing, and returns the memory
that compiling takes to the system.
"""

import ctypes
import functools
import hashlib
import platform
from pathlib import Path

import jax

from qkd_jax.weights.fetch import cache_folder

CPU_FACTS = Path("/proc/cpuinfo")  # Linux
COMPILED = "/jax/core/compile/backend_compile_duration"  # an event, also when loaded from disk
LONG = 0.2  # seconds of a compilation after which memory is given back


def keep_compiled_programs() -> None:
    """Makes later processes load what this one compiles, from `compiled/` in the cache folder.

    Small programs are kept too: a run starts with about forty of them, and loading one takes a
    tenth of the time of compiling it. If `JAX_COMPILATION_CACHE_DIR` names another folder, that one
    is used, with jax's own limits. Programs for one CPU may not run on another, so each kind of CPU
    has a folder of its own.
    """
    if jax.config.jax_compilation_cache_dir:
        return
    kind = platform.machine()
    if CPU_FACTS.exists():
        flags = [line for line in CPU_FACTS.read_text().splitlines() if line.startswith("flags")]
        kind += "-" + hashlib.sha256("".join(flags[:1]).encode()).hexdigest()[:8]
    jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled" / kind))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


@functools.cache
def give_back_memory() -> None:
    """Returns the compiler's memory to the system after each long compilation from now on.

    The C library would keep it. Where that library
    is not glibc, nothing is changed.
    """
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        return

    def listen(event: str, seconds: float, **_) -> None:
        if event == COMPILED and seconds > LONG:
            trim(0)

    jax.monitoring.register_event_duration_secs_listener(listen)
