"""APER against LAMDA-PILOT: loss and gradients of the first task, joined features, scores.

Reference: LAMDA-CL/LAMDA-PILOT at 5240714d3d6071aca824f8aed4a92a46ac6f883c. Called:
backbone/vit_adapter.py `VisionTransformer` with its `Adapter` (parallel, scale 0.1), utils/
inc_net.py `SimpleVitNet` (first task) and `MultiBranchCosineIncrementalNet`, and models/
aper_adapter.py `Learner.construct_dual_branch_network` and `Learner.replace_fc`. Width 24, two
blocks, two heads, MLP 48, bottleneck 3, patch 4, image 8, float64, dropout off; the frozen branch
is timm's `VisionTransformer` with the same weights.

How `golden/make_aper_golden.py` made the arrays: weights and inputs are drawn here and there by the
same frozen NumPy generators, as below. The network of the first task gave loss and gradients on six
images of three classes, with a made-up head of scale 2.5. Then its adapter went into the network of
two branches, the class means of those six and of four images of two further classes into its head,
and four queries gave features and logits.

Error budget: two blocks in float32 with activations near 1, in all 100 eps = 1.2e-5 of the largest
entry for features, and twice that for logits, whose scale is 2.5, and for gradients.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qkd_jax
from qkd_jax.engine import verbs
from qkd_jax.learners.shape import Context, learner_of
from qkd_jax.nn.backbone import Backbone
from qkd_jax.nn.inputs import Raw
from qkd_jax.nn.vit import ViTSpec

BUDGET = 1.2e-5
SPEC = ViTSpec(width=24, depth=2, num_heads=2, mlp_width=48, patch_size=4, image_size=8, grid=2)
FIRST, SECOND = np.array([0, 1, 2, 0, 1, 1]), np.array([3, 4, 3, 3])


@pytest.fixture(scope="module")
def golden():
    return np.load(Path(__file__).parent / "golden" / "aper.npz")


@pytest.fixture(scope="module")
def begun(tiny):
    """The state in its first task with the reference's adapter and head, and the images."""
    random = np.random.RandomState(2025)

    def draw(path, shape):
        values, name = random.standard_normal(shape.shape), path[-1].key
        if name == "kernel":
            values = values * shape.shape[0] ** -0.5
        else:
            values = 1.0 + 0.1 * values if name == "scale" else 0.1 * values
        return values.astype(np.float32)

    params = jax.tree_util.tree_map_with_path(draw, SPEC.param_shapes())
    random = np.random.RandomState(1993)

    def normal(*shape, factor=1.0):
        return jnp.asarray((factor * random.standard_normal(shape)).astype(np.float32))

    down = {"kernel": normal(2, 24, 3, factor=24**-0.5), "bias": normal(2, 3, factor=0.3)}
    up = {"kernel": normal(2, 3, 24), "bias": normal(2, 24, factor=0.3)}
    head = {"rows": normal(3, 24), "scale": jnp.float32(2.5)}
    images = random.random_sample((14, 8, 8, 3)).astype(np.float32)
    config = tiny.config(
        "method=aper",
        "num_classes=5",
        "max_tasks=2",
        "max_task_classes=3",
        "adapter.scale=0.1",
        "adapter.dropout=0.0",
    )
    backbone = Backbone(params, SPEC)
    state = qkd_jax.init_state(jax.random.key(0), backbone, config)
    state = qkd_jax.begin_task(state, qkd_jax.Task(0, (0, 1, 2)))
    return state.replace(trainable={"adapter": {"down": down, "up": up}, "head": head}), images


def test_loss_and_gradients_of_the_first_task(golden, begun):
    state, images = begun
    learner, keys = learner_of(state.config), jax.random.split(jax.random.key(0), 6)
    rows = Context(keys, jnp.ones(6, bool), lambda x: x)
    batch = {"label": jnp.asarray(FIRST)}

    def mean_loss(trainable, state, images):
        images = Raw({"image": images})
        return learner.loss(trainable, state, images, batch, rows)["loss"].mean()

    loss, grads = jax.jit(jax.value_and_grad(mean_loss))(state.trainable, state, images[:6])
    np.testing.assert_allclose(loss, golden["loss"], atol=2 * BUDGET)
    adapter, head = grads["adapter"], grads["head"]
    for name, found in {
        "grad_down": adapter["down"]["kernel"],
        "grad_down_bias": adapter["down"]["bias"],
        "grad_up": adapter["up"]["kernel"],
        "grad_up_bias": adapter["up"]["bias"],
        "grad_rows": head["rows"],
        "grad_scale": head["scale"][None],
    }.items():
        scale = np.abs(golden[name]).max()
        assert scale > 1e-3
        np.testing.assert_allclose(found, golden[name], atol=2 * BUDGET * scale, err_msg=name)


def test_joined_features_class_means_and_cosines(golden, begun):
    state, images = begun
    state = qkd_jax.end_task(state, [{"image": images[:6], "label": FIRST}])
    state = qkd_jax.begin_task(state, qkd_jax.Task(1, (3, 4)))
    state = qkd_jax.end_task(state, [{"image": images[6:10], "label": SECOND}])
    joined = verbs.slot_features(state, images[10:]).reshape(4, 48)
    for found, name in ((joined, "features"), (state.memory["rows"], "rows")):
        scale = np.abs(golden[name]).max()
        np.testing.assert_allclose(found, golden[name], atol=BUDGET * scale, err_msg=name)
    # Cosines of 48 numbers; their new head has a scale of 1.
    np.testing.assert_allclose(qkd_jax.predict(state, images[10:]), golden["scores"], atol=BUDGET)
