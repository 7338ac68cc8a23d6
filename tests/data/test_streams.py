"""Every example once, the same order again, errors where they belong."""

import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qkd_jax.data import streams
from qkd_jax.errors import DataError

WHEN = {"seed": 1993, "task": 2, "epoch": 5}


@given(st.integers(0, 200), st.integers(1, 33), st.integers(0, 9), st.integers(0, 9))
def test_an_epoch_holds_every_example_once(num_examples, batch_size, task, epoch):
    seen = []
    batches = list(streams.epoch_batches(num_examples, batch_size, seed=0, task=task, epoch=epoch))
    assert len(batches) == streams.num_batches(num_examples, batch_size)
    for number, (indices, mask) in enumerate(batches):
        assert indices.shape == mask.shape == (batch_size,)
        assert mask.all() or number == len(batches) - 1
        assert ((indices >= 0) & (indices < num_examples)).all()
        seen += indices[mask].tolist()
    assert sorted(seen) == list(range(num_examples))


@given(st.integers(1, 60), st.integers(1, 9), st.integers(0, 60))
def test_an_epoch_resumes_at_any_step(num_examples, batch_size, start_step):
    whole = list(streams.epoch_batches(num_examples, batch_size, **WHEN))
    rest = list(streams.epoch_batches(num_examples, batch_size, **WHEN, start_step=start_step))
    assert len(rest) == max(0, len(whole) - start_step)
    for found, expected in zip(rest, whole[start_step:], strict=True):
        np.testing.assert_array_equal(found, expected)


def test_order_depends_on_seed_task_and_epoch_only():
    np.random.seed(1)
    first = streams.epoch_order(50, **WHEN)
    np.random.seed(2)
    np.testing.assert_array_equal(streams.epoch_order(50, **WHEN), first)
    orders = [
        streams.epoch_order(50, seed, task, epoch).tolist()
        for seed in (0, 1, 2**32)
        for task in (0, 1)
        for epoch in (0, 1)
    ]
    assert len({tuple(order) for order in orders}) == len(orders)


def test_order_is_the_recorded_one():
    # A change of these numbers changes every run that was ever recorded.
    assert streams.epoch_order(10, 1993, 0, 0).tolist() == [5, 2, 7, 4, 8, 1, 3, 6, 0, 9]


def test_eval_batches_keep_the_order():
    batches = list(streams.eval_batches(5, 2))
    assert [indices[mask].tolist() for indices, mask in batches] == [[0, 1], [2, 3], [4]]
    assert batches[-1][1].tolist() == [True, False]


def test_batch_size_zero_is_refused():
    with pytest.raises(DataError, match="batch_size: expected at least 1, found 0"):
        list(streams.eval_batches(5, 0))


def test_prefetch_keeps_order_and_works_in_another_thread():
    threads = set()

    def items():
        for number in range(20):
            threads.add(threading.get_ident())
            yield number

    assert list(streams.prefetch(items(), ahead=3)) == list(range(20))
    assert threading.get_ident() not in threads


def test_prefetch_raises_where_the_item_would_have_come():
    def items():
        yield 1
        yield 2
        raise DataError("image 3 is broken")

    stream = streams.prefetch(items())
    assert [next(stream), next(stream)] == [1, 2]
    with pytest.raises(DataError, match="image 3 is broken"):
        next(stream)


def test_prefetch_draws_no_more_than_it_was_told_and_ends_its_thread():
    drawn = []

    def items():
        for number in range(100):
            drawn.append(number)
            yield number

    before = threading.active_count()
    stream = streams.prefetch(items(), ahead=2)
    next(stream)
    stream.close()
    assert len(drawn) <= 3
    assert threading.active_count() == before
