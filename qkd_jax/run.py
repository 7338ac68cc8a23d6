"""The loop over tasks; the only file with clock, disk, logs and signals.

A run lives in one folder (README, "What a run leaves behind") and can be killed at any moment: the
same command continues it and ends with the same numbers as a run that was never interrupted.
"""

import dataclasses
import json
import os
import platform
import resource
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from qkd_jax import config as configuration
from qkd_jax import metrics, protocol
from qkd_jax.config import Config
from qkd_jax.data.image_set import ImageSet, Split
from qkd_jax.data.sources import fingerprint as data_fingerprint
from qkd_jax.data.sources import load_split
from qkd_jax.data.streams import epoch_batches, eval_batches, prefetch
from qkd_jax.errors import CheckpointError, ConfigError, QkdError
from qkd_jax.gate import drawing, num_parameters
from qkd_jax.learners import base
from qkd_jax.nn.vit import Backbone
from qkd_jax.parallel import Runner
from qkd_jax.progress import NullProgress, Progress
from qkd_jax.state import LearnerState, join, split

# A decoded set up to this size stays in memory; larger ones are decoded again in every pass.
KEEP_DECODED_BYTES = 2 * 1024**3
# Checkpoint numbers: task * this + step, so that they rise over the whole run.
STEPS_PER_TASK = 10_000_000


class Interrupted(Exception):
    """SIGINT or SIGTERM arrived; the state was saved."""


class Plan(NamedTuple):
    """A run before its first step: the final config (shapes filled in), data and tasks."""

    config: Config
    data: Split
    tasks: tuple[protocol.Task, ...]
    order: np.ndarray


def plan(config: Config) -> Plan:
    """Opens the data, orders the classes, cuts them into tasks, and fixes the shapes in the config.

    Raises:
      DataError, ProtocolError, ConfigError: see the rooms that raise them.
    """
    data = load_split(
        config.data.source,
        path=config.data.path or None,
        split_file=config.data.split_file or None,
    )
    if config.data.num_classes:
        available = len(data.train.class_names)
        if not 0 < config.data.num_classes <= available:
            raise ConfigError(
                f"data.num_classes={config.data.num_classes}: expected 1..{available}, the "
                f"classes of {config.data.source}, or 0 for all"
            )
        data = Split(*(_first_classes(part, config.data.num_classes) for part in data))
    num_classes = len(data.train.class_names)
    seed = config.protocol.order_seed if config.protocol.shuffle else None
    order = protocol.class_order(num_classes, seed)
    tasks = protocol.split_tasks(order, config.protocol.base, config.protocol.increment)
    config = dataclasses.replace(
        config,
        num_classes=num_classes,
        max_tasks=len(tasks),
        max_task_classes=protocol.max_classes_per_task(tasks),
    )
    return Plan(config, data, tasks, order)


def _first_classes(images: ImageSet, count: int) -> ImageSet:
    kept = images.take(np.flatnonzero(images.labels < count))
    return dataclasses.replace(kept, class_names=images.class_names[:count])


def run(
    config: Config,
    backbone: Backbone,
    out: Path,
    *,
    variant: str = "",
    show_progress: bool = False,
) -> dict[str, Any]:
    """Trains and evaluates one method with one seed; continues what is there. Returns the summary.

    Args:
      config: as given by the user; its shapes are filled in from the data.
      backbone: the loaded weights.
      out: the folder above `<experiment>/<method>/seed<k>`.
      variant: part of the folder name after the method, for runs with other settings.
      show_progress: a bar on a terminal or notebook, plain lines elsewhere.

    Raises:
      QkdError: bad data, settings, or a run folder of other settings. Interrupted: a signal
        arrived; all saved.
    """
    planned = plan(config)
    folder = run_folder(out, planned.config, variant)
    summary = _stored_summary(folder, planned, backbone)
    if summary is not None:
        return summary
    # Before the folder is made: settings that do not fit leave nothing behind.
    loop = _Loop(planned, backbone, folder, variant, show_progress)
    with _exclusive(folder):
        # Again under the lock: another process may have ended in between.
        summary = _stored_summary(folder, planned, backbone)
        if summary is not None:
            return summary
        if not _is_begun(folder):
            _begin_folder(folder, planned, backbone)
        return loop.run()


