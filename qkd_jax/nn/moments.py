"""Sums over labelled vectors in float64, on the host, and how they are stored in a state."""

from typing import Any, NamedTuple

import numpy as np


class Pair(NamedTuple):
    """A float64 array as the sum of two float32 arrays, good to 48 bits."""

    high: Any
    low: Any


def as_pair(array: np.ndarray) -> Pair:
    """The two parts of a float64 array."""
    high = np.float32(array)
    return Pair(high, np.float32(array - np.float64(high)))


def as_float64(pair: Pair) -> np.ndarray:
    """The inverse of `as_pair`."""
    return np.float64(pair.high) + np.float64(pair.low)


class Moments(NamedTuple):
    """Sums over vectors z in R^M of labelled inputs, float64.

    Attributes:
      count: [C], inputs of each class.
      total: [C, M], sum of z over each class.
      outer: [M, M], sum of z z^T over all inputs.
    """

    count: np.ndarray
    total: np.ndarray
    outer: np.ndarray


def empty_moments(num_classes: int, width: int) -> Moments:
    """The sums before any input."""
    shapes = (num_classes,), (num_classes, width), (width, width)
    return Moments(*(np.zeros(shape) for shape in shapes))


def add_moments(moments: Moments, vectors: np.ndarray, labels: np.ndarray) -> Moments:
    """`moments` with vectors [N, M] of classes `labels` int [N] added."""
    vectors = np.float64(vectors)
    one_hot = np.eye(len(moments.count))[labels]
    outer = vectors.T @ vectors
    outer += moments.outer  # in place: one copy less of what can take 800 MB
    count, total = one_hot.sum(0), one_hot.T @ vectors
    return Moments(moments.count + count, moments.total + total, outer)


def class_means(count: np.ndarray, total: np.ndarray) -> np.ndarray:
    """[C, M]; zero where a class has no input."""
    return total / np.maximum(count, 1.0)[:, None]


def within_class_scatter(moments: Moments) -> np.ndarray:
    """[M, M]: the sum of (z - m_c)(z - m_c)^T over all inputs."""
    means = class_means(moments.count, moments.total)
    return moments.outer - means.T @ moments.total
