"""Where compiled programs are kept, and that the memory which making them took is given back."""

import ctypes

import jax
import pytest

from qkd_jax.engine.compiled_programs import (
    COMPILED,
    LONG,
    give_back_memory,
    keep_compiled_programs,
)
from qkd_jax.engine.engine import Engine

pytestmark = pytest.mark.floor


def test_compiled_programs_are_kept_where_nothing_else_was_said(monkeypatch, tmp_path):
    names = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"
    before = [getattr(jax.config, name) for name in names]
    monkeypatch.setenv("QKD_JAX_CACHE", str(tmp_path))
    try:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
        jax.config.update("jax_compilation_cache_dir", "mine")
        keep_compiled_programs()
        assert jax.config.jax_compilation_cache_dir == "mine"
        assert jax.config.jax_persistent_cache_min_compile_time_secs == 1.0
        jax.config.update("jax_compilation_cache_dir", None)
        keep_compiled_programs()
        assert jax.config.jax_compilation_cache_dir.startswith(str(tmp_path / "compiled"))
        assert jax.config.jax_persistent_cache_min_compile_time_secs == 0.0  # small ones too
    finally:
        for name, value in zip(names, before, strict=True):
            jax.config.update(name, value)


def test_an_engine_gives_back_what_a_long_compilation_took(monkeypatch):
    """jax tells of each compilation by the name that is listened to, and nothing else trims."""
    trims, listeners = [], []

    class Library:
        malloc_trim = staticmethod(trims.append)

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Library)
    monkeypatch.setattr(jax.monitoring, "register_event_duration_secs_listener", listeners.append)
    give_back_memory.cache_clear()
    Engine(), Engine()
    monkeypatch.undo()
    give_back_memory.cache_clear()
    (listen,) = listeners
    listen(COMPILED, LONG / 2)
    listen("/jax/core/compile/jaxpr_trace_duration", 2 * LONG)
    assert not trims
    listen(COMPILED, 2 * LONG)
    assert trims == [0]

    told = set()
    jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **about: told.add(event))
    jax.jit(lambda x: 2 * x + 1)(3.0)
    assert COMPILED in told


def test_another_c_library_is_left_alone(monkeypatch):
    listeners = []
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    monkeypatch.setattr(jax.monitoring, "register_event_duration_secs_listener", listeners.append)
    give_back_memory.cache_clear()
    give_back_memory()
    give_back_memory.cache_clear()
    assert not listeners
