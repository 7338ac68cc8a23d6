"""The command line: run, compare, report, record, rank, list, doctor, weights, data, circuits."""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from qkd_jax.errors import ConfigError, DataError, QkdError, check_system
from qkd_jax.paths import expanded
from qkd_jax.runs.display import flush, mute, tell, tell_table
from qkd_jax.settings import config as configuration
from qkd_jax.settings.config import Config
from qkd_jax.settings.experiments import experiment_names, load_experiment
from qkd_jax.settings.methods import (
    method_named,
    method_names,
    methods_reading,
    preset_method,
    presets,
)

FOLLOW_LINKS = "read links in a folder of images or texts that lead out of it"


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns 0, or 1 after an error with a message, or 130 if interrupted."""
    options = _parser().parse_args(arguments)
    try:
        check_system()
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qkd_jax", description="Class-incremental learning on a frozen vision transformer."
    )
    commands = parser.add_subparsers(required=True, metavar="command")

    def command(name: str, function: Callable, about: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=about, description=about)
        sub.set_defaults(command=function)
        return sub

    run = command("run", _run, "train and evaluate an experiment; continues an unfinished run")
    run.add_argument("--method", default="qkd")
    run.add_argument("--seed", default="1993", help="one or more, as in --seed '1993 1994 1995'")
    _add_run_options(run)
    hosts = run.add_argument_group("several hosts, one command each; a TPU pod needs none of these")
    hosts.add_argument("--coordinator", default="", help="address:port of host 0")
    hosts.add_argument("--num-hosts", default=0, type=int)
    hosts.add_argument("--host-id", default=-1, type=int, help="which host this is, from 0")
    # For runs that `compare` starts, which writes the tables itself.
    run.add_argument("--bare", action="store_true", help="only train and evaluate: no tables")

    compare = command(
        "compare", _compare, "run many methods with many seeds, and put them into one table"
    )
    compare.add_argument("--methods", default="", help="as in 'qkd ease simplecil'; empty = all")
    compare.add_argument("--seeds", default="1993", help="as in '1993 1994 1995'")
    _add_run_options(compare)
    compare.add_argument(
        "--jobs", default=1, type=int, help="runs at a time, each on its share of the cores"
    )

    report = command(
        "report", _report, "figures, page and results tables of finished runs, made again"
    )
    report.add_argument("folder", type=_path, help="a run folder, or runs/<experiment>")

    record = command(
        "record", _record, "copy settings, matrices and summaries of finished runs: small, to keep"
    )
    record.add_argument("folder", type=_path, help="runs/<experiment>")
    record.add_argument("target", type=_path, help="where <experiment>/<method>/seed<k> go")

    rank = command(
        "rank",
        _rank,
        "methods over several streams: mean ranks and paired differences, with intervals",
    )
    rank.add_argument("folders", type=_path, nargs="+", help="results/<stream>, one or more")
    rank.add_argument("--methods", required=True, help="as in 'qkd mos ranpac'")
    rank.add_argument("--measure", default="average", choices=["average", "last"])
    rank.add_argument("--seed", default=0, type=int, help="of the bootstrap samples")

    listing = command("list", _list, "experiments, methods, presets, backbones and settings")
    listing.add_argument(
        "--settings", action="store_true", help="every setting that --method reads"
    )
    listing.add_argument("--method", default="qkd")

    command("doctor", _doctor, "devices, versions and weights of this machine")

    weights = command("weights", _weights, "fetch and check a backbone's weights")
    weights.add_argument("name", nargs="?", default="clip_vit_b16")

    data = command(
        "data", _data, "prepare a tensorflow-datasets set once, or check that every example reads"
    )
    data.add_argument("action", choices=["prepare", "check"])
    data.add_argument("name", help="an image folder, or a source as in data.source")
    data.add_argument("--path", default="", help="a folder of texts, or of prepared data sets")
    data.add_argument("--split-file", default="", help="for a folder without train/ and test/")
    data.add_argument("--follow-links", action="store_true", help=FOLLOW_LINKS)
    data.add_argument("--text-column", default="text", help="of a table of texts")
    data.add_argument("--label-column", default="label", help="of a table of texts")

    export = command(
        "export-circuit", _export_circuit, "a trained circuit for one text, as OpenQASM 3"
    )
    export.add_argument("folder", type=_path, help="the folder of a run of qd_llm")
    export.add_argument("--text", required=True)
    export.add_argument("--out", type=_path, help="a file to write; empty = print")
    export.add_argument("--weights", default="", help="the encoder's weight file")

    noise = command(
        "noise", _noise, "accuracy of trained circuits against shots, readout and gate errors"
    )
    noise.add_argument("folders", type=_path, nargs="+", help="runs of qd_llm, one for each seed")
    noise.add_argument("--texts", default=300, type=int, help="how many test texts")
    noise.add_argument("--seed", default=0, type=int, help="of texts, shots and errors")
    noise.add_argument("--out", required=True, type=_path, help="a folder for figure and numbers")
    noise.add_argument("--weights", default="", help="the encoder's weight file")
    return parser


def _path(text: str) -> Path:
    """A path; `~`, as in a quoted argument, is the home folder."""
    try:
        return expanded(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _add_run_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("experiment", help="a name from `list`, or an experiment file's path")
    command.add_argument("--preset", default="", help="qkd (default) or paper")
    command.add_argument("--set", action="append", default=[], metavar="key=value", dest="settings")
    command.add_argument(
        "--variant", default="", help="names a run with other settings: <method>-<variant>"
    )
    command.add_argument("--weights", default="", help="a local weight file (or QKD_JAX_WEIGHTS)")
    command.add_argument("--data", default="", help="folder of the data (EXP=folder, vtab, ...)")
    command.add_argument("--follow-links", action="store_true", help=FOLLOW_LINKS)
    command.add_argument(
        "--allow-removed",
        action="store_true",
        help="continue a run although images that it began with are gone",
    )
    command.add_argument("--out", default="runs", type=_path)
    command.add_argument("--no-report", action="store_true", help="skip figures and page")


def _run(options: argparse.Namespace) -> int:
    from qkd_jax.engine import hosts
    from qkd_jax.engine.compiled_programs import keep_compiled_programs
    from qkd_jax.engine.verbs import teacher_config
    from qkd_jax.reports.page import write_report
    from qkd_jax.reports.tables import write_results
    from qkd_jax.runs.loop import Interrupted, run, run_folder
    from qkd_jax.weights.load import backbone_of

    seeds = _seeds(options.seed)
    keep_compiled_programs()
    shows = hosts.connect(options.coordinator, options.num_hosts, options.host_id) == 0
    configs = [_config_of(options, options.method, seed) for seed in seeds]
    backbone = backbone_of(configs[0].backbone)
    taught = teacher_config(configs[0])
    teacher = None if taught is None else backbone_of(taught.backbone)
    import jax

    devices = jax.devices()
    if shows:
        tell(
            f"{options.experiment}, {options.method}: {backbone.name} at "
            f"{backbone.spec.input_size} {backbone.spec.unit} on "
            f"{len(devices)} {devices[0].platform} device{'s' * (len(devices) > 1)}"
            + f" of {jax.process_count()} hosts"
            * (jax.process_count() > 1)
        )
        if teacher is not None:
            size = f"{teacher.spec.input_size} {teacher.spec.unit}"
            tell(f"teacher: {taught.method}, {teacher.name} at {size}")
    unreported: list[str] = []
    for config in configs:
        folder = run_folder(options.out, config, options.variant)
        try:
            run(
                config,
                backbone,
                options.out,
                teacher=teacher,
                variant=options.variant,
                show_progress=True,
                allow_removed=options.allow_removed,
            )
        except Interrupted:
            tell(f"saved in {folder}; the same command continues", sys.stderr)
            return 130
        if options.bare or not shows:
            continue
        _print_table(folder)
        if not options.no_report:
            failed = _failure(f"report of {folder}", partial(write_report, folder))
            unreported += failed
            if not failed:
                tell(f"report: {folder / 'report.html'}")
    if shows and not options.bare:
        tell(f"all methods and seeds: {write_results(options.out / configs[0].experiment)}")
    for message in unreported:
        tell(f"error: {message}", sys.stderr)
    return 1 if unreported else 0


def _compare(options: argparse.Namespace) -> int:
    from rich.console import Console

    from qkd_jax.cli.compare import core_shares, planned_runs, run_all, without_finished
    from qkd_jax.reports.files import read_json
    from qkd_jax.reports.page import write_report
    from qkd_jax.reports.tables import comparison_table, write_results
    from qkd_jax.weights.load import fields_of

    methods = options.methods.replace(",", " ").split()
    if not methods:
        # The backbone is the same for every method.
        backbone = _config_of(options, method_names()[0], seed=0, where_read=True).backbone
        methods = list(methods_reading(fields_of(backbone.name)))
    _refuse_unread(options, methods)
    seeds = _seeds(options.seeds)
    core_shares(options.jobs)
    # Seed after seed, so that the first comparison is complete as early as possible.
    configs = [
        _config_of(options, method, seed, where_read=True)
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
        *(["--follow-links"] if options.follow_links else []),
        *(["--allow-removed"] if options.allow_removed else []),
        *("--out", str(options.out), "--bare"),
    ]


def _print_table(folder: Path) -> None:
    from qkd_jax.reports.files import read_run
    from qkd_jax.reports.tables import console_table

    files = read_run(folder)
    tell_table(console_table(files.summary, files.correct, files.total))


def _seeds(text: str) -> list[int]:
    try:
        seeds = [int(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise ConfigError(
            f"--seed: expected whole numbers, as in '1993 1994 1995', found {text!r}"
        ) from None
    if not seeds:
        raise ConfigError("--seed: expected whole numbers, as in '1993 1994 1995', found none")
    return seeds


def _config_of(
    options: argparse.Namespace, method: str, seed: int, *, where_read: bool = False
) -> Config:
    """The settings of the experiment, then of the preset, then of --set.

    Args:
      where_read: leave out what the method does not read, instead of refusing it.
    """
    config = load_experiment(options.experiment).get_config(method)
    if options.preset and not (where_read and preset_method(options.preset) != method):
        config = configuration.apply_preset(config, options.preset)
    settings = list(options.settings)
    if options.weights:
        settings.append(f"backbone.weights={options.weights}")
    if options.data:
        settings.append(f"data.path={options.data}")
    if options.follow_links:
        settings.append("data.follow_links=true")
    return configuration.override(config, f"seed={seed}", *settings, where_read=where_read)


def _report(options: argparse.Namespace) -> None:
    from qkd_jax.reports.files import read_json
    from qkd_jax.reports.page import write_report
    from qkd_jax.reports.tables import write_results

    if (options.folder / "config.json").is_file():
        print(f"report: {write_report(options.folder)}")
    else:
        results = write_results(options.folder)
        print(f"results: {results}")
        damaged = read_json(results.with_suffix(".json")).get("damaged", {})
        if damaged:
            told = [f"{options.folder / run}/{message}" for run, message in damaged.items()]
            raise DataError("not counted, since damaged:\n  " + "\n  ".join(told))


def _record(options: argparse.Namespace) -> None:
    from qkd_jax.reports.tables import record_runs, write_results

    copies = record_runs(options.folder, options.target)
    print(f"{len(copies)} runs: {write_results(options.target / options.folder.name)}")


def _rank(options: argparse.Namespace) -> None:
    from qkd_jax.reports.ranks import ranking, ranking_table

    methods = options.methods.replace(",", " ").split()
    found = ranking(options.folders, methods, options.measure, options.seed)
    print(f"{options.measure} accuracy, with 95 % intervals over test images and seeds\n")
    print(ranking_table(found), end="")


def _list(options: argparse.Namespace) -> None:
    from qkd_jax.weights.load import TINY_RANDOM
    from qkd_jax.weights.registry import names

    if options.settings:
        from qkd_jax.learners.shape import learner_of

        config = Config(method=options.method)
        has_steps = learner_of(config).loss is not None
        for path, value, accepts in configuration.settings(config, has_steps=has_steps):
            print(f"{path} = {value!r}   ({accepts})")
        return
    print("experiments:", ", ".join(experiment_names()))
    print("methods:    ", ", ".join(method_names()))
    print("presets:    ", ", ".join(presets()))
    print("backbones:  ", ", ".join([*names(), TINY_RANDOM]))


def _doctor(options: argparse.Namespace) -> None:
    import jax

    from qkd_jax.runs.provenance import versions

    for name, version in versions().items():
        print(f"{name:18} {version}")
    devices = jax.local_devices()
    print(f"{'devices':18} {len(devices)} x {devices[0].platform} ({devices[0].device_kind})")
    if devices[0].platform == "cpu":
        print(
            "\nNo accelerator is in use. On a GPU or TPU machine this means that the jax wheel "
            "does not match it:\n"
            '  pip install -U "jax[tpu]"   or   pip install -U "jax[cuda13]"'
        )


def _weights(options: argparse.Namespace) -> None:
    from qkd_jax.weights.fetch import fetch
    from qkd_jax.weights.registry import lookup

    print(fetch(options.name))
    if lookup(options.name).tokenizer is not None:
        print(fetch(options.name, tokenizer=True))


def _export_circuit(options: argparse.Namespace) -> None:
    from qkd_jax.cli.export_circuit import export_circuit
    from qkd_jax.reports.writing import write_atomically

    text = export_circuit(options.folder, options.text, weights=options.weights or None)
    if options.out is None:
        print(text, end="")
        return
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(options.out, text.encode())
    print(options.out)


def _noise(options: argparse.Namespace) -> None:
    from qkd_jax.cli.measure_noise import measure_noise, write_noise

    if options.texts < 1:
        raise ConfigError(f"--texts: expected 1 or more, found {options.texts}")
    measured = measure_noise(
        options.folders, options.texts, options.seed, weights=options.weights or None
    )
    print(write_noise(measured, options.out))


def _data(options: argparse.Namespace) -> None:
    if options.action == "prepare":
        from qkd_jax.data.sources import BENCHMARKS, prepare

        name = BENCHMARKS.get(options.name, options.name.removeprefix("tfds:"))
        if name is None:
            raise ConfigError(
                f"data prepare: expected a set of tensorflow-datasets, found {options.name}; give "
                "its image folder to the run: --data PATH with train/<class>/* and test/<class>/*"
            )
        print(prepare(name, options.path or None))
        return
    from qkd_jax.data.contents import told_leaks, verify
    from qkd_jax.data.sources import describe, load_split
    from qkd_jax.runs.plan import need_every_class
    from qkd_jax.runs.progress import counting

    folder = _path(options.name)
    is_set = options.name.startswith("tfds:")
    is_folder = not is_set and (folder.is_dir() or len(folder.parts) > 1)
    split = load_split(
        "folder" if is_folder else options.name,
        path=folder if is_folder else options.path or None,
        split_file=options.split_file or None,
        follow_links=options.follow_links,
        text_column=options.text_column,
        label_column=options.label_column,
    )
    print(describe(split))
    with counting("checking", len(split.train) + len(split.test)) as advance:
        found = verify(split, advance)
    need_every_class(split)
    noun = split.train.noun
    print(f"every {noun} can be read, and every class has {noun}s to train and to test on")
    for copies in found.copies:
        print(f"the same {split.train.substance}: {' = '.join(copies)}")
    if found.leaked:
        print(f"warning: {told_leaks(found.leaked, split.test)}")
