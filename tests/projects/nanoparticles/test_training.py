"""Trainings: what is minimised, one compilation, going on after a kill, refusals."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from projects.nanoparticles.data import DataSet, Examples
from projects.nanoparticles.diffusion import Diffusion
from projects.nanoparticles.networks import Sizes
from projects.nanoparticles.training import (
    MATRIX_BETA,
    PDF_BETA,
    BetaRise,
    Progress,
    Stage,
    Training,
    compiled_step,
    denoiser_stage,
    encoded,
    latent_scale,
    load_params,
    matrix_stage,
    pdf_stage,
    raised,
    record_of,
    save_params,
    train_stage,
)
from qkd_jax.errors import CheckpointError, ConfigError

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
SHORT = Training(pdf_steps=8, matrix_steps=8, denoiser_steps=8, batch=4, round_steps=3)


def examples(seed, count):
    """Random atoms and a smooth curve, without the packages that make real ones."""
    draws = np.random.default_rng(seed)
    atoms = draws.integers(4, 17, count).astype(np.int32)
    positions = draws.normal(size=(count, 16, 3)) * (
        np.arange(16)[None, :, None] < atoms[:, None, None]
    )
    pdf = np.sin(np.arange(24) / 4 + draws.random((count, 1))) + 0.1 * draws.normal(
        size=(count, 24)
    )
    names = np.full(count, "Au")
    return Examples(positions.astype(np.float32), atoms, names, names, pdf.astype(np.float32))


@pytest.fixture(scope="module")
def data():
    return DataSet(examples(0, 12), examples(1, 5), examples(2, 3))


def line_stage(steps=8, rate=0.1, bad_row=False):
    """A stage of one small parameter, which compiles in no time: a slope is fitted."""

    def loss(params, key, batch, beta):
        found = params["params"]["slope"] * batch["x"]
        error = jnp.mean(jnp.square(found - 2 * batch["x"] + 0.01 * jax.random.normal(key)))
        value = error + beta * jnp.square(params["params"]["slope"])
        return value, {"KL": 100.0 + error, "MSE": error}

    x = np.linspace(0.5, 1.5, 40, dtype=np.float32)
    if bad_row:
        x[7] = np.nan
    return Stage(
        "pdf_vae",
        lambda key: {"params": {"slope": jax.random.normal(key)}},
        loss,
        "MSE",
        {"x": jnp.asarray(x)},
        {"x": jnp.ones(3)},
        optax.adan(rate, eps_root=0.0),
        BetaRise(10.0, 20.0, MATRIX_BETA.rises, pace=80.0),
        steps,
        4,
        rate,
    )


def bytes_of(folder, name="pdf_vae"):
    return (folder / f"{name}.safetensors").read_bytes()


def test_beta_rises_as_in_the_authors_code():
    """With one epoch in a round, the number of epochs to 1 is that of the four rates; beta is
    rounded in each of 1,673 additions.
    """
    slow = BetaRise(0.8, 2.0, MATRIX_BETA.rises, pace=1.0)
    beta, epochs = 0.0, 0
    while beta < 1.0:
        beta, epochs = raised(beta, 0.1, slow), epochs + 1
    assert abs(epochs - (0.05 / 1e-4 + 0.25 / 3e-4 + 0.25 / 1e-3 + 0.45 / 5e-3)) < 4
    assert beta == 1.0 == raised(1.0, 0.1, slow)
    assert raised(0.5, 1.0, slow) == 0.5  # between the thresholds
    assert raised(0.5, 3.0, slow) == 0.5 * 0.999
    assert raised(0.0, 0.02, PDF_BETA) == PDF_BETA.pace * 0.001
    assert raised(0.0, 0.06, PDF_BETA) == 0.0


def test_beta_rises_by_the_error_and_not_by_another_measure(tmp_path):
    """Three rounds of 80 of the authors' epochs; by the divergence, 100, it would stay 0."""
    lines = []
    train_stage(line_stage(), tmp_path, 0, {}, 3, lines.append)
    assert "beta 0.024 " in lines[-1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pdf_vae", "matrix_vae", "denoiser"])
def test_each_step_is_compiled_once_and_learns(name, data, key):
    """Twelve steps with the same batches lower the loss on them; one compilation."""
    if name == "denoiser":
        parts = [make(data, SMALL, SHORT).init for make in (pdf_stage, matrix_stage)]
        latents = encoded(data.train, SMALL, *(jax.jit(init)(key) for init in parts))
        assert latents["mean"].shape == (12, *SMALL.latent)
        assert latents["code"].shape == (12, SMALL.code)
        stage = denoiser_stage(latents, latents, SMALL, SHORT, Diffusion(), latent_scale(latents))
    else:
        stage = (pdf_stage if name == "pdf_vae" else matrix_stage)(data, SMALL, SHORT)
    assert stage.name == name
    stage = stage._replace(optimiser=optax.adam(3e-3))
    params = jax.jit(stage.init)(key)
    progress = Progress(jnp.int32(0), jnp.float32(0.1), params, stage.optimiser.init(params))
    step, losses = compiled_step(stage), []
    for k in range(12):
        progress, loss = step(progress._replace(step=jnp.int32(k % 2)), key, stage.data)
        losses.append(float(loss))
    assert step._cache_size() == 1
    assert np.isfinite(losses).all()
    assert sum(losses[-2:]) < sum(losses[:2])


def test_latents_are_divided_by_their_standard_deviation():
    """Of 200,000 draws: five standard errors, 1 / sqrt(2 * 200,000) of the deviation each, and
    half a unit of the fourth digit.
    """
    draws = np.random.default_rng(0)
    shape = (20, 10000)
    mean, log_var = draws.normal(1.0, 2.0, shape), draws.normal(size=shape)
    latents = mean + np.exp(log_var / 2) * draws.normal(size=shape)
    found = latent_scale({"mean": jnp.asarray(mean), "log_var": jnp.asarray(log_var)})
    assert abs(found / latents.std() - 1) < 5 / np.sqrt(400000) + 5e-4


def test_a_training_that_is_stopped_goes_on_to_the_same_bytes(tmp_path, monkeypatch):
    lines = []
    train_stage(line_stage(), tmp_path / "whole", 0, {"a": 1}, 3, lines.append)
    assert not (tmp_path / "whole" / "pdf_vae_checkpoints").exists()
    assert lines[-1].startswith("pdf_vae  step 8/8  KL ")
    calls = []

    def stopping(stage, step=compiled_step):
        inner = step(stage)

        def run(*given):
            calls.append(0)
            if len(calls) == 5:
                raise KeyboardInterrupt
            return inner(*given)

        return run

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("projects.nanoparticles.training.compiled_step", stopping)
        train_stage(line_stage(), tmp_path / "cut", 0, {"a": 1}, 3, lines.append)
    assert not (tmp_path / "cut" / "pdf_vae.safetensors").exists()
    found = train_stage(line_stage(), tmp_path / "cut", 0, {"a": 1}, 3, lines.append)
    assert "pdf_vae: going on at step 3 of 8" in lines
    assert bytes_of(tmp_path / "cut") == bytes_of(tmp_path / "whole")
    again = train_stage(line_stage(), tmp_path / "cut", 0, {"a": 1}, 3, lines.append)
    assert lines[-1] == "pdf_vae: already trained"
    assert again["params"]["slope"] == found["params"]["slope"]
    train_stage(line_stage(), tmp_path / "other", 1, {"a": 1}, 3, lines.append)
    assert bytes_of(tmp_path / "other") != bytes_of(tmp_path / "whole")


def test_a_damaged_checkpoint_gives_way_to_the_one_before_it(tmp_path, monkeypatch):
    train_stage(line_stage(), tmp_path / "whole", 0, {}, 3, print)
    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr("projects.nanoparticles.training.save_params", _full_disk)
        train_stage(line_stage(), tmp_path / "cut", 0, {}, 3, print)
    newest = max(
        (tmp_path / "cut" / "pdf_vae_checkpoints").glob("[0-9]*"), key=lambda p: int(p.name)
    )
    assert newest.name == "8"
    for file in newest.rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    lines = []
    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr("projects.nanoparticles.training.save_params", _full_disk)
        train_stage(line_stage(), tmp_path / "cut", 0, {}, 3, lines.append)
    assert lines[0] == "pdf_vae: going on at step 6 of 8"
    assert newest.is_dir() and newest.with_name("damaged-8").is_dir()  # kept to be looked at
    train_stage(line_stage(), tmp_path / "cut", 0, {}, 3, print)
    assert bytes_of(tmp_path / "cut") == bytes_of(tmp_path / "whole")


def _full_disk(*given):
    raise OSError("no space left")


def test_a_loss_that_is_not_finite_is_refused_with_its_step_and_rate(tmp_path):
    with pytest.raises(
        ConfigError, match=r"expected a finite loss, found nan at step \d+; lower its"
    ) as error:
        train_stage(line_stage(bad_row=True, rate=0.25), tmp_path, 0, {}, 3, print)
    assert "0.25" in str(error.value)
    assert not (tmp_path / "pdf_vae.safetensors").exists()


def test_other_settings_than_those_of_the_folder_are_refused(tmp_path):
    train_stage(line_stage(steps=1), tmp_path, 0, {"seed": 0, "steps": 1}, 3, print)
    with pytest.raises(CheckpointError, match="steps: 1 there, 2 now"):
        train_stage(line_stage(steps=2), tmp_path, 0, {"seed": 0, "steps": 2}, 3, print)


def test_what_a_stage_depends_on_is_recorded_and_no_more(data):
    stage = pdf_stage(data, SMALL, SHORT)
    record = record_of(stage, 3, SMALL, SHORT, data="abc")
    assert record == json.loads(json.dumps(record))
    assert record["seed"] == 3 and record["data"] == "abc" and record["sizes"]["atoms"] == 16
    assert "pdf_steps" in record["training"] and "batch" in record["training"]
    assert not [n for n in record["training"] if n.startswith(("matrix", "denoiser"))]


def test_weights_of_another_size_or_damaged_are_refused(tmp_path):
    params = {"params": {"a": {"kernel": jnp.ones((2, 3))}}}
    save_params(tmp_path / "a.safetensors", params)
    found = load_params(tmp_path / "a.safetensors", params)
    np.testing.assert_array_equal(found["params"]["a"]["kernel"], np.ones((2, 3)))
    with pytest.raises(CheckpointError, match="expected the weights of networks of the sizes"):
        load_params(tmp_path / "a.safetensors", {"params": {"a": {"kernel": jnp.ones((2, 4))}}})
    (tmp_path / "a.safetensors").write_bytes(b"no weights")
    with pytest.raises(CheckpointError, match="found a damaged file"):
        load_params(tmp_path / "a.safetensors", params)
    with pytest.raises(CheckpointError, match="expected weights, found none"):
        load_params(tmp_path / "b.safetensors", params)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"batch": 0}, "batch: expected 1 or more"), ({"pdf_rate": 0.0}, "pdf_rate: expected more")],
)
def test_settings_out_of_range_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        Training(**change)


