"""The command line."""

from qkd_jax.cli.main import main

__all__ = ["main"]
