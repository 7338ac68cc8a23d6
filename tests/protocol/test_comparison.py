"""Bootstrap, paired differences and ranks against closed forms and published numbers."""

import numpy as np
import pytest

from qkd_jax.errors import DataError
from qkd_jax.protocol import metrics
from qkd_jax.protocol.comparison import (
    critical_difference,
    image_values,
    interval,
    mean_ranks,
    resampled,
    resampled_means,
)


def test_values_of_images_have_the_accuracies_as_their_mean():
    """Against the matrix of counts: three tasks of unequal size."""
    draws = np.random.default_rng(0)
    task_of_class = np.array([0, 0, 1, 2, 2, 2])
    label = draws.integers(0, 6, 40)
    predicted = draws.integers(0, 6, (3, 40))
    predicted[task_of_class[label][None] > np.arange(3)[:, None]] = -1
    correct, total = metrics.empty_matrix(3)
    for task in range(3):
        tested = predicted[task] >= 0
        correct, total = metrics.record(
            correct, total, task, label[tested], predicted[task, tested], task_of_class
        )
    found = metrics.summarise(correct, total)
    average, last = image_values(label, predicted), image_values(label, predicted[-1:])
    assert 100 * average.mean() == pytest.approx(found["average_accuracy"], rel=1e-12)
    assert 100 * last.mean() == pytest.approx(found["last_accuracy"], rel=1e-12)
    with pytest.raises(DataError, match="found none after task 2"):
        image_values(label, np.stack([predicted[0], np.full(40, -1)]))


def test_the_interval_of_an_accuracy_is_that_of_the_normal_distribution():
    """400 images with 300 right: 0.75 +- 1.96 * 0.0217. Of 4,000 samples a quantile is off by
    about sqrt(0.025 * 0.975 / 4000) / 0.058 = 0.04 deviations; five of these, and one image for
    the steps of a count.
    """
    values = np.arange(400)[None] < 300
    samples = resampled(0, 1, np.zeros(400, int), draws=4000)
    np.testing.assert_allclose(samples.images.sum(axis=1), 1.0, rtol=1e-12)
    found = interval(0.75, resampled_means(values, samples))
    deviation = np.sqrt(0.75 * 0.25 / 400)
    tolerance = 0.2 * deviation + 1 / 400
    assert found.low == pytest.approx(0.75 - 1.96 * deviation, abs=tolerance)
    assert found.high == pytest.approx(0.75 + 1.96 * deviation, abs=tolerance)


def test_every_sample_has_as_many_images_of_each_task():
    """So an answer that is always right has accuracy 1 in each, although images of the first task
    add 4 times as much to an average over stages as those of the last.
    """
    tasks = np.repeat([2, 0, 1], [10, 40, 30])
    samples = resampled(0, 1, tasks, draws=50)
    for task in range(3):
        share = samples.images[:, tasks == task].sum(axis=1)
        np.testing.assert_allclose(share, (tasks == task).mean(), rtol=1e-12)
    assert samples.images.std() > 0.8 / len(tasks)  # drawn with replacement
    tested = tasks <= np.arange(3)[:, None]
    values = image_values(np.zeros(80, int), np.where(tested, 0, -1))[None]
    assert values.max() > 4 * values.min()
    np.testing.assert_allclose(resampled_means(values, samples), 1.0, rtol=1e-12)


def test_seeds_widen_the_interval_and_pairing_narrows_that_of_a_difference():
    draws = np.random.default_rng(0)
    easy = draws.random(500) < 0.7
    # With one seed all is right, with the other what is easy: images alone see little of that.
    values = np.stack([np.ones(500, bool), easy])
    one_task = np.zeros(500, int)
    samples = resampled(1, 2, one_task)
    both = interval(0, resampled_means(values, samples))
    images = interval(0, resampled_means(values.mean(axis=0)[None], resampled(1, 1, one_task)))
    assert both.high - both.low > 3 * (images.high - images.low)
    # Two methods that differ in ten images of 500: four deviations of about sqrt(10) / 500.
    other = values ^ (np.arange(500) < 10)
    gap = resampled_means(values, samples) - resampled_means(other, samples)
    assert np.ptp(np.quantile(gap, [0.025, 0.975])) < 0.05 < both.high - both.low
    assert not (resampled_means(values, samples) - resampled_means(values, samples)).any()


def test_mean_ranks_share_ties():
    accuracies = np.array([[0.9, 0.8, 0.8, 0.1], [0.5, 0.7, 0.6, 0.6]])
    np.testing.assert_array_equal(mean_ranks(accuracies), [2.5, 1.75, 2.5, 3.25])
    np.testing.assert_array_equal(mean_ranks(np.stack([accuracies] * 3))[2], [2.5, 1.75, 2.5, 3.25])


@pytest.mark.parametrize(("methods", "quantile"), [(2, 1.960), (5, 2.728), (10, 3.164)])
def test_the_critical_difference_has_the_published_quantiles(methods, quantile):
    """Demsar 2006, table 5a, to three decimals."""
    expected = quantile * np.sqrt(methods * (methods + 1) / (6 * 14))
    assert critical_difference(methods, 14) == pytest.approx(expected, rel=3e-4)
