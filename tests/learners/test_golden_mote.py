"""MoTE against the authors' code.

Repository Frank-lilinjie/MoTE, commit 93d20b33c69b0a2d6fc7f43532afdec8c1d70cd1. The arrays come
from `golden/make_mote_golden.py`, which says how, by running backbone/vit_mote.py
`VisionTransformer` (16 wide, 3 blocks, 2 heads, MLP 16, patches of 4 pixels of 8 x 8 images,
sequential adapters of bottleneck 3 and scale 0.1) inside utils/inc_net.py `MoteNet`, in float64 on
weights rounded to float32: three tasks of two classes with random adapters, whose prototypes
models/mote.py `Learner.replace_fc` computes from 18 images; then `MoteNet.forward` with test=True
on 15 images, five each with no, one and two experts at home, once with every fusion of the
transformer in the place of the one that `forward_test` calls. The images were chosen so that no two
confidences lie closer than 1e-3. Loss and gradient: `MoteNet.forward` with test=False and
cross-entropy on the third task's images, without dropout, for a local head of scale 3.

Error budget: float32 through 3 blocks on a stream of order 1 leaves 1e-5 in a feature; a cosine of
16 numbers is as good. The gradient adds as many backward steps: 5e-5 of its largest entry.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qkd_jax
from qkd_jax.engine import verbs
from qkd_jax.learners import mote
from qkd_jax.learners.shape import Context
from qkd_jax.nn.inputs import Raw
from qkd_jax.protocol.tasks import Task

BUDGET = 1e-5
FUSIONS = {
    "vote_re": (),
    "filter_and_merge": ("mote.others=1.0",),
    "merge_and_reweight": ("mote.filter=false",),
    "vote_re_merge_only": ("mote.filter=false", "mote.others=1.0"),
    "vote": ("mote.merge=false",),
    "vote_re_reweight_only": ("mote.filter=false", "mote.merge=false"),
}


@pytest.fixture(scope="module")
def stored(golden):
    return golden("mote")


def adapter(stored, task):
    return jax.tree.map(lambda a: a[task], stored.adapter("adapter"))


@pytest.fixture(scope="module")
def learned(stored):
    """(state in the third task before its end, the state after it)."""
    settings = "backbone.image_size=8 data.augment=false num_classes=6 max_tasks=3"
    settings += " max_task_classes=2 adapter.bottleneck=3 adapter.scale=0.1 adapter.dropout=0.0"
    settings += " adapter.placement=sequential method=mote"
    config = stored.config(*settings.split())
    state = qkd_jax.init_state(jax.random.key(0), stored.backbone, config)
    for task in range(3):
        state = qkd_jax.begin_task(state, Task(task, (2 * task, 2 * task + 1)))
        state = state.replace(trainable={**state.trainable, "adapter": adapter(stored, task)})
        open_state, mine = state, slice(6 * task, 6 * task + 6)
        batch = {"image": stored.arrays["images"][mine], "label": stored.arrays["labels"][mine]}
        state = qkd_jax.end_task(state, [batch])
    return open_state, state


def test_prototypes_are_means_under_the_adapter_of_the_own_task(stored, learned):
    rows = learned[1].memory["rows"]
    assert rows.shape == (1, 6, 16)
    np.testing.assert_allclose(rows[0], stored.arrays["prototypes"], atol=BUDGET)


def test_every_fusion(stored, learned):
    state = learned[1]
    features = verbs.slot_features(state, stored.arrays["queries"])
    np.testing.assert_allclose(features, stored.arrays["features"], atol=BUDGET)
    for name, changes in FUSIONS.items():
        other = state.replace(config=qkd_jax.override(state.config, *changes))
        scores, weights = verbs.one_device().score(other, features)
        np.testing.assert_allclose(scores, stored.arrays[f"fused/{name}"], atol=BUDGET)
        np.testing.assert_allclose(weights.sum(1), 1.0, atol=1e-6)


def test_loss_and_gradient(stored, learned):
    state, arrays = learned[0], stored.arrays
    trainable = {
        "adapter": adapter(stored, 2),
        "head": {"rows": jnp.asarray(arrays["proxy_rows"]), "scale": jnp.float32(3.0)},
    }
    images = Raw({"image": jnp.asarray(arrays["images"][12:])})
    batch = {"label": jnp.asarray(arrays["labels"][12:])}
    rows = Context(jax.random.split(jax.random.key(0), 6), jnp.ones(6, bool), lambda x: x)

    @jax.jit
    @jax.value_and_grad
    def objective(trainable):
        return jnp.mean(mote.loss(trainable, state, images, batch, rows)["loss"])

    loss, grads = objective(trainable)
    np.testing.assert_allclose(loss, arrays["loss"], rtol=BUDGET)
    head = {"rows": arrays["grad/rows"], "scale": arrays["grad/sigma"][0]}
    expected = {"adapter": stored.adapter("grad"), "head": head}
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=5e-5 * jnp.abs(b).max()), grads, expected
    )
