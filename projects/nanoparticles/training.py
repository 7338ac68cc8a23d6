"""The three trainings: PDF VAE, matrix VAE, denoiser. Each goes on after being killed.

Losses and the rise of beta are those of the authors' code (hegwj/CbLDM). Reduced: a few thousand
steps where they take up to 10,240 epochs, so learning rates are higher and fall to zero along a
cosine, and beta rises as much in one round of steps as theirs in many epochs. Different: both VAEs
learn by AdamW, as the denoiser does there as well, instead of by Adan.
"""

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict

from projects.nanoparticles.data import DataSet, Examples
from projects.nanoparticles.diffusion import Diffusion, noise_loss
from projects.nanoparticles.laplacian import T, weights_of
from projects.nanoparticles.networks import (
    Denoiser,
    Gaussian,
    MatrixVae,
    PdfVae,
    Sizes,
    draw,
    kl_divergence,
    scaled,
)
from qkd_jax.errors import CheckpointError, ConfigError
from qkd_jax.reports.writing import write_atomically
from qkd_jax.runs.checkpoint import DAMAGE, put_aside
from qkd_jax.runs.progress import duration

STAGES = ("pdf_vae", "matrix_vae", "denoiser")
CHECKED = 128  # validation clusters that are looked at after each round


@dataclass(frozen=True)
class Training:
    """How long and how fast the networks learn.

    Attributes:
      pdf_steps, matrix_steps, denoiser_steps: optimisation steps.
      batch: clusters in a step (64).
      round_steps: steps between two checkpoints; beta may rise after each.
      pdf_rate, matrix_rate, denoiser_rate: first learning rates (5e-5, 2e-4, 1e-4).
      pdf_decay, matrix_decay: weight decay (1e-5, 2e-4); the denoiser has none.
      matrix_scale: factor of the mean squared error of the matrix (1e6). It is for the mean over
        256 x 256 entries; 64 x 64 entries weigh as much with a sixteenth.
    """

    pdf_steps: int = 1000
    matrix_steps: int = 3000
    denoiser_steps: int = 4000
    batch: int = 64
    round_steps: int = 25
    pdf_rate: float = 1e-3
    matrix_rate: float = 1e-3
    denoiser_rate: float = 1e-3
    pdf_decay: float = 1e-5
    matrix_decay: float = 2e-4
    matrix_scale: float = 6e4

    def __post_init__(self):
        for name in ("pdf_steps", "matrix_steps", "denoiser_steps", "batch", "round_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected 1 or more, found {getattr(self, name)}")
        for name in ("pdf_rate", "matrix_rate", "denoiser_rate", "matrix_scale"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}: expected more than 0, found {getattr(self, name)}")


@dataclass(frozen=True)
class BetaRise:
    """How the weight of the KL divergence is raised from 0 to 1, looking at a validation error.

    Attributes:
      below: beta rises while the error is under this.
      above: beta is cut by 0.1 % while the error is over this.
      rises: by how much while beta is under 0.05, under 0.3, under 0.55, and from there on.
      pace: how many of the authors' epochs one round stands for.
    """

    below: float
    above: float
    rises: tuple[float, float, float, float]
    pace: float


# The rises are those of the authors' train_pdf.py and train_mtx.py. The error of a PDF is the mean
# absolute one; their thresholds are 0.003 and 0.006, below the noise that our curves have. That of
# a matrix is the mean squared one, and their thresholds hold nothing back: entries are within 0 and
# 1, so it is always under 0.8. (They cut beta for PDFs only when it is over 0.3, and for matrices
# at every tenth validation batch.)
PDF_BETA = BetaRise(0.05, 0.1, (0.001, 0.003, 0.01, 0.02), pace=10.0)
MATRIX_BETA = BetaRise(0.8, 2.0, (0.0001, 0.0003, 0.001, 0.005), pace=80.0)


