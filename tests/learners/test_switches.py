"""Every value of every switch runs a step, the end of a task and a prediction with finite results.

The values are spread over few configs, since each compiles anew; a test below checks that none is
left out. What each switch computes is tested where it lives.
"""

import dataclasses
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qkd_jax
from qkd_jax.engine import verbs
from qkd_jax.engine.checks import check_batch
from qkd_jax.learners.qkd.finish import num_metrics
from qkd_jax.learners.qkd.gate import GateSettings
from qkd_jax.learners.qkd.learner import (
    DistillationSettings,
    QkdHeadSettings,
    SparsitySettings,
)
from qkd_jax.learners.shape import learner_of
from qkd_jax.learners.state import Moving, split
from qkd_jax.learners.step import device_step
from qkd_jax.nn.backbone import Backbone
from qkd_jax.nn.heads import ClassStatistics
from qkd_jax.nn.parameters import init_random
from qkd_jax.nn.vit import ViTSpec

GATE = "gate.kind gate.encoding gate.angle_map gate.states gate.stack gate.score gate.theta_side"
GATE += " gate.last_axis gate.reupload gate.whiten gate.freeze_after"
REST = " head.kind head.prototypes head.whiten head.covariance"
REST += " distillation.columns distillation.target distillation.teacher_view"
REST += " sparsity.kind train.optimizer adapter.placement adapter.input"
COLUMNS = (GATE + REST).split()
TABLE = """
quantum angle linear class weights log_fidelity both y true true -1 cosine all true all seen logits training entropy sgd parallel residual
quantum angle separate weights delta fidelity query x true false 0 linear none false all all logits training l1_softmax adam parallel norm
quantum angle first_q learned weights log_fidelity query z false true 2 cosine own true all own logits training l1_scores sgd sequential residual
quantum amplitude linear class product fidelity both y true true 5 cosine all false seen seen features training entropy sgd parallel residual
pqk angle pool weights product log_fidelity both x true false -1 linear own false all all features test l1_scores adam parallel residual
rbf amplitude linear class weights fidelity both y true true -1 cosine none true all seen logits test entropy sgd parallel residual
cosine angle linear learned weights fidelity both y true false -1 linear all true all own logits training l1_scores sgd parallel residual
mlp angle linear class weights fidelity both y true true -1 cosine drift true seen all features test entropy sgd parallel residual
attention angle linear weights weights fidelity both y true false -1 linear own true all own features training entropy sgd parallel residual
measurement amplitude linear class weights fidelity both y true true -1 cosine drift true all seen logits training entropy sgd parallel residual
uniform angle linear class weights fidelity both y true true -1 cosine drift false all all logits training l1_scores sgd parallel residual
"""  # noqa: E501
ROWS = [dict(zip(COLUMNS, line.split(), strict=True)) for line in TABLE.split("\n") if line]


@pytest.mark.parametrize(
    "section, kind",
    [
        ("gate", GateSettings),
        ("head", QkdHeadSettings),
        ("distillation", DistillationSettings),
        ("sparsity", SparsitySettings),
    ],
)
def test_no_value_is_left_out(section, kind):
    types = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        values = set(typing.get_args(types[field.name]))
        values = {"true", "false"} if types[field.name] is bool else values
        if values:
            tried = {row[f"{section}.{field.name}"] for row in ROWS}
            assert tried == values, f"{section}.{field.name}"


@pytest.fixture(scope="module")
def small():
    spec = ViTSpec(width=8, depth=1, num_heads=2, mlp_width=8, patch_size=4, image_size=8, grid=2)
    return Backbone(init_random(jax.random.key(0), spec), spec)


def third_task(backbone, config):
    """A state in its third task with memories made up, so that nothing must be trained first."""
    state = qkd_jax.init_state(jax.random.key(0), backbone, config)
    generator = np.random.default_rng(0)

    def fill(array):
        values = generator.normal(size=array.shape).astype(np.float32)
        return jnp.asarray(0.3 * values).astype(array.dtype)

    memory = {name: jax.tree.map(fill, part) for name, part in state.memory.items()}
    spread = np.asarray(memory["scatter"])
    memory |= {
        "scatter": jnp.asarray(spread @ spread.swapaxes(1, 2) + np.eye(8, dtype=np.float32)),
        "count": jnp.full(len(spread), 8.0),
        "metrics": state.memory["metrics"],
    }
    adapter = jax.tree.map(fill, state.trainable["adapter"])
    return state.replace(
        task=jnp.int32(2),
        task_classes=jnp.array([5, 2], jnp.int32),
        task_of_class=jnp.array([1, 0, 2, -1, 0, 2, -1], jnp.int32),
        trainable={**state.trainable, "adapter": adapter},
        memory=memory,
    )


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(
            row,
            marks=pytest.mark.slow if row["gate.encoding"] == "angle" else [],
            id=f"{row['gate.kind']}-{row['gate.encoding']}-{n}",
        )
        for n, row in enumerate(ROWS)
    ],
)
def test_step_end_and_prediction_are_finite(tiny, small, row):
    changes = [f"{key}={value}" for key, value in row.items()]
    config = tiny.config("method=qkd", "sparsity.weight=1", "fusion.frozen_weight=0", *changes)
    state, batch = third_task(small, config), tiny.batch(tiny.tasks[2])
    held, moving = split(state)
    learner = learner_of(config)

    @jax.jit
    def whole(held, moving, batch, features):
        moving, metrics = device_step(held, moving, batch)
        state = verbs.join(held, moving)
        features_by_slot = jnp.swapaxes(features, 0, 1)[:, :2]
        outer = jnp.stack([jnp.eye(8) * 9.0] * num_metrics(config))
        sums = ClassStatistics(features_by_slot, jnp.ones(2), outer), ()
        state = learner.finish(learner.freeze(state), sums, jax.random.key(1))
        scores, weights = learner.score(state, features)
        return moving, metrics, state.memory, scores, weights

    arrays = jax.tree.map(jnp.asarray, check_batch(state, batch))
    features = jnp.asarray(np.random.default_rng(1).normal(size=(4, 4, 8)).astype(np.float32))
    after, metrics, memory, scores, weights = whole(held, moving, arrays, features)
    for leaf in jax.tree.leaves((after, metrics, memory)):
        assert np.isfinite(leaf).all()
    seen = np.array([True, True, True, False, True, True, False])
    np.testing.assert_array_equal(np.isfinite(scores), np.broadcast_to(seen, scores.shape))
    np.testing.assert_allclose(np.asarray(weights).sum(1), 1, atol=1e-6)
    assert isinstance(after, Moving) and int(after.step) == 1
    moved = [
        float(jnp.abs(a - b).max())
        for a, b in zip(
            jax.tree.leaves(after.trainable["adapter"]),
            jax.tree.leaves(moving.trainable["adapter"]),
            strict=True,
        )
    ]
    assert max(moved) > 1e-6
    if row["gate.freeze_after"] == "0":  # this is task 2
        jax.tree.map(
            np.testing.assert_array_equal, after.trainable["gate"], moving.trainable["gate"]
        )
