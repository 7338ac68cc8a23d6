"""Which methods there are and which settings each reads.

A method says so itself: `learners.shape.register` calls `declare`. This room imports no method.
"""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from qkd_jax.errors import ConfigError


class Method(NamedTuple):
    """The settings of one method.

    Attributes:
      sections: name -> dataclass of each section that not every method reads.
      defaults: assignments such as "protocol.kind=joint" that hold when a `Config` is first made.
      presets: name of a preset -> its assignments.
      reads: the field of a batch that the backbone must read, such as "token_ids" of texts; "" =
        any.
    """

    sections: Mapping[str, type]
    defaults: tuple[str, ...]
    presets: Mapping[str, tuple[str, ...]]
    reads: str = ""


_METHODS: dict[str, Method] = {}


def declare(name: str, method: Method) -> None:
    """Makes the settings of a method known."""
    _METHODS[name] = method


def method_names() -> tuple[str, ...]:
    """The names of all registered methods, sorted."""
    return tuple(sorted(_METHODS))


def methods_reading(fields: Iterable[str]) -> tuple[str, ...]:
    """The names of the methods that work on a backbone which reads `fields`, sorted."""
    return tuple(name for name in method_names() if _METHODS[name].reads in ("", *fields))


def method_named(name: Any) -> Method:
    """The settings of one method.

    Raises:
      ConfigError: unknown method; the message lists the known ones and the nearest.
    """
    if not isinstance(name, str) or name not in _METHODS:
        own = "; one of your own is loaded by --plugin FILE"
        raise ConfigError(f"{unknown('method', name, method_names())}{own}")
    return _METHODS[name]


def presets() -> dict[str, str]:
    """Name of each preset -> the method it belongs to."""
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
    """An error that lists the known words and suggests those nearest to `word`."""
    return ConfigError(
        f"{kind}: expected one of {', '.join(known)}, found {word!r}{nearest(word, known)}"
    )


def nearest(word: Any, known: Iterable[str]) -> str:
    """'; did you mean ...?' with the closest of `known`, or an empty text."""
    close = difflib.get_close_matches(str(word), list(known), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(close)}?" if close else ""
