"""The three networks at reduced size: matrix VAE with conditional prior, PDF VAE, denoiser.

Cao et al., "CbLDM", arXiv 2509.01370; the facts are from the authors' PyTorch code, hegwj/CbLDM
(MIT). The blocks are theirs, and a test compares them with that code on random weights. What is
reduced or different stands in the docstrings of the networks.

Shapes: B batch, A atoms at most, R points of the PDF, C channels, h x w the latent grid. Images are
[B, height, width, C].
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from qkd_jax.errors import ConfigError, DataError
from qkd_jax.nn.layers import gelu

NORM_EPS = 1e-6


@dataclass(frozen=True)
class Sizes:
    """Sizes of the networks; static. In brackets those of the authors' code.

    Attributes:
      atoms: A, the most atoms of a cluster (256).
      pdf_points: R, points of the PDF (3000).
      latent_side: h = w, of a matrix's latent (16).
      matrix_width: of the layers of the matrix VAE, which are convolutions of 32 to 256 channels in
        the authors' code.
      matrix_blocks: its residual blocks in each direction.
      prior_widths: hidden widths of the MLP from the PDF to the prior (128, 256).
      pdf_segments: the channels that the PDF is folded into (6).
      pdf_channels: of the PDF VAE; each of its two levels has four times more (16).
      denoiser_channels, denoiser_levels: of the denoiser's U-Net (128 * (1, 2, 2, 4)).
      denoiser_blocks: residual blocks at each level (2).
      attention_heads: of the denoiser's transformers (32).
      transformer_depth: their blocks (2).
    """

    atoms: int = 64
    pdf_points: int = 320
    latent_side: int = 4
    matrix_width: int = 512
    matrix_blocks: int = 2
    prior_widths: tuple[int, ...] = (128, 256)
    pdf_segments: int = 6
    pdf_channels: int = 8
    denoiser_channels: int = 32
    denoiser_levels: tuple[int, ...] = (1, 2)
    denoiser_blocks: int = 1
    attention_heads: int = 4
    transformer_depth: int = 1

    def __post_init__(self):
        unit = 2 ** (len(self.denoiser_levels) - 1)
        if self.latent_side < unit or self.latent_side % unit:
            raise ConfigError(
                f"latent_side: expected a multiple of {unit}, since the denoiser halves it "
                f"{len(self.denoiser_levels) - 1} times, found {self.latent_side}"
            )
        for name, unit in (
            ("pdf_channels", 4),
            ("denoiser_channels", 8),
            ("denoiser_channels", self.attention_heads),
        ):
            if getattr(self, name) < unit or getattr(self, name) % unit:
                raise ConfigError(
                    f"{name}: expected a multiple of {unit}, found {getattr(self, name)}"
                )

    @property
    def latent(self) -> tuple[int, int, int]:
        """(h, w, 1), the shape of a matrix's latent."""
        return self.latent_side, self.latent_side, 1

    @property
    def code(self) -> int:
        """Numbers in the code of a PDF (2 x 125)."""
        return 2 * (_folded_length(self) // 4)


class Gaussian(NamedTuple):
    """Independent Gaussians: mean and log variance, of one shape."""

    mean: jax.Array
    log_var: jax.Array


def kl_divergence(p: Gaussian, q: Gaussian) -> jax.Array:
    """KL(p || q) [B] in closed form, summed over all axes but the first.

    Of one number: (log var_q - log var_p + (var_p + (mu_p - mu_q)^2) / var_q - 1) / 2.
    """
    ratio = jnp.exp(p.log_var - q.log_var)
    distance = jnp.square(p.mean - q.mean) * jnp.exp(-q.log_var)
    each = 0.5 * (ratio + distance - 1.0 + q.log_var - p.log_var)
    return each.reshape(each.shape[0], -1).sum(axis=1)


def draw(key: jax.Array, gaussian: Gaussian) -> jax.Array:
    """A reparametrised sample of the shape of the mean."""
    noise = jax.random.normal(key, gaussian.mean.shape, gaussian.mean.dtype)
    return gaussian.mean + jnp.exp(0.5 * gaussian.log_var) * noise


def scaled(pdf: jax.Array) -> jax.Array:
    """PDFs [..., R] divided by their maximum, as the networks read them."""
    return pdf / pdf.max(axis=-1, keepdims=True)


def check_pdf(pdf, sizes: Sizes) -> None:
    """Raises DataError unless `pdf` is [..., R], finite, and above zero somewhere."""
    if pdf.ndim < 1 or pdf.shape[-1] != sizes.pdf_points:
        raise DataError(
            f"G(r): expected {sizes.pdf_points} points, as the model was trained on, found shape "
            f"{tuple(pdf.shape)}; put it on the model's grid first"
        )
    if not bool(jnp.isfinite(pdf).all()):
        raise DataError("G(r): expected finite numbers, found NaN or infinite ones; remove them")
    if not bool((pdf.max(axis=-1) > 0).all()):
        raise DataError("G(r): expected a positive maximum, found none; is it another function?")


class ResidualBlock(nn.Module):
    """Norm, SiLU, convolution, twice, added to the input: [B, h, w, C] -> [B, h, w, channels].

    The embedding of the noise level [B, E] is added between the two; the last convolution starts at
    zero.
    """

    channels: int

    @nn.compact
    def __call__(self, x: jax.Array, embedding: jax.Array) -> jax.Array:
        h = nn.silu(_group_norm(8, "norm_1")(x))
        h = nn.Conv(self.channels, (3, 3), name="conv_1")(h)
        h = h + nn.Dense(self.channels, name="embedding")(nn.silu(embedding))[:, None, None]
        h = nn.silu(_group_norm(8, "norm_2")(h))
        h = nn.Conv(self.channels, (3, 3), kernel_init=nn.initializers.zeros, name="conv_2")(h)
        if x.shape[-1] != self.channels:
            x = nn.Conv(self.channels, (1, 1), name="shortcut")(x)
        return x + h


class SelfAttention(nn.Module):
    """Single-head attention between all positions, added to the input [B, ..., C]."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        h = _group_norm(4, "norm")(x).reshape(x.shape[0], -1, channels)
        query, key, value = (nn.Dense(channels, name=n)(h) for n in ("query", "key", "value"))
        weights = nn.softmax(query @ key.swapaxes(1, 2) * channels**-0.5, axis=-1)
        return x + nn.Dense(channels, name="out")(weights @ value).reshape(x.shape)


class CrossAttention(nn.Module):
    """Multi-head attention of x [B, N, D] to a context [B, M, E], which is x itself by default.

    The code of a PDF is a single token. The softmax over one token is 1, so it adds the same vector
    to all positions, whatever they ask.
    """

    heads: int

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array | None = None) -> jax.Array:
        width, context = x.shape[-1], x if context is None else context

        def heads_of(name, y):
            y = nn.Dense(width, use_bias=False, name=name)(y)
            return y.reshape(*y.shape[:2], self.heads, -1)

        query, key, value = (
            heads_of("query", x),
            heads_of("key", context),
            heads_of("value", context),
        )
        logits = jnp.einsum("bnhd,bmhd->bhnm", query, key) * (width // self.heads) ** -0.5
        mixed = jnp.einsum("bhnm,bmhd->bnhd", nn.softmax(logits, axis=-1), value)
        return nn.Dense(width, name="out")(mixed.reshape(x.shape))


class SpatialTransformer(nn.Module):
    """Self-attention, cross-attention to the context [B, M, E] and a gated MLP between positions.

    Added to the input [B, h, w, C]; the last projection starts at zero.
    """

    heads: int
    depth: int

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        h = nn.Dense(channels, name="in")(_group_norm(4, "norm")(x))
        h = h.reshape(x.shape[0], -1, channels)
        for k in range(self.depth):
            norms = [nn.LayerNorm(epsilon=1e-5, name=f"norm_{k}_{part}") for part in range(3)]
            h = h + CrossAttention(self.heads, name=f"self_{k}")(norms[0](h))
            h = h + CrossAttention(self.heads, name=f"cross_{k}")(norms[1](h), context)
            wide = nn.Dense(8 * channels, name=f"wide_{k}")(norms[2](h))
            value, gate = jnp.split(wide, 2, axis=-1)
            h = h + nn.Dense(channels, name=f"narrow_{k}")(value * gelu(gate))
        out = nn.Dense(channels, kernel_init=nn.initializers.zeros, name="out")
        return x + out(h.reshape(x.shape))


class MatrixVae(nn.Module):
    """The VAE of Laplacian weight matrices, with a prior that is conditional on the PDF.

    As in the paper: an MLP reads the scaled PDF and gives the prior of the latent; the mean of the
    prior is a further input of the encoder.

    Reduced: sizes. Different: both directions are residual MLPs on the entries of the matrix where
    the authors have convolutions on its quadrants: atoms that follow one another in a matrix are
    not neighbours as pixels are. A sigmoid ends the decoder, since zeros of the padding are
    otherwise blurred. The posterior's log variance is free, while the authors' passes through
    softplus, so that their deviation is at least 1 and the latent carries little. The encoder reads
    the prior's mean without teaching it: through that path the reconstruction would bend the prior
    into a second code of the PDF.
    """

    sizes: Sizes

    def setup(self):
        size, numbers = self.sizes, math.prod(self.sizes.latent)
        self.prior_layers = [nn.Dense(n) for n in (*size.prior_widths, 2 * numbers)]
        self.encoder = ResidualMlp(size.matrix_width, size.matrix_blocks, 2 * numbers)
        self.decoder = ResidualMlp(size.matrix_width, size.matrix_blocks, size.atoms**2)

    def prior(self, pdf: jax.Array) -> Gaussian:
        """p(z | PDF), each part [B, h, w, 1], of scaled PDFs [B, R]."""
        h = pdf
        for layer in self.prior_layers[:-1]:
            h = nn.silu(layer(h))
        return self._gaussian(self.prior_layers[-1](h))

    def posterior(self, matrix: jax.Array, prior: Gaussian) -> Gaussian:
        """q(z | W, PDF), each part [B, h, w, 1], of matrices [B, A, A] and the priors."""
        flat = (part.reshape(len(matrix), -1) for part in (matrix, lax.stop_gradient(prior.mean)))
        return self._gaussian(self.encoder(jnp.concatenate([*flat], axis=-1)))

    def decode(self, z: jax.Array) -> jax.Array:
        """Matrices [B, A, A] of latents [B, h, w, 1], within 0 and 1, not symmetric."""
        entries = self.decoder(z.reshape(len(z), -1))
        return nn.sigmoid(entries).reshape(-1, self.sizes.atoms, self.sizes.atoms)

    def __call__(
        self, key: jax.Array, matrix: jax.Array, pdf: jax.Array
    ) -> tuple[jax.Array, Gaussian, Gaussian]:
        """(reconstruction from a sample [B, A, A], posterior, prior)."""
        prior = self.prior(pdf)
        posterior = self.posterior(matrix, prior)
        return self.decode(draw(key, posterior)), posterior, prior

    def _gaussian(self, numbers: jax.Array) -> Gaussian:
        """Mean and log variance from [B, 2 h w]."""
        mean, log_var = jnp.split(numbers, 2, axis=-1)
        shape = len(numbers), *self.sizes.latent
        return Gaussian(mean.reshape(shape), log_var.reshape(shape))


class ResidualMlp(nn.Module):
    """A layer, residual blocks of norm, layer, SiLU and layer, a layer: [B, N] -> [B, out]."""

    width: int
    blocks: int
    out: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = nn.Dense(self.width)(x)
        for _ in range(self.blocks):
            h = h + nn.Dense(self.width)(nn.silu(nn.Dense(self.width)(nn.LayerNorm()(h))))
        return nn.Dense(self.out)(nn.LayerNorm()(h))


class PdfVae(nn.Module):
    """The VAE of PDFs; the mean of its posterior is the code that conditions the denoiser.

    As in the paper: the PDF is folded into six channels, one for each sixth of its range; a
    one-dimensional convolutional encoder with self-attention halves the length twice; the log
    variance passes through softplus.

    Reduced: sizes; group normalisation instead of batch normalisation, so that there are no running
    statistics; normalised once at each level.
    """

    sizes: Sizes

    def setup(self):
        self.encoder, self.decoder = PdfEncoder(self.sizes), PdfDecoder(self.sizes)

    def posterior(self, pdf: jax.Array) -> Gaussian:
        """q(z | PDF), each part [B, length, 2], of scaled PDFs [B, R]."""
        mean, log_var = jnp.split(self.encoder(folded(pdf, self.sizes)), 2, axis=-1)
        return Gaussian(mean, nn.softplus(log_var))

    def code(self, pdf: jax.Array) -> jax.Array:
        """The code [B, 2 length] of scaled PDFs [B, R]."""
        mean = self.posterior(pdf).mean
        return mean.reshape(mean.shape[0], -1)

    def __call__(self, key: jax.Array, pdf: jax.Array) -> tuple[jax.Array, Gaussian]:
        """(reconstruction from a sample [B, R], posterior)."""
        posterior = self.posterior(pdf)
        return unfolded(self.decoder(draw(key, posterior)), self.sizes), posterior


class PdfEncoder(nn.Module):
    """[B, length, segments] -> [B, length / 4, 4], mean and log variance of two channels."""

    sizes: Sizes

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = nn.silu(SelfAttention()(nn.Conv(self.sizes.pdf_channels, (3,))(x)))
        for _ in range(2):
            h = nn.silu(nn.Conv(h.shape[-1], (4,), 2, padding=((1, 1),))(_group_norm(4)(h)))
            h = nn.silu(nn.Conv(4 * h.shape[-1], (3,))(h))
            h = nn.silu(SelfAttention()(h))
        return nn.Conv(4, (3,))(nn.Conv(2, (3,))(h))


class PdfDecoder(nn.Module):
    """[B, length / 4, 2] -> [B, length, segments]."""

    sizes: Sizes

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        h = nn.silu(SelfAttention()(nn.Conv(16 * self.sizes.pdf_channels, (3,))(z)))
        for _ in range(2):
            h = nn.silu(nn.ConvTranspose(h.shape[-1], (2,), (2,))(_group_norm(4)(h)))
            h = nn.silu(nn.Conv(h.shape[-1] // 4, (3,))(h))
            h = nn.silu(SelfAttention()(h))
        h = nn.silu(nn.Conv(self.sizes.pdf_channels, (3,))(h))
        h = nn.Conv(self.sizes.pdf_segments, (3,))(h)
        return nn.Conv(self.sizes.pdf_segments, (3,))(h)


class Denoiser(nn.Module):
    """The U-Net that predicts the noise in a latent, given the code of the PDF.

    As in the paper: residual blocks with an embedding of the noise level, transformers with
    cross-attention to the code (one token) below the finest level and in the middle, connections
    from the way down to the way up; the last convolution starts at zero. Reduced: sizes.
    """

    sizes: Sizes

    @nn.compact
    def __call__(self, z: jax.Array, level: jax.Array, code: jax.Array) -> jax.Array:
        """Predicted noise [B, h, w, 1].

        Args:
          z: noised latents [B, h, w, 1].
          level: int32 [B], noise levels, 0 (clean) to 1000 (noise).
          code: [B, E], codes of PDFs.
        """
        size, context = self.sizes, code[:, None]
        channels = size.denoiser_channels
        embedding = nn.Dense(4 * channels)(level_embedding(level, channels))
        embedding = nn.Dense(4 * channels)(nn.silu(embedding))

        def residual(h, factor):
            return ResidualBlock(factor * channels)(h, embedding)

        def transformer(h):
            return SpatialTransformer(size.attention_heads, size.transformer_depth)(h, context)

        h = nn.Conv(channels, (3, 3))(z)
        kept = [h]
        for depth, factor in enumerate(size.denoiser_levels):
            if depth:
                h = nn.Conv(h.shape[-1], (3, 3), 2, padding=((1, 1), (1, 1)))(h)
                kept.append(h)
            for _ in range(size.denoiser_blocks):
                h = residual(h, factor)
                h = transformer(h) if depth else h
                kept.append(h)
        h = residual(transformer(residual(h, factor)), factor)
        for depth, factor in reversed(list(enumerate(size.denoiser_levels))):
            for _ in range(size.denoiser_blocks + 1):
                h = residual(jnp.concatenate([h, kept.pop()], -1), factor)
                h = transformer(h) if depth else h
            if depth:
                h = nn.Conv(h.shape[-1], (3, 3))(upsampled(h, 2))
        h = nn.silu(_group_norm(8)(h))
        return nn.Conv(1, (3, 3), kernel_init=nn.initializers.zeros)(h)


def level_embedding(level: jax.Array, channels: int) -> jax.Array:
    """Sines, then cosines, of levels [B] at channels / 2 frequencies, 1 to 1e-4: [B, channels]."""
    half = channels // 2
    frequencies = 10000.0 ** (-jnp.arange(half, dtype=jnp.float32) / (half - 1))
    angles = level.astype(jnp.float32)[:, None] * frequencies[None]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1)


def folded(pdf: jax.Array, sizes: Sizes) -> jax.Array:
    """PDFs [B, R] as [B, length, segments], one channel for each part; zeros fill the last part."""
    length = _folded_length(sizes)
    padded = jnp.pad(pdf, ((0, 0), (0, sizes.pdf_segments * length - pdf.shape[1])))
    return padded.reshape(pdf.shape[0], sizes.pdf_segments, length).swapaxes(1, 2)


def unfolded(segments: jax.Array, sizes: Sizes) -> jax.Array:
    """The inverse of `folded`: [B, length, segments] -> [B, R]."""
    flat = segments.swapaxes(1, 2).reshape(segments.shape[0], -1)
    return flat[:, : sizes.pdf_points]


def upsampled(x: jax.Array, factor: int) -> jax.Array:
    """Every position of [B, h, w, C] repeated `factor` times in both directions."""
    return x.repeat(factor, axis=1).repeat(factor, axis=2)


def _folded_length(sizes: Sizes) -> int:
    """Points of one part of the PDF: enough for all, and a multiple of four."""
    return 4 * -(-sizes.pdf_points // (4 * sizes.pdf_segments))


def _group_norm(groups: int, name: str | None = None) -> nn.GroupNorm:
    return nn.GroupNorm(groups, epsilon=NORM_EPS, name=name)
