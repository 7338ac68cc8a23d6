"""The errors of this library. Messages say "<thing>: expected X, found Y", and what to do."""

import sys


class QkdError(ValueError):
    """Base of every error this library raises on bad input."""


class ConfigError(QkdError):
    """A setting is unknown, ill-typed, out of range, or does not fit another one."""


class DataError(QkdError):
    """Images, labels or image files that cannot be learned from."""


class WeightsError(QkdError):
    """A weight file that is missing, damaged, or not the expected architecture."""


class CheckpointError(QkdError):
    """A run folder or checkpoint that cannot be continued."""


class ProtocolError(QkdError):
    """A class order or a split into tasks that is not a partition of the classes."""


def check_system() -> None:
    """Raises ConfigError outside Linux and macOS, where runs could not be locked."""
    if sys.platform not in ("linux", "darwin"):
        raise ConfigError(
            f"operating system: expected Linux or macOS, found {sys.platform}; on Windows use WSL "
            "(the Windows Subsystem for Linux), where everything works as on Linux"
        )