def raised(beta: float, error: float, rise: BetaRise) -> float:
    """Beta for the next round."""
    if error < rise.below and beta < 1.0:
        index = sum(beta >= limit for limit in (0.05, 0.3, 0.55))
        return min(1.0, beta + rise.pace * rise.rises[index])
    return beta * 0.999 if error > rise.above else beta


class Stage(NamedTuple):
    """One training.

    Attributes:
      name: one of `STAGES`.
      init: key -> parameters.
      loss: (params, key, batch, beta) -> (scalar, named measures).
      error: the measure that decides whether beta rises.
      data, validation: named arrays whose first axis is the clusters.
      optimiser: of optax.
      rise: None if there is no beta.
      steps, batch, rate: of `Training`; the rate is named in messages.
    """

    name: str
    init: Callable[[jax.Array], Any]
    loss: Callable[..., tuple[jax.Array, dict[str, jax.Array]]]
    error: str
    data: dict[str, jax.Array]
    validation: dict[str, jax.Array]
    optimiser: optax.GradientTransformation
    rise: BetaRise | None
    steps: int
    batch: int
    rate: float


class Progress(NamedTuple):
    """What a checkpoint holds: everything but the data and the key."""

    step: jax.Array
    beta: jax.Array
    params: Any
    opt_state: Any


def pdf_stage(data: DataSet, sizes: Sizes, training: Training) -> Stage:
    """The PDF VAE. Loss: 100 L1 + 1000 MSE + 1e-3 beta KL(posterior || standard normal)."""
    vae = PdfVae(sizes)

    def loss(params, key, batch, beta):
        found, posterior = vae.apply(params, key, batch["pdf"])
        absolute = jnp.mean(jnp.abs(found - batch["pdf"]))
        squared = jnp.mean(jnp.square(found - batch["pdf"]))
        normal = Gaussian(*(jnp.zeros_like(part) for part in posterior))
        kl = jnp.mean(kl_divergence(posterior, normal))
        value = 100.0 * absolute + 1000.0 * squared + 1e-3 * beta * kl
        return value, {"L1": absolute, "KL": kl}

    def inputs(examples):
        return {"pdf": scaled(jnp.asarray(examples.pdf))}

    return Stage(
        "pdf_vae",
        lambda key: vae.init(key, key, jnp.zeros((1, sizes.pdf_points))),
        loss,
        "L1",
        inputs(data.train),
        inputs(data.validation.rows(slice(CHECKED))),
        _adamw(training.pdf_rate, training.pdf_decay, training.pdf_steps),
        PDF_BETA,
        training.pdf_steps,
        training.batch,
        training.pdf_rate,
    )


def matrix_stage(data: DataSet, sizes: Sizes, training: Training) -> Stage:
    """The matrix VAE. Loss: scale * MSE + 0.1 beta KL(posterior || prior given the PDF)."""
    vae = MatrixVae(sizes)

    def loss(params, key, batch, beta):
        matrix = weights_of(batch["positions"], batch["count"], T)
        found, posterior, prior = vae.apply(params, key, matrix, batch["pdf"])
        squared = jnp.mean(jnp.square(found - matrix))
        kl = jnp.mean(kl_divergence(posterior, prior))
        return training.matrix_scale * squared + 0.1 * beta * kl, {"MSE": squared, "KL": kl}

    def init(key):
        shapes = (1, sizes.atoms, sizes.atoms), (1, sizes.pdf_points)
        return vae.init(key, key, *(jnp.zeros(shape) for shape in shapes))

    return Stage(
        "matrix_vae",
        init,
        loss,
        "MSE",
        _matrix_inputs(data.train),
        _matrix_inputs(data.validation.rows(slice(CHECKED))),
        _adamw(training.matrix_rate, training.matrix_decay, training.matrix_steps),
        MATRIX_BETA,
        training.matrix_steps,
        training.batch,
        training.matrix_rate,
    )


