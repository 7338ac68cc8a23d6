"""Saves and restores what a learner learned, without the backbone. Only this file imports orbax.

A checkpoint is visible only when it is complete, since orbax writes it under another name and
renames it; before that, the hash of each file is written beside them (`manifest.py`). The backbone
is frozen, and its hash is in the run's environment.json.
"""

import dataclasses
import gc
import logging
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from qkd_jax.engine import hosts
from qkd_jax.errors import CheckpointError
from qkd_jax.learners.state import LearnerState
from qkd_jax.reports.writing import sync_folder
from qkd_jax.runs import manifest

# Names of earlier versions on the paths of arrays, and today's.
RENAMED = {"gaussians": "generator"}
KEPT = 2  # the one before the newest is for the case that the newest is damaged
PARTS = ("arrays", "meta")
LATE = 10  # seconds in which the other writes or reads end once one has failed
# What orbax raises for damaged files of a checkpoint whose hashes are not known.
DAMAGE = (ValueError, KeyError, TypeError, AttributeError, NotImplementedError, OSError)

logger = logging.getLogger("qkd_jax")


class OtherArrays(CheckpointError):
    """A whole checkpoint holds other arrays than this version makes."""


class _Manifest(ocp.CheckpointHandler):
    """Writes the manifest when the parts before it are complete, before the checkpoint is."""

    def save(self, directory, args):
        pass

    def restore(self, directory, args):
        pass

    def finalize(self, directory):
        target = Path(directory)
        manifest.write_manifest(target.parent, PARTS, target)


@ocp.args.register_with_handler(_Manifest, for_save=True, for_restore=True)
@dataclasses.dataclass
class _ManifestArgs(ocp.args.CheckpointArgs):
    """Of a manifest nothing is given."""


