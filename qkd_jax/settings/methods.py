"""Which methods there are and which settings each reads: a method says so when it is registered.

The arrow points here: `learners.shape.register` calls `declare`, and no settings import a method.
"""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from qkd_jax.errors import ConfigError


class Method(NamedTuple):
    """What is known of a method's settings.

    Attributes:
      sections: the dataclass of each section that the method alone or with others reads, by name.
      defaults: assignments such as "protocol.kind=joint" that hold when a `Config` is first made.
      presets: assignments by name of the preset.
    """

    sections: Mapping[str, type]
    defaults: tuple[str, ...]
    presets: Mapping[str, tuple[str, ...]]


_METHODS: dict[str, Method] = {}


def declare(name: str, method: Method) -> None:
    """Makes the settings of a method known."""
    _METHODS[name] = method


def method_names() -> tuple[str, ...]:
    """The known methods."""
    return tuple(sorted(_METHODS))


def method_named(name: Any) -> Method:
    """The settings of one method.

    Raises:
      ConfigError: unknown method; the message lists the known ones and the nearest.
    """
    if not isinstance(name, str) or name not in _METHODS:
        raise unknown("method", name, method_names())
    return _METHODS[name]


def presets() -> dict[str, str]:
    """The method of each preset."""
    return {preset: name for name in method_names() for preset in _METHODS[name].presets}


def preset_method(preset: str) -> str:
    """The method that a preset belongs to.

    Raises:
      ConfigError: unknown preset.
    """
    if preset not in presets():
        raise unknown("preset", preset, presets())
    return presets()[preset]


def unknown(kind: str, word: Any, known: Iterable[str]) -> ConfigError:
    """An error that names the known words and those nearest to `word`."""
    return ConfigError(f"unknown {kind} {word!r}; known: {', '.join(known)}{nearest(word, known)}")


def nearest(word: Any, known: Iterable[str]) -> str:
    """'; did you mean ...?' with the closest of `known`, or nothing."""
    close = difflib.get_close_matches(str(word), list(known), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(close)}?" if close else ""
