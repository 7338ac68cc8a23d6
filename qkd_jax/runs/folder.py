"""The folder of a run: begun once, continued only by the same run, consistent after any kill."""

import dataclasses
import json
import logging
import platform
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from qkd_jax.data.contents import FIELDS, SplitContents, arrays_of, contents_of, joined, rows_of
from qkd_jax.data.examples import Split
from qkd_jax.data.labelled_set import concatenate
from qkd_jax.data.sources import fingerprint as data_fingerprint
from qkd_jax.data.splits import summarise
from qkd_jax.errors import CheckpointError, ConfigError, DataError, QkdError
from qkd_jax.learners.shape import learner_of
from qkd_jax.nn.backbone import Backbone
from qkd_jax.npz import read_npz
from qkd_jax.paths import in_utf8
from qkd_jax.protocol.tasks import split_name
from qkd_jax.reports.files import IMAGES
from qkd_jax.reports.forms import problem
from qkd_jax.reports.ledger import LEDGER, NOTED, Ledger, missing_files, needs_ledger
from qkd_jax.runs.manifest import damage_of
from qkd_jax.runs.plan import Plan
from qkd_jax.runs.provenance import provenance, versions
from qkd_jax.runs.writer import encoded_arrays, encoded_json
from qkd_jax.settings import config as configuration
from qkd_jax.settings.config import Config

logger = logging.getLogger("qkd_jax")

# Checkpoint numbers are task * this + step, so that they increase over the whole run. With a
# teacher each task counts twice.
STEPS_PER_TASK = 10_000_000
FOLDER_NAME = re.compile(r"[\w,=+-]([\w.,=+ -]*[\w.,=+-])?")


def run_folder(out: Path, config: Config, variant: str = "") -> Path:
    """The folder of a run, <out>/<experiment>/<method>[-<variant>]/seed<k>.

    Raises:
      ConfigError: the name of the experiment or the variant cannot be that of a folder, or `out` is
        not UTF-8.
    """
    for kind, name in (("experiment", config.experiment), ("--variant", variant)):
        if not name and kind == "--variant":
            continue
        if not FOLDER_NAME.fullmatch(name) or len(name.encode()) > 100:
            raise ConfigError(
                f"{kind}: expected a plain folder name (letters, digits, spaces inside and . , = + "
                f"_ -, not starting with a dot, at most 100 bytes), found {name!r}"
            )
    name = f"{config.method}-{variant}" if variant else config.method
    return in_utf8(out, "--out") / config.experiment / name / f"seed{config.seed}"


def is_begun(folder: Path) -> bool:
    """Whether there is a run to continue, with a checkpoint, or a finished one to keep."""
    finished = (folder / "config.json").exists() and (folder / "summary.json").exists()
    return finished or bool(_checkpoints(folder))


class Begun(NamedTuple):
    """A run in its folder.

    Attributes:
      planned: the plan to continue with; images are in the order that the run began with.
      summary: of a finished run; None while there is work to do, also because the checkpoint of its
        last task is damaged or gone.
      changed: whether settings differ from those in the folder, of which none changes a result.
      removed: ids of images that the run began with and that are gone.
      content: the fingerprint of the remaining images; "" for older runs, which recorded none and
        did not check their images.
      missing: names of files that the run wrote and that are gone.
    """

    planned: Plan
    summary: dict | None
    changed: bool
    removed: tuple[str, ...]
    content: str
    missing: tuple[str, ...]


