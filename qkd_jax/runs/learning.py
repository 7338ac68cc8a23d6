"""One learner of a run, task after task: it learns a task, and is evaluated on all classes seen."""

import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from qkd_jax.data.streams import prefetch
from qkd_jax.engine import hosts
from qkd_jax.errors import CheckpointError, QkdError
from qkd_jax.learners.cost import kept_bytes, passes_per_input
from qkd_jax.learners.state import LearnerState, join, split
from qkd_jax.protocol.calibration import calibration
from qkd_jax.protocol.tasks import Task, task_of_class
from qkd_jax.reports.ledger import Ledger
from qkd_jax.runs.batches import training_batches
from qkd_jax.runs.books import Books
from qkd_jax.runs.evaluation import (
    Accuracies,
    draws_distance,
    halves,
    inference_rate,
    joined,
    predictions,
    shown_examples,
)
from qkd_jax.runs.model import Model
from qkd_jax.runs.plan import Plan
from qkd_jax.runs.progress import NullProgress, told_task
from qkd_jax.runs.slot_features import SlotFeatures
from qkd_jax.runs.store import package_code
from qkd_jax.runs.tracking import Tracker
from qkd_jax.runs.writer import Writer, encoded_arrays, encoded_json
from qkd_jax.settings.config import digest, end_rate
from qkd_jax.settings.plugins import loaded_plugins


