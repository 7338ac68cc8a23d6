"""Resampling of a position grid to another image size."""

import jax
import numpy as np

from qkd_jax.errors import ConfigError


def resample_positions(
    position: jax.Array | np.ndarray, grid: int, new_grid: int, *, antialias: bool = True
) -> np.ndarray:
    """Bicubic resampling of the position grid; done once, when weights are loaded.

    Half-pixel centres; weights beyond the border are dropped and the rest renormalised when
    `antialias` is on (the kernel with a = -0.5, widened when shrinking), or the border is repeated
    (a = -0.75) when it is off. These are the two forms that PyTorch's `interpolate` computes, which
    published checkpoints were resampled with: on for timm's ViTs, off for DINOv2.

    Args:
        position: [1 + grid^2, D], class token first.

    Returns:
        [1 + new_grid^2, D] float32.
    """
    position = np.asarray(position)
    if grid == new_grid:
        return position
    weights = _bicubic_weights(grid, new_grid, antialias)
    tokens, width = position.shape
    if tokens != 1 + grid**2:
        raise ConfigError(
            f"position: expected {1 + grid**2} rows for a {grid} x {grid} grid, found {tokens}"
        )
    patches = position[1:].astype(np.float64).reshape(grid, grid, width)
    patches = np.einsum("ai,bj,ijd->abd", weights, weights, patches, optimize=True)
    new = np.concatenate([position[:1], patches.reshape(new_grid**2, width)])
    return new.astype(np.float32)


def _bicubic_weights(size: int, new_size: int, antialias: bool) -> np.ndarray:
    """[new_size, size] interpolation weights, float64; every row sums to one."""
    a = -0.5 if antialias else -0.75
    ratio = size / new_size
    stretch = max(ratio, 1.0) if antialias else 1.0
    weights = np.zeros((new_size, size))
    for row in range(new_size):
        centre = (row + 0.5) * ratio - 0.5
        reach = 2.0 * stretch
        for column in range(int(np.floor(centre - reach)), int(np.ceil(centre + reach)) + 1):
            t = abs(column - centre) / stretch
            if t < 1.0:
                w = (a + 2.0) * t**3 - (a + 3.0) * t**2 + 1.0
            elif t < 2.0:
                w = a * (t**3 - 5.0 * t**2 + 8.0 * t - 4.0)
            else:
                continue
            if antialias and not 0 <= column < size:
                continue
            weights[row, min(max(column, 0), size - 1)] += w
    return weights / weights.sum(axis=1, keepdims=True)
