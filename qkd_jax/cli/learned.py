"""The commands that use what was learned: eval, predict, export, serve."""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from qkd_jax.cli.arguments import add_command, missing_extra, path
from qkd_jax.errors import ConfigError, DataError
from qkd_jax.paths import expanded
from qkd_jax.runs.display import tell

LEARNED = "a run folder, or one that `export` wrote"


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Adds the commands of this file."""
    evaluate = add_command(
        commands,
        "eval",
        _eval,
        "accuracy of a trained learner on test data",
        "runs/renditions/qkd/seed1993",
        "exported --data ~/photos --out predicted.npz",
    )
    evaluate.add_argument("folder", type=path, help=LEARNED)
    evaluate.add_argument("--data", default="", help="folder of the data, if not the run's own")
    evaluate.add_argument(
        "--split-file", default="", help="which of them are test data, if not the run's own"
    )
    add_weights(evaluate)
    evaluate.add_argument("--out", type=path, help="an npz file for what was predicted")

    classify = add_command(
        commands,
        "predict",
        _predict,
        "the best classes of images or texts, with task and score",
        "runs/folder/qkd/seed1993 photo.jpg 'my photos'",
        "exported --top 3 --json photo.jpg",
        "runs/glosses/qkd/seed1993 'a bird that sings'",
        "exported - < names-of-files.txt",
    )
    classify.add_argument("folder", type=path, help=LEARNED)
    classify.add_argument(
        "inputs",
        nargs="+",
        metavar="input",
        help="image files and folders, or texts; - reads them from standard input, one per line",
    )
    classify.add_argument("--top", default=5, type=int, help="classes to show for each input")
    classify.add_argument("--json", action="store_true", help="one JSON object per line")
    add_weights(classify)

    export = add_command(
        commands,
        "export",
        _export,
        "what a run has learned: arrays, JSON and a model card",
        "runs/folder/qkd/seed1993 exported --licence apache-2.0",
    )
    export.add_argument("folder", type=path, help="a run folder")
    export.add_argument("target", type=path, help="a folder to write")
    export.add_argument(
        "--licence", default="unknown", help="of what was learned, as in apache-2.0"
    )
    add_weights(export)

    serve = add_command(
        commands,
        "serve",
        _serve,
        "a small HTTP endpoint that classifies images or texts",
        "exported",
        "exported --port 8080 --max-mib 4 --timeout 10 --concurrency 2",
    )
    serve.add_argument("folder", type=path, help=LEARNED)
    serve.add_argument("--host", default="127.0.0.1", help="where to listen; this machine alone")
    serve.add_argument("--port", default=8000, type=int)
    serve.add_argument("--max-mib", default=16.0, type=float, help="of a request's body")
    serve.add_argument("--timeout", default=30.0, type=float, help="seconds for one request")
    serve.add_argument("--concurrency", default=4, type=int, help="requests at a time")
    add_weights(serve)


def add_weights(command: argparse.ArgumentParser) -> None:
    """Adds the options that say where weight files are."""
    command.add_argument("--weights", default="", help="the backbone's weight file")
    command.add_argument("--teacher-weights", default="", help="that of a student's teacher")


def weights_of(options: argparse.Namespace) -> dict[str, str | None]:
    """What these options gave, as `load_run` takes it."""
    return {
        "weights": options.weights or None,
        "teacher_weights": options.teacher_weights or None,
    }


def _eval(options: argparse.Namespace) -> None:
    import numpy as np

    from qkd_jax.engine.compiled_programs import keep_compiled_programs
    from qkd_jax.reports.writing import write_atomically
    from qkd_jax.runs.exported import load_trained
    from qkd_jax.runs.tested import tested
    from qkd_jax.runs.writer import encoded_arrays

    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)  # before anything is computed
    keep_compiled_programs()
    trained = load_trained(options.folder, **weights_of(options))
    found = tested(trained, options.data or None, options.split_file or None)
    predicted = found.predicted
    labels, tasks = predicted["label"], predicted["task"]
    correct = predicted["predicted"] == labels
    in_top5 = (predicted["top5"] == labels[:, None]).any(axis=1)
    shares = {
        "accuracy": correct,
        "in the best five": in_top5,
        "when the task is given": predicted["within_task"] == labels,
    }
    if "relevance" in predicted:
        shares["most relevant task is right"] = predicted["relevance"].argmax(axis=1) == tasks
    tell(f"{found.name}: {len(labels)} {found.noun}s, {len(np.unique(labels))} classes")
    for name, right in shares.items():
        tell(f"{name:28} {100 * right.mean():6.2f} %")
    for task in np.unique(tasks).tolist():
        own = correct[tasks == task]
        tell(f"{f'accuracy of task {task + 1}':28} {100 * own.mean():6.2f} %  ({len(own)})")
    if options.out:
        write_atomically(options.out, encoded_arrays(predicted))
        tell(f"predictions: {options.out}")


def _predict(options: argparse.Namespace) -> int:
    from qkd_jax.engine.compiled_programs import keep_compiled_programs
    from qkd_jax.runs import answers
    from qkd_jax.runs.exported import load_trained

    if options.top < 1:
        raise ConfigError(f"--top: expected 1 or more, found {options.top}")
    keep_compiled_programs()
    trained = load_trained(options.folder, **weights_of(options))
    texts = answers.reads_texts(trained)
    answers.best_classes(trained, answers.blank_fields(trained))
    failed = False
    for given in _inputs(options.inputs, texts):
        began = time.perf_counter()
        try:
            if texts:
                fields = answers.text_fields(trained, given)
            else:
                fields = answers.image_fields(trained, _image_file(given), given)
            found = answers.best_classes(trained, fields, options.top)
        except DataError as error:  # the others are still answered
            tell(f"error: {error}", sys.stderr)
            failed = True
            continue
        milliseconds = 1000 * (time.perf_counter() - began)
        if options.json:
            shown = [answer.as_json() for answer in found]
            tell(json.dumps({"input": given, "milliseconds": milliseconds, "answers": shown}))
            continue
        tell(f"{given}  ({milliseconds:.0f} ms)")
        for name, task, score, probability in found:
            tell(f"  {100 * probability:5.1f} %  score {score:9.3f}  task {task:2}  {name}")
    return int(failed)


def _inputs(given: list[str], texts: bool) -> Iterator[str]:
    """Each text or image file that was asked for; a folder stands for the files in it."""
    for word in given:
        read = (line.rstrip("\n") for line in sys.stdin)
        lines = filter(None, read) if word == "-" else [word]
        for line in lines:
            yield from [line] if texts else _files_in(line) or [line]


def _files_in(name: str) -> list[str]:
    """The files in a folder; none if it is no folder."""
    try:
        found = sorted(_place(name).rglob("*"))
    except DataError:  # told when it is read
        return []
    return [str(file) for file in found if file.is_file() and not _is_litter(file)]


def _image_file(name: str) -> Path:
    file = _place(name)
    if file.is_dir():
        raise DataError(f"{name}: expected images, found none in this folder")
    return file


def _place(name: str) -> Path:
    if "\0" in name:  # as of `find -print0`
        raise DataError(f"{name[:60]!r}: expected one path per line, found a NUL character")
    return expanded(name, DataError)


def _is_litter(file: Path) -> bool:
    from qkd_jax.data.scan import LITTER

    return file.name.startswith(".") or file.name.lower() in LITTER


def _export(options: argparse.Namespace) -> None:
    from qkd_jax.runs.exported import export_run

    folder = export_run(
        options.folder, options.target, licence=options.licence, **weights_of(options)
    )
    for file in sorted(folder.iterdir()):
        tell(f"{file}  ({file.stat().st_size:,} bytes)")


def _serve(options: argparse.Namespace) -> int:
    for name, value, least, most in (
        ("--port", options.port, 1, 65535),
        ("--max-mib", options.max_mib, 0.001, 1024),
        ("--timeout", options.timeout, 0.1, 3600),
        ("--concurrency", options.concurrency, 1, 1000),
    ):
        if not least <= value <= most:
            raise ConfigError(f"{name}: expected {least} to {most}, found {value}")
    try:
        from qkd_jax.cli.server import LOOPBACK, Limits, new_app, serve
    except ImportError as error:
        raise missing_extra("serve", error) from None
    from qkd_jax.engine.compiled_programs import keep_compiled_programs
    from qkd_jax.runs.exported import load_trained

    keep_compiled_programs()
    trained = load_trained(options.folder, **weights_of(options))
    limits = Limits(int(options.max_mib * 2**20), options.timeout, options.concurrency)
    alone = options.host in LOOPBACK
    app = new_app(trained, limits, LOOPBACK if alone else ())
    host = f"[{options.host}]" if ":" in options.host else options.host  # IPv6
    tell(f"{trained.config.method} of {options.folder} on http://{host}:{options.port}")
    if not alone:
        tell("warning: whoever reaches this machine may ask; there is no password", sys.stderr)
    return serve(app, options.host, options.port, limits)
