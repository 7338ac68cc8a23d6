"""Paths that a person gives, made usable or refused."""

import os
from pathlib import Path

from qkd_jax.errors import ConfigError, QkdError


def expanded(
    path: str | os.PathLike,
    error: type[QkdError] = ConfigError,
    advice: str = "Give the path in full",
) -> Path:
    """The path with `~` and `~user` replaced by the home folder.

    Args:
      error: the type to raise.
      advice: the end of the message.

    Raises:
      QkdError: there is no such home folder: an unknown user, or one without an entry in the
        password file while HOME is not set.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise error(
            f"{path}: expected a path, found the home folder of an unknown user (is HOME set?). "
            f"{advice}."
        ) from None


def in_utf8(path: str | os.PathLike, name: str, error: type[QkdError] = ConfigError) -> Path:
    """The path as it was given; checkpoints have no names but those in UTF-8.

    Args:
      name: of the path, in the message.
      error: the type to raise.

    Raises:
      QkdError: it is not UTF-8, or holds a NUL character.
    """
    text = os.fspath(path)
    shown = text.encode("utf-8", "backslashreplace").decode()
    if shown != text or "\0" in text:
        raise error(f"{name}: expected a path in UTF-8, found {shown!r}; choose another one")
    return Path(path)
