"""The engine: every compiled function of a method, for one device or for many.

The functions themselves are pure (`learners/passes.py`, `learners/step.py`). One device runs them
under `jax.jit`; several devices run the same functions under `jax.pmap` with `axis_name="data"`.
The five verbs (`verbs.py`) are the engine on one device; a run takes the engine that its settings
ask for (`engine_of` in `sharding.py`).

Several hosts run the same program, each with its own copy of the state. A host reads, decodes and
encodes its own rows of every batch (`hosts.own_rows`); gradients are averaged over the devices of
all hosts, features and scores are gathered. Every host computes the rest from the same numbers.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qkd_jax.engine import hosts
from qkd_jax.engine.checks import check_task
from qkd_jax.engine.compiled_programs import give_back_memory
from qkd_jax.errors import ConfigError, DataError
from qkd_jax.learners import passes
from qkd_jax.learners.classifier import in_closed_form, solved, with_task
from qkd_jax.learners.shape import feature_width, learner_of
from qkd_jax.learners.state import LearnerState, Moving, split
from qkd_jax.learners.step import device_step
from qkd_jax.nn.inputs import Raw, Stem, num_inputs
from qkd_jax.protocol.tasks import Task

AXIS = "data"


class Engine:
    """The compiled functions on one device, the one that holds the arrays of the state.

    `compilations` counts how often the training step was traced, which is once in a run.
    """

    num_devices = 1  # of all hosts
    num_parts = 1  # the parts into which a batch is divided

    def __init__(self):
        give_back_memory()
        self.compilations = 0
        # Axes: None = one copy for all, 0 = divided over the devices by rows.
        self._step = self._build(self._counted_step, (None, None, 0), None, donate=(1,))
        # Independent of other hosts, so these run on the devices of this host alone.
        self._extract = self._build_here(passes.extract, (None, 0, 0, None, None), 0)
        self._frozen_feature = self._build_here(passes.frozen_feature, (None, 0), 0)
        self._survey = self._build_here(self._summed_survey, (None, 0, 0, 0), None)
        self._shared = self._build_here(passes.shared_part, (None, 0), 0)
        self._predict = self._build_here(passes.predict, (None, 0), 0)
        self._predict_with_task = self._build_here(passes.predict_with_task, (None, 0, 0), 0)
        self._teach = self._build_here(passes.teach, (None, 0), 0)
        # Done once per task; several devices would only repeat it (`alone`).
        self._scan = jax.jit(self._scanned_steps, donate_argnums=1)
        self._begin, self._freeze = _changing(passes.begin), _changing(passes.freeze)
        self._before, self._after = _changing(passes.before), _changing(passes.after)
        self._accumulate, self._finish = jax.jit(passes.accumulate), _changing(passes.finish)
        self._score = jax.jit(passes.score)
        self._score_with_task = jax.jit(passes.score_with_task)

    def padded(self, batch_size: int) -> int:
        """The batch size rounded up to a multiple of `num_parts`."""
        return -(-batch_size // self.num_parts) * self.num_parts

    def place(self, state: LearnerState) -> LearnerState:
        """The state with one copy on every device of this host, for passes over inputs."""
        return state

    def alone(self, state: LearnerState) -> LearnerState:
        """The state on one device, for what is done once per task."""
        return state

    def open_task(self, state: LearnerState, task: Task, num_steps: int = 0) -> LearnerState:
        """The state in a new task, before the survey of its inputs (`survey`, `before`).

        Raises:
          ProtocolError: see `begin_task`.
        """
        classes = check_task(state, task, num_steps)
        return self._begin(state, classes, jnp.int32(task.index), jnp.int32(num_steps))

    def survey(self, state: LearnerState, batches: Iterable[Mapping[str, Any]]) -> Any:
        """The learner's survey of this host's batches {"inputs", "label", "mask"}, summed over all
        hosts.

        Raises:
          DataError: there is no batch.
        """
        total = None
        for batch in batches:
            sums = self._survey(state, batch["inputs"], batch["label"], batch["mask"])
            total = sums if total is None else jax.tree.map(lambda a, b: a + b, total, sums)
        if total is None:
            raise DataError(f"batches: expected images for {state.config.method}, found none")
        return self._gathered_sums(total)

    def before(self, state: LearnerState, sums: Any) -> LearnerState:
        """The state after the survey of a task's inputs, before the first step."""
        return self._before(state, sums)

    def step(
        self, held: LearnerState, moving: Moving, batch: Mapping[str, Any]
    ) -> tuple[Moving, dict[str, jax.Array]]:
        """One optimisation step on this host's rows of a batch (`step.device_step`); `moving` is
        donated.
        """
        return self._step(held, moving, batch)

    def steps(
        self, held: LearnerState, moving: Moving, batches: Mapping[str, Any]
    ) -> tuple[Moving, dict[str, jax.Array]]:
        """One step for each batch along the leading axis, in one call."""
        return self._scan(held, moving, batches)

    def freeze(self, state: LearnerState) -> LearnerState:
        """The state with what was trained moved to a filled slot."""
        return self._freeze(state)

    def after(self, state: LearnerState, sums: Any) -> LearnerState:
        """The state after the second survey of a task's inputs, which follows `freeze`."""
        return self._after(state, sums)

    def shared(self, state: LearnerState, inputs: Raw) -> Raw | Stem:
        """What all slots share of this host's rows, to be kept (`passes.shared_part`)."""
        # Without what a step moves: while a task trains those arrays have been given away.
        return self._shared(split(state)[0], inputs)

    def teach(self, state: LearnerState, inputs: Raw) -> Any:
        """What a student's loss reads of its teacher for this host's rows (`passes.teach`)."""
        return self._teach(split(state)[0], inputs)

    def features(
        self,
        state: LearnerState,
        inputs: Raw | Stem,
        slots: Sequence[int],
        known: Any = None,
    ) -> Any:
        """Features [B, S, D] of a whole batch from this host's rows.

        Args:
          slots: the slots to compute, in order of extraction; others stay as in `known`.
          known: [b, S, D] of the slots extracted before; None = zeros.
        """
        size, width = learner_of(state.config).num_slots(state.config), feature_width(state)
        if known is None:
            known = np.zeros((num_inputs(inputs), size, width), np.float32)
        order = jnp.asarray([*slots, *[0] * (size - len(slots))], jnp.int32)
        return self._gathered(self._extract(state, inputs, known, order, jnp.int32(len(slots))))

    def frozen_feature(self, state: LearnerState, inputs: Raw) -> Any:
        """The frozen model's feature [B, Q] of a whole batch from this host's rows."""
        return self._gathered(self._frozen_feature(split(state)[0], inputs))

    def finish(self, state: LearnerState, batches: Iterable[Mapping[str, Any]]) -> LearnerState:
        """The state after a task, from its inputs' slot features: batches {"features", "label",
        "mask"}.

        Raises:
          DataError: a class of the task has no input, or there are more than `max_task_images`.
        """
        config, learner = state.config, learner_of(state.config)
        sums = learner.sums.empty(config, learner.num_slots(config), feature_width(state))
        missing, given = set(np.asarray(state.task_classes).tolist()) - {-1}, 0
        kept = []  # what a classifier in closed form learns from
        for batch in batches:
            label, mask = np.asarray(batch["label"]), np.asarray(batch["mask"])
            missing -= set(label[mask].tolist())
            given += int(mask.sum())
            features = jnp.asarray(batch["features"])
            sums = self._accumulate(state, sums, features, jnp.asarray(label), jnp.asarray(mask))
            if in_closed_form(config):
                kept.append((np.asarray(features)[mask], label[mask]))
        if missing:
            raise DataError(
                "end_task: expected images of every class of the task, found none of "
                f"{sorted(missing)}"
            )
        most = config.shapes.max_task_images
        if 0 < most < given:
            raise DataError(
                f"end_task: expected at most {most} images (shapes.max_task_images), found {given}"
                "; set it to the training images of the largest task, or to 0"
            )
        state = self._finish(state, sums)
        if not in_closed_form(config):
            return state
        features, labels = (np.concatenate(parts) for parts in zip(*kept, strict=True))
        return solved(with_task(state, learner.slots, features, labels))

    def score(self, state: LearnerState, features: Any) -> tuple[jax.Array, jax.Array | None]:
        """(scores [B, C], relevance [B, T] or None) from slot features [B, S, D]."""
        return self._score(state, features)

    def predict(self, state: LearnerState, inputs: Raw | Stem) -> tuple[Any, Any]:
        """(scores, relevance) of a whole batch from this host's rows, for settings whose passes
        depend on the inputs (`Learner.predict`).
        """
        return jax.tree.map(self._gathered, self._predict(state, inputs))

    def score_with_task(self, state: LearnerState, features: Any, tasks: Any) -> jax.Array:
        """Scores [B, C] from slot features [B, S, D] if the task of each input, int [B], is known:
        a diagnostic.
        """
        return self._score_with_task(state, features, tasks)

    def predict_with_task(self, state: LearnerState, inputs: Raw | Stem, tasks: Any) -> Any:
        """The same of a whole batch from this host's rows, for settings whose passes depend on the
        task (`Learner.predict_with_task`).
        """
        return self._gathered(self._predict_with_task(state, inputs, tasks))

    def _build(self, function: Callable, in_axes: tuple, out_axes: Any, donate: tuple = ()):
        """`function` compiled for the devices of all hosts."""
        return jax.jit(function, donate_argnums=donate)

    def _build_here(self, function: Callable, in_axes: tuple, out_axes: Any):
        """`function` compiled for the devices of this host."""
        return jax.jit(function)

    def _counted_step(self, held, moving, batch):
        self.compilations += 1
        return device_step(held, moving, batch, self._axis(everywhere=True))

    def _scanned_steps(self, held, moving, batches):
        return lax.scan(lambda carry, batch: device_step(held, carry, batch), moving, batches)

    def _summed_survey(self, state, inputs, labels, mask):
        sums = passes.survey(state, inputs, labels, mask)
        axis = self._axis(everywhere=False)
        return lax.psum(sums, axis) if axis else sums

    def _axis(self, everywhere: bool) -> str | None:
        """The axis that a function compiled for the devices (of all hosts) is mapped over."""
        return None

    def _gathered(self, rows: Any) -> Any:
        """The rows of all hosts, from this host's."""
        return rows

    def _gathered_sums(self, sums: Any) -> Any:
        """The sums over all hosts, on one device."""
        return sums


