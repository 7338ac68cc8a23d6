"""Laws in two dimensions: eight Gaussians, a Swiss roll, two moons.

Each is a curve or a set of points with noise around it. What the noise is added to is known, so
that samples can be judged: how far from it they are, and whether every part of it is met.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Shape(NamedTuple):
    """A law on the plane.

    Attributes:
      place: (uniform numbers [N] in [0, 1)) -> points [N, 2] without noise, by their place along
        the shape.
      noise: standard deviation of each coordinate around them.
      modes: into how many parts of equal probability the shape is cut, by place.
    """

    place: Callable[[np.ndarray], np.ndarray]
    noise: float
    modes: int


def eight_gaussians(place: np.ndarray) -> np.ndarray:
    """Eight points on a circle of radius 2."""
    angle = 2 * np.pi * np.floor(8 * place) / 8
    return 2 * np.stack([np.cos(angle), np.sin(angle)], axis=1)


def swiss_roll(place: np.ndarray) -> np.ndarray:
    """One and a half turns of a spiral, from radius 0.7 to 2.1; more inside than outside."""
    turn = 1.5 * np.pi * (1 + 2 * place)
    return turn[:, None] * np.stack([np.cos(turn), np.sin(turn)], axis=1) * (2.1 / (4.5 * np.pi))


def two_moons(place: np.ndarray) -> np.ndarray:
    """Two half circles of radius 1.4, each reaching into the other."""
    lower, angle = place >= 0.5, np.pi * (2 * place % 1)
    upper_moon = np.stack([np.cos(angle) - 0.5, np.sin(angle) - 0.25], axis=1)
    lower_moon = np.stack([0.5 - np.cos(angle), 0.25 - np.sin(angle)], axis=1)
    return 1.4 * np.where(lower[:, None], lower_moon, upper_moon)


SHAPES = {
    "eight Gaussians": Shape(eight_gaussians, 0.1, 8),
    "Swiss roll": Shape(swiss_roll, 0.08, 8),
    "two moons": Shape(two_moons, 0.1, 2),
}


def sample(shape: Shape, generator: np.random.Generator, count: int) -> np.ndarray:
    """Float32 [count, 2]."""
    points = shape.place(generator.random(count))
    return (points + shape.noise * generator.normal(size=points.shape)).astype(np.float32)


def judge(shape: Shape, samples: np.ndarray) -> tuple[float, float]:
    """The share of samples within three standard deviations of the shape, and the smallest share of
    a part of it among these, as a multiple of what it should be: 1 where all parts are met alike.
    """
    resolution = 400  # points along the shape
    place = (np.arange(resolution) + 0.5) / resolution
    points = shape.place(place)
    distances = np.linalg.norm(samples[:, None] - points[None], axis=-1)
    near = distances.min(axis=1) < 3 * shape.noise
    if not near.any():
        return 0.0, 0.0
    modes = (shape.modes * place[distances[near].argmin(axis=1)]).astype(int)
    shares = np.bincount(modes, minlength=shape.modes) / near.sum()
    return float(near.mean()), float(shape.modes * shares.min())