def begun_run(
    folder: Path,
    planned: Plan,
    contents: SplitContents,
    backbone: Backbone | None = None,
    teacher: Backbone | None = None,
    *,
    allow_removed: bool = False,
) -> Begun | None:
    """The run in a folder; None where there is none to continue.

    Without `backbone` the weights are not compared. With `allow_removed` a run continues although
    images that it began with are gone.

    Raises:
      CheckpointError: the folder holds a run with other settings, data or weights, or is damaged.
    """
    if not is_begun(folder):
        return None
    try:
        missing = () if needs_ledger(folder) else missing_files(folder)
        ledger = Ledger(folder).read()
    except DataError as error:
        raise CheckpointError(str(error)) from None
    settings = folder / "config.json"
    if not settings.exists() and ledger.agrees("config.json", _settings_of(planned.config)):
        stored = planned.config
    else:
        try:
            stored = configuration.from_dict(read_json(settings))
        except ConfigError as error:
            raise CheckpointError(f"{settings} cannot be used: {error}") from None
    # The shapes of what a run keeps depend on it, so it stays even if images were removed.
    shapes = dataclasses.replace(
        planned.config.shapes, max_task_images=stored.shapes.max_task_images
    )
    config = dataclasses.replace(planned.config, shapes=shapes)
    changed = configuration.difference(stored, config)
    changeable = configuration.changeable_settings()
    results = [line for line in changed if line.partition(":")[0] not in changeable]
    if results:
        raise CheckpointError(
            f"{folder} holds a run with other settings:\n  "
            + "\n  ".join(results)
            + "\nuse the same settings to continue it, or another --out or --variant for a new run"
        )
    environment_then = read_json(folder / "environment.json")
    if not environment_then:
        raise CheckpointError(
            f"{folder / 'environment.json'}: expected weights and data that the run began with, "
            "found an empty object; restore it from a copy"
        )
    if backbone is not None:
        for name, now in fingerprints(backbone, teacher).items():
            # Runs older than this entry are only checked for the name of the weights, a setting.
            then = environment_then.get(name)
            if then not in (None, now):
                raise CheckpointError(
                    f"{folder} was begun with another backbone ({name}: {then} -> {now}); use the "
                    "weights it began with, or another --out or --variant"
                )
    summary = read_json(folder / "summary.json") if (folder / "summary.json").exists() else {}
    finished = bool(summary.get("finished"))
    if finished and _checkpoints(folder):  # else there is nothing to go on from, as in a record
        incomplete = missing or needs_ledger(folder)
        finished = not incomplete and not _is_lost(folder, config, len(planned.tasks))
    data, removed, content = _same_images(
        *(folder, planned, contents, environment_then, ledger),
        finished=finished,
        allow_removed=allow_removed,
    )
    return Begun(
        planned._replace(config=config, data=data),
        summary if finished else None,
        changed=bool(changed),
        removed=removed,
        content=content,
        missing=missing,
    )


def _is_lost(folder: Path, config: Config, num_tasks: int) -> bool:
    """Whether what the last task of a finished run left is damaged or gone, and must be learned
    again.
    """
    newest = max(_checkpoints(folder))
    turns = 1 if learner_of(config).teacher is None else 2
    return newest < num_tasks * turns * STEPS_PER_TASK or bool(
        damage_of(folder / "checkpoints" / str(newest))
    )


def _checkpoints(folder: Path) -> list[int]:
    names = (path.name for path in (folder / "checkpoints").glob("*"))
    return [int(name) for name in names if name.isdigit()]


