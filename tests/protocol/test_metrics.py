"""Metrics against the toy matrix of the literature survey, brute force, and known toolbox defects.

Tolerances: values are percentages near 100 built from fewer than 1e4 float64 operations, so the
rounding error is below 100 * 1e4 * 2**-53 = 1.2e-10; 1e-9 is used.
"""

import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qkd_jax.errors import DataError
from qkd_jax.protocol import metrics
from qkd_jax.protocol.tasks import split_tasks, task_of_class

TOLERANCE = 1e-9
TOY = np.array([[90, 0, 0, 0], [80, 80, 0, 0], [70, 85, 80, 0], [75, 60, 95, 90]])
TOY_TOTAL = 100 * np.tril(np.ones((4, 4), np.int64))


@st.composite
def count_matrices(draw):
    """Random filled (correct, total) of 1 to 6 tasks with unequal numbers of test images."""
    size = draw(st.integers(1, 6))
    images = [draw(st.integers(1, 40)) for _ in range(size)]
    total = np.tril(np.tile(images, (size, 1)))
    correct = np.zeros_like(total)
    for i in range(size):
        for j in range(i + 1):
            correct[i, j] = draw(st.integers(0, images[j]))
    return correct, total


@st.composite
def evaluations(draw):
    """(tasks, labels [N], scores [N, C]) with every class present."""
    num_classes = draw(st.integers(1, 12))
    tasks = split_tasks(
        draw(st.permutations(range(num_classes))),
        draw(st.integers(0, num_classes)),
        draw(st.integers(1, num_classes)),
    )
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    labels = np.concatenate([np.arange(num_classes), rng.integers(0, num_classes, 30)])
    # Few distinct values, so that ties occur; negative ones, as cosine scores have.
    scores = rng.integers(-3, 2, (len(labels), num_classes)) / 4.0
    return tasks, labels, scores


def test_toy_matrix_gives_each_definition_its_published_value():
    summary = metrics.summarise(TOY, TOY_TOTAL)
    # Published to four decimals of a fraction: half a unit of the last one is 0.005 points.
    assert summary["forgetting_clipped"] == pytest.approx(13.33, abs=0.005)
    assert summary["forgetting"] == pytest.approx(8.33, abs=0.005)
    assert summary["forgetting_just_learned"] == pytest.approx(6.67, abs=0.005)
    assert summary["bwt"] == pytest.approx(-6.67, abs=0.005)
    # Closed form of the same four.
    assert summary["forgetting_clipped"] == pytest.approx(40 / 3, abs=TOLERANCE)
    assert summary["forgetting"] == pytest.approx((15 + 25 - 15) / 3, abs=TOLERANCE)
    assert summary["forgetting_just_learned"] == pytest.approx(20 / 3, abs=TOLERANCE)
    assert summary["bwt"] == pytest.approx(-20 / 3, abs=TOLERANCE)
    curve = [90, 80, 235 / 3, 80]
    np.testing.assert_allclose(summary["accuracy_curve"], curve, atol=TOLERANCE)
    assert summary["average_accuracy"] == pytest.approx(np.mean(curve), abs=TOLERANCE)
    assert summary["last_accuracy"] == pytest.approx(80, abs=TOLERANCE)
    assert summary["last_accuracy_per_task"] == [75, 60, 95, 90]


def test_forgetting_counts_the_newest_old_task():
    """A toolbox skips task T-2 and gives 11.67 for just-learned forgetting of the toy matrix."""
    only_newest_old_forgets = TOY.copy()
    only_newest_old_forgets[3] = [90, 85, 20, 90]
    only_newest_old_forgets[:3, 0], only_newest_old_forgets[1:3, 1] = 90, 85
    for key in ("forgetting", "forgetting_clipped", "forgetting_just_learned"):
        value = metrics.summarise(only_newest_old_forgets, TOY_TOTAL)[key]
        assert value == pytest.approx(60 / 3, abs=TOLERANCE)


def brute_force(correct, total):
    """The definitions again, in plain Python loops over exact counts."""
    size = len(total)
    acc = [[100 * int(correct[i][j]) / int(total[i][j]) for j in range(i + 1)] for i in range(size)]
    curve, task_mean = [], []
    for i in range(size):
        right = sum(int(correct[i][j]) for j in range(i + 1))
        curve.append(100 * right / sum(int(total[i][j]) for j in range(i + 1)))
        task_mean.append(sum(acc[i]) / len(acc[i]))
    best_before = best_ever = learned = 0.0
    for j in range(size - 1):
        column = [acc[i][j] for i in range(j, size)]
        best_before += (max(column[:-1]) - column[-1]) / (size - 1)
        best_ever += (max(column) - column[-1]) / (size - 1)
        learned += (column[0] - column[-1]) / (size - 1)
    return {
        "accuracy_curve": curve,
        "average_accuracy": sum(curve) / size,
        "last_accuracy": curve[-1],
        "accuracy_curve_task_mean": task_mean,
        "average_accuracy_task_mean": sum(task_mean) / size,
        "last_accuracy_task_mean": task_mean[-1],
        "last_accuracy_per_task": acc[-1],
        "forgetting": best_before,
        "forgetting_clipped": best_ever,
        "forgetting_just_learned": learned,
        "bwt": -learned,
    }


