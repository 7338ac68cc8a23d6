"""Features of a set's images, each (image, slot) pair computed once in a run.

A filled slot never changes again, so evaluating after each of T tasks costs N T passes and not N
T^2.
"""

from collections.abc import Iterator

import numpy as np

from qkd_jax.engine import hosts
from qkd_jax.settings.config import Config
from qkd_jax.data.image_set import ImageSet
from qkd_jax.data.streams import eval_batches, prefetch
from qkd_jax.engine import verbs
from qkd_jax.learners.shape import learner_of
from qkd_jax.nn.vit import ViTSpec
from qkd_jax.engine.engine import Runner
from qkd_jax.learners.state import LearnerState

# A decoded set up to this size stays in memory; larger ones are decoded again in every pass.
KEEP_DECODED_BYTES = 2 * 1024**3


class SlotFeatures:
    """Features [N, S, D] of a set's images under filled slots, each computed once."""

    def __init__(self, images: ImageSet, config: Config, spec: ViTSpec, runner: Runner):
        self.set, self.config, self.spec, self.runner = images, config, spec, runner
        slots = verbs.num_slots(config)
        self.values = np.zeros((len(images), slots, spec.width), np.float32)
        self.known = np.zeros((len(images), slots), bool)
        self.computed = 0  # (image, slot) pairs so far
        self.batch_size = runner.padded(config.train.eval_batch_size)
        size = config.backbone.image_size
        small = len(images) * size * size * 3 <= KEEP_DECODED_BYTES
        self._decoded = np.zeros((len(images), size, size, 3), np.uint8) if small else None
        self._is_decoded = np.zeros(len(images), bool)
        self._tokens, self._has_tokens = self._token_store(), np.zeros(len(images), bool)

    def _token_store(self) -> np.ndarray | None:
        """Room for what the blocks before the first adapter give, if there are any and it fits."""
        config, spec = self.config, self.spec
        tokens = 1 + (spec.image_size // spec.patch_size) ** 2
        needed = len(self.set) * tokens * spec.width * 4
        fits = self._decoded is not None and needed <= KEEP_DECODED_BYTES
        learner = learner_of(config)
        if learner.loss is None or learner.first_block(config) == 0 or not fits:
            return None
        return np.zeros((len(self.set), tokens, spec.width), np.float32)

    def inputs(self, state: LearnerState, rows: np.ndarray) -> np.ndarray:
        """What the learner reads for `rows`: kept tokens [n, N, D] where they are stored, else
        pixels.
        """
        if self._tokens is None:
            return self.images(rows)
        missing = np.unique(rows[~self._has_tokens[rows]])
        # Hosts miss different rows: what they do here, they do alone.
        size = self.batch_size // hosts.count()
        for indices, mask in eval_batches(len(missing), size):
            tokens = self.runner.prefix(state, self.images(missing[indices]))
            self._tokens[missing[indices[mask]]] = tokens[mask]
        self._has_tokens[missing] = True
        return self._tokens[rows]

    def images(self, rows: np.ndarray) -> np.ndarray:
        """Pixels uint8 [n, S, S, 3] as a test sees them; decoded once if they fit in memory."""
        size = self.config.backbone.image_size
        if self._decoded is None:
            return self.set.load(rows, size)
        missing = np.unique(rows[~self._is_decoded[rows]])
        if missing.size:
            self._decoded[missing] = self.set.load(missing, size)
            self._is_decoded[missing] = True
        return self._decoded[rows]

    def fill(self, state: LearnerState, slots, classes) -> np.ndarray:
        """Computes what is missing for images of `classes` under `slots`; returns the rows of
        those classes.
        """
        rows = np.flatnonzero(np.isin(self.set.labels, list(classes)))
        for slot in slots:
            missing = rows[~self.known[rows, slot]]
            batches = [(missing[i], m) for i, m in eval_batches(len(missing), self.batch_size)]
            own = hosts.own_rows
            loaded = prefetch((part, m, self.inputs(state, own(part))) for part, m in batches)
            for batch_rows, mask, inputs in loaded:
                found = self.runner.extract(state, inputs, slot, self.values[own(batch_rows)])
                self.values[batch_rows[mask], slot] = found[mask]
                self.known[batch_rows[mask], slot] = True
                self.computed += int(mask.sum())
        return rows

    def images_in_batches(self) -> Iterator[dict]:
        """This host's pixels and mask of the whole set, in batches of one size."""
        own = hosts.own_rows
        for indices, mask in eval_batches(len(self.set), self.batch_size):
            yield {"image": self.images(own(indices)), "mask": own(mask)}

    def batches(self) -> Iterator[dict]:
        """Features and labels of the whole set, in order, in batches of one size."""
        for indices, mask in eval_batches(len(self.set), self.batch_size):
            labels = self.set.labels[indices].astype(np.int32)
            yield {"features": self.values[indices], "label": labels, "mask": mask}