def run_folder(out: Path, config: Config, variant: str = "") -> Path:
    """Where a run lives."""
    name = f"{config.method}-{variant}" if variant else config.method
    return Path(out) / config.experiment / name / f"seed{config.seed}"


def _is_begun(folder: Path) -> bool:
    """True where there is something to continue; before the first checkpoint nothing is lost."""
    kept = (folder / "checkpoints").glob("[0-9]*")
    return (folder / "config.json").exists() and ((folder / "summary.json").exists() or any(kept))


def _stored_summary(folder: Path, planned: Plan, backbone: Backbone) -> dict | None:
    """The summary of a finished run; None if there is work to do.

    Raises:
      CheckpointError: the folder holds a run with other settings, data or weights, or is damaged.
    """
    if not _is_begun(folder):
        return None
    settings = folder / "config.json"
    try:
        stored = configuration.from_dict(_read_json(settings))
    except ConfigError as error:
        raise CheckpointError(f"{settings} cannot be used: {error}") from None
    changed = configuration.difference(stored, planned.config)
    if changed:
        raise CheckpointError(
            f"{folder} holds a run with other settings:\n  "
            + "\n  ".join(changed)
            + "\nuse the same settings to continue it, or another --out or --variant for a new run"
        )
    environment_then = _read_json(folder / "environment.json")
    for name, now in _identity(planned, backbone).items():
        then = environment_then.get(name, now)
        if then != now:
            raise CheckpointError(
                f"{folder} was begun with other {name.split('_')[0]} ({name}: {then} -> {now}); "
                "use another --out or --variant for a new run"
            )
    if not (folder / "summary.json").exists():
        return None
    summary = _read_json(folder / "summary.json")
    return summary if summary.get("finished") else None


def _identity(planned: Plan, backbone: Backbone) -> dict[str, str]:
    """What must not change while a run is continued, beside its settings."""
    return {
        "backbone_fingerprint": fingerprint(backbone),
        "data_fingerprint": data_fingerprint(planned.data),
    }


def _begin_folder(folder: Path, planned: Plan, backbone: Backbone) -> None:
    """Writes what is needed to run again."""
    config = planned.config
    _write_json(
        folder / "class_order.json",
        {
            "order": planned.order.tolist(),
            "order_seed": config.protocol.order_seed if config.protocol.shuffle else None,
            "split": protocol.split_name(config.protocol.base, config.protocol.increment),
            "tasks": [list(task.classes) for task in planned.tasks],
            "class_names": list(planned.data.train.class_names),
        },
    )
    _write_json(folder / "environment.json", environment(backbone) | _identity(planned, backbone))
    circuit = drawing(config.gate) if config.method == "qkd" else ""
    if circuit:
        _write_atomically(folder / "circuit.txt", circuit.encode())
    _write_json(folder / "config.json", configuration.to_dict(config))  # last: now all is there


