"""Diffusion of latents: noising, the loss, steps back, and the jump by the conditional prior.

Ho et al., arXiv 2006.11239; Nichol and Dhariwal, arXiv 2102.09672 (cosine schedule); Song et al.,
arXiv 2010.02502 (DDIM); Cao et al., arXiv 2509.01370 (the jump).

A noise level n goes from 0 (clean) to T (noise): z_n = sqrt(abar_n) z_0 + sqrt(1 - abar_n) noise.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from qkd_jax.errors import ConfigError


@dataclass(frozen=True)
class Diffusion:
    """The schedule and how it is walked back; static.

    Attributes:
      levels: T.
      offset: s of the cosine schedule.
      jump_from: the level at which the jump begins. In the authors' code it is 850 + skip / 2,
        which is 900 for the 100 skipped steps of their script, but above T from 300 on.
      stride: levels from one network call to the next; 1 in the paper.
      eta: 1 adds as much noise as the exact posterior has (ancestral sampling, the paper's), 0 adds
        none (DDIM).
      bound: estimates of z_0 are cut at +-bound standard deviations of the latents. The authors do
        not cut; at the highest levels an error of the network is amplified a thousandfold.
    """

    levels: int = 1000
    offset: float = 5e-4
    jump_from: int = 900
    stride: int = 10
    eta: float = 1.0
    bound: float = 4.0

    def __post_init__(self):
        if self.levels < 2:
            raise ConfigError(f"levels: expected 2 or more, found {self.levels}")
        if not 0 < self.jump_from <= self.levels:
            raise ConfigError(f"jump_from: expected 1 to {self.levels}, found {self.jump_from}")
        if not 0.0 <= self.eta <= 1.0:
            raise ConfigError(f"eta: expected 0 to 1, found {self.eta}")
        if not (self.offset > 0.0 and self.bound > 0.0):
            raise ConfigError(
                f"offset and bound: expected more than 0, found {self.offset} and {self.bound}"
            )
        if self.stride < 1 or self.levels % self.stride or self.jump_from % self.stride:
            raise ConfigError(
                f"stride: expected a divisor of the {self.levels} levels and of {self.jump_from}, "
                f"where the jump begins, found {self.stride}"
            )


def alpha_bar(diffusion: Diffusion) -> np.ndarray:
    """abar_n, float64 [T + 1]: 1 at level 0, then the cosine schedule.

    beta_n = min(1 - f(n) / f(n - 1), 0.999) with f(n) = cos^2((n / T + s) / (1 + s) pi / 2), and
    abar_n is the product of 1 - beta up to n.
    """
    n = np.arange(diffusion.levels + 1) / diffusion.levels
    f = np.cos((n + diffusion.offset) / (1.0 + diffusion.offset) * np.pi / 2.0) ** 2
    beta = np.clip(1.0 - f[1:] / f[:-1], 0.0, 0.999)
    return np.concatenate([[1.0], np.cumprod(1.0 - beta)])


def q_sample(z_0: jax.Array, abar: jax.Array, noise: jax.Array) -> jax.Array:
    """z_n of clean latents [B, ...], with abar_n [B] of each and standard normal noise [B, ...]."""
    abar = _as_column(abar, z_0)
    return jnp.sqrt(abar) * z_0 + jnp.sqrt(1.0 - abar) * noise


def noise_loss(
    key: jax.Array,
    denoise: Callable[[jax.Array, jax.Array], jax.Array],
    z_0: jax.Array,
    diffusion: Diffusion,
) -> jax.Array:
    """Mean absolute error of the predicted noise at random levels from 1 to T, a scalar.

    Args:
      key: of the levels and of the noise.
      denoise: (noised latents [B, ...], levels int32 [B]) -> predicted noise [B, ...].
      z_0: clean latents [B, ...].
    """
    key_level, key_noise = jax.random.split(key)
    level = jax.random.randint(key_level, z_0.shape[:1], 1, diffusion.levels + 1)
    noise = jax.random.normal(key_noise, z_0.shape, z_0.dtype)
    abar = jnp.asarray(alpha_bar(diffusion), z_0.dtype)[level]
    return jnp.mean(jnp.abs(denoise(q_sample(z_0, abar, noise), level) - noise))


def estimate(z: jax.Array, noise: jax.Array, abar: jax.Array) -> jax.Array:
    """The z_0 that, with this noise, gives z at a level with this abar."""
    return (z - jnp.sqrt(1.0 - abar) * noise) / jnp.sqrt(abar)


def step(
    z: jax.Array,
    z_0: jax.Array,
    abar: jax.Array,
    abar_next: jax.Array,
    eta: float = 0.0,
    fresh: jax.Array | float = 0.0,
) -> jax.Array:
    """From z at a level to a lower one, given an estimate of z_0 (DDIM, equation 12).

    With eta = 1 it is a draw from the posterior q(z_next | z, z_0) of Ho et al. for any distance
    between the levels. The authors' code adds less noise: beta where the posterior has sqrt(beta).

    Args:
      z, z_0: [...].
      abar, abar_next: scalars, abar_next above abar.
      eta: see `Diffusion`.
      fresh: standard normal noise [...], used when eta is above 0.
    """
    noise = (z - jnp.sqrt(abar) * z_0) / jnp.sqrt(1.0 - abar)
    deviation = eta * jnp.sqrt((1.0 - abar_next) / (1.0 - abar) * (1.0 - abar / abar_next))
    kept = jnp.sqrt(jnp.maximum(1.0 - abar_next - deviation**2, 0.0))
    return jnp.sqrt(abar_next) * z_0 + kept * noise + deviation * fresh


def jump(z: jax.Array, x_hat: jax.Array, abar: jax.Array, abar_next: jax.Array) -> jax.Array:
    """The jump by the conditional prior: a x_hat + u z, from one level to a lower one at once.

    u = sqrt(1 - abar_next) / sqrt(1 - abar) and a = sqrt(abar_next) - u sqrt(abar), as in the
    authors' code. It is the step of DDIM with x_hat, a draw from p(z | PDF), in place of the
    network's estimate of z_0.
    """
    u = jnp.sqrt(1.0 - abar_next) / jnp.sqrt(1.0 - abar)
    a = jnp.sqrt(abar_next) - u * jnp.sqrt(abar)
    return a * x_hat + u * z


def calls_of(diffusion: Diffusion, skip: int) -> tuple[np.ndarray, np.ndarray]:
    """The levels at which the network is called before the jump and after it, int32, falling.

    With stride 1 they are 1000 - skip in all, as in the paper: 1000 to 901, then 900 - skip to 1.

    Raises:
      ConfigError: `skip` is negative, goes below level 0, or is no multiple of the stride.
    """
    if not 0 <= skip < diffusion.jump_from or skip % diffusion.stride:
        raise ConfigError(
            f"skip: expected a multiple of {diffusion.stride} from 0 to below "
            f"{diffusion.jump_from}, found {skip}"
        )
    before = np.arange(diffusion.levels, diffusion.jump_from, -diffusion.stride, dtype=np.int32)
    after = np.arange(diffusion.jump_from - skip, 0, -diffusion.stride, dtype=np.int32)
    return before, after


def down(
    key: jax.Array,
    denoise: Callable[[jax.Array, jax.Array], jax.Array],
    z: jax.Array,
    level: jax.Array,
    diffusion: Diffusion,
) -> jax.Array:
    """Latents [B, ...] one stride lower, with one call of the network.

    Args:
      key: of the noise that is added.
      denoise: (latents [B, ...], levels int32 [B]) -> predicted noise [B, ...].
      level: int32 scalar, where z is.
    """
    abar = jnp.asarray(alpha_bar(diffusion), z.dtype)
    noise = denoise(z, jnp.full(z.shape[0], level, jnp.int32))
    z_0 = jnp.clip(estimate(z, noise, abar[level]), -diffusion.bound, diffusion.bound)
    fresh = jax.random.normal(jax.random.fold_in(key, level), z.shape, z.dtype)
    return step(z, z_0, abar[level], abar[level - diffusion.stride], diffusion.eta, fresh)


def sample(
    key: jax.Array,
    down: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    x_hat: jax.Array,
    diffusion: Diffusion,
    skip: int = 0,
) -> jax.Array:
    """Latents [B, ...], from noise at level T to level 0 in (T - skip) / stride network calls.

    The loop is Python's, around one compiled step: on CPUs, convolutions inside a compiled loop are
    many times slower.

    Args:
      key: of the first noise and of the noise that is added.
      down: (key, latents, level int32) -> latents one stride lower, such as a compiled `down`;
        called once for each level of `calls_of`.
      x_hat: draws from the conditional prior [B, ...], used by the jump alone; they also give the
        shape. With `skip` 0 there is no jump, and they do not matter.
      skip: levels that are jumped over.

    Raises:
      ConfigError: see `calls_of`.
    """
    before, after = calls_of(diffusion, skip)
    key_first, key_fresh = jax.random.split(key)
    z = jax.random.normal(key_first, x_hat.shape, x_hat.dtype)
    for level in before:
        z = down(key_fresh, z, level)
    if skip:
        abar = jnp.asarray(alpha_bar(diffusion), z.dtype)
        z = jump(z, x_hat, abar[diffusion.jump_from], abar[diffusion.jump_from - skip])
    for level in after:
        z = down(key_fresh, z, level)
    return z


def _as_column(abar: jax.Array, like: jax.Array) -> jax.Array:
    """[B] with trailing axes of size 1, so that it broadcasts against `like` [B, ...]."""
    return abar.reshape(abar.shape + (1,) * (like.ndim - 1))
