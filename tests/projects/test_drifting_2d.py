"""The project that shows drifting and gradient flows in two dimensions."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from projects.drifting_2d.__main__ import FOLDER, MEASURES, main, table
from projects.drifting_2d.shapes import SHAPES, judge, sample
from projects.drifting_2d.train import FIELDS, LONGEST_STEP, Training, train, velocity
from qkd_jax.protocol.metrics import energy_distance

SHORT = Training(steps=300, batch=128, pictures=2, shown=400)


@pytest.mark.parametrize("name", SHAPES)
def test_samples_of_a_shape_are_near_it_and_meet_all_its_parts(name):
    """Within three standard deviations in the plane are 1 - exp(-9 / 2) = 98.9 % of the samples of
    a point; of a curve more, since only the distance across it counts. Bounds: of 20,000 samples,
    the share of a part of eight has a standard deviation of 1.9 % of itself; five of them.
    """
    shape = SHAPES[name]
    near, smallest = judge(shape, sample(shape, np.random.default_rng(3), 20000))
    assert near > 0.985
    assert 0.9 < smallest <= 1.0


def test_a_lost_mode_is_seen():
    shape = SHAPES["eight Gaussians"]
    points = sample(shape, np.random.default_rng(0), 4000)
    lost = points[points[:, 0] < 1.5]  # the mode at (2, 0) is cut away
    assert judge(shape, lost)[1] == 0.0
    assert judge(shape, points + 100.0) == (0.0, 0.0)


@pytest.mark.parametrize(
    "field", [pytest.param(f, marks=[] if f == "drifting" else pytest.mark.slow) for f in FIELDS]
)
def test_every_field_moves_samples_to_the_data(field):
    """From far away a training of 300 steps leaves less than a tenth of the energy distance."""
    data = jnp.asarray(sample(SHAPES["two moons"], np.random.default_rng(1), 1000))
    drawn = train(jax.random.key(0), data, jnp.float32(0.4), field, SHORT)
    assert drawn.shape == (3, 400, 2)
    before, _, after = (energy_distance(np.asarray(d), np.asarray(data)) for d in drawn)
    assert after < 0.1 * before
    again = train(jax.random.key(0), data, jnp.float32(0.4), field, SHORT)
    np.testing.assert_array_equal(drawn, again)


def test_a_sample_is_never_sent_further_than_the_longest_step():
    near, far = jnp.array([[0.0, 0.0], [0.1, 0.0]]), jnp.array([[30.0, 0.0], [30.0, 0.1]])
    moved = velocity("mmd", near, near + 0.05, jnp.float32(0.5))
    assert 0 < float(jnp.abs(moved).max()) < LONGEST_STEP
    moved = velocity("drifting", near, far, jnp.float32(0.5))
    np.testing.assert_allclose(jnp.linalg.norm(moved, axis=1), LONGEST_STEP, rtol=1e-6)


def test_the_command_draws_and_records(tmp_path, capsys, monkeypatch):
    for table_of, kept in ((SHAPES, {"two moons"}), (FIELDS, {"drifting", "mixed"})):
        for name in table_of.keys() - kept:
            monkeypatch.delitem(table_of, name)
    assert main(["--out", str(tmp_path), "--steps", "8", "--seeds", "4"]) == 0
    recorded = json.loads((tmp_path / "results.json").read_text())
    assert [row["field"] for row in recorded["rows"]] == list(FIELDS)
    assert recorded["seeds"] == [4]
    assert all(len(row[measure]) == 1 for row in recorded["rows"] for measure in MEASURES)
    assert (tmp_path / "two_moons.png").stat().st_size > 10_000
    assert (tmp_path / "table.md").read_text() in capsys.readouterr().out


def test_bad_numbers_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path / "never"), "--steps", "1"])
    assert "expected 4 steps or more" in capsys.readouterr().err
    assert not (tmp_path / "never").exists()


def test_the_committed_table_is_that_of_the_committed_numbers():
    recorded = json.loads((FOLDER / "results.json").read_text())
    assert len(recorded["rows"]) == len(SHAPES) * len(FIELDS) and len(recorded["seeds"]) == 3
    assert recorded["training"] == Training()._asdict()
    assert (FOLDER / "table.md").read_text() == table(recorded["rows"])
    page = Path(__file__).parents[2] / "docs" / "generators.md"
    assert table(recorded["rows"]) in page.read_text()