def versions() -> dict[str, str]:
    """Versions of Python and the packages that numbers depend on."""
    found = {"python": platform.python_version()}
    names = ("qkd_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "pillow")
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed as a package"
    return found


def environment(backbone: Backbone) -> dict[str, Any]:
    """Versions, devices and weights that a run was made with."""
    return {
        "platform": platform.platform(),
        "versions": versions(),
        "devices": [str(device) for device in jax.local_devices()],
        "command": sys.argv,
        "backbone": backbone.name,
    }


def fingerprint(backbone: Backbone) -> str:
    """A short hash of the backbone's parameters, so that a run is continued with the same
    weights.
    """
    import hashlib

    digest = hashlib.sha256(repr(backbone.spec).encode())
    for leaf in jax.tree.leaves(backbone.params):
        array = np.asarray(leaf, np.float32).ravel()
        digest.update(np.ascontiguousarray(array[:: max(1, array.size // 4096)]).tobytes())
    return digest.hexdigest()[:16]


class _Loop:
    """One run in progress."""

    def __init__(self, planned, backbone, folder, variant, show_progress):
        self.config, self.data, self.tasks, _ = planned
        self.folder, self.variant = folder, variant
        self.show_progress, self.progress = show_progress, NullProgress()
        self.learner = base.learner_of(self.config)
        self.runner = Runner(self.config.train.devices)
        self.runner.check_batch_size("train.batch_size", self.config.train.batch_size)
        self.runner.check_batch_size("train.eval_batch_size", self.config.train.eval_batch_size)
        key = jax.random.key(self.config.seed)
        self.state = self.runner.place(base.init_state(key, backbone, self.config))
        self.task_of_class = protocol.task_of_class(self.tasks, self.config.num_classes)
        self.correct, self.total = metrics.empty_matrix(len(self.tasks))
        self.within_task = np.zeros_like(self.correct)
        self.confusion: np.ndarray | None = None
        # Seconds and counts of earlier sessions; see `clock`.
        self.spent = {"wall": 0.0, "train": 0.0, "eval": 0.0}
        self.counts = {"trained": 0, "extracted": 0}
        self.began = self.lap_began = time.monotonic()
        self.test = _Features(self, self.data.test, "test")
        self.stop = False

    @property
    def epochs(self) -> int:
        return self.config.train.epochs if self.learner.loss is not None else 0

    def images_of(self, task: protocol.Task) -> int:
        """Images trained on in a task, every epoch counted."""
        return self.epochs * int(np.isin(self.data.train.labels, task.classes).sum())

    def steps_of(self, task: protocol.Task) -> int:
        """Optimisation steps of a task; the last batch of an epoch may be padded."""
        if not self.epochs:
            return 0
        return self.epochs * -(
            -self.images_of(task) // (self.epochs * self.config.train.batch_size)
        )

    def run(self) -> dict[str, Any]:
        from qkd_jax.checkpoint import Checkpoints

        with Checkpoints(self.folder / "checkpoints") as checkpoints, self._signals():
            first, restored = self._restore(checkpoints)
            steps = [self.steps_of(task) for task in self.tasks]
            images = [self.images_of(task) for task in self.tasks]
            if self.show_progress:
                self.progress = Progress(
                    sum(steps),
                    sum(images),
                    done_steps=sum(steps[:first]) + restored,
                    done_images=self.counts["trained"],
                )
            with self.progress:
                if first or restored:
                    self.progress.message(f"continuing after task {first}, step {restored}")
                for task in self.tasks[first:]:
                    self._learn(task, checkpoints)
        summary = self._summary(finished=True)
        _write_json(self.folder / "summary.json", summary)
        return summary

    def _restore(self, checkpoints) -> tuple[int, int]:
        """Continues from the newest checkpoint: the task to go on with, and the steps done in
        it.
        """
        log = self.folder / "metrics.jsonl"
        found = checkpoints.restore(self.state)
        if found is None:
            _trim_log(log, -1, 0)
            return 0, 0
        state, meta = found
        self.state = self.runner.place(state)
        names = ("correct", "total", "within_task")
        self.correct, self.total, self.within_task = (np.asarray(meta[k], np.int64) for k in names)
        self.confusion = None if meta["confusion"] is None else np.asarray(meta["confusion"])
        self.spent, self.counts = meta["spent"], meta["counts"]
        first = meta["finished_tasks"]
        _trim_log(log, int(self.state.task), int(self.state.step))
        learned = np.flatnonzero((self.task_of_class >= 0) & (self.task_of_class < first))
        if 0 < first < len(self.tasks):
            # Counted when they were first computed; a resumed run reports the same number.
            counted = self.counts["extracted"]
            self.test.fill(self.state, range(*self.learner.slots(first - 1)), learned)
            self.counts["extracted"] = counted
        return first, int(self.state.step) if int(self.state.task) == first else 0

    def _learn(self, task: protocol.Task, checkpoints) -> None:
        """Trains, closes and evaluates one task."""
        train = self.data.train.take(np.flatnonzero(np.isin(self.data.train.labels, task.classes)))
        num_steps = self.steps_of(task)
        self.progress.start_task(task.index, len(self.tasks))
        if int(self.state.task) < task.index:
            self.state = base.begin_task(self.state, task, num_steps)
        self.state = self.runner.place(self.state)
        features = _Features(self, train, "train")
        self.lap_began = time.monotonic()
        if num_steps:
            if not self.config.data.augment:
                counted = self.counts["extracted"]
                features.fill(self.state, range(*self.learner.teachers(task.index)), task.classes)
                if int(self.state.step):  # resumed within the task: the checkpoint counted them
                    self.counts["extracted"] = counted
            self._train(task, train, features, num_steps, checkpoints)
        self.state = base.freeze(self.state)
        features.fill(self.state, range(*self.learner.slots(task.index)), task.classes)
        self.state = base.finish(self.state, features.batches())
        self._lap("train")
        self._evaluate(task)
        self._save(checkpoints, task.index + 1)

    def _train(self, task, train, features, num_steps, checkpoints) -> None:
        config, batch_size = self.config, self.config.train.batch_size
        per_epoch = num_steps // self.epochs
        held, moving = split(self.state)
        done = int(self.state.step)
        cached = not config.data.augment and self.learner.teachers(task.index)[1] is not None
        with open(self.folder / "metrics.jsonl", "a") as log:
            for epoch in range(done // per_epoch, self.epochs):
                skipped = done - epoch * per_epoch
                batches = epoch_batches(
                    len(train),
                    batch_size,
                    seed=config.seed,
                    task=task.index,
                    epoch=epoch,
                    start_step=skipped,
                )
                loaded = prefetch(self._training_batches(train, features, batches, cached))
                for batch in loaded:
                    moving, values = self.runner.step(held, moving, batch)
                    done += 1
                    real = int(batch["mask"].sum())
                    self.counts["trained"] += real
                    record = {name: float(value) for name, value in values.items()}
                    if not np.isfinite(record["loss"]):
                        raise QkdError(_not_finite(record, task.index, done, self.folder))
                    log.write(json.dumps(self._log_line(task, epoch, done, record)) + "\n")
                    self.progress.update(1, real, record, epoch, self.epochs)
                    if self.stop or (
                        done % config.train.checkpoint_every == 0 and done < num_steps
                    ):
                        log.flush()
                        self._lap("train")
                        self.state = join(held, moving)
                        self._save(checkpoints, task.index)
                    if self.stop:
                        raise Interrupted
        self.state = join(held, moving)

    def _training_batches(self, train, features, batches, cached) -> Iterator[dict]:
        config = self.config
        for indices, mask in batches:
            if config.data.augment:
                canvas = config.data.canvas or train.canvas_size(config.backbone.image_size)
                images = train.load(indices, canvas, "train")
                batch = {"image": images["image"], "aspect": images["aspect"]}
            else:
                inputs = features.inputs(self.state, indices)
                batch = {"tokens" if inputs.ndim == 3 else "image": inputs}
            if cached:
                batch["features"] = features.values[indices]
            yield {**batch, "label": train.labels[indices].astype(np.int32), "mask": mask}

    def _log_line(self, task, epoch, done, record) -> dict:
        return {
            "task": task.index,
            "step": done,
            "epoch": epoch,
            "images_seen": self.counts["trained"],
            "wall_s": round(self.clock(), 3),
            **record,
        }

    def _lap(self, name: str) -> None:
        """Books the seconds since the last lap."""
        now = time.monotonic()
        self.spent[name] += now - self.lap_began
        self.lap_began = now

    def clock(self) -> float:
        """Seconds of this run, all sessions."""
        return self.spent["wall"] + time.monotonic() - self.began

    def _evaluate(self, task: protocol.Task) -> None:
        """Accuracy on all classes seen; every (image, slot) pair is computed once in a run."""
        seen = [c for t in self.tasks[: task.index + 1] for c in t.classes]
        from_images = self.learner.reads_images(self.config)
        slots = () if from_images else range(*self.learner.slots(task.index))
        rows = self.test.fill(self.state, slots, seen)
        labels = self.data.test.labels[rows]
        scores, relevance = [], []
        for indices, mask in eval_batches(len(rows), self.config.train.eval_batch_size):
            if from_images:
                inputs = self.test.inputs(self.state, rows[indices])
                found, weights = self.runner.predict(self.state, inputs)
            else:
                found, weights = base.score(self.state, self.test.values[rows[indices]])
            scores.append(np.asarray(found)[mask])
            if weights is not None:
                relevance.append(np.asarray(weights)[mask])
        scores = np.concatenate(scores)
        top5 = np.argsort(-scores, axis=1, kind="stable")[:, :5]
        self.correct, self.total = metrics.record(
            self.correct, self.total, task.index, labels, top5[:, 0], self.task_of_class
        )
        told = metrics.task_masked_predictions(scores, labels, self.task_of_class)
        self.within_task, _ = metrics.record(
            self.within_task, self.total, task.index, labels, told, self.task_of_class
        )
        truth = self.task_of_class[labels]
        saved = {
            "id": self.data.test.ids[rows],
            "label": labels,
            "task": truth,
            "predicted": top5[:, 0],
            "top5": top5,
        }
        line = f"accuracy {100.0 * self.correct[task.index].sum() / len(rows):.2f}"
        if relevance:
            saved["relevance"] = np.concatenate(relevance)
            num_tasks = len(self.tasks)
            self.confusion = metrics.routing_confusion(truth, saved["relevance"], num_tasks)
            line += f"  routing {100.0 * np.trace(self.confusion) / len(rows):.2f}"
        predictions = self.folder / "predictions"
        predictions.mkdir(exist_ok=True)
        _save_arrays(predictions / f"after_task_{task.index}.npz", saved)
        _write_json(
            self.folder / "matrix.json",
            {
                "orientation": "row = after task, column = evaluated task; counts of images",
                "correct": self.correct.tolist(),
                "total": self.total.tolist(),
            },
        )
        self._lap("eval")
        self.progress.end_task(
            f"task {task.index + 1}/{len(self.tasks)}  classes {len(seen)}  {line}"
        )

    def _save(self, checkpoints, finished_tasks: int) -> None:
        step = int(self.state.step) if finished_tasks == int(self.state.task) else 0
        meta = {
            "finished_tasks": finished_tasks,
            "correct": self.correct.tolist(),
            "total": self.total.tolist(),
            "within_task": self.within_task.tolist(),
            "confusion": None if self.confusion is None else self.confusion.tolist(),
            "spent": {**self.spent, "wall": self.clock()},
            "counts": self.counts,
        }
        checkpoints.save(finished_tasks * STEPS_PER_TASK + step, self.state, meta)
        if finished_tasks == int(self.state.task) + 1:
            _write_json(self.folder / "summary.json", self._summary(finished=False))
        if self.stop:
            raise Interrupted

    def _summary(self, finished: bool) -> dict[str, Any]:
        """summary.json; see docs/metrics.md for every number's definition."""
        measured = metrics.summarise(
            self.correct,
            self.total,
            within_task_correct=self.within_task,
            confusion=self.confusion,
        )
        trainable = self.state.trainable
        return {
            "experiment": self.config.experiment,
            "method": self.config.method,
            "variant": self.variant,
            "seed": self.config.seed,
            "num_tasks": len(self.tasks),
            "routing_accuracy": None,
            **measured,
            "trainable_parameters": sum(leaf.size for leaf in jax.tree.leaves(trainable)),
            "gate_parameters": num_parameters(trainable.get("gate", {})),
            "train_images": self.counts["trained"],
            "extracted_features": self.counts["extracted"],
            "compilations": self.runner.compilations,
            "devices": self.runner.num_devices,
            "wall_seconds": self.clock(),
            "train_images_per_second": self.counts["trained"] / max(self.spent["train"], 1e-9),
            "eval_images_per_second": int(self.total.sum()) / max(self.spent["eval"], 1e-9),
            "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "finished": finished,
        }

    @contextmanager
    def _signals(self):
        """SIGINT and SIGTERM ask the loop to save and stop after the current step."""

        def ask(*_):
            if self.stop:
                raise KeyboardInterrupt
            self.stop = True
            self.progress.message("stopping after this step; the same command continues")

        try:
            before = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not in the main thread, as in some notebooks
            before = {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class _Features:
    """Features [N, S, D] of a set's images under filled slots, each computed once."""

    def __init__(self, loop: _Loop, images: ImageSet, name: str):
        self.loop, self.set, self.name = loop, images, name
        config, width = loop.config, loop.state.backbone.spec.width
        slots = base.num_slots(config)
        self.values = np.zeros((len(images), slots, width), np.float32)
        self.known = np.zeros((len(images), slots), bool)
        size = config.backbone.image_size
        small = len(images) * size * size * 3 <= KEEP_DECODED_BYTES
        self._decoded = np.zeros((len(images), size, size, 3), np.uint8) if small else None
        self._is_decoded = np.zeros(len(images), bool)
        self._tokens, self._has_tokens = self._token_store(), np.zeros(len(images), bool)

    def _token_store(self) -> np.ndarray | None:
        """Room for the frozen blocks before the first adapter, if there are any and it fits in
        memory.
        """
        config, spec = self.loop.config, self.loop.state.backbone.spec
        tokens = 1 + (spec.image_size // spec.patch_size) ** 2
        needed = len(self.set) * tokens * spec.width * 4
        fits = self._decoded is not None and needed <= KEEP_DECODED_BYTES
        if self.loop.learner.loss is None or config.adapter.first_block == 0 or not fits:
            return None
        return np.zeros((len(self.set), tokens, spec.width), np.float32)

    def inputs(self, state: LearnerState, rows: np.ndarray) -> np.ndarray:
        """What the learner reads for `rows`: kept tokens [n, N, D] where they are stored, else
        pixels.
        """
        if self._tokens is None:
            return self.images(rows)
        missing = np.unique(rows[~self._has_tokens[rows]])
        size = self.loop.config.train.eval_batch_size
        for indices, mask in eval_batches(len(missing), size):
            tokens = self.loop.runner.prefix(state, self.images(missing[indices]))
            self._tokens[missing[indices[mask]]] = tokens[mask]
        self._has_tokens[missing] = True
        return self._tokens[rows]

    def images(self, rows: np.ndarray) -> np.ndarray:
        """Pixels uint8 [n, S, S, 3] as a test sees them; decoded once if they fit in memory."""
        size = self.loop.config.backbone.image_size
        if self._decoded is None:
            return self.set.load(rows, size, "test")["image"]
        missing = np.unique(rows[~self._is_decoded[rows]])
        if missing.size:
            self._decoded[missing] = self.set.load(missing, size, "test")["image"]
            self._is_decoded[missing] = True
        return self._decoded[rows]

    def fill(self, state: LearnerState, slots, classes) -> np.ndarray:
        """Computes what is missing for images of `classes` under `slots`; returns the rows of
        those classes.
        """
        rows = np.flatnonzero(np.isin(self.set.labels, list(classes)))
        loop, batch_size = self.loop, self.loop.config.train.eval_batch_size
        for slot in slots:
            missing = rows[~self.known[rows, slot]]
            batches = list(eval_batches(len(missing), batch_size))
            loaded = prefetch((missing[i], m, self.inputs(state, missing[i])) for i, m in batches)
            for batch_rows, mask, inputs in loaded:
                found = loop.runner.extract(state, inputs, slot)
                self.values[batch_rows[mask], slot] = found[mask]
                self.known[batch_rows[mask], slot] = True
                loop.counts["extracted"] += int(mask.sum())
        return rows

    def batches(self) -> Iterator[dict]:
        """Features and labels of the whole set, in order, in batches of one size."""
        for indices, mask in eval_batches(len(self.set), self.loop.config.train.eval_batch_size):
            labels = self.set.labels[indices].astype(np.int32)
            yield {"features": self.values[indices], "label": labels, "mask": mask}


def _not_finite(record: dict, task: int, step: int, folder: Path) -> str:
    bad = [name for name, value in record.items() if not np.isfinite(value)]
    return (
        f"{', '.join(bad)} became NaN or infinite in task {task}, step {step}; the last good state "
        f"is in {folder / 'checkpoints'}. Lower train.learning_rate (with another --variant or "
        "--out), or look at the images of this task."
    )


def _trim_log(path: Path, task: int, step: int) -> None:
    """Drops log lines that the restored state has not seen yet; they will be written again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            record = json.loads(line)
            seen = (record["task"], record["step"]) <= (task, step)
        except (ValueError, KeyError, TypeError):
            break  # the line that a kill cut in two
        if seen:
            kept.append(line)
    _write_atomically(path, "".join(line + "\n" for line in kept).encode())


@contextmanager
def _exclusive(folder: Path):
    """Refuses two processes in one run folder."""
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise CheckpointError(f"another process is running in {folder}") from None
        yield


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; the run folder is damaged") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"{path} is damaged ({error}); delete the run folder or restore it"
        ) from None
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{path} is damaged (no JSON object); delete the run folder or restore it"
        )
    return value


def _write_json(path: Path, value: Any) -> None:
    _write_atomically(path, (json.dumps(value, indent=1) + "\n").encode())


def _write_atomically(path: Path, content: bytes) -> None:
    """A reader sees the old file or the new one, never half of it."""
    temporary = path.with_name(path.name + ".part")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _save_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    temporary = path.with_name(path.name + ".part")
    with open(temporary, "wb") as file:
        np.savez_compressed(file, **arrays)
    os.replace(temporary, path)


__all__ = ["Interrupted", "Plan", "plan", "run", "run_folder"]
