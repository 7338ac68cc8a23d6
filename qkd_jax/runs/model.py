"""What a run has learned so far, and what its devices compute with it."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from qkd_jax.data.image_set import ImageSet
from qkd_jax.data.streams import eval_batches
from qkd_jax.engine import hosts, verbs
from qkd_jax.engine.sharding import runner_of
from qkd_jax.learners.shape import learner_of
from qkd_jax.learners.state import LearnerState
from qkd_jax.nn.vit import Backbone
from qkd_jax.protocol.tasks import Task
from qkd_jax.runs.slot_features import SlotFeatures
from qkd_jax.settings.config import Config


class Model:
    """A learner, its state, and the devices it is on.

    Attributes:
      state: on one device; assign a new one when it has changed.
    """

    def __init__(self, config: Config, backbone: Backbone):
        """Raises ConfigError for settings that do not fit the backbone or the devices."""
        self.config, self.learner = config, learner_of(config)
        self.runner = runner_of(config.train)
        key = jax.random.key(config.seed)
        self.state = self.runner.alone(verbs.init_state(key, backbone, config))
        self._placed: tuple[LearnerState, LearnerState] | None = None

    @property
    def everywhere(self) -> LearnerState:
        """The state with a copy on every device, made when it is first asked for."""
        if self._placed is None or self._placed[0] is not self.state:
            self._placed = None  # gives its memory back first
            self._placed = (self.state, self.runner.place(self.state))
        return self._placed[1]

    def take(self, state: LearnerState) -> None:
        """Goes on with a state that was restored, or trained on all devices."""
        self.state = self.runner.alone(state)

    def open(self, task: Task, num_steps: int, features: SlotFeatures) -> None:
        """The next task begins, after a survey of its images where the learner asks for one."""
        self.state = verbs.open_task(self.state, task, num_steps)
        if self.learner.survey is not None:
            self.state = verbs.prepare(self.state, self._survey(features))

    def freeze(self, features: SlotFeatures) -> None:
        """What was trained becomes a filled slot; the images are surveyed once more."""
        self.state = verbs.freeze(self.state)
        if self.learner.survey is not None:
            self.state = verbs.absorb(self.state, self._survey(features))

    def finish(self, features: SlotFeatures) -> None:
        """Statistics, prototypes and whatever else is made of a task's features when it ends."""
        self.state = verbs.finish(self.state, features.batches())

    def features_of(self, images: ImageSet) -> SlotFeatures:
        """Room for the features of a set of images, none computed yet."""
        return SlotFeatures(images, self.config, self.state.backbone.spec, self.runner)

    def slots_read(self, task: int) -> Sequence[int]:
        """The slots that `scores` reads when `task` is the last."""
        return () if self.learner.reads_images(self.config) else self.learner.slots(task)

    def scores(self, features: SlotFeatures, rows: np.ndarray) -> Iterator[tuple]:
        """(scores [B, C], relevance [B, T] or None, mask [B]) of batches of `rows`, in order; the
        slots that are read must be filled.
        """
        from_images = self.learner.reads_images(self.config)
        for indices, mask in eval_batches(len(rows), features.batch_size):
            if from_images:
                inputs = features.inputs(self.everywhere, rows[hosts.own_rows(indices)])
                yield *self.runner.predict(self.everywhere, inputs), mask
            else:
                yield *verbs.score(self.state, features.values[rows[indices]]), mask

    def parameters(self) -> dict[str, int]:
        """How many numbers optimisation steps move, for each part of what is trained."""
        return {
            name: sum(leaf.size for leaf in jax.tree.leaves(part))
            for name, part in sorted(self.state.trainable.items())
        }

    def _survey(self, features: SlotFeatures) -> Any:
        return self.runner.survey(self.everywhere, features.images_in_batches())