def _same_images(
    folder: Path,
    planned: Plan,
    contents: SplitContents,
    environment_then: dict,
    ledger: Ledger,
    *,
    finished: bool,
    allow_removed: bool,
) -> tuple[Split, tuple[str, ...], str]:
    """(images of the run in its order, ids of those that are gone, fingerprint of the others).

    Images are looked for on both sides, since a split that is computed from ids (`data.validation`,
    a set without a split) changes as soon as a file has another name.

    Raises:
      CheckpointError: lists the images that differ.
    """
    known = environment_then.get("data_content")
    if known is None:  # a run of an older version
        then, now = environment_then.get("data_fingerprint"), data_fingerprint(planned.data)
        if then not in (None, now):
            raise _other_data(folder, [f"data_fingerprint: {then} -> {now}"])
        return planned.data, (), ""
    path = folder / IMAGES
    if finished and not path.exists():  # a copy made by `record`
        if known != contents.sha256():
            raise _other_data(folder, [f"the {planned.data.train.noun}s are others (data_content)"])
        return planned.data, (), known
    lost = not path.exists() and ledger.agrees(IMAGES, encoded_arrays(arrays_of(contents)))
    began = contents if lost else _read_images(path)
    if began.class_names != contents.class_names:
        changed = sorted(set(began.class_names) ^ set(contents.class_names))[:5]
        raise _other_data(folder, [f"the names of the classes differ: {', '.join(changed)}"])
    then = joined(began)
    rows, new = rows_of(then, joined(contents))
    train, test = np.split(rows, [len(began.train.ids)])
    left = began._replace(train=began.train.take(train >= 0), test=began.test.take(test >= 0))
    gone = then.ids[rows < 0].tolist()
    replaced = sorted(set(gone) & set(new))
    removed = [name for name in gone if name not in replaced]
    problems = [f"{name}: other content" for name in replaced]
    problems += [f"{name}: new" for name in new if name not in replaced]
    was_allowed = left.sha256() == known
    if problems or (removed and not (allow_removed or was_allowed)):
        changes = problems + [f"{name}: gone" for name in removed]
        raise _other_data(folder, changes, bool(problems))
    data = planned.data
    if not np.array_equal(rows, np.arange(len(data.train) + len(data.test))):
        everything = concatenate(data, data.train.name)
        data = Split(
            *(
                everything.take(side[side >= 0], part.name)
                for side, part in zip((train, test), data, strict=True)
            )
        )
    return data, tuple(removed), left.sha256()


def _other_data(folder: Path, changes: list[str], hopeless: bool = True) -> CheckpointError:
    advice = "use the data it began with, or another --out or --variant for a new run"
    if not hopeless:
        advice = f"put them back, continue without them by --allow-removed, or {advice}"
    count = "1 difference" if len(changes) == 1 else f"{len(changes)} differences"
    return CheckpointError(
        f"{folder} was begun with other data; {count}:{summarise(changes)}\n{advice}"
    )


def _read_images(path: Path) -> SplitContents:
    try:
        return contents_of(read_npz(path, FIELDS))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; restore it from a copy") from None
    except (OSError, QkdError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); restore it from a copy") from None


def begin_folder(
    folder: Path,
    planned: Plan,
    contents: SplitContents,
    backbone: Backbone,
    teacher: Backbone | None,
    leaked: list[list[str]],
    cut: tuple[int, ...],
) -> None:
    """Writes what is needed to repeat the run, which test examples are also trained on, and how
    many examples of each side are longer than the backbone reads.
    """
    recorded = (
        environment(backbone)
        | {
            **fingerprints(backbone, teacher),
            "data_fingerprint": data_fingerprint(planned.data),
            "data_content": contents.sha256(),
            "leaked_test_images": leaked,
            "examples": f"{planned.data.train.noun}s",
        }
        | ({"cut_texts": list(cut)} if any(cut) else {})
        | NOTED
    )
    written = {"environment.json": encoded_json(recorded)}
    Ledger(folder).write(written | _following(planned, contents))


def _following(planned: Plan, contents: SplitContents) -> dict[str, bytes]:
    """The files of a run that follow from its settings and data; config.json is the last."""
    config = planned.config
    order = {
        "order": planned.order.tolist(),
        "order_seed": config.protocol.order_seed if config.protocol.shuffle else None,
        "split": _split_name(planned),
        "tasks": [list(task.classes) for task in planned.tasks],
        "class_names": list(planned.data.train.class_names),
    }
    described = learner_of(config).describe(config)
    return {
        "class_order.json": encoded_json(order),
        IMAGES: encoded_arrays(arrays_of(contents)),
        **{name: text.encode() for name, text in described.items()},
        "config.json": _settings_of(config),
    }


