"""The loop over tasks.

A run has one folder (README, "What a run leaves behind") and can be killed at any moment: the same
command continues it and gives the same numbers as a run that was never interrupted.
"""

import json
import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from qkd_jax.data.contents import read_contents, told_cut, told_leaks, verify
from qkd_jax.data.streams import prefetch
from qkd_jax.engine import hosts
from qkd_jax.errors import CheckpointError, QkdError, check_system
from qkd_jax.learners.state import LearnerState, join, split
from qkd_jax.nn.backbone import Backbone
from qkd_jax.protocol.tasks import Task, task_of_class
from qkd_jax.runs.batches import training_batches
from qkd_jax.runs.books import Books
from qkd_jax.runs.evaluation import (
    Accuracies,
    inference_rate,
    joined,
    predictions,
    shown_examples,
)
from qkd_jax.runs.folder import (
    Writer,
    begin_folder,
    begun_run,
    continue_folder,
    exclusive,
    run_folder,
)
from qkd_jax.runs.model import Model
from qkd_jax.runs.plan import plan
from qkd_jax.runs.progress import NullProgress, Progress, counting
from qkd_jax.runs.signals import StopRequest
from qkd_jax.runs.slot_features import SlotFeatures
from qkd_jax.settings.config import Config, end_rate

logger = logging.getLogger("qkd_jax")

