"""Arguments that several commands take, and what they mean."""

import argparse
from collections.abc import Callable
from pathlib import Path

from qkd_jax.errors import ConfigError
from qkd_jax.paths import expanded
from qkd_jax.settings import config as configuration
from qkd_jax.settings.config import Config
from qkd_jax.settings.experiments import load_experiment
from qkd_jax.settings.methods import preset_method

FOLLOW_LINKS = "read links in a folder of images or texts that lead out of it"


def add_command(
    commands: argparse._SubParsersAction,
    name: str,
    function: Callable[[argparse.Namespace], int | None],
    about: str,
    *examples: str,
) -> argparse.ArgumentParser:
    """A new command that calls `function`; returns its parser.

    Args:
      about: one line.
      examples: what may stand after the name, for `--help`.
    """
    lines = [f"  qkd-jax {name} {example}".rstrip() for example in examples]
    parser = commands.add_parser(
        name,
        help=about,
        description=about,
        epilog="\n".join(["examples:", *lines]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(command=function)
    parser.add_argument(
        "--plugin",
        action="append",
        default=[],
        metavar="FILE",
        help="a Python file with a method or data set of your own; may be given several times",
    )
    return parser


def missing_extra(extra: str, error: ImportError) -> ConfigError:
    """The error for a package that is only installed with an extra."""
    return ConfigError(
        f"{error.name}: expected it to be installed, found it missing; "
        f'pip install "qkd_jax[{extra}]"'
    )


def path(text: str) -> Path:
    """A path; `~`, as in a quoted argument, is the home folder."""
    try:
        return expanded(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_run_options(command: argparse.ArgumentParser) -> None:
    """Adds what `run` and `compare` have in common."""
    command.add_argument("experiment", help="a name from `list`, or an experiment file's path")
    command.add_argument("--preset", default="", help="qkd (default) or paper")
    command.add_argument("--set", action="append", default=[], metavar="key=value", dest="settings")
    command.add_argument(
        "--variant", default="", help="names a run with other settings: <method>-<variant>"
    )
    add_places(command)
    command.add_argument("--out", default="runs", type=path)


def add_places(command: argparse.ArgumentParser) -> None:
    """Adds where weights and data are, and what a run may do without."""
    command.add_argument("--weights", default="", help="a local weight file (or QKD_JAX_WEIGHTS)")
    command.add_argument("--data", default="", help="folder of the data (EXP=folder, vtab, ...)")
    command.add_argument("--follow-links", action="store_true", help=FOLLOW_LINKS)
    command.add_argument(
        "--allow-removed",
        action="store_true",
        help="continue a run although images that it began with are gone",
    )
    command.add_argument("--no-report", action="store_true", help="skip figures and page")


def seeds_of(text: str) -> list[int]:
    """The seeds in "1993 1994"; raises ConfigError for anything else."""
    try:
        seeds = [int(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise ConfigError(
            f"--seed: expected whole numbers, as in '1993 1994 1995', found {text!r}"
        ) from None
    if not seeds:
        raise ConfigError("--seed: expected whole numbers, as in '1993 1994 1995', found none")
    return seeds


def config_of(
    options: argparse.Namespace, method: str, seed: int, *, where_read: bool = False
) -> Config:
    """The settings of the experiment, then of the preset, then of --set.

    Args:
      where_read: leave out what the method does not read, instead of refusing it.
    """
    config = load_experiment(options.experiment).get_config(method)
    if options.preset and not (where_read and preset_method(options.preset) != method):
        config = configuration.apply_preset(config, options.preset)
    config = configuration.override(config, f"seed={seed}")
    return with_places(options, config, where_read=where_read)


def with_places(options: argparse.Namespace, config: Config, *, where_read: bool = False) -> Config:
    """`config` with `--set` and the places of `add_places`; `where_read` as in `config_of`."""
    settings = list(options.settings)
    if options.weights:
        settings.append(f"backbone.weights={options.weights}")
    if options.data:
        settings.append(f"data.path={options.data}")
    if options.follow_links:
        settings.append("data.follow_links=true")
    return configuration.override(config, *settings, where_read=where_read)