def denoiser_stage(
    data: dict[str, jax.Array],
    validation: dict[str, jax.Array],
    sizes: Sizes,
    training: Training,
    diffusion: Diffusion,
    scale: float,
) -> Stage:
    """The denoiser. Loss: L1 of the noise in latents drawn from the matrix VAE's posterior.

    Args:
      data, validation: of `encoded`.
      scale: latents are divided by it (`latent_scale`); 1 in the authors' code.
    """
    denoiser = Denoiser(sizes)

    def loss(params, key, batch, beta):
        key_posterior, key_noise = jax.random.split(key)
        z_0 = draw(key_posterior, Gaussian(batch["mean"], batch["log_var"])) / scale

        def denoise(z, level):
            return denoiser.apply(params, z, level, batch["code"])

        value = noise_loss(key_noise, denoise, z_0, diffusion)
        return value, {"L1": value}

    def init(key):
        latent, code = jnp.zeros((1, *sizes.latent)), jnp.zeros((1, sizes.code))
        return denoiser.init(key, latent, jnp.zeros(1, jnp.int32), code)

    return Stage(
        "denoiser",
        init,
        loss,
        "L1",
        data,
        {name: array[:CHECKED] for name, array in validation.items()},
        _adamw(training.denoiser_rate, 0.0, training.denoiser_steps),
        None,
        training.denoiser_steps,
        training.batch,
        training.denoiser_rate,
    )


def encoded(
    examples: Examples, sizes: Sizes, pdf_params: Any, matrix_params: Any
) -> dict[str, jax.Array]:
    """What the denoiser learns from, computed once, since both VAEs stay as they are.

    Returns:
      "mean" and "log_var" [K, h, w, 1] of the matrices' posteriors, "code" [K, E] of the PDFs.
    """
    vae, pdf_vae = MatrixVae(sizes), PdfVae(sizes)

    @jax.jit
    def encode(matrix_params, pdf_params, batch):
        matrix = weights_of(batch["positions"], batch["count"], T)
        prior = vae.apply(matrix_params, batch["pdf"], method="prior")
        mean, log_var = vae.apply(matrix_params, matrix, prior, method="posterior")
        code = pdf_vae.apply(pdf_params, batch["pdf"], method="code")
        return {"mean": mean, "log_var": log_var, "code": code}

    inputs, count, parts = _matrix_inputs(examples), len(examples.count), []
    for begin in range(0, count, CHECKED):
        # The last block is filled up with the last cluster, so that all have one shape.
        rows = np.minimum(np.arange(begin, begin + CHECKED), count - 1)
        block = {name: array[rows] for name, array in inputs.items()}
        parts.append(encode(matrix_params, pdf_params, block))
    return jax.tree.map(lambda *blocks: jnp.concatenate(blocks)[:count], *parts)


def latent_scale(data: dict[str, jax.Array]) -> float:
    """The standard deviation of latents drawn from the posteriors of `encoded`.

    Of four digits, so that another number of threads on going on does not change it.
    """
    mean, log_var = (np.asarray(data[name], np.float64) for name in ("mean", "log_var"))
    return float(f"{np.sqrt(np.exp(log_var).mean() + mean.var()):.4g}")


