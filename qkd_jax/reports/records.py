"""Records of finished runs: the small files from which tables are made again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from qkd_jax.errors import DataError
from qkd_jax.reports.files import IMAGES, read_json, read_run
from qkd_jax.reports.ledger import NOTED, Ledger, lost_files, missing_files
from qkd_jax.reports.predictions import PACKED, check_follows, packed, read_predictions
from qkd_jax.reports.results import seed_folders
from qkd_jax.reports.writing import write_atomically

# The files of a run that `record_runs` copies, beside its predictions.
RECORDED = ("config.json", "environment.json", "matrix.json", "summary.json")


def record_runs(experiment_folder: str | Path, target: str | Path) -> list[Path]:
    """Copies the small files of the finished runs of runs/<experiment> to `target`/<experiment>.

    They are settings, versions, matrix and summary, which are enough to make the tables again, and
    what was predicted of each test image (`read_predictions`). Of examples that are read from a
    path, `target`/<experiment>/examples-<fingerprint>.npz keeps which they were: ids, classes and
    digests, once for all runs with the same ones. A record is there to be shown to others, so of a
    path on this machine only the last name is kept.

    Returns:
      The folders of the copies.

    Raises:
      DataError: the folder does not exist or holds no finished run, or a file of one is gone or not
        what the run wrote, or its matrix or summary does not follow from its predictions.
    """
    folder, copies = Path(experiment_folder), []
    if not folder.is_dir():
        raise DataError(f"{folder}: expected an experiment's folder, runs/<experiment>, found none")
    for method in sorted(path for path in folder.iterdir() if path.is_dir()):
        for run, _ in seed_folders(method):
            if not (run / "summary.json").is_file():
                continue
            if read_json(run / "summary.json").get("finished") is not True:
                continue
            record = _record_of(run)
            copy = Path(target) / folder.name / method.name / run.name
            Ledger(copy).write(record)
            if (listed := _list_of_examples(run)) is not None:
                write_atomically(copy.parents[1] / listed.name, listed.content)
            copies.append(copy)
    if not copies:
        raise DataError(f"{folder}: expected at least one finished run, found none")
    return copies


def _record_of(run: Path) -> dict[str, bytes]:
    """The files of a run's record, from which a reader can tell that they belong together."""
    gone = [*missing_files(run), *lost_files(run)]
    if needed := [n for n in gone if n in RECORDED or n.startswith("predictions/")]:
        raise DataError(
            f"{run / needed[0]} is gone, so that a record would be incomplete; restore it from a "
            "copy, or repeat the run with another --variant"
        )
    files, predictions = read_run(run), read_predictions(run)
    try:
        check_follows(predictions, files.correct, files.total, files.summary)
    except DataError as error:
        raise DataError(f"{run}: {error}") from None
    record = {} if predictions is None else {PACKED: packed(predictions)}
    for name in RECORDED:
        content = read_json(run / name)
        shown = without_paths(content) | (NOTED if name == "environment.json" else {})
        same = shown == content
        text = (run / name).read_bytes() if same else (json.dumps(shown, indent=1) + "\n").encode()
        record[name] = text
    return record


class Listed(NamedTuple):
    """The list of a run's examples, and the name of its file in a record."""

    name: str
    content: bytes


def _list_of_examples(run: Path) -> Listed | None:
    """None where the examples come with the package, or an older version kept no list."""
    if not read_json(run / "config.json")["data"].get("path") or not (run / IMAGES).is_file():
        return None
    fingerprint = read_json(run / "environment.json")["data_fingerprint"]
    return Listed(f"examples-{fingerprint[:16]}.npz", (run / IMAGES).read_bytes())


def without_paths(value: Any) -> Any:
    """Plain JSON where each text that is an absolute path or leads upwards, also behind
    `setting=`, is the last name of that path.
    """
    if isinstance(value, dict):
        return {name: without_paths(part) for name, part in value.items()}
    if isinstance(value, list):
        return [without_paths(part) for part in value]
    if not isinstance(value, str):
        return value
    key, equals, path = value.rpartition("=")
    return key + equals + Path(path).name if path.startswith(("/", "../")) else value
