"""What forms add to a host, against NumPy in float64.

Error budget: sums of at most 32 products of numbers near 1, and up to six LayerNorms in a row:
200 eps = 2.4e-5.
"""

import jax
import jax.numpy as jnp
import numpy as np

from qkd_jax.learners.cdl.parts import (
    fused_blocks,
    new_fusion,
    new_mapper,
    start_rows,
    with_mapped,
    with_prompts,
    with_token,
)
from qkd_jax.nn.inserts import Inserts
from qkd_jax.nn.layers import AttentionInsert

BUDGET = 2.4e-5


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def norm(params, x):
    x = x - x.mean(-1, keepdims=True)
    scaled = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5)
    return scaled * np.float64(params["scale"]) + np.float64(params["bias"])


def linear(params, x):
    return x @ np.float64(params["kernel"]) + np.float64(params["bias"])


def moved(params):
    """The same tree with every leaf off its start, so that scales and biases count."""
    leaves, treedef = jax.tree.flatten(params)
    return treedef.unflatten([a + 0.3 * draw(*a.shape, seed=i) for i, a in enumerate(leaves)])


def test_fused_blocks_from_the_last_to_the_first():
    params = moved(new_fusion(jax.random.key(0), 3, teacher=5, student=4))
    blocks = [draw(2, 6, 4, seed=9 + i) for i in range(3)]
    fused, expected = None, [None] * 3
    for index in (2, 1, 0):
        layer = params["last"]
        if index < 2:
            layer = jax.tree.map(lambda a, index=index: a[index], params["others"])
        x = norm(layer["in_norm"], linear(layer["in"], np.float64(blocks[index])))
        if fused is not None:
            gates = [norm(layer["gate_norm"], linear(layer["gate"], v)) for v in (x, fused)]
            x = norm(layer["fused_norm"], x * gates[0] + fused * gates[1])
        fused = x
        expected[index] = linear(layer["out"], x)
    found = jax.jit(fused_blocks)(params, blocks)
    assert found.shape == (2, 3, 6, 5)
    for index, reference in enumerate(expected):
        limit = BUDGET * np.abs(reference).max()
        np.testing.assert_allclose(found[:, index], reference, atol=limit)


def test_mapped_prompts_stand_behind_the_hosts_own():
    mapper = moved(new_mapper(jax.random.key(0), (2, 3, 4), teacher=5, student=6))
    means, own = draw(2, 2, 5), AttentionInsert(prefix_key=draw(1, 6), prefix_value=draw(1, 6))
    inserts = with_mapped(Inserts(attention=(own, None, None)), mapper, jnp.asarray(means), 3)
    first, second, third = inserts.attention
    assert third is None
    for index, insert in enumerate((first, second)):
        rows = {name: np.float64(part[index]) for name, part in mapper.items()}
        for b in range(2):
            prompt = np.zeros((4, 6))
            for m in range(3):
                seen = np.float64(means[b, index]) * rows["attention"][m]
                lengths = np.linalg.norm(seen) * np.linalg.norm(rows["keys"][m])
                prompt += seen @ rows["keys"][m] / lengths * rows["components"][m]
            keys, values = insert.prefix_key[b], insert.prefix_value[b]
            np.testing.assert_allclose(keys[-2:], prompt[:2], atol=BUDGET)
            np.testing.assert_allclose(values[-2:], prompt[2:], atol=BUDGET)
            assert keys.shape == ((3, 6) if index == 0 else (2, 6))
            if index == 0:
                np.testing.assert_array_equal(keys[:1], own.prefix_key)


def test_the_mapper_starts_orthonormal():
    mapper = new_mapper(jax.random.key(0), (2, 3, 4), teacher=5, student=6)
    for rows in mapper.values():
        flat = np.float64(rows).reshape(2, 3, -1)
        np.testing.assert_allclose(flat @ flat.swapaxes(1, 2), [np.eye(3)] * 2, atol=1e-5)


def test_prompts_go_into_all_blocks_but_the_first():
    """After a host's own rows, of each image or of all, or beside what is no prefix."""
    prompts = draw(3, 4, 6)
    per_image = AttentionInsert(prefix_key=draw(2, 1, 6), prefix_value=draw(2, 1, 6))
    added = AttentionInsert(class_key=draw(6), class_value=draw(6))
    attention = with_prompts(
        Inserts(attention=(per_image, per_image, added, None)), prompts
    ).attention
    assert attention[0] is per_image
    np.testing.assert_array_equal(attention[1].prefix_key[:, :1], per_image.prefix_key)
    for b in range(2):
        np.testing.assert_array_equal(attention[1].prefix_key[b, 1:], prompts[0, :2])
        np.testing.assert_array_equal(attention[1].prefix_value[b, 1:], prompts[0, 2:])
    np.testing.assert_array_equal(attention[2].class_key, added.class_key)
    np.testing.assert_array_equal(attention[2].prefix_key, prompts[1, :2])
    np.testing.assert_array_equal(attention[3].prefix_value, prompts[2, 2:])
    for insert in with_prompts(Inserts(), prompts).attention[1:]:
        assert insert.prefix_key.shape == (2, 6)


def test_the_token_is_the_last_row():
    token, tokens = draw(1, 6), draw(2, 3, 6, seed=1)
    np.testing.assert_array_equal(with_token(Inserts(), token).tokens, token)
    found = with_token(Inserts(tokens=tokens), token).tokens
    np.testing.assert_array_equal(found[:, :3], tokens)
    np.testing.assert_array_equal(found[:, 3:], [token, token])


def test_starts():
    assert not start_rows(jax.random.key(0), (3, 400), "zeros").any()
    rows = np.asarray(start_rows(jax.random.key(0), (3, 400), "unit"))
    # 1200 numbers of U(0, 1): their mean is off by 0.29 / 35; five of that.
    assert 0 <= rows.min() and rows.max() < 1 and abs(rows.mean() - 0.5) < 0.042
