"""Two runs that differ a little: how far, and in how many predictions."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import devices


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """(one, other): the second has a memory of length 5 off by 5e-6, and one of six predictions."""
    for name, predicted, shift in (("one", [0, 1, 2], 0.0), ("other", [0, 1, 1], 0.25)):
        (tmp_path / name / "predictions").mkdir(parents=True)
        for task in (0, 1):
            np.savez(
                tmp_path / name / f"predictions/after_task_{task}.npz",
                id=np.array(["a", "b", "c"]),
                predicted=np.array(predicted if task else [0, 1, 2]),
                log_probability=np.float32([-1.0, -2.0, -3.0 + shift * task]),
            )

    def load_run(folder):
        off = 5e-6 * (folder.name == "other")
        memory = {"a": np.array([3.0, 0.0]), "b": np.array([4.0 + off]), "count": jnp.int32(9)}
        state = SimpleNamespace(trainable={"rows": jnp.ones(2)}, memory=memory, classifier=())
        return SimpleNamespace(state=state)

    monkeypatch.setattr(devices, "load_run", load_run)
    return tmp_path / "one", tmp_path / "other"


def test_distances_are_relative_and_different_predictions_are_counted(runs):
    found = devices.compared(*runs)
    assert found.pop("stored") == pytest.approx(1e-6, rel=1e-3)
    assert found == {"trained": 0.0, "predictions": 6, "different": 1, "log_probability": 0.25}
    same = devices.compared(runs[0], runs[0])
    assert (same["stored"], same["different"], same["log_probability"]) == (0, 0, 0)


def test_other_images_are_refused(runs):
    path = runs[1] / "predictions/after_task_1.npz"
    with np.load(path) as content:
        np.savez(path, **{**content, "id": np.array(["a", "c", "b"])})
    with pytest.raises(ValueError, match="expected the same images"):
        devices.compared(*runs)


def test_the_table_tells_bytes_and_counts():
    gap = {"trained": 2e-7, "stored": 4e-6, "log_probability": 3e-5}
    gap |= {"predictions": 60, "different": 1}
    found = {"again": [], "eight devices": gap, "two processes": gap}
    lines = devices.table({"qkd": found, "mos": {**found, "again": ["matrix.json"]}}).splitlines()
    assert lines[2] == "| qkd | the same bytes | eight devices | 2e-07 | 4e-06 | 3e-05 | 1 of 60 |"
    assert lines[3] == "|  |  | two processes | 2e-07 | 4e-06 | 3e-05 | 1 of 60 |"
    assert lines[4].startswith("| mos | 1 differ |")