class MappedEngine(Engine):
    """The engine under `jax.pmap`, over devices of one host or all devices of several hosts.

    What every device reads is passed as one logical copy (`in_axes=None`) and placed on all of them
    once per task, not once per step.
    """

    def __init__(self, devices: Sequence[jax.Device]):
        """`devices`: those of this host to use."""
        self.devices = list(devices)
        self.all_devices = jax.devices() if hosts.count() > 1 else self.devices
        self.num_devices = self.num_parts = len(self.all_devices)
        self._frozen: tuple[Any, Any] = (None, None)  # on one device, and the same on all
        super().__init__()

    def place(self, state: LearnerState) -> LearnerState:
        single, copies = self._frozen
        known = _same_arrays(state.frozen, single)
        mesh = Mesh(np.asarray(self.devices), (AXIS,))
        placed = jax.device_put(
            state.replace(frozen=copies) if known else state, NamedSharding(mesh, PartitionSpec())
        )
        self._frozen = (state.frozen, placed.frozen)
        return placed

    def alone(self, state: LearnerState) -> LearnerState:
        """The state on the first device. On CPU this is needed: several devices in LAPACK at once
        can deadlock, each waiting for threads that the others hold (jaxlib 0.10).
        """
        single, copies = self._frozen
        if _same_arrays(state.frozen, copies):
            state = state.replace(frozen=single)
        return jax.device_put(jax.tree.map(hosts.own_copy, state), self.devices[0])

    def _build(self, function, in_axes, out_axes, donate=()):
        return self._mapped(function, self.all_devices, in_axes, out_axes, donate)

    def _build_here(self, function, in_axes, out_axes):
        return self._mapped(function, self.devices, in_axes, out_axes, ())

    def _mapped(self, function, devices, in_axes, out_axes, donate):
        """`function` under `jax.pmap`; arguments and results with axis 0 are this host's rows."""
        if len(devices) == 1:
            return jax.jit(function, donate_argnums=donate)
        mapped = jax.pmap(
            function,
            axis_name=AXIS,
            in_axes=in_axes,
            out_axes=out_axes,
            donate_argnums=donate,
            devices=devices,
        )
        divide = partial(jax.tree.map, partial(_split_rows, len(self.devices)))

        def call(*arguments):
            pairs = zip(arguments, in_axes, strict=True)
            results = mapped(*(divide(a) if axis == 0 else a for a, axis in pairs))
            return jax.tree.map(_joined_rows, results) if out_axes == 0 else results

        return call

    def _axis(self, everywhere):
        return AXIS if len(self.all_devices if everywhere else self.devices) > 1 else None

    def _gathered(self, rows):
        return hosts.gathered(np.asarray(rows))

    def _gathered_sums(self, sums):
        if hosts.count() > 1:
            sums = jax.tree.map(lambda a: hosts.gathered(np.asarray(a)[None]).sum(0), sums)
        return jax.device_put(sums, self.devices[0])