def train_stage(
    stage: Stage,
    folder: Path,
    seed: int,
    record: dict[str, Any],
    round_steps: int = 25,
    tell: Callable[[str], None] = print,
) -> Any:
    """The trained parameters of a stage, also in `folder`/<name>.safetensors.

    After every round of steps there is a checkpoint; a training that was killed goes on from the
    newest one and ends with the same bytes, since batches and noise follow from the seed and the
    step. A finished stage is read and not trained again.

    Args:
      folder: of this model.
      seed: of first parameters, batches and noise.
      record: plain JSON, all that the result depends on.
      tell: gets a line of progress from time to time.

    Raises:
      CheckpointError: the folder holds a training with another record, or damaged files.
      ConfigError: the loss became NaN or infinite.
    """
    weights = folder / f"{stage.name}.safetensors"
    key = jax.random.fold_in(jax.random.key(seed), STAGES.index(stage.name))
    params = jax.jit(stage.init)(jax.random.fold_in(key, 0))
    check_record(folder, stage.name, record)
    if weights.exists():
        tell(f"{stage.name}: already trained")
        return load_params(weights, params)
    progress = Progress(
        jnp.int32(0), jnp.float32(0.0), params, jax.jit(stage.optimiser.init)(params)
    )
    train_step, validate = compiled_step(stage), jax.jit(stage.loss)
    began = told = time.monotonic()
    with _checkpoints(folder / f"{stage.name}_checkpoints") as manager:
        progress = _newest(manager, progress)
        done = first = int(progress.step)
        if done:
            tell(f"{stage.name}: going on at step {done} of {stage.steps}")
        while done < stage.steps:
            losses = []
            for _ in range(min(round_steps, stage.steps - done)):
                progress, loss = train_step(progress, key, stage.data)
                losses.append(loss)
            _check_finite(np.asarray(jnp.stack(losses)), done, stage, manager)
            done += len(losses)
            # The same noise at each look, so that errors can be compared.
            _, measures = validate(
                progress.params, jax.random.fold_in(key, 1), stage.validation, progress.beta
            )
            measures = {name: float(value) for name, value in measures.items()}
            if stage.rise is not None:
                beta = raised(float(progress.beta), measures[stage.error], stage.rise)
                progress = progress._replace(beta=jnp.float32(beta))
                measures["beta"] = beta
            manager.save(done, args=ocp.args.StandardSave(progress._asdict()))
            manager.wait_until_finished()
            now = time.monotonic()
            if now - told >= 5.0 or done == stage.steps:
                told = now
                left = (now - began) * (stage.steps - done) / (done - first)
                tell(_line(stage, done, measures, left))
    save_params(weights, progress.params)
    shutil.rmtree(folder / f"{stage.name}_checkpoints", ignore_errors=True)
    return progress.params


def compiled_step(stage: Stage) -> Callable[..., tuple[Progress, jax.Array]]:
    """(progress, key, data) -> (progress after one optimisation step, its loss), compiled once.

    The loop around it is Python's and not `qkd_jax.nn.fit`'s: on CPUs, convolutions inside a
    compiled loop are many times slower.
    """

    @jax.jit
    def train_step(progress: Progress, key: jax.Array, data: dict[str, jax.Array]):
        key_rows, key_loss = jax.random.split(jax.random.fold_in(key, 2 + progress.step))
        count = len(next(iter(data.values())))
        rows = jax.random.randint(key_rows, (stage.batch,), 0, count)
        batch = {name: array[rows] for name, array in data.items()}
        gradient = jax.value_and_grad(stage.loss, has_aux=True)
        (loss, _), grads = gradient(progress.params, key_loss, batch, progress.beta)
        # The bias corrections raise floats to int32 counts, which strict promotion refuses.
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = stage.optimiser.update(grads, progress.opt_state, progress.params)
        params = optax.apply_updates(progress.params, updates)
        return Progress(progress.step + 1, progress.beta, params, opt_state), loss

    return train_step


def save_params(path: Path, params: Any) -> None:
    """Writes parameters as one safetensors file, visible only when it is complete."""
    from safetensors.numpy import save

    flat = {name: np.asarray(leaf) for name, leaf in flatten_dict(params, sep="/").items()}
    write_atomically(path, save(flat))


def load_params(path: Path, like: Any) -> Any:
    """The parameters in a file of `save_params`, with the names and shapes of `like`.

    Raises:
      CheckpointError: the file is missing, damaged, or of a network of another size.
    """
    from safetensors.numpy import load_file

    try:
        found = load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: expected weights, found none; run `train` first") from None
    except Exception as error:  # safetensors has an error type of its own
        raise CheckpointError(
            f"{path}: expected weights, found a damaged file ({error}); delete it and run `train`"
        ) from error
    wanted = {name: leaf.shape for name, leaf in flatten_dict(like, sep="/").items()}
    if {name: array.shape for name, array in found.items()} != wanted:
        raise CheckpointError(
            f"{path}: expected the weights of networks of the sizes in this command, found others; "
            "use the settings of its training, or delete it and run `train`"
        )
    return unflatten_dict({name: jnp.asarray(array) for name, array in found.items()}, sep="/")


