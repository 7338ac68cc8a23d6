"""Noising, steps back and the jump by the conditional prior, against formulas in float64."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from projects.nanoparticles.diffusion import (
    Diffusion,
    alpha_bar,
    calls_of,
    down,
    estimate,
    jump,
    noise_loss,
    q_sample,
    sample,
    step,
)
from qkd_jax.errors import ConfigError

GOLDEN = Path(__file__).parent / "golden" / "cbldm_golden.npz"
FINE = Diffusion(stride=1)


def test_schedule_is_the_formula_and_the_authors():
    """Both float64: 1,000 factors, each rounded once."""
    found = alpha_bar(FINE)
    n = np.arange(1001)
    f = np.cos((n / 1000 + 5e-4) / (1 + 5e-4) * np.pi / 2) ** 2
    assert found.shape == (1001,) and found[0] == 1.0
    # Below the last level, where beta is cut to 0.999, the product telescopes.
    np.testing.assert_allclose(found[:1000], f[:1000] / f[0], rtol=1e-12)
    np.testing.assert_allclose(found[1000], found[999] * 0.001, rtol=1e-9)
    with np.load(GOLDEN) as golden:
        np.testing.assert_allclose(1 - found[1:] / found[:-1], golden["beta"], rtol=1e-9)


def test_the_jump_is_the_step_of_ddim_with_a_draw_from_the_prior():
    """Float64, for the paper's jump from 900 to 800 and others; rounding of a few operations."""
    abar = alpha_bar(FINE)
    draws = np.random.default_rng(0)
    with jax.enable_x64(True):
        z, x_hat = (jnp.asarray(draws.normal(size=(5, 4, 4, 1))) for _ in range(2))
        for begin, end in ((900, 800), (900, 500), (1000, 1), (2, 1)):
            a, b = jnp.asarray(abar[begin]), jnp.asarray(abar[end])
            found = jump(z, x_hat, a, b)
            np.testing.assert_allclose(found, step(z, x_hat, a, b), rtol=1e-11, atol=1e-11)
            # DDIM as written in the paper of Song et al., with the noise that x_hat implies.
            noise = (z - np.sqrt(abar[begin]) * x_hat) / np.sqrt(1 - abar[begin])
            expected = np.sqrt(abar[end]) * x_hat + np.sqrt(1 - abar[end]) * noise
            np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-11)
        assert jump(z, x_hat, jnp.asarray(abar[900]), jnp.asarray(abar[900])).tolist() == z.tolist()


def test_noised_latents_have_the_moments_of_the_forward_process(key):
    """Means and deviations of 40,000: five standard errors of 1 / 200 of a deviation."""
    for level in (1, 300, 999):
        abar = alpha_bar(FINE)[level]
        noise = jax.random.normal(key, (2, 20000))
        z = q_sample(jnp.full((2, 20000), 3.0), jnp.full(2, abar, jnp.float32), noise)
        deviation = np.sqrt(1 - abar)
        assert abs(float(z.mean()) - 3 * np.sqrt(abar)) < 5 * deviation / 200
        assert abs(float(z.std()) / deviation - 1) < 5 / 200
        again = estimate(z, noise, jnp.float32(abar))
        # float32 rounding of z, amplified by 1 / sqrt(abar).
        np.testing.assert_allclose(again, 3.0, atol=1e-6 / np.sqrt(abar))


def test_a_step_with_noise_is_a_draw_from_the_posterior_of_ho_et_al():
    """Mean and variance of q(z_(t-1) | z_t, z_0), equation 7 of Ho et al., in float64."""
    abar = alpha_bar(FINE)
    with jax.enable_x64(True):
        for t in (2, 400, 998):
            a, b = abar[t], abar[t - 1]
            beta = 1 - a / b
            mean = np.sqrt(b) * beta / (1 - a) * 0.7 + np.sqrt(1 - beta) * (1 - b) / (1 - a) * -1.3
            deviation = np.sqrt((1 - b) / (1 - a) * beta)
            given = jnp.float64(-1.3), jnp.float64(0.7), jnp.float64(a), jnp.float64(b)
            # At t = 998 the mean is a difference of numbers that are 1,000 times larger.
            np.testing.assert_allclose(step(*given, 1.0, 0.0), mean, rtol=1e-9)
            found = step(*given, 1.0, 1.0) - step(*given, 1.0, 0.0)
            np.testing.assert_allclose(found, deviation, rtol=1e-9)