@given(count_matrices())
def test_summary_equals_brute_force(matrices):
    summary = metrics.summarise(*matrices)
    expected = brute_force(*matrices)
    assert summary.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(summary[key], value, atol=TOLERANCE, err_msg=key)


@given(count_matrices())
def test_bounds_and_order_of_the_definitions(matrices):
    summary = metrics.summarise(*matrices)
    accuracies = [v for k, v in summary.items() if "accuracy" in k]
    assert all(0 <= value <= 100 for value in np.hstack(accuracies))
    assert summary["forgetting_clipped"] >= -TOLERANCE
    assert summary["forgetting_clipped"] >= summary["forgetting"] - TOLERANCE
    assert summary["forgetting"] >= summary["forgetting_just_learned"] - TOLERANCE
    assert -100 <= summary["bwt"] <= 100
    assert summary == json.loads(json.dumps(summary, allow_nan=False))


@given(count_matrices())
def test_summary_leaves_its_arguments_alone_and_ignores_rows_not_reached(matrices):
    correct, total = matrices
    before = correct.copy(), total.copy()
    padded = [np.pad(matrix, ((0, 3), (0, 3))) for matrix in matrices]
    assert metrics.summarise(*padded) == metrics.summarise(correct, total)
    np.testing.assert_array_equal(correct, before[0])
    np.testing.assert_array_equal(total, before[1])


def test_one_task_has_no_forgetting():
    summary = metrics.summarise(np.array([[3]]), np.array([[4]]))
    assert summary["average_accuracy"] == summary["last_accuracy"] == 75.0
    for key in ("forgetting", "forgetting_clipped", "forgetting_just_learned", "bwt"):
        assert summary[key] == 0.0


def test_curve_weighs_images_and_task_mean_weighs_tasks():
    correct, total = np.array([[10, 0], [10, 0]]), np.array([[10, 0], [10, 90]])
    summary = metrics.summarise(correct, total)
    assert summary["last_accuracy"] == pytest.approx(10.0, abs=TOLERANCE)
    assert summary["last_accuracy_task_mean"] == pytest.approx(50.0, abs=TOLERANCE)


def test_nothing_is_rounded_before_averaging():
    correct, total = np.tril(np.ones((3, 3), int)), 3 * np.tril(np.ones((3, 3), int))
    assert metrics.summarise(correct, total)["average_accuracy"] == pytest.approx(
        100 / 3, abs=TOLERANCE
    )


@pytest.mark.parametrize(("num_classes", "base", "increment"), [(11, 10, 1), (101, 0, 10)])
def test_a_last_task_of_one_class_is_counted(num_classes, base, increment):
    """A toolbox groups by range(base, max label, increment) and loses this class."""
    tasks = split_tasks(np.arange(num_classes), base, increment)
    table = task_of_class(tasks, num_classes)
    labels = np.arange(num_classes)
    predictions = labels.copy()
    predictions[-1] = 0
    last = len(tasks) - 1
    correct, total = metrics.record(
        *metrics.empty_matrix(len(tasks)), last, labels, predictions, table
    )
    assert total[last].sum() == num_classes
    assert (total[last, last], correct[last, last]) == (1, 0)


