"""The trained whole, with networks that are not trained: shapes, ranges, draws, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from projects.nanoparticles import model as module
from projects.nanoparticles.diffusion import Diffusion
from projects.nanoparticles.model import (
    Model,
    as_weights,
    generate,
    generate_all,
    generate_by_vae,
    with_stride,
)
from projects.nanoparticles.networks import Denoiser, MatrixVae, PdfVae, Sizes
from qkd_jax.errors import ConfigError, DataError

SMALL = Sizes(
    atoms=16,
    pdf_points=24,
    matrix_width=16,
    matrix_blocks=1,
    prior_widths=(8,),
    pdf_channels=4,
    denoiser_channels=8,
    attention_heads=2,
)
PDF = np.sin(np.arange(24) / 4).astype(np.float32)


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model():
    key = jax.random.key(0)
    matrix, pdf = jnp.zeros((1, 16, 16)), jnp.zeros((1, 24))
    latent, code = jnp.zeros((1, *SMALL.latent)), jnp.zeros((1, SMALL.code))
    params = (
        jax.jit(PdfVae(SMALL).init)(key, key, pdf),
        jax.jit(MatrixVae(SMALL).init)(key, key, matrix, pdf),
        jax.jit(Denoiser(SMALL).init)(key, latent, jnp.zeros(1, jnp.int32), code),
    )
    return Model(SMALL, Diffusion(stride=100), *params, jnp.float32(1.5))


def test_predicted_matrices_are_symmetric_and_within_zero_and_one():
    matrix = jnp.array([[[2.0, 0.5], [0.1, -1.0]]])
    np.testing.assert_allclose(as_weights(matrix), [[[1.0, 0.3], [0.3, 1e-6]]], rtol=1e-6)


def test_candidates_are_weights_that_follow_from_the_key(model, key):
    found = generate(model, key, PDF, 3)
    assert found.shape == (3, 16, 16)
    np.testing.assert_array_equal(found, found.swapaxes(1, 2))
    assert 0 < float(found.min()) and float(found.max()) <= 1
    assert float(jnp.abs(found[0] - found[1]).max()) > 1e-3
    np.testing.assert_array_equal(found, generate(model, key, PDF, 3))
    # The networks read G(r) by its maximum, so its units do not matter: rounding of a product.
    np.testing.assert_allclose(generate(model, key, 3 * PDF, 3), found, atol=1e-4)


def test_skips_change_the_result_and_share_one_compiled_step(model, key):
    pdf = np.stack([PDF, PDF[::-1]])
    module._down.clear_cache()
    found = [generate_all(model, key, pdf, 2, skip) for skip in (0, 100, 400)]
    assert module._down._cache_size() == 1
    assert found[0].shape == (2, 2, 16, 16)
    assert float(jnp.abs(found[0] - found[1]).max()) > 1e-3
    assert float(jnp.abs(found[1] - found[2]).max()) > 1e-3


def test_the_vae_alone_decodes_draws_from_the_prior(model, key):
    """Against a decoder that is called by hand on the draws, in the same precision."""
    found = generate_by_vae(model, key, PDF[None], 2)
    assert found.shape == (1, 2, 16, 16)

    def by_hand(params, key, pdf):
        vae = MatrixVae(SMALL)
        prior = vae.apply(params, pdf / pdf.max(), method="prior")
        noise = jax.random.normal(key, (2, *SMALL.latent))
        z = prior.mean + jnp.exp(prior.log_var / 2) * noise
        return vae.apply(params, z, method="decode")

    expected = as_weights(jax.jit(by_hand)(model.matrix_params, key, jnp.stack([PDF, PDF])))
    np.testing.assert_allclose(found[0], expected, atol=1e-5)


def test_what_cannot_be_generated_is_refused(model, key):
    with pytest.raises(DataError, match="expected finite numbers"):
        generate(model, key, np.where(PDF > 0.9, np.nan, PDF), 1)
    with pytest.raises(DataError, match="expected 24 points"):
        generate(model, key, PDF[:20], 1)
    with pytest.raises(ConfigError, match="candidates: expected 1 or more, found 0"):
        generate(model, key, PDF, 0)
    with pytest.raises(ConfigError, match="skip: expected a multiple of 100"):
        generate(model, key, PDF, 1, skip=50)
    with pytest.raises(ConfigError, match="skip: expected a multiple of 50"):
        generate(with_stride(model, 50), key, PDF, 1, skip=75)
