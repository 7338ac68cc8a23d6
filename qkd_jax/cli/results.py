"""The commands that read finished runs: report, record, rank."""

import argparse

from qkd_jax.cli.arguments import add_command, path, seeds_of
from qkd_jax.errors import DataError


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Adds the commands of this file."""
    report = add_command(
        commands,
        "report",
        _report,
        "figures, page and results tables of finished runs, made again",
        "runs/renditions/qkd/seed1993",
        "runs/renditions",
    )
    report.add_argument("folder", type=path, help="a run folder, or runs/<experiment>")

    record = add_command(
        commands,
        "record",
        _record,
        "copy settings, matrices and summaries of finished runs: small, to keep",
        "runs/renditions results",
    )
    record.add_argument("folder", type=path, help="runs/<experiment>")
    record.add_argument("target", type=path, help="where <experiment>/<method>/seed<k> go")

    rank = add_command(
        commands,
        "rank",
        _rank,
        "methods over several streams: mean ranks and paired differences, with intervals",
        "runs/renditions runs/glosses --methods 'qkd mos ranpac'",
    )
    rank.add_argument("folders", type=path, nargs="+", help="results/<stream>, one or more")
    rank.add_argument("--methods", required=True, help="as in 'qkd mos ranpac'")
    rank.add_argument("--measure", default="average", choices=["average", "last"])
    rank.add_argument("--seeds", default="", help="as in '1993 1994'; without, every one")
    rank.add_argument("--seed", default=0, type=int, help="of the bootstrap samples")


def _report(options: argparse.Namespace) -> None:
    from qkd_jax.reports.files import read_json
    from qkd_jax.reports.results import write_results
    from qkd_jax.reports.run_page import write_report

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
    from qkd_jax.reports.records import record_runs
    from qkd_jax.reports.results import write_results

    copies = record_runs(options.folder, options.target)
    print(f"{len(copies)} runs: {write_results(options.target / options.folder.name)}")


def _rank(options: argparse.Namespace) -> None:
    from qkd_jax.reports.ranks import ranking, ranking_table

    methods = options.methods.replace(",", " ").split()
    seeds = seeds_of(options.seeds) if options.seeds else ()
    found = ranking(options.folders, methods, options.measure, options.seed, seeds)
    print(f"{options.measure} accuracy, with 95 % intervals over test images and seeds\n")
    print(ranking_table(found), end="")
