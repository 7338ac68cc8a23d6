"""The loop over tasks.

A run has one folder (docs/api.md) and can be killed at any moment: the same command continues it
and gives the same numbers as a run that was never interrupted.
"""

import logging
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from qkd_jax.data.contents import read_contents, told_cut, told_leaks, verify
from qkd_jax.engine import hosts
from qkd_jax.errors import CheckpointError, check_system
from qkd_jax.nn.backbone import Backbone
from qkd_jax.protocol.tasks import Task
from qkd_jax.reports.ledger import Ledger
from qkd_jax.runs.display import tell
from qkd_jax.runs.folder import (
    STEPS_PER_TASK,
    begin_folder,
    begun_run,
    continue_folder,
    run_folder,
)
from qkd_jax.runs.learning import Learning
from qkd_jax.runs.lock import exclusive
from qkd_jax.runs.model import Model
from qkd_jax.runs.plan import plan
from qkd_jax.runs.progress import NullProgress, Progress, counting
from qkd_jax.runs.signals import StopRequest
from qkd_jax.runs.tracking import need_trackers, new_trackers
from qkd_jax.runs.writer import encoded_json
from qkd_jax.settings.config import Config, digest

logger = logging.getLogger("qkd_jax")


class Interrupted(Exception):
    """SIGINT or SIGTERM arrived; the state was saved."""


def run(
    config: Config,
    backbone: Backbone,
    out: Path,
    *,
    teacher: Backbone | None = None,
    variant: str = "",
    show_progress: bool = False,
    allow_removed: bool = False,
) -> dict[str, Any]:
    """Trains and evaluates one method with one seed, or continues; returns the summary.

    Args:
      config: as given by the user; its shapes are filled in from the data.
      backbone: the loaded weights.
      out: the folder above `<experiment>/<method>/seed<k>`.
      teacher: the loaded weights of the teacher, of methods that learn from one.
      variant: added to the method in the folder name, for runs with other settings.
      show_progress: whether to show a bar (terminal, notebook) or plain lines.
      allow_removed: continue although images that the run began with are gone.

    Raises:
      QkdError: bad data, bad settings, or a run folder with other settings.
      Interrupted: a signal arrived; everything is saved.
    """
    check_system()
    need_trackers(config)
    planned = plan(config)
    folder = run_folder(out, planned.config, variant)
    shows = show_progress and hosts.is_first()
    num_images = len(planned.data.train) + len(planned.data.test)
    with counting("reading", num_images, shows) as advance:
        contents = read_contents(planned.data, advance)
    find = partial(begun_run, folder, contents=contents, backbone=backbone, teacher=teacher)
    begun = find(planned, allow_removed=allow_removed)
    if begun is not None and begun.summary is not None:
        return begun.summary
    # Before the folder is made, so that settings and images that do not fit leave nothing behind.
    loop = _Loop(
        begun.planned if begun else planned,
        contents,
        backbone,
        teacher,
        folder,
        variant,
        show_progress,
    )
    leaked: list[list[str]] = []
    cut: tuple[int, ...] = ()
    if begun is None or not begun.content:  # else it was checked when it began
        with counting("checking", num_images, shows) as advance:
            leaked = verify(planned.data, advance).leaked
        cut = tuple(part.cut(backbone) for part in planned.data)
        if any(cut) and shows:
            tell(told_cut(cut, planned.data, backbone.spec.input_size))
        if leaked and shows:
            tell(f"warning: {told_leaks(leaked, planned.data.test)}")
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
            begin_folder(folder, planned, contents, backbone, teacher, leaked, cut)
        elif first:
            continue_folder(folder, now, contents)
        hosts.wait()
        return loop.run()


