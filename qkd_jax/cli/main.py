"""The command line: its commands, one group per file, and what every error becomes."""

import argparse
import sys

from qkd_jax.cli import circuits, learned, resources, results, training
from qkd_jax.errors import QkdError, check_system
from qkd_jax.runs.display import flush, mute, tell
from qkd_jax.settings.plugins import load_plugins

EXIT_CODES = """\
exit codes:
  0    done
  1    an error, told in one message
  2    wrong usage
  130  interrupted; a run is saved, and the same command or `resume` continues it
"""
GROUPS = (training, learned, results, resources, circuits)


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns 0, or 1 after an error with a message, or 130 if interrupted."""
    options = new_parser().parse_args(arguments)
    try:
        check_system()
        load_plugins(options.plugin)
        code = options.command(options) or 0
        flush()
        return code
    except QkdError as error:
        tell(f"error: {error}", sys.stderr)
        return 1
    except BrokenPipeError:  # `| head`
        mute(sys.stdout)
        return 1
    except OSError as error:  # unwritable folder, full disk, unreadable file
        place = f"{error.filename}: " if error.filename else ""
        tell(f"error: {place}{error.strerror or error}", sys.stderr)
        return 1
    except KeyboardInterrupt:
        tell("interrupted", sys.stderr)
        return 130


def new_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="qkd-jax",
        description="Class-incremental learning on a frozen transformer, of images or texts.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    for group in GROUPS:
        group.add_commands(commands)
    return parser