def test_the_loss_is_the_mean_absolute_error_of_the_noise(key):
    """A network that knows z_0 finds the noise; rounding at level 1, where 1 - abar is 4e-6, is
    1e-7 / 2e-3. A network that finds nothing has E|noise| = sqrt(2 / pi).
    """
    z_0 = jax.random.normal(key, (4000, 3))

    def knows(z, level):
        abar = jnp.asarray(alpha_bar(FINE), jnp.float32)[level][:, None]
        return (z - jnp.sqrt(abar) * z_0) / jnp.sqrt(1 - abar)

    levels = []

    def nothing(z, level):
        levels.append(np.asarray(level))
        return jnp.zeros_like(z)

    assert float(noise_loss(key, knows, z_0, FINE)) < 1e-4
    # The deviation of |noise| is 0.6; of 12,000 the mean has one of 0.0055.
    found = float(noise_loss(key, nothing, z_0, FINE))
    assert abs(found - np.sqrt(2 / np.pi)) < 5 * 0.0055
    assert levels[0].min() >= 1 and levels[0].max() <= 1000
    assert len(np.unique(levels[0])) > 900  # of 4,000 draws out of 1,000 all but 18 are expected


def walk(diffusion, skip, x_hat, denoise):
    """The result of `sample`, and the levels at which the network was called."""
    levels = []

    def one_down(key, z, level):
        levels.append(int(level))
        return down(key, denoise, z, level, diffusion)

    return sample(jax.random.key(3), one_down, x_hat, diffusion, skip), levels


def zero(z, level):
    return jnp.zeros_like(z)


@pytest.mark.parametrize(("skip", "calls"), [(0, 20), (100, 18), (400, 12)])
def test_the_network_is_called_once_for_every_step_that_is_not_skipped(skip, calls):
    """With a stride of 50, a fiftieth of 1000 - skip; with a stride of 1 all, as in the paper."""
    coarse = Diffusion(stride=50)
    found, levels = walk(coarse, skip, jnp.ones((2, 3)), zero)
    assert len(levels) == calls == (1000 - skip) // 50
    assert levels == np.concatenate(calls_of(coarse, skip)).tolist()
    assert bool(jnp.isfinite(found).all())
    before, after = calls_of(FINE, skip)
    assert len(before) + len(after) == 1000 - skip
    assert (before[0], before[-1], after[0], after[-1]) == (1000, 901, 900 - skip, 1)


def test_without_a_jump_the_prior_does_not_matter_and_with_it_it_does():
    coarse = Diffusion(stride=50)
    once, other = jnp.ones((2, 3)), -jnp.ones((2, 3))
    assert walk(coarse, 0, once, zero)[0].tolist() == walk(coarse, 0, other, zero)[0].tolist()
    moved = walk(coarse, 100, once, zero)[0] - walk(coarse, 100, other, zero)[0]
    assert float(jnp.abs(moved).min()) > 1e-3


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_perfect_network_leads_back_to_the_data(eta):
    """Data of one point: the exact noise is known, and the last step gives the point itself, up to
    float32 rounding. Before it, cutting of the estimate does not bind.
    """
    diffusion, point = Diffusion(stride=50, eta=eta), jnp.array([[1.5, -2.0, 0.3]])

    def denoise(z, level):
        abar = jnp.asarray(alpha_bar(diffusion), jnp.float32)[level][:, None]
        return (z - jnp.sqrt(abar) * point) / jnp.sqrt(1 - abar)

    found, _ = walk(diffusion, 0, jnp.zeros((1, 3)), denoise)
    np.testing.assert_allclose(found, point, atol=2e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stride": 7}, "stride: expected a divisor of the 1000 levels and of 900"),
        ({"stride": 0}, "stride"),
        ({"eta": 1.5}, "eta: expected 0 to 1"),
        ({"jump_from": 1001}, "jump_from: expected 1 to 1000"),
        ({"levels": 1}, "levels: expected 2 or more"),
        ({"offset": 0.0}, "offset and bound"),
    ],
)
def test_schedules_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        Diffusion(**change)


@pytest.mark.parametrize("skip", [-10, 900, 105])
def test_skips_that_do_not_fit_are_refused(skip):
    with pytest.raises(ConfigError, match="skip: expected a multiple of 10 from 0 to below 900"):
        calls_of(Diffusion(), skip)