def local_devices(count: int) -> list[jax.Device]:
    """`count` devices of this host; 0 = all. Several hosts use all of theirs.

    Raises:
      ConfigError: there are fewer devices, or only some of several hosts' are asked for.
    """
    available = jax.local_devices()
    if hosts.count() > 1 and count not in (0, len(available)):
        raise ConfigError(
            f"train.devices: expected 0, since with {hosts.count()} hosts every device is used, "
            f"found {count}"
        )
    if count > len(available):
        raise ConfigError(
            f"train.devices: expected at most {len(available)} ({available[0].platform}), the "
            f"devices of this process, found {count}"
        )
    return available[: count or len(available)]


def _changing(function: Callable) -> Callable:
    """`function` from a state to the next one, compiled, with the frozen arrays and those of a
    classifier in closed form kept out: as results of a program they would be copied, several times
    per task.
    """
    out = {"frozen": None, "classifier": ()}
    compiled = jax.jit(lambda state, *rest: function(state, *rest).replace(**out))
    return lambda state, *rest: compiled(state, *rest).replace(
        frozen=state.frozen, classifier=state.classifier
    )


def _split_rows(parts: int, array: Any) -> Any:
    return array.reshape(parts, array.shape[0] // parts, *array.shape[1:])


def _joined_rows(array: Any) -> np.ndarray:
    array = np.asarray(array)
    return array.reshape(-1, *array.shape[2:])


def _same_arrays(tree: Any, other: Any) -> bool:
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=False)
    return other is not None and all(a is b for a, b in pairs)
