"""The commands that train: run, resume, compare."""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from qkd_jax.cli.arguments import (
    add_command,
    add_places,
    add_run_options,
    config_of,
    path,
    seeds_of,
    with_places,
)
from qkd_jax.errors import ConfigError
from qkd_jax.runs.display import tell, tell_table
from qkd_jax.settings import config as configuration
from qkd_jax.settings.config import Config
from qkd_jax.settings.methods import method_named, method_names, methods_reading, preset_method


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Adds the commands of this file."""
    run = add_command(
        commands,
        "run",
        _run,
        "train and evaluate an experiment; continues an unfinished run",
        "renditions",
        "renditions --method ease --seed '1993 1994' --set train.epochs=5",
        "folder --data ~/photos",
        "smoke --plugin my_method.py --method nearest_mean",
    )
    run.add_argument("--method", default="qkd")
    run.add_argument("--seed", default="1993", help="one or more, as in --seed '1993 1994 1995'")
    add_run_options(run)
    _add_host_options(run)
    # For runs that `compare` starts, which writes the tables itself.
    run.add_argument("--bare", action="store_true", help="only train and evaluate: no tables")

    resume = add_command(
        commands,
        "resume",
        _resume,
        "continue a stopped run from its folder, without repeating its settings",
        "runs/renditions/qkd/seed1993",
        "runs/folder/qkd/seed1993 --data /new/place/of/images",
    )
    resume.add_argument("folder", type=path, help="a run folder")
    resume.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="key=value",
        dest="settings",
        help="of those that change no result, such as train.devices=1",
    )
    add_places(resume)
    _add_host_options(resume)

    compare = add_command(
        commands,
        "compare",
        _compare,
        "run many methods with many seeds, and put them into one table",
        "renditions --methods 'qkd ease mos' --seeds '1993 1994 1995' --jobs 2",
        "folder --data ~/photos",
    )
    compare.add_argument("--methods", default="", help="as in 'qkd ease simplecil'; empty = all")
    compare.add_argument("--seeds", default="1993", help="as in '1993 1994 1995'")
    add_run_options(compare)
    compare.add_argument(
        "--jobs", default=1, type=int, help="runs at a time, each on its share of the cores"
    )


def _add_host_options(command: argparse.ArgumentParser) -> None:
    hosts = command.add_argument_group(
        "several hosts, one command each; a TPU pod needs none of these"
    )
    hosts.add_argument("--coordinator", default="", help="address:port of host 0")
    hosts.add_argument("--num-hosts", default=0, type=int)
    hosts.add_argument("--host-id", default=-1, type=int, help="which host this is, from 0")


def _run(options: argparse.Namespace) -> int:
    seeds = seeds_of(options.seed)
    shows = _connect(options)
    configs = [config_of(options, options.method, seed) for seed in seeds]
    return _learn(options, configs, options.out, options.variant, shows, bare=options.bare)


def _resume(options: argparse.Namespace) -> int:
    from qkd_jax.reports.files import read_json
    from qkd_jax.runs.folder import run_folder

    folder = options.folder.absolute()
    settings = read_json(folder / "config.json") if folder.is_dir() else {}
    if not settings:
        raise ConfigError(
            f"{options.folder}: expected a run folder, runs/<experiment>/<method>/seed<k>, found "
            "no config.json in it"
        )
    shows = _connect(options)
    config = with_places(options, configuration.from_dict(settings))
    out, name = folder.parents[2], folder.parent.name
    variant = name.removeprefix(config.method).removeprefix("-")
    if run_folder(out, config, variant) != folder:
        raise ConfigError(
            f"{options.folder}: expected a folder {config.experiment}/{config.method}"
            f"[-variant]/seed{config.seed}, as the run in it was begun; move it back"
        )
    return _learn(options, [config], out, variant, shows)


def _connect(options: argparse.Namespace) -> bool:
    """Joins the hosts; returns whether this one shows what happens."""
    from qkd_jax.engine import hosts
    from qkd_jax.engine.compiled_programs import keep_compiled_programs

    keep_compiled_programs()
    return hosts.connect(options.coordinator, options.num_hosts, options.host_id) == 0


def _learn(
    options: argparse.Namespace,
    configs: list[Config],
    out: Path,
    variant: str,
    shows: bool,
    *,
    bare: bool = False,
) -> int:
    """Runs, or continues, one config after the other; returns the exit code."""
    import jax

    from qkd_jax.engine.verbs import teacher_config
    from qkd_jax.reports.results import write_results
    from qkd_jax.reports.run_page import write_report
    from qkd_jax.runs.load import backbones_of
    from qkd_jax.runs.loop import Interrupted, run, run_folder

    first = configs[0]
    backbone, teacher = backbones_of(first)
    devices = jax.devices()
    if shows:
        tell(
            f"{first.experiment}, {first.method}: {backbone.name} at "
            f"{backbone.spec.input_size} {backbone.spec.unit} on "
            f"{len(devices)} {devices[0].platform} device{'s' * (len(devices) > 1)}"
            + f" of {jax.process_count()} hosts"
            * (jax.process_count() > 1)
        )
        if teacher is not None:
            size = f"{teacher.spec.input_size} {teacher.spec.unit}"
            tell(f"teacher: {teacher_config(first).method}, {teacher.name} at {size}")
    unreported: list[str] = []
    for config in configs:
        folder = run_folder(out, config, variant)
        try:
            run(
                config,
                backbone,
                out,
                teacher=teacher,
                variant=variant,
                show_progress=True,
                allow_removed=options.allow_removed,
            )
        except Interrupted:
            told = f"saved in {folder}; the same command continues, or: qkd-jax resume {folder}"
            tell(told, sys.stderr)
            return 130
        if bare or not shows:
            continue
        _print_table(folder)
        if not options.no_report:
            failed = _failure(f"report of {folder}", partial(write_report, folder))
            unreported += failed
            if not failed:
                tell(f"report: {folder / 'report.html'}")
    if shows and not bare:
        tell(f"all methods and seeds: {write_results(out / first.experiment)}")
    for message in unreported:
        tell(f"error: {message}", sys.stderr)
    return 1 if unreported else 0


def _compare(options: argparse.Namespace) -> int:
    from rich.console import Console

    from qkd_jax.cli.compare import core_shares, planned_runs, run_all, without_finished
    from qkd_jax.reports.files import read_json
    from qkd_jax.reports.results import write_results
    from qkd_jax.reports.run_page import write_report
    from qkd_jax.reports.tables import comparison_table
    from qkd_jax.weights.load import fields_of

    methods = options.methods.replace(",", " ").split()
    if not methods:
        # The backbone is the same for every method.
        backbone = config_of(options, method_names()[0], seed=0, where_read=True).backbone
        methods = list(methods_reading(fields_of(backbone.name)))
    _refuse_unread(options, methods)
    seeds = seeds_of(options.seeds)
    core_shares(options.jobs)
    # Seed after seed, so that the first comparison is complete as early as possible.
    configs = [
        config_of(options, method, seed, where_read=True)
        for seed in dict.fromkeys(seeds)
        for method in dict.fromkeys(methods)
    ]
    runs = planned_runs(
        configs, options.out, options.variant, lambda config: _run_arguments(options, config)
    )

    unreported: list[tuple[str, str]] = []

    def finished(run) -> None:
        failed = []
        if not options.no_report:
            failed += _failure("report", partial(write_report, run.folder))
        failed += _failure("tables", partial(write_results, run.folder.parents[1]))
        unreported.extend((run.name, message) for message in failed)

    left, failures = without_finished(runs, tell, allow_removed=options.allow_removed)
    failed, stopped = run_all(runs, left, options.jobs, show=tell, finished=finished)
    failures += failed + unreported
    folder = options.out / configs[0].experiment
    if folder.is_dir():
        results = write_results(folder)
        names = {run.folder.parent.name for run in runs}
        rows = read_json(folder / "results.json")
        tell_table(comparison_table(rows, names, Console().width))
        tell(f"all methods and seeds: {results}")
    if failures:
        tell(f"\n{len(failures)} of {len(runs)} runs failed:", sys.stderr)
        for name, message in failures:
            tell(f"  {name}: " + message.replace("\n", "\n    "), sys.stderr)
    if stopped:
        tell("stopped; what ran was saved, the same command continues", sys.stderr)
        return 130
    return 1 if failures else 0


def _failure(what: str, act: Callable[[], object]) -> list[str]:
    """Calls `act`, which concerns one run alone; returns what went wrong in it."""
    try:
        act()
    except Exception as error:  # of whatever draws: the run itself is finished and saved
        return [f"{what}: {str(error) or type(error).__name__}"]
    return []


def _refuse_unread(options: argparse.Namespace, methods: list[str]) -> None:
    """Raises ConfigError for an unknown method, and for settings that no method reads."""
    for method in methods:
        method_named(method)
    for assignment in options.settings:
        key, _ = configuration.key_and_text(assignment)
        if not set(configuration.readers_of(key)) & set(methods):
            raise configuration.not_read(key, methods)
    if options.preset and preset_method(options.preset) not in methods:
        raise ConfigError(
            f"preset {options.preset}: expected {preset_method(options.preset)} among the methods, "
            f"found {', '.join(methods)}"
        )


def _run_arguments(options: argparse.Namespace, config: Config) -> list[str]:
    """The `run` command for one method and seed of a comparison, with settings that it reads."""
    given = {"variant": options.variant, "weights": options.weights, "data": options.data}
    if options.preset and preset_method(options.preset) == config.method:
        given["preset"] = options.preset
    read = [
        assignment
        for assignment in options.settings
        if config.method in configuration.readers_of(configuration.key_and_text(assignment)[0])
    ]
    return [
        *("run", options.experiment, "--method", config.method, "--seed", str(config.seed)),
        *(f"--set={assignment}" for assignment in read),
        *(f"--{name}={value}" for name, value in given.items() if value),
        *(f"--plugin={file}" for file in options.plugin),
        *(["--follow-links"] if options.follow_links else []),
        *(["--allow-removed"] if options.allow_removed else []),
        *("--out", str(options.out), "--bare"),
    ]


def _print_table(folder: Path) -> None:
    from qkd_jax.reports.files import read_run
    from qkd_jax.reports.tables import console_table

    files = read_run(folder)
    tell_table(console_table(files.summary, files.correct, files.total))
