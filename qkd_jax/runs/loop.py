"""The loop over tasks; the only file with clock, disk, logs and signals.

A run lives in one folder (README, "What a run leaves behind") and can be killed at any moment: the
same command continues it and ends with the same numbers as a run that was never interrupted.
"""

import json
import logging
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from qkd_jax.engine import hosts
from qkd_jax.protocol import metrics
from qkd_jax.protocol import tasks as protocol
from qkd_jax.settings.config import Config
from qkd_jax.data.contents import read_contents, told_leaks, verify
from qkd_jax.data.crops import crop_draws
from qkd_jax.data.image_set import ImageSet
from qkd_jax.data.streams import epoch_batches, eval_batches, prefetch
from qkd_jax.errors import CheckpointError, QkdError, check_system
from qkd_jax.learners.qkd.gate import num_parameters
from qkd_jax.engine import verbs
from qkd_jax.learners.shape import learner_of
from qkd_jax.nn.vit import Backbone
from qkd_jax.runs.plan import Plan, plan
from qkd_jax.runs.progress import NullProgress, Progress, counting
from qkd_jax.runs.folder import (
    Writer,
    begin_folder,
    begun_run,
    continue_folder,
    exclusive,
    run_folder,
)
from qkd_jax.engine.sharding import runner_of
from qkd_jax.runs.slot_features import SlotFeatures
from qkd_jax.learners.state import LearnerState, join, split

logger = logging.getLogger("qkd_jax")

# Checkpoint numbers: task * this + step, so that they rise over the whole run.
STEPS_PER_TASK = 10_000_000
# Inference is timed on fresh images for at least this long, or until the test set ends.
INFERENCE_SECONDS = 2.0
TRAINING_RATE = "train.learning_rate"


class Interrupted(Exception):
    """SIGINT or SIGTERM arrived; the state was saved."""


def run(
    config: Config,
    backbone: Backbone,
    out: Path,
    *,
    variant: str = "",
    show_progress: bool = False,
    allow_removed: bool = False,
) -> dict[str, Any]:
    """Trains and evaluates one method with one seed; continues what is there. Returns the summary.

    Args:
      config: as given by the user; its shapes are filled in from the data.
      backbone: the loaded weights.
      out: the folder above `<experiment>/<method>/seed<k>`.
      variant: part of the folder name after the method, for runs with other settings.
      show_progress: a bar on a terminal or notebook, plain lines elsewhere.
      allow_removed: go on although images that the run began with are gone.

    Raises:
      QkdError: bad data, settings, or a run folder of other settings. Interrupted: a signal
        arrived; all saved.
    """
    check_system()
    planned = plan(config)
    folder = run_folder(out, planned.config, variant)
    shows = show_progress and hosts.is_first()
    num_images = len(planned.data.train) + len(planned.data.test)
    with counting("reading", num_images, shows) as advance:
        contents = read_contents(planned.data, advance)
    find = partial(begun_run, folder, contents=contents, backbone=backbone)
    begun = find(planned, allow_removed=allow_removed)
    if begun is not None and begun.summary is not None:
        return begun.summary
    # Before the folder is made: settings and images that do not fit leave nothing behind.
    loop = _Loop(begun.planned if begun else planned, backbone, folder, variant, show_progress)
    leaked: list[list[str]] = []
    if begun is None or not begun.content:  # else it was checked when it began
        with counting("checking", num_images, shows) as advance:
            leaked = verify(planned.data, advance).leaked
        if leaked and shows:
            print(f"warning: {told_leaks(leaked)}", flush=True)
        elif leaked and hosts.is_first():
            logger.warning(told_leaks(leaked))
    first = hosts.is_first()
    with exclusive(folder, locks=first):
        # Again under the lock: another process may have worked here in between.
        now = find(planned, allow_removed=allow_removed)
        if now is not None and now.summary is not None:
            return now.summary
        if (now is None) != (begun is None):
            raise CheckpointError(f"another process began or removed {folder}; run it again")
        if first and now is None:
            begin_folder(folder, planned, contents, backbone, leaked)
        elif first and now.changed:
            continue_folder(folder, now)
        hosts.wait()
        return loop.run()


