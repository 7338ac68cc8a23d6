"""What leaves a full queue, against NumPy float64.

Error budget: a singular value decomposition of rows of length up to 10 in float32, 1e-7 of the
largest singular value times some 10 roundings: 2e-5.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkd_jax.learners.q_tuning.queue import principal_rows, random_rows, shifted, signed

BUDGET = 2e-5
ROWS, LENGTH = 6, 2


@pytest.fixture(scope="module")
def queue():
    """Rows [6, 8] of different lengths around a mean that is not zero."""
    random = np.random.default_rng(0)
    return (random.normal(size=(ROWS, 8)) * np.arange(1, ROWS + 1)[:, None] + 0.5).astype("f4")


@pytest.fixture(scope="module")
def parts(queue):
    """(mean, U, S, V^T) in float64."""
    wide = np.float64(queue)
    mean = wide.mean(0)
    return mean, *np.linalg.svd(wide - mean, full_matrices=False)


def test_principal_rows_are_s_v_and_orthogonal(queue, parts):
    mean, left, lengths, _ = parts
    rows = np.float64(principal_rows(queue, LENGTH))
    assert rows.shape == (ROWS - LENGTH, 8)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), lengths[:4], rtol=1e-5)
    gram = rows @ rows.T
    np.testing.assert_allclose(gram - np.diag(np.diag(gram)), 0, atol=BUDGET * lengths[0] ** 2)
    # U^T (rows - mean), up to the sign of each.
    expected = left[:, :4].T @ (np.float64(queue) - mean)
    signs = np.sign(np.sum(expected * rows, axis=1))
    np.testing.assert_allclose(rows, signs[:, None] * expected, atol=BUDGET * lengths[0])


def test_what_is_lost_is_the_sum_of_the_dropped_squares(queue, parts):
    mean, _, lengths, _ = parts
    rows = np.float64(principal_rows(queue, LENGTH))
    directions = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    centred = np.float64(queue) - mean
    lost = np.sum((centred - centred @ directions.T @ directions) ** 2)
    assert lost > 1
    np.testing.assert_allclose(lost, np.sum(lengths[4:] ** 2), rtol=1e-4)


def test_the_sign_does_not_depend_on_the_decomposition(queue, parts):
    mean, _, lengths, directions = parts
    rows = np.float32(lengths[:, None] * directions)[:4]
    flips = np.array([1, -1, -1, 1], np.float32)[:, None]
    once, again = signed(rows, np.float32(mean)), signed(flips * rows, np.float32(mean))
    np.testing.assert_array_equal(once, again)
    np.testing.assert_allclose(principal_rows(queue, LENGTH), once, atol=BUDGET * lengths[0])
    assert (np.asarray(once) @ mean >= 0).all()
    free = np.asarray(principal_rows(queue, LENGTH, fix_sign=False))
    np.testing.assert_allclose(np.abs(free), np.abs(once), atol=BUDGET * lengths[0])


@pytest.mark.parametrize("noise", [0.0, 1e-7, -1e-7])
def test_a_row_orthogonal_to_the_mean_has_a_sign_all_the_same(noise):
    rows, mean = jnp.array([[noise, -3.0, 2.0]]), jnp.array([1.0, 0.0, 0.0])
    for row in (rows, -rows):
        assert signed(row, mean)[0, 1] == 3.0
    assert not np.asarray(signed(jnp.zeros((1, 3)), mean)).any()
    # Without a mean there is only the largest entry.
    assert signed(jnp.array([[1.0, -3.0, 2.0]]), jnp.zeros(3))[0, 1] == 3.0


def test_the_mean_row_comes_back_if_asked(queue, parts):
    with_mean, without = (principal_rows(queue, LENGTH, keep_mean=k) for k in (True, False))
    np.testing.assert_allclose(with_mean - without, np.tile(parts[0], (4, 1)), atol=1e-5)


def test_a_queue_longer_than_wide_has_zeros_for_the_rows_that_do_not_exist():
    queue = np.random.default_rng(1).normal(size=(9, 3)).astype("f4")
    rows = np.asarray(principal_rows(queue, 2))
    assert rows.shape == (7, 3) and (np.linalg.norm(rows[:3], axis=1) > 0.1).all()
    assert not rows[3:].any()


def test_the_oldest_or_random_rows_leave(queue):
    np.testing.assert_array_equal(shifted(queue, LENGTH), queue[:4])
    seen = set()
    for seed in range(20):
        rows = np.asarray(random_rows(jax.random.key(seed), queue, LENGTH))
        kept = [int(np.flatnonzero((queue == row).all(1))[0]) for row in rows]
        assert kept == sorted(set(kept)) and len(kept) == 4
        seen |= set(kept)
    assert seen == set(range(ROWS))