def _settings_of(config: Config) -> bytes:
    return encoded_json(configuration.to_dict(config))


def continue_folder(folder: Path, begun: Begun, contents: SplitContents) -> None:
    """Records settings that may change, the remaining images, and other code or another machine;
    writes what is missing anew, or tells that it is lost.
    """
    ledger = Ledger(folder).read()
    if not (folder / LEDGER).exists():
        if needs_ledger(folder):
            logger.warning("%s is gone; its files are taken as they are", folder / LEDGER)
        ledger.adopt(*_written_files(folder))
    anew = {
        name: content
        for name, content in _following(begun.planned, contents).items()
        if name in begun.missing and ledger.agrees(name, content)
    }
    later = ("matrix.json", "summary.json")  # by the loop
    lost = [n for n in begun.missing if n not in anew and Path(n).name not in later]
    for name in lost:
        logger.warning("%s is lost; what was learned and measured is kept", folder / name)
    ledger.lose(*lost)
    then = read_json(folder / "environment.json")
    now = then | NOTED
    if begun.content != then.get("data_content", ""):
        removed = sorted({*then.get("removed_images", []), *begun.removed})
        now |= {"data_content": begun.content, "removed_images": removed}
    here = provenance()
    before = [{name: then.get(name) for name in here}, *then.get("continued_by", [])]
    if here not in before:
        now["continued_by"] = [*before[1:], here]
    if now != then:
        anew["environment.json"] = encoded_json(now)
    if begun.changed:
        anew["config.json"] = _settings_of(begun.planned.config)
    ledger.write(anew)


def _written_files(folder: Path) -> list[str]:
    """The names of the files of a run that belong into its ledger."""
    kinds = ("*.json", "*.npz", "*.jsonl", "circuit.txt", "predictions/*.npz")
    paths = (path for kind in kinds for at in ("", "teacher/") for path in folder.glob(at + kind))
    return sorted(p.relative_to(folder).as_posix() for p in paths if p.name != LEDGER)


def _split_name(planned: Plan) -> str:
    """The split name, such as B0-Inc10; for a single task the increment is all classes."""
    if len(planned.tasks) == 1:
        return split_name(0, planned.config.shapes.num_classes)
    wanted = planned.config.protocol
    return split_name(wanted.base, wanted.increment)


def environment(backbone: Backbone) -> dict[str, Any]:
    """Machine, version of the code, packages, devices and weights of a run."""
    return {
        "platform": platform.platform(),
        **provenance(),
        "versions": versions(),
        "devices": [str(device) for device in jax.local_devices()],
        "command": ["python", "-m", "qkd_jax", *sys.argv[1:]],
        "backbone": backbone.name,
    }


def fingerprint(backbone: Backbone) -> str:
    """A short hash of the backbone, since a run must continue with the same weights."""
    import hashlib

    digest = hashlib.sha256(repr(backbone.spec).encode())
    digest.update(getattr(backbone.preprocessing, "sha256", "").encode())  # of a tokenizer
    for leaf in jax.tree.leaves(backbone.params):
        array = np.asarray(leaf, np.float32).ravel()
        digest.update(np.ascontiguousarray(array[:: max(1, array.size // 4096)]).tobytes())
    return digest.hexdigest()[:16]


def fingerprints(backbone: Backbone, teacher: Backbone | None = None) -> dict[str, str]:
    """The hashes of a run's weights, by their names in environment.json."""
    found = {"weights_fingerprint": fingerprint(backbone)}
    return found if teacher is None else found | {"teacher_fingerprint": fingerprint(teacher)}


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; restore it from a copy") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror or error})") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); restore it from a copy") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is damaged (no JSON object); restore it from a copy")
    if wrong := problem(path.name, value):
        raise CheckpointError(f"{path} is damaged ({wrong}); restore it from a copy")
    return value