def digest(path: Path) -> str:
    """SHA-256 of a file, to record what a training depends on."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def record_of(stage: Stage, seed: int, sizes: Sizes, training: Training, **more: Any) -> dict:
    """What the result of a stage depends on, as plain JSON."""
    own = {"pdf_vae": "pdf_", "matrix_vae": "matrix_", "denoiser": "denoiser_"}
    others = tuple(prefix for name, prefix in own.items() if name != stage.name)
    kept = {n: value for n, value in asdict(training).items() if not n.startswith(others)}
    record = {"seed": seed, "sizes": asdict(sizes), "training": kept, **more}
    return json.loads(json.dumps(record))


def _matrix_inputs(examples: Examples) -> dict[str, jax.Array]:
    return {
        "positions": jnp.asarray(examples.positions),
        "count": jnp.asarray(examples.count),
        "pdf": scaled(jnp.asarray(examples.pdf)),
    }


def _adamw(rate: float, decay: float, steps: int) -> optax.GradientTransformation:
    return optax.adamw(optax.cosine_decay_schedule(rate, steps), weight_decay=decay)


def _check_finite(losses: np.ndarray, done: int, stage: Stage, manager) -> None:
    if not np.isfinite(losses).all():
        bad = int(np.argmin(np.isfinite(losses)))
        kept = manager.latest_step() or 0
        raise ConfigError(
            f"{stage.name}: expected a finite loss, found {losses[bad]} at step {done + bad + 1}; "
            f"lower its learning rate, which is {stage.rate:g} (the checkpoint of step {kept} is "
            "good)"
        )


def _line(stage: Stage, done: int, measures: dict[str, float], left: float) -> str:
    shown = "  ".join(f"{name} {value:.4g}" for name, value in measures.items())
    return f"{stage.name}  step {done}/{stage.steps}  {shown}  {duration(left)} left"


def check_record(folder: Path, name: str, record: dict[str, Any]) -> None:
    """Writes the record of a training that begins; refuses to go on with another one."""
    path = folder / f"{name}.json"
    folder.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        write_atomically(path, (json.dumps(record, indent=1) + "\n").encode())
        return
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(
            f"{path}: expected JSON, found {error}; delete the folder and train again"
        ) from error
    changed = [
        f"{key}: {found.get(key)} there, {record.get(key)} now"
        for key in sorted({*record, *found})
        if found.get(key) != record.get(key)
    ]
    if changed:
        raise CheckpointError(
            f"{path}: expected the settings of this command, found others ({'; '.join(changed)}); "
            "use another --out, or delete that folder to train again"
        )


@contextmanager
def _checkpoints(folder: Path) -> Iterator[ocp.CheckpointManager]:
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # orbax logs every file
    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    handler = ocp.StandardCheckpointHandler()
    with ocp.CheckpointManager(folder.resolve(), options=options, item_handlers=handler) as manager:
        yield manager


def _newest(manager: ocp.CheckpointManager, progress: Progress) -> Progress:
    """The newest checkpoint that can be read, or `progress` if there is none at all. Damaged ones
    after it are put aside.

    Raises:
      CheckpointError: none of those that are there can be read.
    """
    target = jax.tree.map(ocp.utils.to_shape_dtype_struct, progress._asdict())
    failure, damaged = None, []
    for number in sorted(manager.all_steps(), reverse=True):
        try:
            found = manager.restore(number, args=ocp.args.StandardRestore(target))
        except DAMAGE as error:
            failure = error
            damaged.append(number)
            continue
        for number in damaged:
            put_aside(Path(manager.directory) / str(number))
        manager.reload()
        return Progress(**found)
    if failure is not None:
        raise CheckpointError(
            f"{manager.directory}: expected a checkpoint, found none that can be read "
            f"({str(failure).splitlines()[0]}); delete the folder to train again"
        ) from failure
    return progress
