"""Class orders pinned to the published rule; splits are partitions."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qkd_jax.errors import ProtocolError
from qkd_jax.protocol.tasks import (
    Task,
    class_order,
    max_classes_per_task,
    split_name,
    split_tasks,
    task_of_class,
)


@pytest.mark.parametrize(
    ("num_classes", "prefix"),
    [
        (100, [68, 56, 78, 8, 23, 84, 90, 65, 74, 76]),
        (200, [168, 136, 51, 9, 183, 101, 171, 99, 42, 159]),
        (300, [169, 221, 146, 296, 92, 229, 49, 70, 126, 77]),
        (50, [43, 41, 23, 14, 13, 40, 42, 22, 16, 45]),
    ],
)
def test_seed_1993_gives_the_published_order(num_classes, prefix):
    order = class_order(num_classes)
    assert order[:10].tolist() == prefix
    assert order.dtype == np.int64
    np.testing.assert_array_equal(np.sort(order), np.arange(num_classes))


def test_order_leaves_the_global_generator_alone_and_ignores_it():
    np.random.seed(7)
    before = np.random.get_state()[1].copy()
    first = class_order(100)
    np.testing.assert_array_equal(np.random.get_state()[1], before)
    np.random.seed(8)
    np.testing.assert_array_equal(class_order(100), first)


def test_no_seed_keeps_the_labels_in_order_and_an_explicit_order_wins():
    assert class_order(5, seed=None).tolist() == [0, 1, 2, 3, 4]
    assert class_order(3, seed=1993, explicit=[2, 0, 1]).tolist() == [2, 0, 1]


@pytest.mark.parametrize(
    ("explicit", "words"),
    [
        ([0, 1, 1], "each of 0..2 once, found twice \\[1\\], missing \\[2\\]"),
        ([0, 1, 3], "outside \\[3\\]"),
        ([0, 1], "expected 3 classes, found 2"),
        ([[0, 1, 2]], "flat list"),
        (2, "flat list"),
        ([0.0, 1.0, 2.0], "whole label ids"),
    ],
)
def test_an_explicit_order_must_be_a_permutation(explicit, words):
    with pytest.raises(ProtocolError, match=words):
        class_order(3, explicit=explicit)


def test_of_many_wrong_labels_five_are_named():
    five = r"missing \[1, 2, 3, 4, 5\], outside \[11, 12, 13, 14, 15\] \(at most five"
    with pytest.raises(ProtocolError, match=five):
        class_order(8, explicit=[0, 11, 12, 13, 14, 15, 16, 7])


@pytest.mark.parametrize("seed", [-1, 2**32, 1.5, True])
def test_bad_seeds_are_named(seed):
    with pytest.raises(ProtocolError, match="class order seed"):
        class_order(3, seed=seed)


@given(st.integers(1, 130), st.data())
def test_tasks_partition_the_classes_in_learned_order(num_classes, data):
    base = data.draw(st.integers(0, num_classes))
    increment = data.draw(st.integers(1, num_classes))
    order = class_order(num_classes, seed=data.draw(st.integers(0, 2**32 - 1)))
    tasks = split_tasks(order, base, increment)

    assert [label for task in tasks for label in task.classes] == order.tolist()
    assert [task.index for task in tasks] == list(range(len(tasks)))
    sizes = [len(task.classes) for task in tasks]
    later = sizes[1:] if base else sizes
    if base:
        assert sizes[0] == base
    assert all(size == increment for size in later[:-1])
    if later:
        assert 1 <= later[-1] <= increment
        assert later[-1] == ((num_classes - base - 1) % increment) + 1
    assert max_classes_per_task(tasks) == max(sizes)

    table = task_of_class(tasks, num_classes)
    for label in range(num_classes):
        assert label in tasks[table[label]].classes


@pytest.mark.parametrize(
    ("num_classes", "base", "increment", "sizes"),
    [
        (100, 0, 10, [10] * 10),
        (100, 50, 10, [50] + [10] * 5),
        (11, 10, 1, [10, 1]),  # a toolbox lost this last task of one class
        (101, 0, 10, [10] * 10 + [1]),  # and class 100 here
        (10, 0, 10, [10]),
        (10, 10, 3, [10]),
        (10, 8, 5, [8, 2]),
    ],
)
def test_known_splits(num_classes, base, increment, sizes):
    tasks = split_tasks(np.arange(num_classes), base, increment)
    assert [len(task.classes) for task in tasks] == sizes


@pytest.mark.parametrize(
    ("base", "increment", "words"),
    [
        (11, 1, "base: expected at most 10, the number of classes, found 11"),
        (0, 11, "increment: expected at most 10, .* found 11"),
        (0, 0, "increment: expected a whole number of at least 1, found 0"),
        (-1, 1, "base: .* found -1"),
        (0, 2.5, "increment: .* found 2.5"),
    ],
)
def test_impossible_splits_are_refused(base, increment, words):
    with pytest.raises(ProtocolError, match=words):
        split_tasks(np.arange(10), base, increment)


def test_orders_that_are_no_permutation_or_empty_are_refused():
    with pytest.raises(ProtocolError, match="the class order: expected each"):
        split_tasks([0, 0, 1], 0, 1)
    with pytest.raises(ProtocolError, match="expected a whole number of at least 1"):
        split_tasks([], 0, 1)
    with pytest.raises(ProtocolError, match=r"num_classes: .* found 0"):
        class_order(0)
    with pytest.raises(ProtocolError, match="at least one"):
        max_classes_per_task(())


def test_task_of_class_marks_unlearned_classes_and_refuses_overlap():
    tasks = split_tasks([3, 1, 0, 2], 0, 2)
    assert task_of_class(tasks, 4).tolist() == [1, 0, 1, 0]
    assert task_of_class(tasks[:1], 4).tolist() == [-1, 0, -1, 0]
    with pytest.raises(
        ProtocolError, match="class 1: expected it in one task, found it in tasks 0 and 1"
    ):
        task_of_class((Task(0, (1,)), Task(1, (1,))), 2)
    with pytest.raises(ProtocolError, match="expected classes 0 to 1, found 2"):
        task_of_class((Task(0, (2,)),), 2)


def test_tasks_are_hashable_and_splits_have_names():
    assert len(set(split_tasks(np.arange(4), 0, 2))) == 2
    assert split_name(0, 10) == "B0-Inc10"
    assert split_name(50, 5) == "B50-Inc5"