class Checkpoints:
    """The checkpoints of one run, in `folder`; use as a context manager.

    Args:
      shared: a host's arrays -> arrays that all hosts write and read together.
      read_only: whether nothing in the folder may be written, made or renamed.
    """

    def __init__(
        self,
        folder: Path,
        shared: Callable[[Any], Any] = lambda arrays: arrays,
        *,
        read_only: bool = False,
    ):
        self._shared, self._read_only = shared, read_only
        self.skipped: tuple[str, ...] = ()  # damaged checkpoints that `restore` passed over
        logging.getLogger("absl").setLevel(logging.CRITICAL)  # orbax logs every file
        # and leaves reads unawaited when one fails.
        warnings.filterwarnings("ignore", "coroutine '_read_array", RuntimeWarning)
        self._folder = Path(folder).resolve()
        self._manager = ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=None if read_only else KEPT,
                enable_async_checkpointing=False,
                create=not read_only,
                read_only=read_only,
            ),
            # Without them a manager that has saved nothing yet cannot tell which arrays there are.
            # They are completed in this order.
            item_handlers={
                "arrays": ocp.StandardCheckpointHandler(),
                "meta": ocp.JsonCheckpointHandler(),
                manifest.NAME: _Manifest(),
            },
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        self._manager.close()

    def save(self, number: int, state: LearnerState, meta: dict[str, Any]) -> None:
        """Writes checkpoint `number`, which must be larger than the last; `meta` is plain JSON.

        Raises:
          CheckpointError: the state holds NaN or infinite numbers, or the disk refuses it.
        """
        arrays, bad = _arrays(state), not_finite(state)
        if bad:
            raise CheckpointError(
                f"{bad} became NaN or infinite in task {int(state.task) + 1}, step "
                f"{int(state.step)}; the last good state is in {self._folder}"
            )
        args = ocp.args.Composite(
            arrays=ocp.args.StandardSave(self._shared(arrays)),
            meta=ocp.args.JsonSave(meta),
            **{manifest.NAME: _ManifestArgs()},
        )
        try:
            with _without_late_complaints():
                self._manager.save(number, args=args, force=True)
                self._manager.wait_until_finished()
            if hosts.is_first():
                sync_folder(self._folder)
        except Exception as error:  # orbax raises many types for a disk that is full or read-only
            raise CheckpointError(
                f"cannot save a checkpoint in {self._folder}: {_reason(error)}; the one before it "
                "is whole. Make room or make the folder writable; the same command continues"
            ) from error

    def restore(self, state: LearnerState) -> tuple[LearnerState, dict[str, Any]] | None:
        """The newest good checkpoint put into `state` (which gives shapes and placement), or None.

        A damaged one, of which a file is missing or not as it was written, is reported and the one
        before it is taken. Unless read-only, the damaged one is renamed to damaged-<number>, since
        its number will be saved again.

        Raises:
          CheckpointError: checkpoints exist, but all are damaged; a file cannot be read; or a whole
            checkpoint holds other arrays than this version makes.
        """
        numbers = sorted(self._manager.all_steps(), reverse=True)
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, self._shared(_arrays(state)))
        damaged: dict[int, str] = {}
        for number in numbers:
            found, damage = self._read(number, state, target)
            if not damage:
                self.skipped = tuple(self._told(damaged))
                if damaged and not self._read_only:
                    self._quarantine(damaged)
                return found
            damaged[number] = damage
            logger.warning(
                "checkpoint %s cannot be read (%s); trying the one before it", number, damage
            )
        if damaged:
            raise CheckpointError(
                "no checkpoint of this run can be read:\n  "
                + "\n  ".join(self._told(damaged))
                + "\ndelete the run folder to start again, or restore it from a copy"
            )
        return None

    def _told(self, damaged: dict[int, str]) -> list[str]:
        return [f"{self._folder / str(number)}: {damage}" for number, damage in damaged.items()]

    def _quarantine(self, damaged: dict[int, str]) -> None:
        """Renames damaged checkpoints, so that they are kept to be looked at, and never read."""
        for number in damaged if hosts.is_first() else ():
            put_aside(self._folder / str(number))
        hosts.wait()
        self._manager.reload()

    def _read(self, number: int, state: LearnerState, target: dict) -> tuple[Any, str]:
        """((state, meta), "") of one checkpoint, or (None, how it is damaged)."""
        damage = manifest.damage_of(self._folder / str(number))
        if damage:
            return None, damage
        # Of a whole checkpoint every error is one of this code, or of the version that wrote it.
        caught = () if damage == "" else DAMAGE
        try:
            with _without_late_complaints():
                return self._whole(number, state, target), ""
        except OtherArrays:
            raise
        except caught as error:
            failure = _reason(error)
        # Reads that were unfinished when one failed log long complaints when they are collected, so
        # they are collected here without the log.
        log = logging.getLogger("asyncio")
        log.disabled, before = True, log.disabled
        gc.collect()
        log.disabled = before
        return None, failure

    def _whole(self, number: int, state: LearnerState, target: dict) -> tuple[Any, dict[str, Any]]:
        """(state, meta) of one checkpoint.

        Raises:
          OtherArrays: it holds other arrays than `target`.
        """
        held = _by_path(self._manager.item_metadata(number)["arrays"])
        todays, wanted = _with_todays_names(held), _by_path(target)
        for path, array in wanted.items():
            found = todays.get(path)
            if found is None or (found.shape, found.dtype) != (array.shape, array.dtype):
                told = "none" if found is None else f"{found.shape} {found.dtype}"
                raise OtherArrays(
                    f"{self._folder / str(number)}, {'.'.join(path)}: expected {array.shape} "
                    f"{array.dtype}, as this version of qkd_jax makes it, found {told}; the "
                    "version that began the run can continue and load it"
                )
        # Earlier versions may have kept more arrays, which are ignored, or under other names.
        more = held.keys() - wanted.keys()
        arrays = ocp.args.StandardRestore() if more else ocp.args.StandardRestore(target)
        args = ocp.args.Composite(arrays=arrays, meta=ocp.args.JsonRestore())
        kept = self._manager.restore(number, args=args)
        arrays = kept["arrays"]
        if more:
            arrays = _as_in(target, _with_todays_names(_by_path(arrays)))
        return _with_arrays(state, arrays), kept["meta"]


def put_aside(checkpoint: Path) -> None:
    """Renames a damaged checkpoint to damaged-<number>, so that its number is free again, and tells
    it.
    """
    aside = checkpoint.with_name(f"damaged-{checkpoint.name}")
    while aside.exists():
        aside = aside.with_name(f"{aside.name}-again")
    checkpoint.rename(aside)
    sync_folder(checkpoint.parent)
    logger.warning("checkpoint %s was renamed to %s", checkpoint.name, aside)


