"""The model of a run: learner, state and devices."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from qkd_jax.data.examples import Examples
from qkd_jax.data.streams import eval_batches
from qkd_jax.engine import hosts, verbs
from qkd_jax.engine.engine import Engine
from qkd_jax.engine.sharding import engine_of
from qkd_jax.errors import ConfigError
from qkd_jax.learners.shape import learner_of
from qkd_jax.learners.state import LearnerState
from qkd_jax.learners.task_adapters import on_host
from qkd_jax.nn.backbone import Backbone
from qkd_jax.protocol.tasks import Task
from qkd_jax.runs.slot_features import SlotFeatures
from qkd_jax.runs.store import Store, backbone_key, store_folder
from qkd_jax.settings.config import Config


class Model:
    """A learner, its state, and the engine that it runs on.

    Attributes:
      state: on one device; assign a new one to change it.
    """

    def __init__(self, state: LearnerState):
        """`state`: before the first task.

        Raises:
          ConfigError: the settings do not fit the devices.
        """
        config, backbone = state.config, state.backbone
        self.config, self.learner = config, learner_of(config)
        self.engine = engine_of(config.train)
        if on_host(config) and type(self.engine) is not Engine:
            raise ConfigError(
                "adapter.memory: expected device, since only one device fetches adapters from the "
                "host, found host; set train.devices=1 and train.model_devices=1"
            )
        self.state = self.engine.alone(state)
        self._placed: tuple[LearnerState, LearnerState] | None = None
        self._store = None
        # With several hosts either all or none must compute, so the disk of one does not help.
        if config.data.store_gib and hosts.count() == 1:
            key = backbone_key(backbone, config.backbone.compute_dtype)
            if state.query is not backbone:
                key += backbone_key(state.query, config.backbone.compute_dtype)
            limit = int(config.data.store_gib * 2**30)
            self._store = Store(store_folder(), limit, key)

    @property
    def store(self) -> Store | None:
        """What runs share on disk; None = nothing."""
        return self._store

    @property
    def reads_inputs(self) -> bool:
        """Whether scores need a pass over the inputs, and not only slot features."""
        return self.learner.predict(self.config) is not None

    @classmethod
    def new(cls, config: Config, backbone: Backbone, teacher: Backbone | None = None) -> "Model":
        """A model before the first task; a student needs the backbone of its teacher.

        Raises:
          ConfigError: the settings do not fit the backbones or the devices.
        """
        key = jax.random.key(config.seed)
        return cls(verbs.init_state(key, backbone, config, teacher=teacher))

    @property
    def everywhere(self) -> LearnerState:
        """The state with a copy on every device, made on first use."""
        if self._placed is None or self._placed[0] is not self.state:
            self._placed = None  # gives its memory back first
            self._placed = (self.state, self.engine.place(self.state))
        return self._placed[1]

    def take(self, state: LearnerState) -> None:
        """Continues with a state that was restored, or trained on all devices."""
        self.state = self.engine.alone(state)

    def open(self, task: Task, num_steps: int, features: SlotFeatures) -> None:
        """Begins the next task, with a survey of its images if the learner has one."""
        self.state = self.engine.open_task(self.state, task, num_steps)
        if self.learner.survey is not None:
            self.state = self.engine.before(self.state, self._survey(features))

    def freeze(self, features: SlotFeatures) -> None:
        """Moves what was trained to a filled slot, then surveys the images again."""
        self.state = self.engine.freeze(self.state)
        if self.learner.survey is not None:
            self.state = self.engine.after(self.state, self._survey(features))

    def finish(self, features: SlotFeatures) -> None:
        """Computes what a task leaves from its features, such as prototypes."""
        self.state = self.engine.finish(self.state, features.batches())

    def features_of(self, examples: Examples, digests: np.ndarray | None = None) -> SlotFeatures:
        """`SlotFeatures` of a set. With digests of its contents, the outputs of the frozen model
        are shared with other runs on disk.

        Raises:
          ConfigError: the backbone does not read what the set has.
        """
        store = None if digests is None else self._store
        backbone = self.state.reader
        if set(examples.fields) != set(backbone.spec.fields):
            wanted, read = (", ".join(part) for part in (examples.fields, backbone.spec.fields))
            raise ConfigError(
                f"backbone.name: expected a backbone that reads {examples.noun}s, as "
                f"{examples.name} has them ({wanted}), found {backbone.name or 'one'}, which reads "
                f"{read}"
            )
        return SlotFeatures(examples, self.state, self.engine, store, digests)

    def slots_read(self, task: int) -> Sequence[int]:
        """The slots that `scores` reads after `task`."""
        return () if self.reads_inputs else self.learner.slots.score(task)

    def scores(self, features: SlotFeatures, rows: np.ndarray) -> Iterator[tuple]:
        """(scores [B, C], relevance [B, T] or None, mask [B]) for batches of `rows`, in order.

        The slots that are read must be filled.
        """
        for indices, mask in eval_batches(len(rows), features.batch_size):
            if self.reads_inputs:
                inputs = features.inputs(self.everywhere, rows[hosts.own_rows(indices)])
                yield *self.engine.predict(self.everywhere, inputs), mask
            else:
                yield *self.engine.score(self.state, features.values[rows[indices]]), mask

    def scores_with_task(
        self, features: SlotFeatures, rows: np.ndarray, tasks: np.ndarray
    ) -> Iterator[tuple] | None:
        """(scores [B, C], None, mask [B]) as of `scores` if the learner is told the task of each of
        `rows`, int32 [N]: a diagnostic. None for a learner that chooses no task.
        """
        reads_inputs = self.learner.predict_with_task(self.config) is not None
        if not reads_inputs and self.learner.score_with_task is None:
            return None

        def batches():
            for indices, mask in eval_batches(len(rows), features.batch_size):
                if reads_inputs:
                    own = hosts.own_rows(indices)
                    inputs = features.inputs(self.everywhere, rows[own])
                    scores = self.engine.predict_with_task(self.everywhere, inputs, tasks[own])
                else:
                    known = features.values[rows[indices]]
                    scores = self.engine.score_with_task(self.state, known, tasks[indices])
                yield scores, None, mask

        return batches()

    def parameters(self) -> dict[str, int]:
        """The number of trainable parameters, for each part of what is trained."""
        return {
            name: sum(leaf.size for leaf in jax.tree.leaves(part))
            for name, part in sorted(self.learner.optimised(self.state.trainable).items())
        }

    def _survey(self, features: SlotFeatures) -> Any:
        return self.engine.survey(self.everywhere, features.inputs_in_batches())
