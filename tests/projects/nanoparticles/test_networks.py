"""The networks against the authors' code on random weights, and closed forms."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from projects.nanoparticles.networks import (
    Denoiser,
    Gaussian,
    MatrixVae,
    PdfVae,
    ResidualBlock,
    SelfAttention,
    Sizes,
    SpatialTransformer,
    check_pdf,
    draw,
    folded,
    kl_divergence,
    level_embedding,
    unfolded,
    upsampled,
)
from qkd_jax.errors import ConfigError, DataError

GOLDEN = Path(__file__).parent / "golden" / "cbldm_golden.npz"
# Sums of at most 8 * 9 * 16 products of numbers of size 1 in float32, in another order than
# PyTorch's: 1e-7 * sqrt(1152) * a few layers, relative to outputs up to 10.
TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}
SMALL = Sizes(
    atoms=16,
    pdf_points=50,
    matrix_width=16,
    matrix_blocks=1,
    prior_widths=(8, 8),
    pdf_channels=4,
    denoiser_channels=8,
    attention_heads=2,
)


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as file:
        return dict(file)


def last(image):
    """PyTorch's [B, C, ...] as [B, ..., C]."""
    return jnp.asarray(np.moveaxis(image, 1, -1))


def kernel(golden, name, dense=False):
    """{"kernel", "bias"} of a convolution or a linear layer; 1 x 1 convolutions as linear ones."""
    weight = golden[f"{name}.weight"]
    if dense:
        layer = {"kernel": weight.reshape(weight.shape[:2]).T}
    else:
        layer = {"kernel": weight.transpose(2, 3, 1, 0)}
    return layer | ({"bias": golden[f"{name}.bias"]} if f"{name}.bias" in golden else {})


def norm(golden, name):
    return {"scale": golden[f"{name}.weight"], "bias": golden[f"{name}.bias"]}


def test_attention_of_the_matrix_vae_is_the_authors(golden):
    names = {"query": "q", "key": "k", "value": "v", "out": "proj_out"}
    params = {
        name: kernel(golden, f"vae_attention.{theirs}", dense=True)
        for name, theirs in names.items()
    }
    params["norm"] = norm(golden, "vae_attention.norm")
    found = SelfAttention().apply({"params": params}, last(golden["image"]))
    np.testing.assert_allclose(found, last(golden["vae_attention.out"]), **TOLERANCE)


def test_residual_block_of_the_denoiser_is_the_authors(golden):
    params = {
        "norm_1": norm(golden, "unet_residual.in_layers.0"),
        "conv_1": kernel(golden, "unet_residual.in_layers.2"),
        "embedding": kernel(golden, "unet_residual.emb_layers.1", dense=True),
        "norm_2": norm(golden, "unet_residual.out_layers.0"),
        "conv_2": kernel(golden, "unet_residual.out_layers.2"),
        "shortcut": kernel(golden, "unet_residual.skip_connection"),
    }
    block = ResidualBlock(8)
    found = block.apply({"params": params}, last(golden["wide"]), jnp.asarray(golden["embedding"]))
    np.testing.assert_allclose(found, last(golden["unet_residual.out"]), **TOLERANCE)


def test_transformer_of_the_denoiser_is_the_authors(golden):
    """With a context of three tokens, so that attention is not trivial."""
    name = "unet_transformer"
    params = {
        "norm": norm(golden, f"{name}.norm"),
        "in": kernel(golden, f"{name}.proj_in", dense=True),
        "out": kernel(golden, f"{name}.proj_out", dense=True),
    }
    for k in range(2):
        block = f"{name}.transformer_blocks.{k}"
        for part in range(3):
            params[f"norm_{k}_{part}"] = norm(golden, f"{block}.norm{part + 1}")
        for ours, theirs in (("self", "attn1"), ("cross", "attn2")):
            layers = {"query": "to_q", "key": "to_k", "value": "to_v", "out": "to_out.0"}
            params[f"{ours}_{k}"] = {
                layer: kernel(golden, f"{block}.{theirs}.{path}", dense=True)
                for layer, path in layers.items()
            }
        params[f"wide_{k}"] = kernel(golden, f"{block}.ff.net.0.proj", dense=True)
        params[f"narrow_{k}"] = kernel(golden, f"{block}.ff.net.1", dense=True)
    found = SpatialTransformer(2, 2).apply(
        {"params": params}, last(golden["image"]), jnp.asarray(golden["context"])
    )
    np.testing.assert_allclose(found, last(golden[f"{name}.out"]), **TOLERANCE)


def test_embedding_of_levels_is_the_authors(golden):
    """Angles are up to 999, which float32 has to 6e-5."""
    found = level_embedding(jnp.asarray(golden["levels"], jnp.int32), 16)
    np.testing.assert_allclose(found, golden["level_embedding"], atol=2e-4)


def test_kl_in_closed_form_is_the_integral():
    """Numerical integration in float64 over 16 standard deviations: its error is below 1e-9, that
    of the closed form in float64 as well.
    """
    draws = np.random.default_rng(0)
    mean_p, mean_q = draws.normal(size=(2, 3, 5))
    log_var_p, log_var_q = draws.normal(size=(2, 3, 5))
    x = np.linspace(-40, 40, 200001)

    def log_density(mean, log_var):
        return -0.5 * (np.log(2 * np.pi) + log_var + (x - mean) ** 2 / np.exp(log_var))

    expected = np.zeros(3)
    for row, column in np.ndindex(3, 5):
        p = log_density(mean_p[row, column], log_var_p[row, column])
        q = log_density(mean_q[row, column], log_var_q[row, column])
        expected[row] += np.trapezoid(np.exp(p) * (p - q), x)
    with jax.enable_x64(True):
        p, q = Gaussian(mean_p, log_var_p), Gaussian(mean_q, log_var_q)
        found = kl_divergence(*(Gaussian(*map(jnp.asarray, g)) for g in (p, q)))
        assert found.dtype == jnp.float64
        np.testing.assert_allclose(found, expected, rtol=1e-8)
        np.testing.assert_array_equal(kl_divergence(p, p), np.zeros(3))