def test_matrix_columns_stay_in_numeric_order_past_a_hundred_classes():
    """A toolbox sorts groups as text (00-09, 10-19, 100-109, ...) and tears columns apart."""
    tasks = split_tasks(np.arange(120), 0, 10)
    table = task_of_class(tasks, 120)
    labels = np.repeat(np.arange(120), 1 + np.arange(120) // 10)
    _, total = metrics.record(*metrics.empty_matrix(12), 11, labels, labels, table)
    np.testing.assert_array_equal(total[11], 10 * (1 + np.arange(12)))


def test_uneven_split_with_a_base_can_be_summarised():
    """A toolbox crashes here ("could not broadcast") when all training is over."""
    tasks = split_tasks(np.arange(100), 50, 10)
    table = task_of_class(tasks, 100)
    matrix = metrics.empty_matrix(6)
    for row in range(6):
        labels = np.flatnonzero(table <= row)
        matrix = metrics.record(*matrix, row, labels, labels, table)
    np.testing.assert_array_equal(np.diagonal(matrix[1]), [50, 10, 10, 10, 10, 10])
    assert metrics.summarise(*matrix)["average_accuracy"] == 100.0


@given(evaluations(), st.randoms(use_true_random=False))
def test_record_is_pure_and_blind_to_the_order_of_images(evaluation, random):
    tasks, labels, scores = evaluation
    table = task_of_class(tasks, scores.shape[1])
    predictions = scores.argmax(axis=1)
    empty = metrics.empty_matrix(len(tasks))
    row = len(tasks) - 1
    correct, total = metrics.record(*empty, row, labels, predictions, table)
    assert not empty[0].any() and not empty[1].any()
    for task in tasks:
        member = np.isin(labels, task.classes)
        assert total[row, task.index] == member.sum()
        assert correct[row, task.index] == (member & (labels == predictions)).sum()
    shuffle = random.sample(range(len(labels)), len(labels))
    again = metrics.record(*empty, row, labels[shuffle], predictions[shuffle], table)
    np.testing.assert_array_equal(again, (correct, total))


@given(evaluations())
def test_knowing_the_task_never_hurts(evaluation):
    tasks, labels, scores = evaluation
    table = task_of_class(tasks, scores.shape[1])
    masked = metrics.task_masked_predictions(scores, labels, table)
    np.testing.assert_array_equal(table[masked], table[labels])
    right = scores.argmax(axis=1) == labels
    assert np.all(masked[right] == labels[right])
    assert np.mean(masked == labels) >= right.mean()

    empty, row = metrics.empty_matrix(len(tasks)), len(tasks) - 1
    aware, _ = metrics.record(*empty, row, labels, masked, table)
    blind, _ = metrics.record(*empty, row, labels, scores.argmax(axis=1), table)
    assert np.all(aware >= blind)


def test_other_tasks_are_masked_with_minus_infinity_not_zero():
    """With a mask of 0, class 2 (another task) would beat the negative cosine of class 1."""
    scores, table = np.array([[-0.9, -0.1, -0.5]]), np.array([0, 0, 1])
    assert metrics.task_masked_predictions(scores, np.array([1]), table).tolist() == [1]


def test_recall_by_hand():
    """Ties go to the first task, and a task without relevance is not the second."""
    relevance = [[0.5, 0.3, 0.2], [0.2, 0.3, 0.5], [0.4, 0.2, 0.4], [1.0, 0.0, 0.0]]
    tasks = [0, 1, 2, 1]
    assert [metrics.routing_recall(relevance, tasks, k) for k in (1, 2, 3)] == [1, 3, 3]


@given(st.integers(1, 5), st.integers(1, 20), st.integers(0, 2**32 - 1))
def test_recall_at_one_is_the_routing_accuracy_and_more_tasks_never_hurt(num_tasks, size, seed):
    draw = np.random.default_rng(seed)
    tasks = draw.integers(num_tasks, size=size)
    relevance = draw.integers(3, size=(size, num_tasks)) / 2  # with ties and zeros
    found = [metrics.routing_recall(relevance, tasks, k) for k in range(1, num_tasks + 2)]
    assert found[0] == np.trace(metrics.routing_confusion(tasks, relevance, num_tasks))
    assert found == sorted(found) and found[-1] <= size


def test_summary_carries_task_aware_and_routing_numbers_when_given():
    within = TOY_TOTAL.copy()
    confusion = np.array([[3, 1], [0, 6]])
    summary = metrics.summarise(TOY, TOY_TOTAL, within_task_correct=within, confusion=confusion)
    assert summary["within_task_last_accuracy"] == 100.0
    assert summary["within_task_average_accuracy"] == 100.0
    assert summary["within_task_accuracy_curve"] == [100.0] * 4
    assert summary["routing_accuracy"] == pytest.approx(90, abs=TOLERANCE)
    assert summary["routing_accuracy_per_task"] == [75.0, 100.0]
    assert summary["routing_accuracy_task_mean"] == pytest.approx(87.5, abs=TOLERANCE)
    assert "within_task_last_accuracy" not in metrics.summarise(TOY, TOY_TOTAL)


@given(st.integers(1, 6), st.integers(1, 50), st.integers(0, 2**31))
def test_routing_and_mean_relevance_equal_brute_force(num_tasks, num_images, seed):
    rng = np.random.default_rng(seed)
    tasks = rng.integers(0, num_tasks, num_images)
    relevance = rng.dirichlet(np.ones(num_tasks), num_images)
    expected_counts = np.zeros((num_tasks, num_tasks), int)
    sums = np.zeros((num_tasks, num_tasks))
    for n in range(num_images):
        expected_counts[tasks[n], int(np.argmax(relevance[n]))] += 1
        sums[tasks[n]] += relevance[n]
    confusion = metrics.routing_confusion(tasks, relevance, num_tasks)
    np.testing.assert_array_equal(confusion, expected_counts)
    by_task = metrics.routing_confusion(tasks, relevance.argmax(axis=1), num_tasks)
    np.testing.assert_array_equal(by_task, expected_counts)

    padded = np.pad(relevance, ((0, 0), (0, 2)))
    mean = metrics.mean_relevance(padded, tasks, num_tasks)
    for task in range(num_tasks):
        count = (tasks == task).sum()
        if count:
            # Weights of each image sum to 1, so mean rows do too.
            np.testing.assert_allclose(mean[task], sums[task] / count, atol=1e-12)
            assert mean[task].sum() == pytest.approx(1, abs=1e-12)
        else:
            assert np.isnan(mean[task]).all()
    summary = metrics.routing_summary(confusion)
    assert 0 <= summary["routing_accuracy"] <= 100
    assert summary["routing_accuracy"] == pytest.approx(
        100 * (tasks == relevance.argmax(axis=1)).mean(), abs=TOLERANCE
    )
    assert json.dumps(summary, allow_nan=False)


def test_uniform_relevance_routes_to_task_zero():
    confusion = metrics.routing_confusion(np.array([0, 1, 1]), np.full((3, 2), 0.5), 2)
    assert confusion.tolist() == [[1, 0], [2, 0]]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda e, t: metrics.record(*e, 0, [0, 1], [0, 1], t), "later tasks"),
        (lambda e, t: metrics.record(*e, 1, [0], [0], t), "task 1: expected at least one"),
        (lambda e, t: metrics.record(*e, 1, [0, 1], [0], t), "shape"),
        (lambda e, t: metrics.record(*e, 2, [0, 1], [0, 1], t), "row: expected 0 to 1"),
        (lambda e, t: metrics.record(*e, 1, [0, 2], [0, 1], t), "classes 0 to 1, found 2"),
        (lambda e, t: metrics.record(*e, 1, [-1, 1], [0, 1], t), "classes 0 to 1, found -1"),
        (
            lambda e, t: metrics.record(*e, 0, [0], [0], np.array([-1])),
            "expected classes of a task, found 0",
        ),
        (lambda e, t: metrics.summarise(*e), "at least one evaluated stage"),
        (lambda e, t: metrics.summarise(e[0], np.ones(2)), "expected both"),
        (
            lambda e, t: metrics.summarise(e[0], np.array([[0, 0], [1, 1]])),
            "stage 0: expected counts",
        ),
        (
            lambda e, t: metrics.summarise(e[0], np.array([[1, 0], [1, 0]])),
            "expected at least one test image",
        ),
        (
            lambda e, t: metrics.summarise(e[0] + 2, np.array([[1, 0], [1, 1]])),
            "from 0 to",
        ),
        (
            lambda e, t: metrics.routing_confusion([0, 2], [0, 0], 2),
            "found 0 to 2",
        ),
        (lambda e, t: metrics.routing_confusion([0], [0, 0], 2), "same number of images"),
        (lambda e, t: metrics.routing_summary(e[0]), "at least one image"),
    ],
)
def test_impossible_input_is_named(call, words):
    with pytest.raises(DataError, match=words):
        call(metrics.empty_matrix(2), np.array([0, 1]))


