"""The optimiser's settings as numbers: rate of the head, clipping, decay, Adam's moments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qkd_jax
from qkd_jax.learners.optimiser import optimiser
from qkd_jax.settings.sections import TrainConfig

# A few sums and products in float32.
BUDGET = 2e-6
PARAMS = {
    "adapter": {"kernel": np.array([[1.0, -2.0]]), "bias": np.array([0.5])},
    "head": {"rows": np.array([[3.0]]), "scale": np.array(5.0)},
    "gate": {"kernel": np.array([4.0])},
}
SLOPES = {
    "adapter": {"kernel": np.array([[0.3, 0.0]]), "bias": np.array([-0.4])},
    "head": {"rows": np.array([[1.2]]), "scale": np.array(0.0)},
    "gate": {"kernel": np.array([0.5])},
}
NORM = 1.3929  # of all slopes together: sqrt(0.09 + 0.16 + 1.44 + 0.25)


def updates(config, steps=1):
    """What `optimiser` gives in the last of several steps with gradients SLOPES, 2 SLOPES, ..."""
    params, slopes = (jax.tree.map(jnp.float32, tree) for tree in (PARAMS, SLOPES))
    rule = optimiser(config)
    state = rule.init(params)
    with jax.numpy_dtype_promotion("standard"):
        for step in range(steps):
            grads = jax.tree.map(lambda g, n=step + 1: n * g, slopes)
            found, state = rule.update(grads, state, params)
    return found


def assert_tree(found, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=BUDGET), found, expected)


@pytest.mark.parametrize("clip, factor", [(0.0, 1.0), (0.5, 0.5 / NORM), (2.0, 1.0)])
def test_the_norm_of_all_gradients_together_is_clipped_before_decay(clip, factor):
    found = updates(TrainConfig(clip_norm=clip, weight_decay=0.1, momentum=0.9))
    expected = jax.tree.map(lambda g: factor * g, SLOPES)
    expected["adapter"]["kernel"] = (
        expected["adapter"]["kernel"] + 0.1 * PARAMS["adapter"]["kernel"]
    )
    expected["head"]["rows"] = expected["head"]["rows"] + 0.1 * PARAMS["head"]["rows"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=5e-5), found, expected)


def test_momentum_adds_up():
    """v_2 = 0.9 g + 2 g."""
    found = updates(TrainConfig(weight_decay=0.0, momentum=0.9), steps=2)
    assert_tree(found, jax.tree.map(lambda g: 2.9 * g, SLOPES))


def test_adam_has_its_published_moments():
    """beta_1 = 0.9, beta_2 = 0.999, eps = 1e-8 (arXiv 1412.6980); the decay is not adapted.

    With gradients g, 2 g, 3 g: m = 0.1 (0.81 + 1.8 + 3) g and v = 0.001 (0.998001 + 4 * 0.999 + 9)
    g^2. With 0.99 for beta_2 the update would be 1 % smaller.
    """
    found = updates(TrainConfig(optimizer="adam", weight_decay=0.1), steps=3)
    mean = 0.561 / (1 - 0.9**3)
    size = np.sqrt(0.001 * (0.998001 + 3.996 + 9) / (1 - 0.999**3))
    expected = jax.tree.map(lambda g: mean * g / (size * np.abs(g) + 1e-8), SLOPES)
    expected["adapter"]["kernel"] = (
        expected["adapter"]["kernel"] + 0.1 * PARAMS["adapter"]["kernel"]
    )
    expected["head"]["rows"] = expected["head"]["rows"] + 0.1 * PARAMS["head"]["rows"]
    # optax computes 1 - 0.999^3 in float32, 3e-3 from 1: off by 2e-5.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=3e-5), found, expected)


def test_the_head_has_its_share_of_the_rate(tiny, begun):
    """A step moves the head by head_rate times as much, and nothing else differently."""
    batch = tiny.batch(tiny.tasks[0])

    def moved(factor):
        config = qkd_jax.override(begun.config, f"train.head_rate={factor}")
        before = tiny.copy(begun.replace(config=config))
        after, _ = qkd_jax.train_task(tiny.copy(before), batch)
        return jax.tree.map(
            lambda a, b: np.float64(b) - np.float64(a), before.trainable, after.trainable
        )

    whole, part = moved(1), moved(0.25)
    # A difference of rows near 1 is rounded by eps, of a scale of 5 by 5 eps.
    for name in ("rows", "scale"):
        np.testing.assert_allclose(part["head"][name], 0.25 * whole["head"][name], atol=2e-6)
        assert np.abs(whole["head"][name]).max() > 1e-4
    jax.tree.map(np.testing.assert_array_equal, part["adapter"], whole["adapter"])