SCRIPT = """
import sys
from pathlib import Path
from test_training import line_stage
from projects.nanoparticles.training import train_stage
train_stage(line_stage(steps=60), Path(sys.argv[1]), 0, {}, 2, lambda line: print(line, flush=True))
"""


@pytest.mark.slow
def test_a_killed_process_goes_on_to_the_same_bytes(tmp_path):
    """SIGKILL after a few checkpoints, three times, at moments that nobody chose."""
    here = Path(__file__)
    path = os.pathsep.join(
        [str(here.parents[3]), str(here.parent), os.environ.get("PYTHONPATH", "")]
    )
    environment = os.environ | {"PYTHONPATH": path}

    def start(folder):
        return subprocess.Popen([sys.executable, "-c", SCRIPT, str(folder)], env=environment)

    assert start(tmp_path / "whole").wait(timeout=300) == 0
    for least in (4, 16, 36):
        process, checkpoints = start(tmp_path / "cut"), tmp_path / "cut" / "pdf_vae_checkpoints"
        until = time.monotonic() + 200
        while time.monotonic() < until:
            steps = [int(p.name) for p in checkpoints.glob("*") if p.name.isdigit()]
            if steps and max(steps) >= least:
                break
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait(timeout=60) == -signal.SIGKILL
    assert start(tmp_path / "cut").wait(timeout=300) == 0
    assert bytes_of(tmp_path / "cut") == bytes_of(tmp_path / "whole")
