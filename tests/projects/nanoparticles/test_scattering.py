"""G(r) by the Debye equation, against loops in float64 and against `debyecalculator`."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from projects.nanoparticles.scattering import (
    PdfSettings,
    form_factors,
    intensity,
    pair_distribution,
    with_noise,
)
from qkd_jax.errors import ConfigError

GOLDEN = Path(__file__).parent / "golden" / "debye.npz"
SETTINGS = PdfSettings(q_min=0.7, q_max=16.0, q_step=0.15, b_iso=0.5, r_max=12.0, r_step=0.1)
# Float32 knows a phase Q d of at most 25 * 17 = 425 to 2.5e-5, and errors of pairs mostly cancel.
FLOAT32 = 3e-5


def cluster(seed=0, atoms=9):
    """Atoms at 2 angstrom or more from one another, float64 [N, 3]."""
    grid = np.stack(np.meshgrid(*[np.arange(3.0)] * 3), axis=-1).reshape(-1, 3)[:atoms]
    return 2.8 * grid + np.random.default_rng(seed).normal(scale=0.1, size=grid.shape)


def by_loops(positions, factor, settings):
    """I(Q) and G(r) in float64, straight from the equations."""
    atoms, q, r = len(positions), settings.q(), settings.r()
    pairs = np.zeros_like(q)
    for i in range(atoms):
        for j in range(atoms):
            if i != j:
                phase = q * np.linalg.norm(positions[i] - positions[j])
                pairs += (
                    factor**2
                    * np.exp(-settings.b_iso * q**2 / (8 * np.pi**2))
                    * (np.sin(phase) / phase)
                )
    scattered = atoms * factor**2 + pairs
    reduced = q * (scattered / (atoms * factor**2) - 1)
    pdf = np.array([2 / np.pi * np.sum(reduced * np.sin(q * x)) * settings.q_step for x in r])
    return scattered, pdf * np.exp(-((settings.q_damp * r) ** 2) / 2)


def factor_of(settings, count=()):
    """A made-up form factor, so that these tests need no table."""
    return np.broadcast_to(60 * np.exp(-settings.q() / 8) + 5, (*count, len(settings.q())))


def test_both_are_those_of_loops_in_float64():
    positions, factor = cluster(), factor_of(SETTINGS)
    expected = by_loops(positions, factor, SETTINGS)
    with jax.enable_x64(True):
        arguments = jnp.asarray(positions), jnp.asarray(9), jnp.asarray(factor), SETTINGS
        found = intensity(*arguments), pair_distribution(*arguments)
        for a, b in zip(found, expected, strict=True):
            assert a.dtype == jnp.float64
            np.testing.assert_allclose(a, b, atol=1e-12 * np.abs(b).max())
    arguments = jnp.float32(positions), jnp.int32(9), jnp.float32(factor), SETTINGS
    found = intensity(*arguments), pair_distribution(*arguments)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, atol=FLOAT32 * np.abs(b).max())


@pytest.mark.parametrize("name", ["fine", "coarse"])
def test_both_are_those_of_debyecalculator(name):
    """Its grids are rounded to float32, which moves a phase by 2e-6 * 17 at most. It counts each
    pair and each atom half.
    """
    pytest.importorskip("xraydb")
    golden = np.load(GOLDEN)
    fields = [field.name for field in dataclasses.fields(PdfSettings)]
    order = ("q_min", "q_max", "q_step", "q_damp", "b_iso", "r_min", "r_max", "r_step")
    assert set(fields) == set(order)
    values = dict(zip(order, golden[f"settings_{name}"].tolist(), strict=True))
    settings, clusters = PdfSettings(**values), range(4)
    padded, counts = np.zeros((4, 64, 3), np.float32), []
    for k in clusters:
        counts.append(len(golden[f"positions_{k}"]))
        padded[k, : counts[k]] = golden[f"positions_{k}"]
    assert counts == [13, 38, 15, 64]
    factor = form_factors([str(golden[f"element_{k}"]) for k in clusters], settings)
    arguments = padded, np.array(counts, np.int32), factor, settings
    scattered, pdf = intensity(*arguments), pair_distribution(*arguments)
    for k in clusters:
        for found, kind in ((scattered, "intensity"), (pdf, "pdf")):
            expected = 2 * golden[f"{kind}_{name}_{k}"]
            np.testing.assert_allclose(found[k], expected, atol=FLOAT32 * np.abs(expected).max())


def test_gradients_are_those_of_finite_differences():
    """Central differences with h = 1e-5 in float64: rounding 1e-16 / h and h^2 Q_max^3 leave 1e-7
    of the largest slope.
    """
    positions, factor = cluster(3, 5), factor_of(SETTINGS)
    mixed = np.random.default_rng(1).normal(size=len(SETTINGS.r()))
    with jax.enable_x64(True):

        @jax.jit
        def value(x):
            pdf = pair_distribution(x, jnp.asarray(5), jnp.asarray(factor), SETTINGS)
            return jnp.sum(pdf * mixed)

        slope = np.asarray(jax.grad(value)(jnp.asarray(positions)))
        for atom, axis in ((0, 0), (2, 1), (4, 2)):
            moved = [positions.copy(), positions.copy()]
            moved[0][atom, axis] += 1e-5
            moved[1][atom, axis] -= 1e-5
            expected = (value(moved[0]) - value(moved[1])) / 2e-5
            assert abs(slope[atom, axis] - expected) < 1e-7 * np.abs(slope).max()


def test_a_rigid_motion_a_reflection_and_padding_change_nothing():
    positions, factor = cluster(), factor_of(SETTINGS).astype(np.float32)
    turn = np.linalg.qr(np.random.default_rng(2).normal(size=(3, 3)))[0]
    batch = np.full((4, 12, 3), 7.0, np.float32)  # padding far from zero
    for k, atoms in enumerate(
        (positions, positions @ turn + 3, positions @ -turn, positions[::-1])
    ):
        batch[k, :9] = atoms
    pdf = pair_distribution(batch, np.full(4, 9, np.int32), np.stack([factor] * 4), SETTINGS)
    alone = pair_distribution(np.float32(positions), np.int32(9), factor, SETTINGS)
    for row in pdf:
        np.testing.assert_allclose(row, alone, atol=FLOAT32 * np.abs(alone).max())
    other = pair_distribution(batch[:1], np.array([8], np.int32), factor[None], SETTINGS)
    assert np.abs(other[0] - alone).max() > 0.01 * np.abs(alone).max()


def test_atoms_in_one_place_have_a_finite_gradient():
    positions = jnp.zeros((3, 3)).at[2, 0].set(2.5)
    factor = jnp.float32(factor_of(SETTINGS))
    slope = jax.grad(lambda x: pair_distribution(x, jnp.int32(3), factor, SETTINGS).sum())
    assert np.isfinite(slope(positions)).all()


def test_form_factors_are_electrons_and_known():
    """At Q = 0 a neutral atom scatters as its electrons do together; the table has 0.1 % or so."""
    pytest.importorskip("xraydb")
    low = PdfSettings(q_min=1e-4, q_max=0.1, q_step=0.05, r_max=5.0)
    found = form_factors(["Pt", "Cu", "Pt"], low)
    assert found.shape == (3, 2) and found.dtype == np.float32
    np.testing.assert_allclose(found[:, 0], [78, 29, 78], rtol=2e-3)
    with pytest.raises(ConfigError, match=r"expected a symbol with .* found Xx"):
        form_factors(["Xx"], low)


def test_noise_has_the_asked_size():
    """Of 40,000 numbers, the standard deviation is known to 0.35 %; five times that."""
    pdf = jnp.linspace(-4.0, 2.0, 40000)
    noise = with_noise(jax.random.key(0), pdf, 0.05) - pdf
    assert abs(float(noise.std()) / 0.2 - 1) < 0.02
    np.testing.assert_array_equal(with_noise(jax.random.key(0), pdf, 0.0), pdf)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q_min": 0.0}, "expected 0 < q_min < q_max"),
        ({"r_min": 9.0, "r_max": 8.0}, "expected 0 <= r_min < r_max"),
        ({"q_step": float("nan")}, "a step that fits"),
        ({"b_iso": -1.0}, "b_iso: expected 0 or more, found -1.0"),
        ({"q_step": 0.5}, "r_max: expected at most pi / q_step = 6.283"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        PdfSettings(**changes)


def test_a_grid_does_not_reach_its_end():
    settings = PdfSettings()
    assert settings.q()[-1] == pytest.approx(24.9) and settings.r()[-1] == pytest.approx(16.95)
    assert (len(settings.q()), len(settings.r())) == (245, 320)