@contextmanager
def _without_late_complaints() -> Iterator[None]:
    """When one write or read fails, orbax ends its event loop, and threads that finish others print
    a trace for each. These traces are left out, and nothing else: until what is done here ends and,
    if it fails, for `LATE` seconds more.
    """
    before = getattr(sys.excepthook, "before", sys.excepthook)  # of an earlier failure's too

    def shown(kind, error, trace):
        if (kind, str(error)) != (RuntimeError, "Event loop is closed"):
            before(kind, error, trace)

    def put_back():
        if sys.excepthook is shown:
            sys.excepthook = before

    shown.before, sys.excepthook = before, shown
    try:
        yield
    except BaseException:
        later = threading.Timer(LATE, put_back)
        later.daemon = True  # the process need not wait for it
        later.start()
        raise
    put_back()


def _by_path(tree: Any) -> dict[tuple[str, ...], Any]:
    """Leaves by the names on their path, whether a node is a tuple, a record or a dict."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    names = ("key", "idx", "name")
    return {
        tuple(str(next(getattr(p, n) for n in names if hasattr(p, n))) for p in path): leaf
        for path, leaf in leaves
    }


def _with_todays_names(held: dict[tuple[str, ...], Any]) -> dict[tuple[str, ...], Any]:
    """`held` with what earlier versions called otherwise."""
    return {tuple(RENAMED.get(name, name) for name in path): leaf for path, leaf in held.items()}


def _as_in(target: Any, held: dict[tuple[str, ...], Any]) -> Any:
    """The arrays by the names on their path, of which there may be more, in the structure and
    placement of `target`.
    """
    arrays = []
    for path, wanted in _by_path(target).items():
        array = held.get(path)
        if array is None or (array.shape, array.dtype) != (wanted.shape, wanted.dtype):
            name = ".".join(path)
            raise CheckpointError(f"{name}: expected {wanted.shape} {wanted.dtype}, found none")
        arrays.append(jax.device_put(array, wanted.sharding))
    return jax.tree.unflatten(jax.tree.structure(target), arrays)


def _arrays(state: LearnerState) -> dict[str, Any]:
    """The arrays to keep, and of a student those of its teacher; the key follows from the seed, a
    backbone from its file.
    """
    own = {
        "task": state.task,
        "step": state.step,
        "num_steps": state.num_steps,
        "task_classes": state.task_classes,
        "task_of_class": state.task_of_class,
        "trainable": state.trainable,
        "opt_state": state.opt_state,
        "memory": state.memory,
    }
    if jax.tree.leaves(state.classifier):
        own["classifier"] = state.classifier
    return own if state.teacher is None else own | {"teacher": _arrays(state.teacher)}


def _with_arrays(state: LearnerState, arrays: dict[str, Any]) -> LearnerState:
    own = dict(arrays)
    if state.teacher is not None:
        state = state.taught_by(state.teacher.replace(**own.pop("teacher")))
    state = state.replace(**own)
    bad = not_finite(state)
    if bad:
        raise CheckpointError(f"{bad} holds NaN or infinite numbers")
    return state


def named_arrays(state: LearnerState) -> dict[str, np.ndarray]:
    """The arrays to keep, by names that say where they stand."""
    return {".".join(path): np.asarray(leaf) for path, leaf in _by_path(_arrays(state)).items()}


def with_named_arrays(state: LearnerState, arrays: dict[str, np.ndarray]) -> LearnerState:
    """`state` with what `named_arrays` gave.

    Raises:
      CheckpointError: an array is missing, or has another shape or type.
    """
    found = {tuple(name.split(".")): array for name, array in arrays.items()}
    return _with_arrays(state, _as_in(_arrays(state), found))


def not_finite(state: LearnerState) -> str | None:
    """The path of the first kept array with NaN or infinite numbers; None if there is none."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(_arrays(state)):
        if np.issubdtype(leaf.dtype, np.floating) and not np.isfinite(np.asarray(leaf)).all():
            return jax.tree_util.keystr(path, simple=True, separator=".")
    return None


def _reason(error: Exception) -> str:
    """The first line of an error, shortened (tensorstore appends pages), or its type."""
    line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return line if len(line) <= 300 else f"{line[:300]} ..."