class Learning:
    """One learner of a run with what it has learned, measured and spent so far.

    Attributes:
      name: "" for the learner of the run, "teacher" for its teacher.
      planned: the plan, with the settings of this learner.
      progress: where progress is shown.
      trackers: where numbers go beside metrics.jsonl.
      told: the line to show of the task that was evaluated last.
    """

    def __init__(
        self,
        name: str,
        planned: Plan,
        model: Model,
        digests: tuple[np.ndarray, np.ndarray],
        ledger: Ledger,
        rate: str = "train.learning_rate",
    ):
        """`digests`: of the contents of training and test set; `ledger`: of the run; `rate`: the
        setting of the learning rate.

        Raises:
          ConfigError: the backbone does not read what the data have.
        """
        self.name, self.planned, self.model, self.folder = name, planned, model, ledger.folder
        self._rate = rate
        self.writer = Writer(ledger, name, hosts.is_first())
        self.config, self.data, self.tasks, _ = planned
        self.learner = model.learner
        self.progress: NullProgress = NullProgress()
        self.trackers: list[Tracker] = []
        self.task_of_class = task_of_class(self.tasks, self.config.shapes.num_classes)
        self.accuracies = Accuracies.none_yet(len(self.tasks))
        self.calibration: dict[str, Any] = {}  # after the last task
        self.books = Books()
        self.told = ""
        self.taken = 0  # tasks that were not learned here, but taken from the store
        self._for_others: Callable[[], None] = lambda: None
        self._digests, self._test_digests = digests
        self.test = model.features_of(self.data.test, self._test_digests)

    @property
    def _keeps_features(self) -> bool:
        """Whether the features that the loss reads are the same in every step of a task."""
        return not self.config.data.augment or self.learner.slots.loss_view == "test"

    @property
    def state(self) -> LearnerState:
        """The state of the learner."""
        return self.model.state

    def restore(self, state: LearnerState, kept: dict[str, Any], finished: int) -> None:
        """Continues with `state` and with what `saved` gave, after `finished` tasks."""
        self.model.take(state)
        self.accuracies = Accuracies.restored(kept)
        self.calibration = kept.get("calibration", {})
        self.books.restore(kept)
        self.taken = kept.get("taken", 0)
        self.writer.trim_log("metrics.jsonl", int(state.task), int(state.step))
        if finished and not self.writer.has("matrix.json"):
            self.writer.write({"matrix.json": encoded_json(self.accuracies.matrix())})
        if 0 < finished < len(self.tasks):
            read = set(self.model.slots_read(finished - 1))
            for task in self.tasks[:finished]:
                # In the order of the first time, so that no bit differs; they were counted then.
                slots = [slot for slot in self.model.slots_read(task.index) if slot in read]
                self._fill(self.test, slots, self._seen(task), count=False)

    def saved(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the state, as plain JSON."""
        also = {"calibration": self.calibration, "taken": self.taken}
        return {**self.accuracies.saved(), **self.books.saved(), **also}

    def steps_done(self, task: Task) -> int:
        """Optimisation steps done in `task` so far."""
        return int(self.state.step) if int(self.state.task) == task.index else 0

    def learn_or_take(
        self, task: Task, save: Callable[[], None], asked: Callable[[], bool]
    ) -> None:
        """Learns and evaluates a task, for a teacher unless an earlier run has left both in the
        store. What a teacher learns does not depend on its student.
        """
        store = self.model.store if self.name else None
        if store is None:
            self.learn(task, save, asked)
            self.evaluate(task)
            return
        from qkd_jax.runs.checkpoint import named_arrays

        data = [
            array.tobytes()
            for array in (
                *(self._digests, self.data.train.labels),
                *(self._test_digests, self.data.test.labels),
            )
        ]
        content = hashlib.sha256(b"".join(data)).hexdigest()
        settings = digest(self.config), self.config.seed, self.tasks[: task.index + 1]
        what = ("taught", package_code(), content, settings, *loaded_plugins().items())
        begun = int(self.state.task) == task.index
        if not begun and self._take_over(task, store.find(*what)):
            return
        self.learn(task, save, asked)
        found = named_arrays(self.state) | self.evaluate(task)
        self._for_others = partial(store.keep, found, *what)

    def keep_for_others(self) -> None:
        """Puts what was learned last into the store, once it is saved: a run that is killed in
        between learns again, and does not take from the store what it cannot show in its log.
        """
        keep, self._for_others = self._for_others, lambda: None
        keep()

    def _take_over(self, task: Task, found: dict[str, np.ndarray] | None) -> bool:
        """Continues after a task with what another run found; whether it can."""
        if found is None:
            return False
        from qkd_jax.runs.checkpoint import with_named_arrays

        self.books.start_lap()
        names = ("scores", "relevance", "scores_with_task")
        measured = {name: found.pop(name, None) for name in names}
        try:
            self.model.take(with_named_arrays(self.state, found))
        except CheckpointError:  # damaged
            return False
        self.taken += 1
        self.progress.start_task(task.index, len(self.tasks), self.name)
        self.progress.update(self.planned.steps(task), self.planned.images(task))
        rows = np.flatnonzero(np.isin(self.test.set.labels, self._seen(task)))
        self._record(task, rows, **measured)
        return True

    def learn(self, task: Task, save: Callable[[], None], asked: Callable[[], bool]) -> None:
        """Opens, surveys, trains, freezes and finishes one task, or what is left of it.

        Args:
          save: saves this learner as it is now, from time to time within the task.
          asked: whether to save after this step already.

        Raises:
          QkdError: a loss or a state is not finite.
        """
        self.progress.start_task(task.index, len(self.tasks), self.name)
        rows = self.planned.rows(task)
        features = self.model.features_of(self.data.train.take(rows), self._digests[rows])
        num_steps = self.planned.steps(task)
        self.books.start_lap()
        if int(self.state.task) < task.index:
            self.model.open(task, num_steps, features)
        if num_steps:
            if self._keeps_features:
                # Resumed within the task: the checkpoint has counted them.
                fresh = int(self.state.step) == 0
                self._fill(features, self.learner.slots.loss(task.index), task.classes, count=fresh)
            if not self.config.data.augment:
                features.fill_taught(self.model.everywhere)
            self._train(task, features, save, asked)
        self.model.freeze(features)
        self._fill(features, self.learner.slots.at_end(task.index), task.classes)
        self.model.finish(features)
        self._need_finite("when the task ended", partial(end_rate, self.config))
        self.books.end_lap("train")

    def _train(self, task: Task, features: SlotFeatures, save, asked) -> None:
        """Does the remaining optimisation steps of a task."""
        train, epochs = self.config.train, self.planned.epochs(task)
        num_steps, done = self.planned.steps(task), int(self.state.step)
        per_epoch = num_steps // epochs
        start = self.model.everywhere
        held, moving = split(start)
        # The same in every task, so that the step is compiled once.
        cached = self._keeps_features and bool(self.learner.slots.loss(len(self.tasks)))
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
                    if not np.isfinite(record["loss"]):
                        self.model.take(join(held, moving))
                        what = ["loss", *filter(None, [self._not_finite()])]
                        raise self._diverged(" and ".join(what), f"step {done}", self._rate)
                    line = self._log_line(task, epoch, done, record)
                    log.write(json.dumps(line) + "\n")
                    self._track("train", line)
                    self.progress.update(1, images, record, epoch, epochs)
                    due = done % train.checkpoint_every == 0 and done < num_steps
                    if asked() or due:
                        log.flush()
                        self.books.end_lap("train")
                        self._take(join(held, moving), done)
                        save()
                    self.books.start_step()
        self._take(join(held, moving), done)

    def _take(self, trained: LearnerState, step: int) -> None:
        """Continues with what the steps up to `step` trained, unless it is not finite."""
        self.model.take(trained)
        self._need_finite(f"step {step}", lambda path: self._rate)

    def _log_line(self, task: Task, epoch: int, step: int, record: dict) -> dict[str, Any]:
        return {
            "task": task.index,
            "step": step,
            "epoch": epoch,
            "images_seen": self.books.trained,
            "wall_s": round(self.books.wall_seconds(), 3),
            **record,
        }

    def _track(self, kind: str, values: dict[str, Any]) -> None:
        for tracker in self.trackers:
            tracker.log(kind, values, self.books.trained)

    def _seen(self, task: Task) -> list[int]:
        """The classes of tasks up to and including `task`."""
        return [c for t in self.tasks[: task.index + 1] for c in t.classes]

    def evaluate(self, task: Task) -> dict[str, np.ndarray]:
        """Evaluates on all classes seen; every (image, slot) pair is computed once in a run.

        Returns:
          "scores" [N, C] and, of methods that have it, "relevance" [N, T] of the test set's images;
          after the last task also "scores_with_task" [N, C].
        """
        rows = self._fill(self.test, self.model.slots_read(task.index), self._seen(task))
        scores, relevance = joined(self.model.scores(self.test, rows))
        found = {"scores": scores, "relevance": relevance}
        if task.index == len(self.tasks) - 1:
            tasks = self.task_of_class[self.data.test.labels[rows]].astype(np.int32)
            told = self.model.scores_with_task(self.test, rows, tasks)
            found["scores_with_task"] = None if told is None else joined(told)[0]
        self._record(task, rows, **found)
        return {name: values for name, values in found.items() if values is not None}

    def _record(self, task: Task, rows, scores, relevance, scores_with_task=None) -> None:
        """Writes what was measured after a task on the test images `rows`.

        Raises:
          QkdError: an image has no largest score; those of classes not yet seen are -inf.
        """
        if not np.isfinite(scores.max(axis=1)).all():
            raise self._diverged(f"scores of test {self.data.test.noun}s", "in evaluation", "")
        ids, labels = self.data.test.ids[rows], self.data.test.labels[rows]
        predicted = predictions(
            ids, labels, scores, relevance, self.task_of_class, scores_with_task
        )
        self.accuracies = self.accuracies.after(task.index, predicted, self.task_of_class)
        if task.index == len(self.tasks) - 1:
            self.calibration = calibration(scores, labels, halves(len(rows), self.config.seed))
        shown = shown_examples(self.data.test, rows, predicted)
        self.writer.write(
            {
                f"predictions/after_task_{task.index}.npz": encoded_arrays(predicted),
                "matrix.json": encoded_json(self.accuracies.matrix()),
                "examples.json": encoded_json({"after_task": task.index, "test": shown}),
            }
        )
        self.books.end_lap("eval")
        self._track("test", {"task": task.index} | self.accuracies.after_task(task.index))
        self.told = (
            f"{told_task(task.index, len(self.tasks), self.name)}  classes "
            f"{len(self._seen(task))}  "
            f"{self.accuracies.line(task.index)}"
        )

    def inference_rate(self) -> float:
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

    def draws_distance(self) -> float | None:
        """How far what is drawn of classes is from the features of their test images."""
        if self.learner.draw is None:
            return None
        rows = self._fill(self.test, (0,), self._seen(self.tasks[-1]), count=False)
        width = self.state.backbone.spec.width
        return draws_distance(
            self.state, self.test.values[rows, 0, :width], self.data.test.labels[rows]
        )

    def summary(self) -> dict[str, Any]:
        """The part of summary.json that one learner has; docs/metrics.md defines every number."""
        parameters = self.model.parameters()
        return {
            "method": self.config.method,
            **self.accuracies.summary(),
            **self.calibration,
            "trainable_parameters": sum(parameters.values()),
            "parameters": parameters,
            **self.cost,
            "compilations": self.model.engine.compilations,
            "devices": self.model.engine.num_devices,
            **self.books.summary(),
        } | ({"tasks_taken_from_store": self.taken} if self.taken else {})

    @functools.cached_property
    def cost(self) -> dict[str, float]:
        """Passes for each input and bytes kept, which follow from settings and shapes alone."""
        passes = passes_per_input(self.config, self.state.backbone.spec.depth)
        return {"passes_per_image": passes, **kept_bytes(self.state)}

    def _fill(self, features: SlotFeatures, slots, classes, *, count: bool = True) -> np.ndarray:
        """Computes missing features of `classes` under `slots`; returns the rows of these."""
        before = features.computed
        rows = features.fill(self.model.everywhere, slots, classes)
        self.books.extracted += (features.computed - before) * count
        return rows

    def _need_finite(self, when: str, rate_of: Callable[[str], str]) -> None:
        """`rate_of`: the path of an array -> the setting of the learning rate that trained it."""
        if bad := self._not_finite():
            raise self._diverged(bad, when, rate_of(bad))

    def _not_finite(self) -> str | None:
        from qkd_jax.runs.checkpoint import not_finite

        return not_finite(self.state)

    def _diverged(self, what: str, when: str, rate: str) -> QkdError:
        """The error for `what` that is not finite; `rate`: the setting of its learning rate."""
        advice = f"Lower {rate} (with another --variant or --out), or look" if rate else "Look"
        of_teacher = f" of the {self.name}" if self.name else ""
        return QkdError(
            f"{what}{of_teacher} became NaN or infinite in task {int(self.state.task) + 1} of "
            f"{len(self.tasks)}, {when}; the last good state is in {self.folder / 'checkpoints'}. "
            f"{advice} at the {self.data.train.noun}s of this task."
        )