def test_draws_have_the_moments_of_their_gaussian(key):
    """Of 40,000 draws, the mean is off by 1 / 200 of a deviation, and 5 of those are allowed."""
    gaussian = Gaussian(jnp.full((40000,), 3.0), jnp.full((40000,), 2 * jnp.log(0.5)))
    found = draw(key, gaussian)
    assert abs(float(found.mean()) - 3.0) < 5 * 0.5 / 200
    assert abs(float(found.std()) / 0.5 - 1.0) < 5 / 200


def test_pdfs_come_back_from_their_pieces():
    pdf = jnp.arange(100, dtype=jnp.float32).reshape(2, 50)
    parts = folded(pdf, SMALL)
    assert parts.shape == (2, 12, 6)
    np.testing.assert_array_equal(parts[1, :, 1], pdf[1, 12:24])
    np.testing.assert_array_equal(unfolded(parts, SMALL), pdf)
    image = jnp.arange(4.0).reshape(1, 2, 2, 1)
    np.testing.assert_array_equal(
        upsampled(image, 2)[0, :, :, 0], [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]]
    )


def test_the_encoder_reads_the_prior_which_learns_from_the_divergence_alone(key):
    matrix, pdf = jax.random.uniform(key, (2, 16, 16)), jax.random.normal(key, (2, 50))
    vae = MatrixVae(SMALL)

    @jax.jit
    def run(key, matrix, pdf):
        params = vae.init(key, key, matrix, pdf)
        found, posterior, prior = vae.apply(params, key, matrix, pdf)
        moved = Gaussian(prior.mean + 1, prior.log_var)

        def reconstruction(params):
            return jnp.sum(jnp.square(vae.apply(params, key, matrix, pdf)[0] - matrix))

        def divergence(params):
            return jnp.sum(kl_divergence(*vae.apply(params, key, matrix, pdf)[1:]))

        slopes = jax.grad(reconstruction)(params), jax.grad(divergence)(params)
        return found, posterior, prior, vae.apply(params, matrix, moved, method="posterior"), slopes

    found, posterior, prior, moved, slopes = run(key, matrix, pdf)
    assert found.shape == matrix.shape
    assert 0 < float(found.min()) and float(found.max()) < 1
    assert posterior.mean.shape == prior.log_var.shape == (2, *SMALL.latent) == (2, 4, 4, 1)
    assert float(posterior.log_var.min()) < 0  # its deviations may be below 1
    assert float(jnp.abs(moved.mean - posterior.mean).max()) > 1e-3
    # Else the encoder would bend the prior into a second code of the PDF.
    by_reconstruction, by_divergence = (slope["params"]["prior_layers_0"] for slope in slopes)
    assert not any(float(jnp.abs(leaf).max()) for leaf in by_reconstruction.values())
    assert float(jnp.abs(by_divergence["kernel"]).max()) > 0


@pytest.mark.slow
def test_the_pdf_vae_gives_a_code_of_the_stated_size(key):
    pdf, vae = jax.random.normal(key, (2, 50)), PdfVae(SMALL)

    @jax.jit
    def run(key, pdf):
        params = vae.init(key, key, pdf)
        return *vae.apply(params, key, pdf), vae.apply(params, pdf, method="code")

    found, posterior, code = run(key, pdf)
    assert found.shape == pdf.shape and float(posterior.log_var.min()) > 0
    assert code.shape == (2, SMALL.code)
    np.testing.assert_array_equal(code, posterior.mean.reshape(2, -1))


@pytest.mark.slow
def test_the_denoiser_starts_at_zero_and_reads_latent_level_and_code(key):
    denoiser, z = Denoiser(SMALL), jax.random.normal(key, (2, *SMALL.latent))
    level, code = jnp.array([3, 900], jnp.int32), jax.random.normal(key, (2, SMALL.code))
    params = jax.jit(denoiser.init)(key, z, level, code)
    run = jax.jit(denoiser.apply)
    np.testing.assert_array_equal(run(params, z, level, code), jnp.zeros_like(z))
    params = jax.tree.map(lambda leaf: leaf + 0.05, params)  # the last layers start at zero
    noise = run(params, z, level, code)
    for other in ((z * 2, level, code), (z, level + 50, code), (z, level, code + 1)):
        assert float(jnp.abs(run(params, *other) - noise).max()) > 1e-4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latent_side": 5}, "latent_side: expected a multiple of 2"),
        ({"pdf_channels": 6}, "pdf_channels: expected a multiple of 4"),
        ({"denoiser_channels": 12}, "denoiser_channels: expected a multiple of 8"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        Sizes(**change)


def test_pdfs_that_cannot_be_read_are_refused():
    good = np.linspace(-1, 1, 50)
    check_pdf(good, SMALL)
    with pytest.raises(DataError, match="expected 50 points"):
        check_pdf(good[:49], SMALL)
    with pytest.raises(DataError, match="expected finite"):
        check_pdf(np.where(good > 0.9, np.nan, good), SMALL)
    with pytest.raises(DataError, match="expected a positive maximum"):
        check_pdf(good - 2, SMALL)