def test_energy_distance_against_its_closed_form_and_by_pairs():
    """N(0, 1) and N(d, 1): x - y is normal with variance 2 and mean d."""
    draws = np.random.default_rng(0)
    distance, size = 1.5, 3000
    x, y = draws.normal(size=(size, 1)), draws.normal(size=(size, 1)) + distance
    apart = 2 / math.sqrt(math.pi) * math.exp(-(distance**2) / 4)
    apart += distance * math.erf(distance / 2)
    expected = 2 * apart - 2 * 2 / math.sqrt(math.pi)
    # Means over 3,000 vectors of numbers with deviations near 1: five of them.
    assert abs(metrics.energy_distance(x, y) - expected) < 5 * 2 / math.sqrt(size)

    x, y = draws.normal(size=(4, 3)), draws.normal(size=(5, 3)) + 1

    def mean(pairs):
        return np.mean([np.linalg.norm(a - b) for a, b in pairs])

    own = sum(mean(itertools.combinations(sample, 2)) for sample in (x, y))
    expected = 2 * mean(itertools.product(x, y)) - own
    assert metrics.energy_distance(x, y) == pytest.approx(expected, rel=1e-12)
    same = [metrics.energy_distance(*draws.normal(size=(2, 6, 2))) for _ in range(300)]
    assert min(same) < 0 and abs(np.mean(same)) < 5 * np.std(same) / math.sqrt(300)
    with pytest.raises(DataError, match="two vectors or more, found 1, 5"):
        metrics.energy_distance(x[:1], y)
