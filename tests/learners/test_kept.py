"""What a task trains on from the task before, and what it starts anew, for every kind of method."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qkd_jax
from qkd_jax.learners.shape import learner_of

ADAPTER = {f"adapter.{side}.{name}" for side in ("down", "up") for name in ("kernel", "bias")}
SHARED = {name.replace("adapter", "shared") for name in ADAPTER}
# Method -> what is trained on. All other leaves are new: in each method, all rows of its head.
KEPT = {
    "qkd": {"head.scale", "gate.map", "gate.theta"},
    "finetune": ADAPTER | {"head.scale"},
    "linear_probe": {"head.scale"},
    "ssiat": ADAPTER,
    "tuna": ADAPTER,
    "care": SHARED | {"shared.scale", "shared.norm.scale", "shared.norm.bias"},
    "clare": ADAPTER | {"head.scale"},
    "facet": {f"shared.{side}.kernel" for side in ("down", "mid", "up")}
    | {"codes.diagonal", "codes.left", "codes.right", "head.scale"},
    "apt": {"prompt.key", "prompt.value"},
    "l2p": {"prompts", "keys"},
    "ease": set(),
    "mote": set(),
    "mos": set(),
    "inflora": set(),
    "min": set(),
}
MARK = 7.0


@pytest.mark.parametrize("method", KEPT)
def test_what_is_trained_on(tiny, method):
    config = tiny.config(f"method={method}")
    state = qkd_jax.init_state(jax.random.key(7), tiny.backbone, config)
    trained = jax.tree.map(lambda a: jnp.full_like(a, MARK), state.trainable)
    state = state.replace(task=jnp.int32(1), trainable=trained)
    begun, _ = learner_of(config).begin(state, jax.random.key(3))
    leaves = {
        ".".join(part.key for part in path): np.array_equal(leaf, np.full_like(leaf, MARK))
        for path, leaf in jax.tree_util.tree_leaves_with_path(begun)
    }
    assert {name for name, same in leaves.items() if same} == KEPT[method]
    assert not leaves["head.rows"]
