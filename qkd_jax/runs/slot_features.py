"""Features of a set's inputs, with each (input, slot) pair computed once in a run.

A filled slot never changes, so evaluation after each of T tasks costs N T passes and not N T^2.
What all slots share of an input (`passes.shared_part`) is also computed once.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from qkd_jax.data.examples import Examples
from qkd_jax.data.streams import eval_batches, prefetch
from qkd_jax.engine import hosts
from qkd_jax.engine.engine import Engine
from qkd_jax.learners import passes
from qkd_jax.learners.shape import feature_width, learner_of
from qkd_jax.learners.state import LearnerState, split
from qkd_jax.nn.inputs import Raw, Stem
from qkd_jax.runs.store import Shelf, Store

# Decoded inputs, and what slots share, are kept in memory up to this size. In every pass inputs of
# larger sets are decoded again; what slots share is read from the store, or computed again.
KEEP_BYTES = 2 * 1024**3


class SlotFeatures:
    """Features [N, S, D] of a set's inputs under filled slots, each computed once."""

    def __init__(
        self,
        examples: Examples,
        state: LearnerState,
        engine: Engine,
        store: Store | None = None,
        digests: np.ndarray | None = None,
    ):
        """`state` may be any of the learner. `store` keeps outputs of the frozen model on disk, by
        `digests` uint8 [N, 16] of the inputs' contents; None = nothing is kept on disk.
        """
        config = state.config
        self.set, self.config, self.engine = examples, config, engine
        # Without the weights, whose arrays would stay in memory once more.
        self.reader, self.width = state.reader.replace(params=None), feature_width(state)
        self._resize = state.resizes
        self.store, self.digests = store, digests
        learner = learner_of(config)
        self.frozen = learner.slots.frozen
        slots = learner.num_slots(config)
        self.values = np.zeros((len(examples), slots, self.width), np.float32)
        self.known = np.zeros((len(examples), slots), bool)
        self.computed = 0  # (input, slot) pairs so far
        self.batch_size = engine.padded(config.train.eval_batch_size)
        self._fields, self._shared, self._taught = (_Kept(len(examples)) for _ in range(3))
        self._one_stem = None  # its shapes and types
        # Where nothing is trained each pair is computed once anyway.
        self._shares = learner.loss is not None and learner.first_block(config) is not None

    def inputs(self, state: LearnerState, rows: np.ndarray) -> Raw | Stem:
        """What the learner reads for `rows`: what slots share, or the inputs themselves.

        What slots share is computed by itself in any case, so that no bit depends on where it is
        kept: in memory; if the set is too large, on disk alone; or nowhere.
        """
        if not self._shares:
            return self.raw(rows)
        if self._one_stem is None:
            self._one_stem = jax.eval_shape(passes.shared_part, state, self.raw(rows[:1]))
            size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self._one_stem))
            self._shared.look(size)
        if not self._shared.fits:
            return self._shared_part(state, rows)
        return self._shared.rows(rows, lambda missing: self._shared_part(state, missing))

    def _shared_part(self, state: LearnerState, rows: np.ndarray) -> Any:
        first = learner_of(self.config).first_block(self.config)

        def compute(positions):
            return self._compute_shared_part(state, rows[positions])

        if self.store is None:
            return compute(np.arange(len(rows)))
        return self._shelf("stem", first).rows(self.digests[rows], self._one_stem, compute)

    def _shelf(self, *what: Any) -> Shelf:
        return self.store.shelf(*what, self.reader.spec.input_size, self.set.view)

    def _compute_shared_part(self, state: LearnerState, rows: np.ndarray) -> Any:
        return self._in_batches(rows, lambda raw: self.engine.shared(state, raw))

    def _in_batches(self, rows: np.ndarray, compute: Callable[[Raw], Any]) -> Any:
        """`compute` of `rows`, in batches of equal size. Hosts miss different rows, so each
        computes its own alone.
        """
        size = self.batch_size // hosts.count()
        parts = []
        for indices, mask in eval_batches(len(rows), size):
            part = compute(self.raw(rows[indices]))
            parts.append(jax.tree.map(lambda a, mask=mask: np.asarray(a)[mask], part))
        return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)

    def raw(self, rows: np.ndarray, draws: Any = None) -> Raw:
        """The inputs themselves in the test view, or by `draws` in a training view."""
        if draws is None:
            return Raw(self.fields(rows), self._resize)
        return Raw(self.set.load(rows, self.reader, draws), self._resize)

    def fields(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """The inputs in the test view, decoded once if they fit in memory."""

        def load(missing):
            return self.set.load(missing, self.reader)

        kept = self._fields.rows(rows, load) if self._fields.fits else None
        return load(rows) if kept is None else kept

    def fill_taught(self, state: LearnerState) -> None:
        """Computes what a student's loss reads of its teacher for every input, if that fits in
        memory (`taught`).
        """
        if state.teacher is None:
            return
        everything = np.arange(len(self.set))
        one = jax.eval_shape(passes.teach, split(state)[0], self.raw(everything[:1]))
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(one))
        self._taught.look(size)

        def compute(rows):
            return self._in_batches(rows, lambda raw: self.engine.teach(state, raw))

        if self._taught.fits:
            self._taught.rows(everything, compute)

    def taught(self, rows: np.ndarray) -> Any:
        """What `fill_taught` computed for `rows`; None if there is nothing."""
        if self._taught.tree is None:
            return None
        return jax.tree.map(lambda leaf: leaf[rows], self._taught.tree)

    def fill(self, state: LearnerState, slots, classes) -> np.ndarray:
        """Computes missing features of `classes` under `slots`; returns the rows of these."""
        rows = np.flatnonzero(np.isin(self.set.labels, list(classes)))

        def missing(slot):
            return rows[~self.known[rows, slot]]

        def together(slot):
            return slot == self.frozen, missing(slot).tobytes()

        # Slots that miss the same rows are computed in one pass over them.
        for _, group in itertools.groupby(slots, together):
            group = tuple(group)
            lacking = missing(group[0])
            if group == (self.frozen,):
                features = self._frozen_features(state, lacking)
            else:
                features = self._extract(state, group, lacking)
            self.values[lacking[:, None], group] = features
            self.known[lacking[:, None], group] = True
            self.computed += features.shape[0] * features.shape[1]
        return rows

    def _extract(self, state: LearnerState, slots: tuple[int, ...], rows: np.ndarray) -> np.ndarray:
        """Features [n, len(slots), D] of some rows."""
        own = hosts.own_rows

        def compute(part, inputs):
            known = self.values[own(part)]
            return np.asarray(self.engine.features(state, inputs, slots, known))[:, slots]

        shape = (len(slots), self.width)
        return self._computed(rows, shape, lambda part: self.inputs(state, own(part)), compute)

    def _frozen_features(self, state: LearnerState, rows: np.ndarray) -> np.ndarray:
        """The frozen model's features [n, 1, D], from the store where it has them."""
        # Without the zeros after it, which other methods have not.
        width = state.query.spec.width

        def compute(positions):
            return self._computed(
                rows[positions],
                (width,),
                lambda part: self.raw(hosts.own_rows(part)),
                lambda part, inputs: self.engine.frozen_feature(state, inputs),
            )

        if self.store is None:
            features = compute(np.arange(len(rows)))
        else:
            like = jax.ShapeDtypeStruct((1, width), np.float32)
            features = self._shelf("class token").rows(self.digests[rows], like, compute)
        return np.pad(features, ((0, 0), (0, self.width - width)))[:, None]

    def _computed(
        self, rows: np.ndarray, shape: tuple[int, ...], load: Callable, compute: Callable
    ) -> np.ndarray:
        """float32 [n, *shape]: `compute(part, load(part))` of batches of `rows`, joined."""
        found, done = np.zeros((len(rows), *shape), np.float32), 0
        batches = [(rows[i], m) for i, m in eval_batches(len(rows), self.batch_size)]
        for part, mask, inputs in prefetch((part, m, load(part)) for part, m in batches):
            count = int(mask.sum())
            found[done : done + count] = np.asarray(compute(part, inputs))[mask]
            done += count
        return found

    def inputs_in_batches(self) -> Iterator[dict]:
        """This host's inputs, labels and masks of the whole set, in batches of equal size."""
        own = hosts.own_rows
        for indices, mask in eval_batches(len(self.set), self.batch_size):
            labels = self.set.labels[own(indices)].astype(np.int32)
            yield {"inputs": self.raw(own(indices)), "label": labels, "mask": own(mask)}

    def batches(self) -> Iterator[dict]:
        """Features, labels and masks of the whole set, in order, in batches of equal size."""
        for indices, mask in eval_batches(len(self.set), self.batch_size):
            labels = self.set.labels[indices].astype(np.int32)
            yield {"features": self.values[indices], "label": labels, "mask": mask}


class _Kept:
    """Rows of a pytree of arrays, each computed on first use and then kept."""

    def __init__(self, size: int):
        self.size, self.fits, self.tree = size, True, None
        self.has = np.zeros(size, bool)

    def look(self, row_bytes: int) -> None:
        """Decides whether all rows fit in memory."""
        self.fits = row_bytes * self.size <= KEEP_BYTES

    def rows(self, rows: np.ndarray, compute: Callable[[np.ndarray], Any]) -> Any:
        """The pytree of `rows`; None if all rows together do not fit in memory.

        Args:
          compute: rows [n] -> pytree of arrays [n, ...].
        """
        missing = np.unique(rows[~self.has[rows]])
        if missing.size:
            computed = compute(missing)
            if self.tree is None:
                self.look(sum(leaf.nbytes for leaf in jax.tree.leaves(computed)) // len(missing))
                if not self.fits:
                    return None
                self.tree = jax.tree.map(
                    lambda leaf: np.zeros((self.size, *leaf.shape[1:]), leaf.dtype), computed
                )
            jax.tree.map(lambda kept, new: kept.__setitem__(missing, new), self.tree, computed)
            self.has[missing] = True
        return jax.tree.map(lambda leaf: leaf[rows], self.tree)
