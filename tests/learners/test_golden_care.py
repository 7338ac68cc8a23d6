"""CaRE against the authors' code: routed experts, losses, start of an expert, both predictions.

`golden/make_care_golden.py` made the arrays and says how: three tasks of two classes, twelve
blocks, two routers of two experts each, weights drawn away from their usual start.

Error budget: float32 through 12 blocks on a stream of order 1 leaves 2e-5 in a feature; the scale
of 20 carries ten times that into a softmax or a loss: 2e-4. A gradient adds as many backward steps
on the way through the LayerNorms of expert outputs: 2e-4 of its largest entry. What is close to a
tie between routers or experts would differ by far more; no input here is.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qkd_jax
from qkd_jax.learners import care
from qkd_jax.learners.shape import Context
from qkd_jax.nn.backbone import stack_blocks
from qkd_jax.nn.inputs import Raw
from qkd_jax.protocol.tasks import Task

BUDGET = 2e-5
SETTINGS = """
    method=care backbone.image_size=8 data.augment=false num_classes=6 max_tasks=3
    max_task_classes=2 alignment.epochs=0 care.expert_bottleneck=2 care.shared_bottleneck=3
    care.dropout=0.0 care.routers=2 care.experts=2 care.scale=20.0 care.margin=0.1
""".split()


@pytest.fixture(scope="module")
def stored(golden):
    return golden("care")


def turned(array):
    return jnp.asarray(array).swapaxes(-1, -2)


def adapter_of(arrays, prefix):
    def named(name):
        return jnp.asarray(arrays[f"{prefix}{name}"])

    norm = "adapter_layer_norm_before."
    return {
        "norm": {"scale": named(f"{norm}weight"), "bias": named(f"{norm}bias")},
        **{
            name: {
                "kernel": turned(named(f"{name}_proj.weight")),
                "bias": named(f"{name}_proj.bias"),
            }
            for name in ("down", "up")
        },
        "scale": named("scale"),
    }


def experts_of(arrays, prefix="experts/"):
    """Experts, perceptrons and routers [L, T, ...] by our names."""

    def linear(name):
        return {
            "kernel": turned(arrays[f"{prefix}{name}.weight"]),
            "bias": jnp.asarray(arrays[f"{prefix}{name}.bias"]),
        }

    scale = jnp.asarray(arrays[f"{prefix}latent_head.0.weight"])
    bias = jnp.asarray(arrays[f"{prefix}latent_head.0.bias"])
    return {
        "expert": adapter_of(arrays, f"{prefix}adapter."),
        "perceptron": {"norm": {"scale": scale, "bias": bias}, **linear("latent_head.1")},
        "router": linear("router"),
    }


@pytest.fixture(scope="module")
def learned(stored):
    """The state in the third task before its end, with the reference's weights."""
    arrays, experts = stored.arrays, experts_of(stored.arrays)
    backbone = stored.backbone.replace(params=stack_blocks(stored.backbone.params))
    state = qkd_jax.init_state(jax.random.key(0), backbone, stored.config(*SETTINGS))
    for task in range(3):
        state = qkd_jax.begin_task(state, Task(task, (2 * task, 2 * task + 1)))
    rows = jnp.asarray(arrays["rows"])
    trainable = {
        **jax.tree.map(lambda a: a[:, 2], experts),
        "shared": adapter_of(arrays, "shared/"),
        "head": {"rows": rows[4:]},
    }
    memory = {**state.memory, "experts": experts, "shared": trainable["shared"], "rows": rows}
    return state.replace(trainable=trainable, memory=memory)


def test_features_of_every_pass(stored, learned):
    images = Raw({"image": jnp.asarray(stored.arrays["images"])})
    run = jax.jit(lambda task, forced: care.frozen_feature(learned, images, task, forced))
    found = [run(jnp.int32(task), True) for task in range(3)] + [run(jnp.int32(2), False)]
    np.testing.assert_allclose(jnp.stack(found, axis=1), stored.arrays["features"], atol=BUDGET)
    # The passes differ, so that routers and experts were chosen.
    assert np.abs(np.diff(stored.arrays["features"], axis=1)).max(axis=(0, 2)).min() > 0.1


@pytest.mark.parametrize("passes", ["one", "every_task"])
def test_both_predictions(stored, learned, passes):
    config = qkd_jax.override(learned.config, f"care.passes={passes}")
    scores = qkd_jax.predict(learned.replace(config=config), stored.arrays["images"])
    scores = scores / 20.0 if passes == "one" else scores  # theirs are cosines there
    np.testing.assert_allclose(scores, stored.arrays[f"scores/{passes}"], atol=10 * BUDGET)


@pytest.mark.parametrize("kind", ["cosface", pytest.param("cross_entropy", marks=pytest.mark.slow)])
def test_losses_and_gradients(stored, learned, kind):
    """`cross_entropy` is their setting for ImageNet-A, without the KL."""
    settings = f"care.perceptron_loss={kind}", f"care.distill={kind == 'cosface'}".lower()
    state = learned.replace(config=qkd_jax.override(learned.config, *settings))
    arrays, mine = stored.arrays, stored.arrays["labels"] >= 4
    images = Raw({"image": jnp.asarray(arrays["images"][mine])})
    batch = {"label": jnp.asarray(arrays["labels"][mine])}
    rows = Context(jax.random.split(jax.random.key(0), 4), jnp.ones(4, bool), lambda x: x)

    def total(trainable):
        terms = care.loss(trainable, state, images, batch, rows)
        means = {name: jnp.mean(value) for name, value in terms.items()}
        return means["loss"], means

    gradient, means = jax.jit(jax.grad(total, has_aux=True))(state.trainable)
    found = [means[name] for name in ("loss", "loss_ce", "loss_perceptrons")]
    np.testing.assert_allclose(found, arrays[f"{kind}/losses"], atol=10 * BUDGET)
    experts = experts_of(arrays, f"{kind}/gradient/experts/")
    expected = {
        **jax.tree.map(lambda a: a[:, 0], experts),
        "shared": adapter_of(arrays, f"{kind}/gradient/shared/"),
        "head": {"rows": arrays[f"{kind}/gradient/rows"]},
    }
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4 * np.abs(b).max()),
        gradient,
        expected,
    )


def test_start_of_a_fourth_expert(stored, learned):
    trainable, _ = care.begin(learned.replace(task=jnp.int32(3)), jax.random.key(0))
    expected = adapter_of(stored.arrays, "start/")
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a[0], b, atol=1e-6), trainable["expert"], expected
    )


def test_the_shared_adapter_is_pulled_back(stored, learned):
    moved = jax.tree.map(lambda a: a + 1.0, learned.trainable["shared"])
    pulled = care.project({**learned.trainable, "shared": moved}, learned)["shared"]
    expected = adapter_of(stored.arrays, "pulled/")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[0], b, atol=1e-6), pulled, expected)
