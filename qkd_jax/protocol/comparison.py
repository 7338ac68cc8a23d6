"""Comparing methods on the same test images: bootstrap intervals, paired differences, mean ranks.

A method's outcome on one stream is `values` [S, N]: what each of N test images adds to its accuracy
with each of S seeds, so that the mean over both is the accuracy. All methods of a stream have the
same images in the same order.
"""

from typing import NamedTuple

import numpy as np

from qkd_jax.errors import DataError

DRAWS = 2000
LEVEL = 0.95


class Interval(NamedTuple):
    """A number with the ends of its interval."""

    value: float
    low: float
    high: float


class Resampled(NamedTuple):
    """How often each seed [D, S] and each image [D, N] counts in D bootstrap samples; rows sum to
    1. The same for all methods, so that differences are paired.
    """

    seeds: np.ndarray
    images: np.ndarray


def image_values(label: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """What each image adds to the average accuracy over tasks, [N], with the accuracy as its mean.

    Args:
      label: int [N].
      predicted: int [T, N], -1 where an image was not tested. With one row, of the last task, the
        result is the last accuracy's.

    Raises:
      DataError: no image was tested after one of the tasks.
    """
    tested = predicted >= 0
    counts = tested.sum(axis=1, keepdims=True)
    if not counts.all():
        raise DataError(
            f"predictions: expected tested images after each task, found none after task "
            f"{int(np.argmin(counts)) + 1}"
        )
    right = tested & (predicted == label[None])
    return (right * (label.size / counts)).mean(axis=0)


def resampled(seed: int, num_seeds: int, tasks: np.ndarray, draws: int = DRAWS) -> Resampled:
    """Bootstrap samples of seeds and of images, independently of one another.

    Images are resampled within each task. Else a sample with many images of the first task, which
    are tested most often and add most to an average, would have an accuracy above 1.

    With one seed only images are resampled, and intervals then say nothing about seeds.

    Args:
      tasks: int [N], the task of each image.
    """
    generator = np.random.default_rng(seed)

    def counts(size):
        return generator.multinomial(size, np.full(size, 1 / size), size=draws)

    seeds = counts(num_seeds) / num_seeds
    images = np.empty((draws, len(tasks)))
    for task in np.unique(tasks):
        images[:, tasks == task] = counts(int((tasks == task).sum())) / len(tasks)
    return Resampled(seeds, images)


def resampled_means(values: np.ndarray, samples: Resampled) -> np.ndarray:
    """The mean of `values` [S, N] in each bootstrap sample, [D]."""
    return np.einsum("ds,sn,dn->d", samples.seeds, values, samples.images, optimize=True)


def interval(value: float, draws: np.ndarray, level: float = LEVEL) -> Interval:
    """The percentile interval (Efron 1979) of a number from its bootstrap samples [D]."""
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(value), float(low), float(high))


def mean_ranks(accuracies: np.ndarray) -> np.ndarray:
    """The mean over streams of the rank of each method, 1 = most accurate, ties share their mean.

    Args:
      accuracies: [..., K streams, M methods].

    Returns:
      [..., M].
    """
    from scipy.stats import rankdata  # takes a second to import

    return rankdata(-accuracies, axis=-1).mean(axis=-2)


def critical_difference(num_methods: int, num_streams: int, level: float = LEVEL) -> float:
    """The least difference of two mean ranks that is significant in the test of Nemenyi.

    q sqrt(M (M + 1) / (6 K)), with q the quantile of the studentized range of M groups over the
    root of 2 (Demsar, JMLR 7 (2006) 1, equation 4 and table 5a).
    """
    from scipy.stats import studentized_range

    quantile = studentized_range.ppf(level, num_methods, np.inf) / 2**0.5
    return float(quantile * np.sqrt(num_methods * (num_methods + 1) / (6 * num_streams)))