class _Loop:
    """One run in progress: of one learner, or for each task of a teacher and then its student."""

    def __init__(self, planned, contents, backbone, teacher, folder, variant, show_progress):
        self.planned, self.folder, self.variant = planned, folder, variant
        self.config, self.data, self.tasks, _ = planned
        self.shows, self.progress = show_progress and hosts.is_first(), NullProgress()
        self.stop = StopRequest(self._tell_stop)
        digests = contents.digests_of(self.data)
        self.ledger = Ledger(folder)
        model = Model.new(self.config, backbone, teacher)
        self.own = Learning("", planned, model, digests, self.ledger)
        self.learnings = [self.own]
        if (teaching := self.own.state.teacher) is not None:
            taught = planned._replace(config=teaching.config)
            rate = self.own.learner.teacher.rate
            self.learnings = [
                Learning("teacher", taught, Model(teaching), digests, self.ledger, rate),
                self.own,
            ]

    def run(self) -> dict[str, Any]:
        """Runs all remaining tasks; returns the summary."""
        from qkd_jax.runs.checkpoint import Checkpoints

        folder = self.folder / "checkpoints"
        self.ledger.read()  # what began or continued the run is in it
        with Checkpoints(folder, hosts.shared) as checkpoints, self.stop, ExitStack() as open_logs:
            done = self._restore(checkpoints)
            self._open_trackers(open_logs)
            first = self._next(done)
            self.progress = self._progress(done)
            for learning in self.learnings:
                learning.progress = self.progress
            with self.progress:
                if first is not None and (done or first[1].steps_done(first[0])):
                    task, learning = first
                    self.progress.message(
                        f"continuing after task {task.index}, step {learning.steps_done(task)}"
                        + f" of the {learning.name}" * bool(learning.name)
                    )
                while (now := self._next(done)) is not None:
                    task, learning = now
                    self._teach()
                    learning.learn_or_take(
                        task,
                        partial(self._save, checkpoints, done),
                        lambda: hosts.any_of(self.stop.asked),
                    )
                    done += 1
                    self._save(checkpoints, done, learning.told)
                    learning.keep_for_others()
        distance = self.own.draws_distance()
        summary = self._summary(finished=True, rate=self.own.inference_rate())
        if distance is not None:
            summary["draws_energy_distance"] = distance
        self.own.writer.write({"summary.json": encoded_json(summary)})
        hosts.wait()
        return summary

    def _open_trackers(self, open_logs: ExitStack) -> None:
        """Opens what the settings ask for; they are closed with `open_logs`."""
        for learning in self.learnings if hosts.is_first() else ():
            seen = learning.books.trained
            learning.trackers = new_trackers(self.config, self.folder, learning.name, seen)
            for tracker in learning.trackers:
                open_logs.callback(tracker.close)

    def _next(self, done: int) -> tuple[Task, Learning] | None:
        """The task and the learner that come after `done` of these; None at the end."""
        task, turn = divmod(done, len(self.learnings))
        return (self.tasks[task], self.learnings[turn]) if task < len(self.tasks) else None

    def _teach(self) -> None:
        """Gives the student its teacher as it is now."""
        for teacher in self.learnings[:-1]:
            if self.own.state.teacher is not teacher.state:
                self.own.model.take(self.own.state.taught_by(teacher.state))

    def _restore(self, checkpoints) -> int:
        """Continues from the newest checkpoint; returns how many (task, learner) are done."""
        found = checkpoints.restore(self.own.state)
        if found is None:
            for learning in self.learnings:
                learning.writer.trim_log("metrics.jsonl", -1, 0)
            return 0
        state, kept = found
        done = kept["finished_tasks"] * len(self.learnings) + kept.get("finished_teachers", 0)
        for turn, learning in enumerate(self.learnings):
            own = (kept["teacher"], state.teacher) if learning is not self.own else (kept, state)
            finished = (done + len(self.learnings) - 1 - turn) // len(self.learnings)
            learning.restore(own[1], own[0], finished)
        return done

    def _save(self, checkpoints, done: int, told: str = "") -> None:
        """Saves everything, and stops if a signal asked for it.

        Args:
          done: how many (task, learner) are finished.
          told: what to show of the one that just was; not before it is saved.

        Raises:
          Interrupted: a signal arrived, on any host.
        """
        finished_tasks, finished_teachers = divmod(done, len(self.learnings))
        kept = {"finished_tasks": finished_tasks, **self.own.saved()}
        for teacher in self.learnings[:-1]:
            kept |= {"finished_teachers": finished_teachers, "teacher": teacher.saved()}
        now = self._next(done)
        step = now[1].steps_done(now[0]) if now else 0
        self._teach()
        for learning in self.learnings:
            learning.writer.keep_log("metrics.jsonl")
        checkpoints.save(done * STEPS_PER_TASK + step, self.own.state, kept)
        if step == 0 and finished_teachers == 0:
            summary = self._summary(finished=False)
            self.own.writer.write({"summary.json": encoded_json(summary)})
        if told:
            self.progress.end_task(told)
        if hosts.any_of(self.stop.asked):
            raise Interrupted

    def _summary(self, finished: bool, rate: float | None = None) -> dict[str, Any]:
        """The content of summary.json; docs/metrics.md defines every number."""
        taught: dict[str, Any] = {t.name: t.summary() for t in self.learnings[:-1]}
        if self.own.learner.teacher is not None:
            taught["student"] = digest(self.own.learner.teacher.alone(self.config))
        return {
            "experiment": self.config.experiment,
            "variant": self.variant,
            "seed": self.config.seed,
            "num_tasks": len(self.tasks),
            **self.own.summary(),
            **taught,
            "inference_images_per_second": rate,
            "finished": finished,
        }

    def _progress(self, done: int) -> NullProgress | Progress:
        """The progress to show once `done` (task, learner) are finished."""
        if not self.shows:
            return NullProgress()
        turns = [(task, learning) for task in self.tasks for learning in self.learnings]
        steps = [learning.planned.steps(task) for task, learning in turns]
        now = self._next(done)
        begun = now[1].steps_done(now[0]) if now else 0
        images = sum(learning.planned.images(task) for task, learning in turns)
        # More may be done than the plan has in total, if images were removed in between.
        return Progress(
            sum(steps),
            images,
            done_steps=min(sum(steps), sum(steps[:done]) + begun),
            done_images=min(images, sum(learning.books.trained for learning in self.learnings)),
            noun=self.data.train.noun,
        )

    def _tell_stop(self) -> None:
        self.progress.message("stopping after this step; the same command continues")