# Checkpoint numbers are task * this + step, so that they increase over the whole run.
STEPS_PER_TASK = 10_000_000
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
    """Trains and evaluates one method with one seed, or continues; returns the summary.

    Args:
      config: as given by the user; its shapes are filled in from the data.
      backbone: the loaded weights.
      out: the folder above `<experiment>/<method>/seed<k>`.
      variant: added to the method in the folder name, for runs with other settings.
      show_progress: whether to show a bar (terminal, notebook) or plain lines.
      allow_removed: continue although images that the run began with are gone.

    Raises:
      QkdError: bad data, bad settings, or a run folder with other settings.
      Interrupted: a signal arrived; everything is saved.
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
    # Before the folder is made, so that settings and images that do not fit leave nothing behind.
    loop = _Loop(
        begun.planned if begun else planned, contents, backbone, folder, variant, show_progress
    )
    leaked: list[list[str]] = []
    cut: tuple[int, ...] = ()
    if begun is None or not begun.content:  # else it was checked when it began
        with counting("checking", num_images, shows) as advance:
            leaked = verify(planned.data, advance).leaked
        cut = tuple(part.cut(backbone) for part in planned.data)
        if any(cut) and shows:
            print(told_cut(cut, planned.data, backbone.spec.input_size), flush=True)
        if leaked and shows:
            print(f"warning: {told_leaks(leaked, planned.data.test)}", flush=True)
        elif leaked and hosts.is_first():
            logger.warning(told_leaks(leaked, planned.data.test))
    first = hosts.is_first()
    with exclusive(folder, locks=first):
        # Again under the lock: another process may have worked here in between.
        now = find(planned, allow_removed=allow_removed)
        if now is not None and now.summary is not None:
            return now.summary
        if (now is None) != (begun is None):
            raise CheckpointError(f"another process began or removed {folder}; run it again")
        if first and now is None:
            begin_folder(folder, planned, contents, backbone, leaked, cut)
        elif first and now.changed:
            continue_folder(folder, now)
        hosts.wait()
        return loop.run()


class _Loop:
    """One run in progress."""

    def __init__(self, planned, contents, backbone, folder, variant, show_progress):
        self.planned, self.folder, self.variant = planned, folder, variant
        self.config, self.data, self.tasks, _ = planned
        self.shows, self.progress = show_progress and hosts.is_first(), NullProgress()
        self.stop = StopRequest(self._tell_stop)
        self.writer = Writer(folder, hosts.is_first())
        self.model = Model(self.config, backbone)
        self.learner = self.model.learner
        self.task_of_class = task_of_class(self.tasks, self.config.shapes.num_classes)
        self.accuracies = Accuracies.none_yet(len(self.tasks))
        self.books = Books()
        self.digests, of_test = contents.digests_of(self.data)
        self.test = self.model.features_of(self.data.test, of_test)

    @property
    def state(self) -> LearnerState:
        """The state of the learner."""
        return self.model.state

    def run(self) -> dict[str, Any]:
        """Runs all remaining tasks; returns the summary."""
        from qkd_jax.runs.checkpoint import Checkpoints

        folder = self.folder / "checkpoints"
        with Checkpoints(folder, hosts.shared) as checkpoints, self.stop:
            first, step = self._restore(checkpoints)
            self.progress = self._progress(first, step)
            with self.progress:
                if first or step:
                    self.progress.message(f"continuing after task {first}, step {step}")
                for task in self.tasks[first:]:
                    self._learn(task, checkpoints)
                    self._evaluate(task)
                    self._save(checkpoints, task.index + 1)
        summary = self._summary(finished=True, rate=self._inference_rate())
        self.writer.json("summary.json", summary)
        hosts.wait()
        return summary

    def _restore(self, checkpoints) -> tuple[int, int]:
        """Continues from the newest checkpoint; returns (next task, steps done in it)."""
        found = checkpoints.restore(self.state)
        if found is None:
            self.writer.trim_log("metrics.jsonl", -1, 0)
            return 0, 0
        state, meta = found
        self.model.take(state)
        self.accuracies = Accuracies.restored(meta)
        self.books.restore(meta)
        first = meta["finished_tasks"]
        self.writer.trim_log("metrics.jsonl", int(self.state.task), int(self.state.step))
        if 0 < first < len(self.tasks):
            read = set(self.model.slots_read(first - 1))
            for task in self.tasks[:first]:
                # In the order of the first time, so that no bit differs; they were counted then.
                slots = [slot for slot in self.model.slots_read(task.index) if slot in read]
                self._fill(self.test, slots, self._seen(task), count=False)
        return first, int(self.state.step) if int(self.state.task) == first else 0

    def _learn(self, task: Task, checkpoints) -> None:
        """Opens, surveys, trains, freezes and finishes one task."""
        self.progress.start_task(task.index, len(self.tasks))
        rows = self.planned.rows(task)
        features = self.model.features_of(self.data.train.take(rows), self.digests[rows])
        num_steps = self.planned.steps(task)
        self.books.start_lap()
        if int(self.state.task) < task.index:
            self.model.open(task, num_steps, features)
        if num_steps:
            if not self.config.data.augment:
                # Resumed within the task: the checkpoint has counted them.
                fresh = int(self.state.step) == 0
                self._fill(features, self.learner.slots.loss(task.index), task.classes, count=fresh)
            self._train(task, features, checkpoints)
        self.model.freeze(features)
        self._fill(features, self.learner.slots.at_end(task.index), task.classes)
        self.model.finish(features)
        self._need_finite("when the task ended", end_rate(self.config))
        self.books.end_lap("train")

    def _train(self, task: Task, features: SlotFeatures, checkpoints) -> None:
        """Does the remaining optimisation steps of a task."""
        train, epochs = self.config.train, self.planned.epochs(task)
        num_steps, done = self.planned.steps(task), int(self.state.step)
        per_epoch = num_steps // epochs
        start = self.model.everywhere
        held, moving = split(start)
        # The same in every task, so that the step is compiled once.
        cached = not self.config.data.augment and bool(self.learner.slots.loss(len(self.tasks)))
        with self.writer.log("metrics.jsonl") as log:
            for epoch in range(done // per_epoch, epochs):
                batches = training_batches(
                    features,
                    start,
                    task=task.index,
                    epoch=epoch,
                    start_step=done - epoch * per_epoch,
                    padded_to=self.model.engine.padded(train.batch_size),
                    with_features=cached,
                )
                self.books.start_step()
                for batch, images in prefetch(batches):
                    moving, values = self.model.engine.step(held, moving, batch)
                    done += 1
                    record = {name: float(value) for name, value in values.items()}
                    self.books.end_step(images)
                    bad = [name for name, value in record.items() if not np.isfinite(value)]
                    if "loss" in bad:
                        raise self._diverged(", ".join(bad), f"step {done}", TRAINING_RATE)
                    log.write(json.dumps(self._log_line(task, epoch, done, record)) + "\n")
                    self.progress.update(1, images, record, epoch, epochs)
                    due = done % train.checkpoint_every == 0 and done < num_steps
                    if hosts.any_of(self.stop.asked) or due:
                        log.flush()
                        self.books.end_lap("train")
                        self._take(join(held, moving), done)
                        self._save(checkpoints, task.index)
                    self.books.start_step()
        self._take(join(held, moving), done)

    def _take(self, trained: LearnerState, step: int) -> None:
        """Continues with what the steps up to `step` trained, unless it is not finite."""
        self.model.take(trained)
        self._need_finite(f"step {step}", TRAINING_RATE)

    def _log_line(self, task: Task, epoch: int, step: int, record: dict) -> dict[str, Any]:
        return {
            "task": task.index,
            "step": step,
            "epoch": epoch,
            "images_seen": self.books.trained,
            "wall_s": round(self.books.wall_seconds(), 3),
            **record,
        }

    def _seen(self, task: Task) -> list[int]:
        """The classes of tasks up to and including `task`."""
        return [c for t in self.tasks[: task.index + 1] for c in t.classes]

    def _evaluate(self, task: Task) -> None:
        """Evaluates on all classes seen; every (image, slot) pair is computed once in a run."""
        seen = self._seen(task)
        rows = self._fill(self.test, self.model.slots_read(task.index), seen)
        scores, relevance = joined(self.model.scores(self.test, rows))
        ids, labels = self.data.test.ids[rows], self.data.test.labels[rows]
        predicted = predictions(ids, labels, scores, relevance, self.task_of_class)
        self.accuracies = self.accuracies.after(task.index, predicted, scores, self.task_of_class)
        self.writer.arrays(f"predictions/after_task_{task.index}.npz", predicted)
        self.writer.json("matrix.json", self.accuracies.matrix())
        shown = shown_examples(self.data.test, rows, predicted)
        self.writer.json("examples.json", {"after_task": task.index, "test": shown})
        self.books.end_lap("eval")
        self.progress.end_task(
            f"task {task.index + 1}/{len(self.tasks)}  classes {len(seen)}  "
            f"{self.accuracies.line(task.index)}"
        )

    def _inference_rate(self) -> float:
        """Images per second of the final model, with all its slots and the score."""
        slots = self.model.slots_read(len(self.tasks) - 1)
        everything = range(self.config.shapes.num_classes)

        def classify(features: SlotFeatures, slots: Sequence[int]) -> None:
            features.fill(self.model.everywhere, slots, everything)
            for scores in self.model.scores(features, np.arange(len(features.set))):
                jax.block_until_ready(scores)

        size = self.test.batch_size
        return inference_rate(
            self.data.test, size, slots, self.model.features_of, classify, self.books.now
        )

    def _save(self, checkpoints, finished_tasks: int) -> None:
        """Saves everything, and stops if a signal asked for it.

        Raises:
          Interrupted: a signal arrived, on any host.
        """
        step = int(self.state.step) if finished_tasks == int(self.state.task) else 0
        kept = {
            "finished_tasks": finished_tasks,
            **self.accuracies.saved(),
            **self.books.saved(),
        }
        checkpoints.save(finished_tasks * STEPS_PER_TASK + step, self.state, kept)
        if finished_tasks == int(self.state.task) + 1:
            self.writer.json("summary.json", self._summary(finished=False))
        if hosts.any_of(self.stop.asked):
            raise Interrupted

    def _summary(self, finished: bool, rate: float | None = None) -> dict[str, Any]:
        """The content of summary.json; docs/metrics.md defines every number."""
        parameters = self.model.parameters()
        return {
            "experiment": self.config.experiment,
            "method": self.config.method,
            "variant": self.variant,
            "seed": self.config.seed,
            "num_tasks": len(self.tasks),
            **self.accuracies.summary(),
            "trainable_parameters": sum(parameters.values()),
            "parameters": parameters,
            "compilations": self.model.engine.compilations,
            "devices": self.model.engine.num_devices,
            **self.books.summary(),
            "inference_images_per_second": rate,
            "finished": finished,
        }

    def _fill(self, features: SlotFeatures, slots, classes, *, count: bool = True) -> np.ndarray:
        """Computes missing features of `classes` under `slots`; returns the rows of these."""
        before = features.computed
        rows = features.fill(self.model.everywhere, slots, classes)
        self.books.extracted += (features.computed - before) * count
        return rows

    def _need_finite(self, when: str, rate: str) -> None:
        from qkd_jax.runs.checkpoint import not_finite

        bad = not_finite(self.state)
        if bad:
            raise self._diverged(bad, when, rate)

    def _diverged(self, what: str, when: str, rate: str) -> QkdError:
        """The error for `what` that is not finite; `rate`: the setting of its learning rate."""
        advice = f"Lower {rate} (with another --variant or --out), or look" if rate else "Look"
        return QkdError(
            f"{what} became NaN or infinite in task {int(self.state.task) + 1} of "
            f"{len(self.tasks)}, {when}; the last good state is in {self.folder / 'checkpoints'}. "
            f"{advice} at the {self.data.train.noun}s of this task."
        )

    def _progress(self, first: int, step: int) -> NullProgress | Progress:
        """The progress to show from step `step` of task `first` on."""
        if not self.shows:
            return NullProgress()
        steps = [self.planned.steps(task) for task in self.tasks]
        images = sum(self.planned.images(task) for task in self.tasks)
        # More may be done than the plan has in total, if images were removed in between.
        return Progress(
            sum(steps),
            images,
            done_steps=min(sum(steps), sum(steps[:first]) + step),
            done_images=min(images, self.books.trained),
            noun=self.data.train.noun,
        )

    def _tell_stop(self) -> None:
        self.progress.message("stopping after this step; the same command continues")
