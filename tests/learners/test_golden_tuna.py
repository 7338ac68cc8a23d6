"""TUNA against the authors' code.

The authors' repository (LAMDA-CL/ICCV2025-TUNA) as it stands in the history of the public copy
Ngahoang2005/ICCV2025-TUNA at their last commit, 77d4f10ec92368d28d97664a26fb2b36f2e54fdd; the
copy's own later commits change these files. The arrays come from `golden/make_tuna_golden.py`,
which says how, by running models/tuna.py `Learner` and utils/inc_net.py `TUNANet` on
backbone/vit_tuna.py `VisionTransformer` (8 wide, 12 blocks, for their loss counts to 12, 2 heads,
MLP 8, patches of 4 pixels of 8 x 8 images, their `Adapter` with bottleneck 2 and scale 0.1, no
dropout), in float64 on weights rounded to float32: three tasks of two classes, four images a class,
with random adapters and head rows.

- `merge` gave the fused adapter of three tasks;
- `_init_train` on one batch of the third task (scale 20, margin 0.3, reg 2, a rate of 0) the total
  loss and gradients, `AngularPenaltySMLoss` and `orth_loss` its two parts;
- `_eval_cnn` on nine images, three for each adapter that entropy chooses, the scores, taken where
  it asks for the best five: as it stands, and with the adapter index at which the transformer
  answers with the fused adapter. The least entropy is the least by 1e-3;
- `classifer_align` (7 epochs, 5 draws a class, rate 0.005, decay 0.01, with `decay`) its means, its
  draws and the rows after.

Error budget: float32 through 12 blocks on a stream of order 1 leaves 2e-5 in a feature, at worst;
the scale of 20 carries half of it into a softmax or a loss of order 5: 1e-4. A gradient adds as
many backward steps: 1e-4 of its largest entry. 42 SGD steps at that scale: 2e-5 in rows of
order 1.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qkd_jax
from qkd_jax.engine import verbs
from qkd_jax.learners import tuna
from qkd_jax.learners.shape import Context
from qkd_jax.nn.backbone import stack_blocks
from qkd_jax.nn.fit import cosine_factor, fit, sgd
from qkd_jax.nn.inputs import Raw
from qkd_jax.nn.losses import cross_entropy
from qkd_jax.protocol.tasks import Task

BUDGET = 2e-5
SETTINGS = """
    method=tuna backbone.image_size=8 data.augment=false num_classes=6 max_tasks=3
    max_task_classes=2 adapter.bottleneck=2 adapter.scale=0.1 adapter.dropout=0.0
    alignment.epochs=0 tuna.scale=20.0 tuna.margin=0.3 tuna.orthogonality=2.0 tuna.mean_decay=new
""".split()


@pytest.fixture(scope="module")
def stored(golden):
    return golden("tuna")


@pytest.fixture(scope="module")
def learned(stored):
    """(state in the third task before its end, the state after it)."""
    arrays, adapters = stored.arrays, stored.adapter("adapter")
    config = stored.config(*SETTINGS)
    backbone = stored.backbone.replace(params=stack_blocks(stored.backbone.params))
    state = qkd_jax.init_state(jax.random.key(0), backbone, config)
    for task in range(3):
        state = qkd_jax.begin_task(state, Task(task, (2 * task, 2 * task + 1)))
        head = {"rows": jnp.asarray(arrays["rows"][2 * task : 2 * task + 2])}
        adapter = jax.tree.map(lambda a, task=task: a[task], adapters)
        state = state.replace(trainable={"adapter": adapter, "head": head})
        open_state, mine = state, slice(8 * task, 8 * task + 8)
        batch = {"image": arrays["images"][mine], "label": arrays["labels"][mine]}
        state = qkd_jax.end_task(state, [batch])
    return open_state, state


def test_the_fused_adapter(stored, learned):
    expected = jax.tree.map(lambda a: a[0], stored.adapter("fused"))
    jax.tree.map(np.testing.assert_array_equal, learned[1].memory["universal"], expected)


def test_selection_and_both_predictions(stored, learned):
    state, arrays = learned[1], stored.arrays
    features = verbs.slot_features(state, arrays["queries"])
    np.testing.assert_allclose(features[:, [0, 2, 4, 5]], arrays["features"], atol=BUDGET)
    scores, relevance = verbs.one_device().score(state, features)
    np.testing.assert_array_equal(np.argmax(relevance, axis=1), arrays["used"])
    np.testing.assert_allclose(scores, arrays["scores_fused"], atol=5 * BUDGET)
    newest = state.replace(config=qkd_jax.override(state.config, "tuna.universal=newest"))
    scores, _ = verbs.predict_with_relevance(newest, arrays["queries"])
    np.testing.assert_allclose(scores, arrays["scores_newest"], atol=5 * BUDGET)
    assert np.abs(arrays["scores_newest"] - arrays["scores_fused"]).max() > 0.1


def test_loss_and_gradient(stored, learned):
    state, arrays = learned[0], stored.arrays
    images = jnp.asarray(arrays["images"][arrays["batch"]] / np.float32(255))
    batch = {"label": jnp.asarray(arrays["labels"][arrays["batch"]])}
    rows = Context(jax.random.split(jax.random.key(0), 5), jnp.ones(5, bool), lambda x: x)

    def total(trainable):
        terms = tuna.loss(trainable, state, Raw({"image": images}), batch, rows)
        means = {name: jnp.mean(value) for name, value in terms.items()}
        return means["loss"], means

    gradient, means = jax.jit(jax.grad(total, has_aux=True))(state.trainable)
    np.testing.assert_allclose(means["loss_ce"], arrays["ce"], atol=5 * BUDGET)
    np.testing.assert_allclose(means["loss_orthogonality"], arrays["orth"], rtol=BUDGET)
    np.testing.assert_allclose(means["loss"], arrays["total"], atol=5 * BUDGET)
    theirs = jax.tree.map(lambda a: a[0], stored.adapter("gradient"))
    head = {"rows": arrays["gradient_rows"]}
    for ours, wanted in ((gradient["adapter"], theirs), (gradient["head"], head)):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max()), ours, wanted
        )


def test_means_of_alignment(stored, learned):
    state, arrays = learned[1], stored.arrays
    means = state.memory["generator"].mean
    np.testing.assert_allclose(means, arrays["means"], atol=BUDGET)
    scaled = tuna.mean_factors(state)[:, None] * means
    np.testing.assert_allclose(scaled, arrays["drawn_means"], atol=BUDGET)


def test_alignment_on_the_same_draws(stored, learned):
    """The rate is back at its height after ten epochs: 0 in the sixth, rising in the seventh."""
    state, arrays = learned[1], stored.arrays
    rows, seen = jnp.asarray(arrays["rows"]), jnp.ones(6, bool)
    draws, labels = jnp.asarray(arrays["draws"]), jnp.asarray(arrays["draw_labels"], jnp.int32)
    optimiser = sgd(lambda step: 0.005 * cosine_factor(step // 6, 5), 0.9, 0.01)

    def objective(rows, i):
        return jnp.mean(cross_entropy(tuna.logits_of(state, draws[i], rows), labels[i], seen))

    rows, _ = fit(rows, optimiser.init(rows), objective, lambda i: i, optimiser, len(draws))
    np.testing.assert_allclose(rows, arrays["aligned_rows"], atol=2e-5)
    assert np.abs(arrays["aligned_rows"] - arrays["rows"]).max() > 0.1
