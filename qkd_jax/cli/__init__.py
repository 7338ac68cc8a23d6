"""The command line."""

from qkd_jax.cli.commands import main

__all__ = ["main"]
