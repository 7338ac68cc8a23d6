"""The trained whole: from G(r) to Laplacian weight matrices."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from projects.nanoparticles.data import load_data
from projects.nanoparticles.diffusion import Diffusion, down, sample
from projects.nanoparticles.networks import (
    Denoiser,
    MatrixVae,
    PdfVae,
    Sizes,
    check_pdf,
    draw,
    scaled,
)
from projects.nanoparticles.training import (
    STAGES,
    Training,
    denoiser_stage,
    digest,
    encoded,
    latent_scale,
    load_params,
    matrix_stage,
    pdf_stage,
    record_of,
    train_stage,
)
from qkd_jax.errors import ConfigError
from qkd_jax.runs.folder import read_json

LEAST_WEIGHT = 1e-6  # weights are cut to this and 1


class Model(NamedTuple):
    """Trained networks.

    Attributes:
      sizes, diffusion: static.
      pdf_params, matrix_params, denoiser_params: of the three networks.
      scale: standard deviation of the latents, by which the denoiser's are divided.
    """

    sizes: Sizes
    diffusion: Diffusion
    pdf_params: Any
    matrix_params: Any
    denoiser_params: Any
    scale: jax.Array


def train_model(
    data_file: Path,
    folder: Path,
    seed: int,
    sizes: Sizes,
    diffusion: Diffusion,
    training: Training,
    tell=print,
) -> Model:
    """Trains what is not trained yet, one network after the other, and returns the whole.

    Raises:
      DataError, CheckpointError, ConfigError: see `data.load_data` and `training.train_stage`.
    """
    data, used = load_data(data_file), digest(data_file)
    found = data.train.positions.shape[1], data.train.pdf.shape[1]
    if found != (sizes.atoms, sizes.pdf_points):
        raise ConfigError(
            f"{data_file}: expected {sizes.atoms} atoms at most and {sizes.pdf_points} points of "
            f"G(r), found {found[0]} and {found[1]}; delete the file and run `data`"
        )

    def trained(stage, **more):
        record = record_of(stage, seed, sizes, training, data=used, **more)
        return train_stage(stage, folder, seed, record, training.round_steps, tell)

    pdf_params = trained(pdf_stage(data, sizes, training))
    matrix_params = trained(matrix_stage(data, sizes, training))
    train, validation = (
        encoded(part, sizes, pdf_params, matrix_params) for part in (data.train, data.validation)
    )
    scale = latent_scale(train)
    denoiser_params = trained(
        denoiser_stage(train, validation, sizes, training, diffusion, scale),
        made_from={name: digest(folder / f"{name}.safetensors") for name in STAGES[:2]},
        noise={"levels": diffusion.levels, "offset": diffusion.offset},
        scale=scale,
    )
    return Model(sizes, diffusion, pdf_params, matrix_params, denoiser_params, jnp.float32(scale))


def load_model(folder: Path, sizes: Sizes, diffusion: Diffusion) -> Model:
    """A model that `train_model` finished in `folder`.

    Raises:
      CheckpointError: it is not finished, damaged, or of other sizes.
    """
    key = jax.random.key(0)
    matrix, pdf = jnp.zeros((1, sizes.atoms, sizes.atoms)), jnp.zeros((1, sizes.pdf_points))
    latent, code = jnp.zeros((1, *sizes.latent)), jnp.zeros((1, sizes.code))
    networks = {
        "pdf_vae": (PdfVae(sizes), key, pdf),
        "matrix_vae": (MatrixVae(sizes), key, matrix, pdf),
        "denoiser": (Denoiser(sizes), latent, jnp.zeros(1, jnp.int32), code),
    }
    params = []
    for name, (network, *inputs) in networks.items():
        like = jax.eval_shape(network.init, key, *inputs)
        params.append(load_params(folder / f"{name}.safetensors", like))
    scale = read_json(folder / "denoiser.json")["scale"]
    return Model(sizes, diffusion, *params, jnp.float32(scale))


def generate(
    model: Model, key: jax.Array, pdf: jax.Array, how_many: int, skip: int = 100
) -> jax.Array:
    """W [how_many, A, A] for one G(r) [R] by latent diffusion, in (T - skip) / stride calls.

    Args:
      key: of all draws.
      pdf: on the grid that the model was trained on, in any units of G.
      skip: levels that the conditional prior jumps over; 0 is latent diffusion from noise.

    Raises:
      DataError: `pdf` has another length, or numbers that are not finite.
      ConfigError: `how_many` is below 1, or `skip` does not fit (`diffusion.calls_of`).
    """
    return generate_all(model, key, jnp.asarray(pdf)[None], how_many, skip)[0]


def generate_all(
    model: Model, key: jax.Array, pdf: jax.Array, how_many: int, skip: int = 100
) -> jax.Array:
    """W [K, how_many, A, A] for G(r) [K, R]; see `generate`."""
    pdf = _repeated(model, pdf, how_many)
    keys = jax.random.split(key)
    diffusion = model.diffusion
    params = model.matrix_params, model.pdf_params
    x_hat, code = _conditions(params, keys[0], pdf, model.sizes)
    x_hat = x_hat / model.scale

    def one_down(key, z, level):
        return _down(model.denoiser_params, key, z, level, code, model.sizes, diffusion)

    z = sample(keys[1], one_down, x_hat, diffusion, skip)
    return _matrices(model, z, how_many)


def generate_by_vae(model: Model, key: jax.Array, pdf: jax.Array, how_many: int) -> jax.Array:
    """W [K, how_many, A, A] by the conditional VAE alone: decoded draws from p(z | PDF).

    Args:
      pdf: [K, R].

    Raises:
      DataError, ConfigError: see `generate`.
    """
    pdf = _repeated(model, pdf, how_many)
    params = model.matrix_params, model.pdf_params
    x_hat, _ = _conditions(params, key, pdf, model.sizes)
    return _matrices(model, x_hat / model.scale, how_many)


def with_stride(model: Model, stride: int) -> Model:
    """The same model that walks back in other strides (`Diffusion.stride`)."""
    return model._replace(diffusion=replace(model.diffusion, stride=stride))


def as_weights(matrix: jax.Array) -> jax.Array:
    """Predicted matrices [..., A, A], made symmetric and cut to (0, 1]."""
    return jnp.clip(0.5 * (matrix + matrix.swapaxes(-1, -2)), LEAST_WEIGHT, 1.0)


def _repeated(model: Model, pdf: jax.Array, how_many: int) -> jax.Array:
    """Scaled PDFs [K how_many, R], each `how_many` times in a row."""
    pdf = jnp.asarray(pdf, jnp.float32)
    check_pdf(pdf, model.sizes)
    if how_many < 1:
        raise ConfigError(f"candidates: expected 1 or more, found {how_many}")
    return scaled(pdf).repeat(how_many, axis=0)


def _matrices(model: Model, z: jax.Array, how_many: int) -> jax.Array:
    matrices = _decoded(model.matrix_params, z * model.scale, model.sizes)
    return as_weights(matrices).reshape(-1, how_many, *matrices.shape[1:])


@partial(jax.jit, static_argnames="sizes")
def _conditions(params, key, pdf, sizes):
    """Draws from the prior [B, h, w, 1] and codes [B, E] of scaled PDFs [B, R]."""
    matrix_params, pdf_params = params
    prior = MatrixVae(sizes).apply(matrix_params, pdf, method="prior")
    return draw(key, prior), PdfVae(sizes).apply(pdf_params, pdf, method="code")


@partial(jax.jit, static_argnames=("sizes", "diffusion"))
def _down(params, key, z, level, code, sizes, diffusion):
    return down(
        key, lambda z, level: Denoiser(sizes).apply(params, z, level, code), z, level, diffusion
    )


@partial(jax.jit, static_argnames="sizes")
def _decoded(params, z, sizes):
    return MatrixVae(sizes).apply(params, z, method="decode")
