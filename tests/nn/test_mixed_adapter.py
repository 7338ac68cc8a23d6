"""Adapters mixed in every block: one wide adapter equals the weighted sum of its parts."""

import jax
import jax.numpy as jnp
import numpy as np

from qkd_jax.nn.adapters import AdapterSpec, apply_adapter, init_adapter, mixed_adapter
from qkd_jax.nn.backbone import Backbone
from qkd_jax.nn.encode import encode
from qkd_jax.nn.inputs import Raw
from qkd_jax.nn.inserts import Inserts
from qkd_jax.nn.parameters import init_random
from qkd_jax.nn.vit import ViTSpec

SPEC = AdapterSpec(bottleneck=5)
TASKS, BLOCKS, WIDTH, IMAGES = 3, 2, 8, 4


def stack(key):
    """TASKS adapters without a zero in them."""
    one = init_adapter(key, SPEC, WIDTH, BLOCKS)
    return jax.tree.map(
        lambda a: jax.random.normal(jax.random.fold_in(key, a.size), (TASKS, *a.shape)), one
    )


def feature_of(params, spec, images, inserts=None, **options):
    """[B, D]: the class token of normalised images."""
    return encode(Backbone(params, spec), Raw({"image": images}), inserts, **options)[:, 0]


def test_a_block_of_the_mixture_is_the_weighted_sum(key):
    adapters = stack(key)
    weights = jax.nn.softmax(jax.random.normal(key, (IMAGES, TASKS)))
    x = jax.random.normal(jax.random.key(3), (IMAGES, 6, WIDTH))
    mixture, factors = mixed_adapter(adapters, weights)
    for block in range(BLOCKS):
        found = apply_adapter(
            jax.tree.map(lambda a, b=block: a[b], mixture), x, SPEC, factors[:, None, :]
        )
        expected = sum(
            np.asarray(weights)[:, i, None, None]
            * np.asarray(
                apply_adapter(jax.tree.map(lambda a, i=i, b=block: a[i, b], adapters), x, SPEC)
            )
            for i in range(TASKS)
        )
        # Sums of 18 hidden units of order 10: a few roundings of 6e-8 each.
        np.testing.assert_allclose(found, expected, atol=2e-5)


def test_all_weight_on_one_task_is_that_adapter_alone(key):
    spec = ViTSpec(
        width=WIDTH, depth=BLOCKS, num_heads=2, mlp_width=16, patch_size=4, image_size=8, grid=2
    )
    params, adapters = init_random(key, spec), stack(key)
    images = jax.random.normal(jax.random.key(1), (IMAGES, 8, 8, 3))
    chosen = np.array([2, 0, 1, 2])
    mixture, factors = mixed_adapter(adapters, jnp.asarray(np.eye(TASKS, dtype=np.float32)[chosen]))
    mixed = feature_of(params, spec, images, Inserts(mixture, SPEC, factors))
    for row, task in enumerate(chosen):
        alone = jax.tree.map(lambda a, t=task: a[t], adapters)
        expected = feature_of(params, spec, images[row : row + 1], Inserts(alone, SPEC))
        np.testing.assert_allclose(mixed[row], expected[0], atol=1e-4)
