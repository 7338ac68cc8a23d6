"""The pair distribution function G(r) of a cluster, by the Debye scattering equation.

    I(Q) = N f(Q)^2 + 2 f(Q)^2 exp(-B Q^2 / (8 pi^2)) sum_{i<j} sin(Q d_ij) / (Q d_ij)
    S(Q) = I(Q) / (N f(Q)^2),   F(Q) = Q (S(Q) - 1)
    G(r) = (2 / pi) exp(-(Q_damp r)^2 / 2) int_{Q_min}^{Q_max} F(Q) sin(Q r) dQ

Debye, Annalen der Physik 351 (1915) 809; Farrow and Billinge, Acta Cryst. A65 (2009) 232. As in
`debyecalculator` (Johansen et al., JOSS 9 (2024) 6024) the integral is the sum over the grid of Q,
and B damps pairs alone; but its version 1.1.1 counts every pair and every atom half, so that its
I, F and G are half of these, which have S = 1 at large Q. In a cluster of one element the form
factor f cancels out of S(Q); the intensity needs it. Lengths are in angstrom, Q in 1 / angstrom, B
in angstrom^2, G in 1 / angstrom^2, intensities in electrons^2.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from qkd_jax.errors import ConfigError

# Atoms nearer than this scatter as if they were this far from one another: a generated structure
# may put two into one place, where a distance has no gradient. sin(x) / x is 1 to 1e-4 there.
LEAST_DISTANCE = 1e-3


@dataclass(frozen=True)
class PdfSettings:
    """How a pair distribution function is measured; static for compilation.

    Attributes:
      q_min, q_max, q_step: the grid of momentum transfers Q, in 1 / angstrom, without its end.
        Distances up to pi / q_step can be told apart from longer ones.
      q_damp: standard deviation of the instrument's resolution in Q, in 1 / angstrom; it makes an
        envelope on G(r).
      b_iso: the isotropic displacement parameter B = 8 pi^2 <u^2>, in angstrom^2.
      r_min, r_max, r_step: the grid of distances r, in angstrom, without its end.

    Raises:
      ConfigError: a grid is empty or does not go upwards from 0, or a damping is negative.
    """

    q_min: float = 0.5
    q_max: float = 25.0
    q_step: float = 0.1
    q_damp: float = 0.04
    b_iso: float = 0.3
    r_min: float = 1.0
    r_max: float = 17.0
    r_step: float = 0.05

    def __post_init__(self):
        for name in ("q", "r"):
            low, high, step = (getattr(self, f"{name}_{end}") for end in ("min", "max", "step"))
            # A form factor divides by Q; at Q = 0 the Debye equation needs a limit.
            if not (0 <= low < high and 0 < step <= high - low and (name == "r" or low > 0)):
                least = "0 <" if name == "q" else "0 <="
                raise ConfigError(
                    f"{name}_min, {name}_max, {name}_step: expected {least} {name}_min < "
                    f"{name}_max and a step that fits between them, found {low}, {high}, {step}"
                )
        for name in ("q_damp", "b_iso"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name}: expected 0 or more, found {getattr(self, name)}")
        if self.r_max > math.pi / self.q_step:
            raise ConfigError(
                f"r_max: expected at most pi / q_step = {math.pi / self.q_step:.4g} angstrom, "
                f"found {self.r_max}; a smaller q_step reaches further"
            )

    def q(self) -> np.ndarray:
        """Float64 [Q]."""
        return self.q_min + self.q_step * np.arange(points(self.q_min, self.q_max, self.q_step))

    def r(self) -> np.ndarray:
        """Float64 [R]."""
        return self.r_min + self.r_step * np.arange(points(self.r_min, self.r_max, self.r_step))


def points(low: float, high: float, step: float) -> int:
    """How many points `low + k step` lie below `high`, where rounding does not add one."""
    return math.ceil((high - low) / step - 1e-9)


def form_factors(elements: Sequence[str], settings: PdfSettings) -> np.ndarray:
    """X-ray form factors f0(Q) in electrons, float32 [K, Q], one row for each symbol.

    The table is that of Waasmaier and Kirfel, Acta Cryst. A51 (1995) 416, as `xraydb` has it.

    Raises:
      ConfigError: a symbol is not in the table.
    """
    import xraydb

    # xraydb takes sin(theta) / wavelength = Q / (4 pi).
    s, known = settings.q() / (4 * np.pi), {}
    for symbol in set(map(str, elements)):
        if symbol not in xraydb.f0_ions(symbol):
            raise ConfigError(
                f"element: expected a symbol with tabulated form factors such as Pt, found {symbol}"
            )
        known[symbol] = xraydb.f0(symbol, s).astype(np.float32)
    return np.stack([known[str(symbol)] for symbol in elements])


def pair_sum(positions: jax.Array, count: jax.Array, settings: PdfSettings) -> jax.Array:
    """2 sum_{i<j} sin(Q d_ij) / (Q d_ij) of one cluster [A, 3], without thermal motion, [Q].

    Q is the sum of a coarse and a fine step, and sin(a + b) = sin a cos b + cos a sin b makes the
    sum over pairs two matrix products. Sines are needed for the steps only, not for every Q.
    """
    dtype, q = positions.dtype, settings.q()
    first, second = np.triu_indices(len(positions), k=1)
    present = jnp.asarray(second) < count
    squared = jnp.sum((positions[first] - positions[second]) ** 2, axis=1)
    squared = jnp.maximum(jnp.where(present, squared, 1), LEAST_DISTANCE**2)
    distance = jnp.sqrt(squared)[:, None]
    weight = jnp.where(present, 2, 0).astype(dtype)[:, None] / distance
    fine = math.isqrt(len(q) - 1) + 1
    near = distance * jnp.asarray(settings.q_step * np.arange(fine), dtype)[None]
    far = distance * jnp.asarray(q[::fine], dtype)[None]
    product = partial(jnp.matmul, precision="highest")
    sums = product((weight * jnp.sin(far)).T, jnp.cos(near))
    sums = sums + product((weight * jnp.cos(far)).T, jnp.sin(near))
    return sums.reshape(-1)[: len(q)] / jnp.asarray(q, dtype)


def pair_intensity(
    positions: jax.Array, count: jax.Array, form_factor: jax.Array, settings: PdfSettings
) -> jax.Array:
    """What pairs of different atoms of one cluster add to I(Q), [Q]."""
    # Each atom of a pair is damped by exp(-B Q^2 / (16 pi^2)).
    damped = np.exp(-settings.b_iso * settings.q() ** 2 / (8 * np.pi**2))
    pairs = pair_sum(positions, count, settings) * jnp.asarray(damped, positions.dtype)
    return form_factor**2 * pairs


@partial(jax.jit, static_argnames="settings")
@partial(jnp.vectorize, signature="(a,x),(),(q)->(q)", excluded=("settings", 3))
def intensity(
    positions: jax.Array, count: jax.Array, form_factor: jax.Array, settings: PdfSettings
) -> jax.Array:
    """Scattered intensity I(Q) [..., Q] in electrons^2; the arguments of `pair_distribution`."""
    own = count.astype(positions.dtype) * form_factor**2
    return own + pair_intensity(positions, count, form_factor, settings)


@partial(jax.jit, static_argnames="settings")
@partial(jnp.vectorize, signature="(a,x),(),(q)->(r)", excluded=("settings", 3))
def pair_distribution(
    positions: jax.Array, count: jax.Array, form_factor: jax.Array, settings: PdfSettings
) -> jax.Array:
    """G(r) [..., R] of clusters of one element each, differentiable in the positions.

    Args:
      positions: [..., A, 3] in angstrom; atoms from `count` on are padding and may lie anywhere.
      count: [...] atoms of each cluster.
      form_factor: [..., Q] of `form_factors`, of the same type as the positions.
      settings: static.
    """
    dtype, q, r = positions.dtype, settings.q(), settings.r()
    pairs = pair_intensity(positions, count, form_factor, settings)
    reduced = pairs / (count.astype(dtype) * form_factor**2)  # S(Q) - 1
    envelope = np.exp(-((settings.q_damp * r) ** 2) / 2)
    transform = 2 / np.pi * settings.q_step * q[:, None] * np.sin(q[:, None] * r) * envelope
    return jnp.matmul(reduced, jnp.asarray(transform, dtype), precision="highest")


def with_noise(key: jax.Array, pdf: jax.Array, level: float) -> jax.Array:
    """G(r) [..., R] with independent Gaussian noise on every point.

    Args:
      level: standard deviation of the noise as a part of the largest |G(r)| of each row.
    """
    largest = jnp.max(jnp.abs(pdf), axis=-1, keepdims=True)
    return pdf + jnp.asarray(level, pdf.dtype) * largest * jax.random.normal(
        key, pdf.shape, pdf.dtype
    )
