"""Compiled programs: kept on disk, so that a second run compiles nothing; and the memory that
making one takes is given back.
"""

import ctypes
import functools
import hashlib
import platform
from pathlib import Path

import jax

from qkd_jax.weights.fetch import cache_folder

CPU_FACTS = Path("/proc/cpuinfo")  # Linux
COMPILED = "/jax/core/compile/backend_compile_duration"  # or loaded
LONG = 0.2  # seconds


def keep_compiled_programs() -> None:
    """Later processes load what this one compiles, from `compiled/` beside the fetched weights.

    Small programs too: a run starts with some forty of them, and loading one takes a tenth of the
    time that compiling it takes. Another folder that jax was told (`JAX_COMPILATION_CACHE_DIR`)
    stays, with jax's own limits. Programs for one CPU may not run on another, so every kind of CPU
    has its own.
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
    """From now on the compiler's memory goes back to the system after each long compilation.

    The C library would hold it, some 170 MB after a step of ViT-B/16, beside what the step takes
    itself. Where that library is not glibc, nothing is changed.
    """
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        return

    def listen(event: str, seconds: float, **_) -> None:
        if event == COMPILED and seconds > LONG:
            trim(0)

    jax.monitoring.register_event_duration_secs_listener(listen)