class _Loop:
    """One run in progress."""

    def __init__(self, planned, backbone, folder, variant, show_progress):
        self.config, self.data, self.tasks, _ = planned
        self.folder, self.variant = folder, variant
        self.show_progress, self.progress = show_progress, NullProgress()
        self.learner = learner_of(self.config)
        self.runner = runner_of(self.config.train)
        self.writer = Writer(folder, hosts.is_first())
        key = jax.random.key(self.config.seed)
        # On one device; `everywhere` has the copies of all.
        self.state = self.runner.alone(verbs.init_state(key, backbone, self.config))
        self._placed: tuple[LearnerState, LearnerState] | None = None
        self.task_of_class = protocol.task_of_class(self.tasks, self.config.shapes.num_classes)
        self.correct, self.total = metrics.empty_matrix(len(self.tasks))
        self.within_task = np.zeros_like(self.correct)
        self.confusion: np.ndarray | None = None
        # What all sessions took so far, of this one what is booked; see `clock`.
        self.spent = {"wall": 0.0, "train": 0.0, "eval": 0.0, "steps": 0.0}
        self.spent |= {"timed_images": 0, "peak_memory_mb": 0.0}
        self.compiled = False  # the first step of a session compiles, and is not timed
        self.counts = {"trained": 0, "extracted": 0}
        self.began = self.lap_began = time.monotonic()
        self.test = self._features_of(self.data.test)
        self.stop = False

    @property
    def everywhere(self) -> LearnerState:
        """The state with a copy on every device, made when it is first asked for."""
        if self._placed is None or self._placed[0] is not self.state:
            self._placed = None  # gives its memory back first
            self._placed = (self.state, self.runner.place(self.state))
        return self._placed[1]

    def epochs_of(self, task: protocol.Task) -> int:
        """Epochs of a task; 0 where the method trains nothing in it."""
        trains = self.learner.loss is not None and self.learner.trains(self.config, task.index)
        epochs = self.config.train.epochs
        if task.index > 0:
            epochs = self.config.train.later_epochs or epochs
        return epochs if trains else 0

    def images_of(self, task: protocol.Task) -> int:
        """Images trained on in a task, every epoch counted."""
        return self.epochs_of(task) * int(np.isin(self.data.train.labels, task.classes).sum())

    def steps_of(self, task: protocol.Task) -> int:
        """Optimisation steps of a task; the last batch of an epoch may be padded."""
        images = int(np.isin(self.data.train.labels, task.classes).sum())
        return self.epochs_of(task) * -(-images // self.config.train.batch_size)

    def run(self) -> dict[str, Any]:
        from qkd_jax.runs.checkpoint import Checkpoints

        folder = self.folder / "checkpoints"
        with Checkpoints(folder, hosts.shared) as checkpoints, self._signals():
            first, restored = self._restore(checkpoints)
            steps = [self.steps_of(task) for task in self.tasks]
            images = [self.images_of(task) for task in self.tasks]
            if self.show_progress and hosts.is_first():
                # Less may be left to do than was done, where images were removed in between.
                done = min(sum(steps), sum(steps[:first]) + restored), self.counts["trained"]
                self.progress = Progress(
                    sum(steps),
                    sum(images),
                    done_steps=done[0],
                    done_images=min(sum(images), done[1]),
                )
            with self.progress:
                if first or restored:
                    self.progress.message(f"continuing after task {first}, step {restored}")
                for task in self.tasks[first:]:
                    self._learn(task, checkpoints)
        summary = self._summary(finished=True, inference_rate=self._inference_rate())
        self.writer.json("summary.json", summary)
        hosts.wait()
        return summary

    def _restore(self, checkpoints) -> tuple[int, int]:
        """Continues from the newest checkpoint: the task to go on with, the steps done in it."""
        found = checkpoints.restore(self.state)
        if found is None:
            self.writer.trim_log("metrics.jsonl", -1, 0)
            return 0, 0
        state, meta = found
        self.state = self.runner.alone(state)
        names = ("correct", "total", "within_task")
        self.correct, self.total, self.within_task = (np.asarray(meta[k], np.int64) for k in names)
        self.confusion = None if meta["confusion"] is None else np.asarray(meta["confusion"])
        self.spent, self.counts = self.spent | meta["spent"], meta["counts"]
        first = meta["finished_tasks"]
        self.writer.trim_log("metrics.jsonl", int(self.state.task), int(self.state.step))
        learned = np.flatnonzero((self.task_of_class >= 0) & (self.task_of_class < first))
        if 0 < first < len(self.tasks):
            # Counted when they were first computed; a resumed run reports the same number.
            self._fill(self.test, self.learner.slots(first - 1), learned, count=False)
        return first, int(self.state.step) if int(self.state.task) == first else 0

    def _learn(self, task: protocol.Task, checkpoints) -> None:
        """Trains, closes and evaluates one task."""
        train = self.data.train.take(np.flatnonzero(np.isin(self.data.train.labels, task.classes)))
        num_steps = self.steps_of(task)
        self.progress.start_task(task.index, len(self.tasks))
        features = self._features_of(train)
        self.lap_began = time.monotonic()
        if int(self.state.task) < task.index:
            self.state = verbs.open_task(self.state, task, num_steps)
            if self.learner.survey is not None:
                self.state = verbs.prepare(self.state, self._survey(features))
        if num_steps:
            if not self.config.data.augment:
                # Resumed within the task: the checkpoint has counted them.
                fresh = int(self.state.step) == 0
                self._fill(features, self.learner.teachers(task.index), task.classes, count=fresh)
            self._train(task, train, features, num_steps, checkpoints)
        self.state = verbs.freeze(self.state)
        if self.learner.survey is not None:
            self.state = verbs.absorb(self.state, self._survey(features))
        self._fill(features, self.learner.slots_at_end(task.index), task.classes)
        self.state = verbs.finish(self.state, features.batches())
        self._need_finite("when the task ended", self.learner.end_rate)
        self._lap("train")
        self._evaluate(task)
        self._save(checkpoints, task.index + 1)

    def _survey(self, features: SlotFeatures) -> Any:
        return self.runner.survey(self.everywhere, features.images_in_batches())

    def _features_of(self, images: ImageSet) -> SlotFeatures:
        return SlotFeatures(images, self.config, self.state.backbone.spec, self.runner)

    def _fill(self, features: SlotFeatures, slots, classes, *, count: bool = True) -> np.ndarray:
        """Computes missing features of `classes` under slots first..end-1; the rows of those."""
        before = features.computed
        rows = features.fill(self.everywhere, slots, classes)
        self.counts["extracted"] += (features.computed - before) * count
        return rows

    def _train(self, task, train, features, num_steps, checkpoints) -> None:
        config, batch_size = self.config, self.config.train.batch_size
        epochs = self.epochs_of(task)
        per_epoch = num_steps // epochs
        start = self.everywhere
        held, moving = split(start)
        done = int(self.state.step)
        # The same in every task, so that the step is compiled once.
        cached = not config.data.augment and bool(self.learner.teachers(len(self.tasks)))
        with self.writer.log("metrics.jsonl") as log:
            for epoch in range(done // per_epoch, epochs):
                skipped = done - epoch * per_epoch
                place = {"seed": config.seed, "task": task.index, "epoch": epoch}
                batches = epoch_batches(
                    len(train),
                    batch_size,
                    start_step=skipped,
                    padded_to=self.runner.padded(batch_size),
                    **place,
                )
                loaded = prefetch(
                    self._training_batches(start, train, features, batches, place, cached)
                )
                began = time.monotonic()
                for batch, real in loaded:
                    moving, values = self.runner.step(held, moving, batch)
                    done += 1
                    self.counts["trained"] += real
                    record = {name: float(value) for name, value in values.items()}
                    self._time_step(real, time.monotonic() - began)
                    bad = [name for name, value in record.items() if not np.isfinite(value)]
                    if "loss" in bad:
                        raise self._diverged(", ".join(bad), f"step {done}", TRAINING_RATE)
                    log.write(json.dumps(self._log_line(task, epoch, done, record)) + "\n")
                    self.progress.update(1, real, record, epoch, epochs)
                    stop = hosts.any_of(self.stop)
                    if stop or (done % config.train.checkpoint_every == 0 and done < num_steps):
                        log.flush()
                        self._lap("train")
                        self.state = self.runner.alone(join(held, moving))
                        self._need_finite(f"step {done}", TRAINING_RATE)
                        self._save(checkpoints, task.index)
                    if stop:
                        raise Interrupted
                    began = time.monotonic()
        self.state = self.runner.alone(join(held, moving))
        self._need_finite(f"step {done}", TRAINING_RATE)

    def _need_finite(self, when: str, rate: str) -> None:
        from qkd_jax.runs.checkpoint import not_finite

        bad = not_finite(self.state)
        if bad:
            raise self._diverged(bad, when, rate)

    def _diverged(self, what: str, when: str, rate: str) -> QkdError:
        """`rate`: the setting that moved what is no longer finite; "" where nothing was trained."""
        advice = f"Lower {rate} (with another --variant or --out), or look" if rate else "Look"
        return QkdError(
            f"{what} became NaN or infinite in task {int(self.state.task) + 1} of "
            f"{len(self.tasks)}, {when}; the last good state is in {self.folder / 'checkpoints'}. "
            f"{advice} at the images of this task."
        )

    def _time_step(self, images: int, seconds: float) -> None:
        """Books a step from the wait for its batch to its loss; not a session's first, which
        compiles.
        """
        if self.compiled:
            self.spent["steps"] += seconds
            self.spent["timed_images"] += images
        self.compiled = True

    def _training_batches(
        self, state, train, features, batches, place, cached
    ) -> Iterator[tuple[dict, int]]:
        """(this host's rows of a batch, how many rows of the whole batch are images)."""
        config = self.config
        for every_index, every_mask in batches:
            indices, mask = hosts.own_rows(every_index), hosts.own_rows(every_mask)
            if config.data.augment:
                draws = crop_draws(indices, **place)
                batch = {"image": train.load(indices, config.backbone.image_size, draws)}
            else:
                inputs = features.inputs(state, indices)
                batch = {"tokens" if inputs.ndim == 3 else "image": inputs}
            if cached:
                batch["features"] = features.values[indices]
            batch |= {"label": train.labels[indices].astype(np.int32), "mask": mask}
            yield batch, int(every_mask.sum())

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
        rows = self._fill(self.test, () if from_images else self.learner.slots(task.index), seen)
        labels = self.data.test.labels[rows]
        scores, relevance = [], []
        for indices, mask in eval_batches(len(rows), self.test.batch_size):
            if from_images:
                inputs = self.test.inputs(self.everywhere, rows[hosts.own_rows(indices)])
                found, weights = self.runner.predict(self.everywhere, inputs)
            else:
                found, weights = verbs.score(self.state, self.test.values[rows[indices]])
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
        self.writer.arrays(f"predictions/after_task_{task.index}.npz", saved)
        self.writer.json(
            "matrix.json",
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

    def _inference_rate(self) -> float:
        """Images a second of the final model: all its slots and the score, nothing kept before.

        Decoding is not counted. Compiled programs are warmed on one slot before the clock starts.
        """
        task = len(self.tasks) - 1
        from_images = self.learner.reads_images(self.config)
        slots = () if from_images else self.learner.slots(task)
        size = min(self.test.batch_size, len(self.data.test))
        everything = range(self.config.shapes.num_classes)

        def classify(features, slots):
            features.fill(self.everywhere, slots, everything)
            for indices, _ in eval_batches(len(features.set), features.batch_size):
                if from_images:
                    inputs = features.inputs(self.everywhere, hosts.own_rows(indices))
                    self.runner.predict(self.everywhere, inputs)
                else:
                    jax.block_until_ready(verbs.score(self.state, features.values[indices]))

        images, seconds = 0, 0.0
        for start in range(0, len(self.data.test) - size + 1, size):
            batch = self.data.test.take(np.arange(start, start + size))
            if not images:
                classify(self._features_of(batch), slots[:1])
            features = self._features_of(batch)
            features.images(np.arange(size))
            began = time.monotonic()
            classify(features, slots)
            seconds += time.monotonic() - began
            images += size
            if hosts.any_of(seconds >= INFERENCE_SECONDS):
                break
        return images / seconds

    def _peak_memory_mb(self) -> float:
        """Largest resident memory of any session so far."""
        import resource  # not on Windows, where the package can at least be imported

        here = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        return max(here, self.spent["peak_memory_mb"])

    def _save(self, checkpoints, finished_tasks: int) -> None:
        step = int(self.state.step) if finished_tasks == int(self.state.task) else 0
        meta = {
            "finished_tasks": finished_tasks,
            "correct": self.correct.tolist(),
            "total": self.total.tolist(),
            "within_task": self.within_task.tolist(),
            "confusion": None if self.confusion is None else self.confusion.tolist(),
            "spent": {
                **self.spent,
                "wall": self.clock(),
                "peak_memory_mb": self._peak_memory_mb(),
            },
            "counts": self.counts,
        }
        checkpoints.save(finished_tasks * STEPS_PER_TASK + step, self.state, meta)
        if finished_tasks == int(self.state.task) + 1:
            self.writer.json("summary.json", self._summary(finished=False))
        if hosts.any_of(self.stop):
            raise Interrupted

    def _summary(self, finished: bool, inference_rate: float | None = None) -> dict[str, Any]:
        """summary.json; see docs/metrics.md for every number's definition."""
        measured = metrics.summarise(
            self.correct,
            self.total,
            within_task_correct=self.within_task,
            confusion=self.confusion,
        )
        trainable, spent = self.state.trainable, self.spent
        timed = spent["timed_images"]
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
            "train_seconds": spent["train"],
            "eval_seconds": spent["eval"],
            "training_images_per_second": timed / spent["steps"] if timed else None,
            "inference_images_per_second": inference_rate,
            "peak_memory_mb": self._peak_memory_mb(),
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


__all__ = ["Interrupted", "Plan", "plan", "run", "run_folder"]
