"""SSIAT against the authors' code.

Repository HAIV-Lab/SSIAT, commit 3f1f00d044785cb31c47b4c8eadea4314515fd33. The arrays come from
`golden/make_ssiat_golden.py`, which says how, by running network/vision_transformer_adapter.py
`VisionTransformer` (16 wide, 3 blocks, 2 heads, MLP 16, patches of 4 pixels of 8 x 8 images,
parallel adapters of bottleneck 3 and scale 0.1) inside utils/inc_net.py `SimpleVitNet`, in float64
on weights rounded to float32: two tasks of two classes and 8 images each, one random adapter after
each task. From them, in the order of `Learner.incremental_train`: `_compute_class_mean` of task 0,
the network's logits, utils/loss.py `AngularPenaltySMLoss` (cosface, s 20, m 0.3, no dropout) and
its gradient on task 1, `displacement` of the old means at sigma 4 and 1, `_compute_class_mean` of
task 1, and of `_stage2_compact_classifier` the means it draws around, its first batch of 256
pseudo-features (rounded to float16), that batch's loss and gradient.

The authors' code gives `displacement` features of two shuffled passes, so that old and new
features belong to different images; here it was called with those of the same images, and for
`unpaired` with the mean of the new features in every row, which is its mean over all orders.

Error budget: float32 through 3 blocks on a stream of order 1 leaves 1e-5 in a feature and in means
and shifts of features; 20 cosines carry 20 times that, covariances twice the size of a feature. The
gradient adds as many backward steps: 5e-5 of its largest entry.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qkd_jax
from qkd_jax.learners import ssiat
from qkd_jax.learners.shape import Context
from qkd_jax.learners.task_heads import alignment_loss
from qkd_jax.nn.inputs import Raw
from qkd_jax.protocol.tasks import Task

BUDGET = 1e-5


@pytest.fixture(scope="module")
def stored(golden):
    return golden("ssiat")


def begun(stored, state, task, adapter):
    """The task's state before its end, with the reference's weights."""
    state = qkd_jax.begin_task(state, Task(task, (2 * task, 2 * task + 1)))
    rows = jnp.asarray(stored.arrays["head"][2 * task : 2 * task + 2])
    return state.replace(trainable={"adapter": stored.adapter(adapter), "head": {"rows": rows}})


def ended(stored, state):
    mine = slice(8 * int(state.task), 8 * int(state.task) + 8)
    arrays = stored.arrays
    return qkd_jax.end_task(state, [{n[:-1]: arrays[n][mine] for n in ("images", "labels")}])


@pytest.fixture(scope="module")
def learned(stored):
    """States of two tasks: after the first, in the second before its end, after it."""
    settings = "backbone.image_size=8 data.augment=false num_classes=4 max_tasks=2"
    settings += " max_task_classes=2 adapter.bottleneck=3 adapter.scale=0.1 adapter.dropout=0.0"
    settings += " alignment.jitter=0.001 alignment.epochs=0 ssiat.margin=0.3 method=ssiat"
    config = stored.config(*settings.split())
    state = qkd_jax.init_state(jax.random.key(0), stored.backbone, config)
    first = ended(stored, begun(stored, state, 0, "first"))
    second = begun(stored, first, 1, "second")
    return first, second, ended(stored, second)


def test_logits_of_one_adapter_and_all_rows(stored, learned):
    scores = qkd_jax.predict(learned[2], stored.arrays["images"])
    np.testing.assert_allclose(scores, 20.0 * stored.arrays["logits"], atol=20 * BUDGET)


def test_margin_loss_and_gradient(stored, learned):
    state, arrays = learned[1], stored.arrays
    images = Raw({"image": jnp.asarray(arrays["images"][8:])})
    batch = {"label": jnp.asarray(arrays["labels"][8:])}
    rows = Context(jax.random.split(jax.random.key(0), 8), jnp.ones(8, bool), lambda x: x)

    @jax.jit
    @jax.value_and_grad
    def objective(trainable):
        return jnp.mean(ssiat.loss(trainable, state, images, batch, rows)["loss"])

    loss, grads = objective(state.trainable)
    np.testing.assert_allclose(loss, arrays["loss"], atol=20 * BUDGET)
    expected = {"adapter": stored.adapter("grad"), "head": {"rows": arrays["grad/head"]}}
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=5e-5 * jnp.abs(b).max()), grads, expected
    )


def test_gaussians_before_and_after_the_shift(stored, learned):
    first, second = (state.memory["generator"] for state in (learned[0], learned[2]))
    np.testing.assert_allclose(first.mean[:2], stored.arrays["means/0"], atol=BUDGET)
    np.testing.assert_allclose(second.mean, stored.arrays["means/1"], atol=2 * BUDGET)
    covariances = np.einsum("cde,cfe->cdf", second.factor, second.factor)
    np.testing.assert_allclose(covariances, stored.arrays["covariances/1"], atol=5 * BUDGET)
    np.testing.assert_array_equal(first.factor[:2], second.factor[:2])


@pytest.mark.parametrize("kind", ["paired", "unpaired"])
@pytest.mark.parametrize("sigma", [4.0, 1.0])
def test_shift(stored, learned, kind, sigma):
    settings = f"ssiat.shift={kind}", f"ssiat.kernel_width={sigma}"
    state = learned[1].replace(config=qkd_jax.override(learned[1].config, *settings))
    images = Raw({"image": jnp.asarray(stored.arrays["images"][8:])})

    @jax.jit
    def shifts():
        features = [ssiat.extract(state, images, jnp.int32(slot), None) for slot in (0, 1)]
        features, labels = jnp.stack(features, axis=1), jnp.asarray(stored.arrays["labels"][8:])
        statistics = ssiat.statistics(state.config, 2, 16)
        for rows in (slice(0, 5), slice(5, 8)):
            statistics = ssiat.accumulate(
                state,
                statistics,
                features[rows],
                labels[rows],
                jnp.ones(rows.stop - rows.start, bool),
            )
        return ssiat.shifts(state, statistics)

    found = shifts()
    np.testing.assert_allclose(found[:2], stored.arrays[f"shift/{kind}/{sigma}"], atol=2 * BUDGET)
    assert not np.asarray(found[2:]).any()


def test_alignment_draws_around_scaled_means(stored, learned):
    state = learned[2]
    means = ssiat.scaled(state, state.memory["generator"]).mean
    np.testing.assert_allclose(means, stored.arrays["align/means"], atol=2 * BUDGET)


def test_alignment_loss_and_gradient(stored, learned):
    arrays, state = stored.arrays, learned[2]
    np.testing.assert_array_equal(state.memory["rows"], arrays["head"])
    features = jnp.asarray(arrays["align/features"].astype(np.float32))
    labels = jnp.asarray(arrays["align/labels"].astype(np.int32))

    @jax.jit
    @jax.value_and_grad
    def objective(rows):
        return alignment_loss(state, ssiat.logits_of(state, features, rows), labels)

    loss, grad = objective(state.memory["rows"])
    np.testing.assert_allclose(loss, arrays["align/loss"], rtol=BUDGET)
    expected = arrays["align/grads"].reshape(4, 16)
    np.testing.assert_allclose(grad, expected, atol=5e-5 * np.abs(expected).max())
