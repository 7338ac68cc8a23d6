"""A classifier in closed form in place of a method's own, on the features of its slots.

No method knows of it: `headed` replaces how a learner scores, and when a task ends the engine calls
`with_task` and `solved`. What it keeps is `LearnerState.classifier`:

    drawn  float32 arrays that never change: random projections
    sums   a tree of `moments.Pair`: sums over the images of all finished tasks
    rule   float32 arrays: what scores

By default it reads the slots that all tasks have in common, so that all sums are over the same
features: both of aper, the first adapter of methods with one for each task, the frozen query of
prompts. Adapters that start anew with every task are no one feature: with `features=newest` their
sums classify much worse (docs/methods.md). A method whose one model changes with every task has no
slot in common: it leaves sums over features as they were, like its class means.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qkd_jax.errors import ConfigError
from qkd_jax.learners.state import LearnerState, seen_classes
from qkd_jax.nn.closed_form import HEADS
from qkd_jax.nn.moments import Pair, as_float64, as_pair
from qkd_jax.settings.config import Config


def in_closed_form(config: Config) -> bool:
    """Whether a classifier in closed form takes the place of the method's own."""
    return config.classifier.kind != "own"


def headed(learner: Any, config: Config) -> Any:
    """`learner` (a `shape.Learner`) with the scores of `config.classifier`.

    Raises:
      ConfigError: it has no features that another classifier could read.
    """
    if not in_closed_form(config):
        return learner
    if not learner.has_features:
        raise ConfigError(
            f"classifier.kind: expected own, since the classifier of {config.method} is the method "
            f"and no feature is learned for another one, found {config.classifier.kind}"
        )
    columns = columns_read(learner.slots, config)

    def score(state, features):
        head, kept = HEADS[config.classifier.kind], state.classifier
        features = features[:, jnp.asarray(columns)[state.task]].reshape(len(features), -1)
        scores = head.scores(kept["drawn"], kept["rule"], features)
        return jnp.where(seen_classes(state)[None, :], scores, -jnp.inf), None

    slots = _slots_for(learner.slots, columns)
    return learner._replace(
        slots=slots,
        score=score,
        score_with_task=None,
        predict=lambda config: None,
        predict_with_task=lambda config: None,
    )


def columns_read(slots: Any, config: Config) -> np.ndarray:
    """int [T, K]: of `shape.Slots`, those whose features, side by side, the classifier reads after
    each task.
    """
    orders = [list(slots.score(task)) for task in range(config.shapes.max_tasks)]
    common = [slot for slot in orders[0] if all(slot in order for order in orders)]
    if config.classifier.features == "shared" and common:
        return np.array([common] * len(orders))
    if config.classifier.features != "joined":
        return np.array([order[-1:] for order in orders])
    most = max(map(len, orders))
    return np.array([order + order[-1:] * (most - len(order)) for order in orders])


def _slots_for(own: Any, columns: np.ndarray) -> Any:
    """`shape.Slots` that read at test only what the classifier needs, and when a task ends that
    too. The frozen model's feature may be the query of the others.
    """

    def score(task):
        read = {*columns[task].tolist(), own.frozen}
        return tuple(slot for slot in own.score(task) if slot in read)

    def finish(task):
        return tuple(sorted({*own.at_end(task), *score(task)}))

    return own._replace(score=score, finish=finish)


def new_classifier(state: LearnerState, slots: Any, slot_width: int) -> dict | tuple:
    """`LearnerState.classifier` before the first task.

    Args:
      slots: the learner's `shape.Slots`.
      slot_width: the width of one slot's feature.
    """
    config = state.config
    if not in_closed_form(config):
        return ()
    settings, head = config.classifier, HEADS[config.classifier.kind]
    width = columns_read(slots, config).shape[1] * slot_width
    num_classes, drawn = config.shapes.num_classes, head.draw(settings, _key(state), width)
    rule = head.rule(settings, num_classes, width)
    return {
        "drawn": drawn,
        "sums": _stored(head.empty(settings, drawn, num_classes, width)),
        "rule": {name: jnp.zeros(shape) for name, shape in rule.items()},
    }


def with_task(
    state: LearnerState, slots: Any, features: np.ndarray, labels: np.ndarray
) -> LearnerState:
    """The state with the current task in the sums of its classifier.

    Args:
      slots: the learner's `shape.Slots`.
      features: [N, S, D] slot features of all images of the task.
      labels: int [N].
    """
    settings, kept = state.config.classifier, state.classifier
    head, task = HEADS[settings.kind], int(state.task)
    features = features[:, columns_read(slots, state.config)[task]].reshape(len(labels), -1)
    key = jax.random.fold_in(jax.random.fold_in(_key(state), 1), task)
    sums = head.add(settings, kept["drawn"], _in_float64(kept["sums"]), features, labels, key)
    return state.replace(classifier={**kept, "sums": _stored(sums)})


def solved(state: LearnerState) -> LearnerState:
    """The state with the rule that follows from the sums of its classifier."""
    settings, kept, key = state.config.classifier, state.classifier, _key(state)
    sums, key = _in_float64(kept["sums"]), jax.random.fold_in(key, 2)
    rule = HEADS[settings.kind].solve(settings, kept["drawn"], sums, key)
    rule = {name: jnp.asarray(array, jnp.float32) for name, array in rule.items()}
    return state.replace(classifier={**kept, "rule": rule})


def _key(state):
    """A key that nothing else in a run uses."""
    return jax.random.fold_in(state.key, 6)


def _stored(sums):
    return jax.tree.map(lambda array: jax.tree.map(jnp.asarray, as_pair(array)), sums)


def _in_float64(stored):
    return jax.tree.map(as_float64, stored, is_leaf=lambda leaf: isinstance(leaf, Pair))
