"""Choices and key losses of prompt pools against loops in NumPy float64.

Error budget: sums of at most 40 terms near 1 in float32, 40 eps = 5e-6 of the largest value.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkd_jax.errors import ConfigError
from qkd_jax.nn.layers import AttentionInsert
from qkd_jax.nn.prompts import (
    STARTS,
    check_blocks,
    chosen_rows,
    cosines,
    in_blocks,
    key_loss,
    nearest,
    new_rows,
    split_prefix,
)

B, K, N, D = 5, 6, 2, 4
MASK = np.array([True, True, False, True, True])


@pytest.fixture(scope="module")
def case():
    """Queries, keys (one zero), their cosines in float64 and the two nearest keys."""
    random = np.random.default_rng(0)
    queries, keys = random.standard_normal((B, D)), random.standard_normal((K, D))
    keys[3] = 0.0
    cosine = np.zeros((B, K))
    for b in range(B):
        for k in range(K):
            lengths = max(np.linalg.norm(queries[b]), 1e-12) * max(np.linalg.norm(keys[k]), 1e-12)
            cosine[b, k] = queries[b] @ keys[k] / lengths
    chosen = np.argsort(-cosine, axis=1, kind="stable")[:, :N]
    return np.float32(queries), np.float32(keys), cosine, chosen


def test_cosines_and_the_nearest_keys(case):
    queries, keys, cosine, chosen = case
    found = cosines(queries, keys)
    np.testing.assert_allclose(found, cosine, atol=5e-6)
    np.testing.assert_array_equal(nearest(found, N), chosen)
    # A zero key is at cosine 0 and its gradient is finite.
    assert not np.asarray(found)[:, 3].any()
    assert np.isfinite(jax.grad(lambda k: cosines(queries, k).sum())(keys)).all()


def test_nearest_of_those_allowed_and_the_first_of_equals():
    scores = jnp.array([[0.1, 0.9, 0.5, 0.5], [0.0, 0.0, 0.0, 0.0]])
    np.testing.assert_array_equal(nearest(scores, 2), [[1, 2], [0, 1]])
    allowed = jnp.array([True, False, True, True])
    np.testing.assert_array_equal(nearest(scores, 2, allowed), [[2, 3], [0, 2]])


def by_loops(reduction, cosine, chosen):
    """The loss of a batch with one padded row, image by image and pair by pair."""
    real = np.flatnonzero(MASK)
    if reduction == "gtripl_sum":
        return sum(1 - cosine[b, k] for b in real for other in real for k in chosen[other])
    total = sum(1 - cosine[b, k] for b in real for k in chosen[b])
    return total if reduction == "sum" else total / len(real)


@pytest.mark.parametrize("reduction", ["mean", "sum", "gtripl_sum"])
def test_key_losses_equal_loops_on_one_device_and_on_five(case, reduction):
    _, _, cosine, chosen = case
    terms = key_loss(jnp.float32(cosine), chosen, reduction, MASK, lambda x: x)
    expected = by_loops(reduction, cosine, chosen)
    np.testing.assert_allclose(np.asarray(terms)[MASK].mean(), expected, rtol=5e-6)

    def on_device(cosine, chosen, mask):
        def gather(x):
            return jax.lax.all_gather(x, "data", tiled=True)

        return key_loss(cosine[None], chosen[None], reduction, mask[None], gather)[0]

    spread = jax.pmap(on_device, axis_name="data")(jnp.float32(cosine), chosen, MASK)
    np.testing.assert_allclose(np.asarray(spread)[MASK].mean(), expected, rtol=5e-6)


def test_only_the_sum_over_wrong_pairs_moves_a_key_by_images_that_did_not_choose_it(case):
    queries, keys, _, chosen = case

    def pull(keys, reduction):
        found = cosines(queries, keys)
        return jnp.sum(key_loss(found, chosen, reduction, MASK, lambda x: x)[:1])

    others = np.setdiff1d(chosen[MASK], chosen[0])
    assert others.size
    for reduction in ("mean", "sum", "gtripl_sum"):
        gradient = np.asarray(jax.grad(pull)(keys, reduction))[others]
        assert gradient.any() == (reduction == "gtripl_sum")


def test_rows_become_prefixes_and_tokens():
    rows = np.arange(2 * 3 * 4 * D, dtype=np.float32).reshape(2, 3, 4, D)
    shared, own, several = split_prefix(rows[0, 0]), split_prefix(rows[0]), split_prefix(rows)
    np.testing.assert_array_equal(shared.prefix_key, rows[0, 0, :2])
    np.testing.assert_array_equal(shared.prefix_value, rows[0, 0, 2:])
    np.testing.assert_array_equal(own.prefix_value, rows[0, :, 2:])
    # Every one of three prompts is halved; keys never stand among values.
    np.testing.assert_array_equal(several.prefix_key[1], np.concatenate(rows[1, :, :2]))
    np.testing.assert_array_equal(several.prefix_value[1], np.concatenate(rows[1, :, 2:]))
    pool = jnp.asarray(rows[0])
    picked = chosen_rows(pool, jnp.array([[2, 0], [1, 1]]))
    np.testing.assert_array_equal(picked[0], np.concatenate([rows[0, 2], rows[0, 0]]))
    np.testing.assert_array_equal(picked[1], np.concatenate([rows[0, 1], rows[0, 1]]))
    insert = AttentionInsert()
    assert in_blocks(4, {2: insert}) == (None, None, insert, None)


def test_starts_and_blocks(key):
    for start, (low, high) in STARTS.items():
        rows = np.asarray(new_rows(key, (40, 50), start))
        assert low <= rows.min() < rows.max() < high
        # 2000 draws: the mean's standard error is (high - low) / sqrt(12 * 2000) < 0.007 of it.
        assert abs(rows.mean() - (low + high) / 2) < 0.03 * (high - low)
    check_blocks("l2p.blocks", 5, 5)
    with pytest.raises(ConfigError, match=r"l2p.blocks: expected at most 4, .* found 5"):
        check_blocks("l2p.blocks", 5, 4)
