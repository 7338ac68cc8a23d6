"""Completion in a shell, by shtab: a script that is made once, so that Tab starts no Python."""

import argparse

from qkd_jax.cli.arguments import missing_extra, path
from qkd_jax.settings.experiments import experiment_names
from qkd_jax.settings.methods import method_names


def completion(shell: str) -> str:
    """The script for "bash", "zsh" or "tcsh".

    Raises:
      ConfigError: shtab is not installed.
    """
    try:
        import shtab
    except ImportError as error:
        raise missing_extra("completion", error) from None
    from qkd_jax.cli.main import new_parser

    parser = new_parser()
    known = {"experiment": experiment_names(), "method": method_names()}
    for action in _actions(parser):
        if action.dest in known:
            action.choices = list(known[action.dest])
        elif action.type is path or action.dest in ("plugin", "weights", "data", "inputs"):
            action.complete = shtab.FILE
    return shtab.complete(parser, shell)


def _actions(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Those of all commands."""
    commands = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return [action for sub in commands.choices.values() for action in sub._actions]
