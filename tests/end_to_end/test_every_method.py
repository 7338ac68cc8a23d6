"""Every method: two devices, stopped in the middle and continued, against one device in one go.

Three tasks, the last of one class. The devices divide batches and sums, so parameters differ by
rounding; accuracies are those of the same images, each of them counted.
"""

from functools import partial

import numpy as np
import pytest

from qkd_jax.engine.engine import Engine
from qkd_jax.engine.verbs import teacher_config
from qkd_jax.learners.shape import learner_of
from qkd_jax.reports.files import read_run
from qkd_jax.runs.loop import run, run_folder
from qkd_jax.settings.config import override
from qkd_jax.settings.experiments import load_experiment
from qkd_jax.settings.methods import methods_reading
from qkd_jax.weights.load import load_backbone

pytestmark = [pytest.mark.floor, pytest.mark.usefixtures("compiled")]

MEASURED = ("oracle_accuracy", "routing_recall_at_2", "passes_per_image", "kept_bytes")
METHODS = methods_reading(("image",))
# Prompts, a survey of the images, sums of a fixed size, nothing trained; the others take minutes.
DEFAULT = ("ranpac", "simplecil")
# Few steps at the rate of `smoke` leave the adapters of TUNA where they began: for some images two
# of them are equally certain to the last bit, and rounding would choose. At this one the two most
# certain differ by 1e-3 nats or more.
SETTINGS = {"tuna": ("train.learning_rate=1.0",)}


def config(method, devices):
    return override(
        load_experiment("smoke").get_config(method),
        *("data.num_classes=5", "train.epochs=1", "train.checkpoint_every=3"),
        f"train.devices={devices}",
        *SETTINGS.get(method, ()),
    )


@pytest.mark.parametrize(
    "method",
    [pytest.param(m, marks=[] if m in DEFAULT else pytest.mark.slow) for m in METHODS],
)
def test_devices_and_interruptions_change_nothing(method, tmp_path, monkeypatch):
    backbone = load_backbone("tiny_random", image_size=32)
    taught = teacher_config(config(method, 1)) is not None
    teacher = load_backbone("tiny_random", image_size=32) if taught else None
    run_it = partial(run, backbone=backbone, teacher=teacher)
    whole = run_it(config(method, 1), out=tmp_path / "whole")
    finish, ended = Engine.finish, []

    def stops_once(*arguments):
        ended.append(1)
        if len(ended) == min(2, whole["num_tasks"]):
            raise KeyboardInterrupt
        return finish(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Engine, "finish", stops_once)
        run_it(config(method, 2), out=tmp_path / "parts")
    parts = run_it(config(method, 2), out=tmp_path / "parts")
    assert (whole["devices"], parts["devices"]) == (1, 2)
    assert whole["num_tasks"] == (1 if method == "joint" else 3)
    found, expected = (
        read_run(run_folder(tmp_path / name, config(method, 1))) for name in ("parts", "whole")
    )
    np.testing.assert_array_equal(found.total, expected.total)
    np.testing.assert_array_equal(found.correct, expected.correct)
    assert parts["train_images"] == whole["train_images"]
    assert parts["extracted_features"] == whole["extracted_features"]
    for name in (*MEASURED, "routing_accuracy"):
        assert parts[name] == whole[name], name
    assert (whole["routing_recall_at_2"] is None) == (whole["routing_accuracy"] is None)
    assert (whole["routing_recall_at_2"] or 0) >= (whole["routing_accuracy"] or 0)
    learner = learner_of(config(method, 1))
    told = learner.score_with_task or learner.predict_with_task(config(method, 1))
    assert (whole["oracle_accuracy"] is None) == (told is None)
    assert whole["passes_per_image"] >= 1 and whole["kept_bytes"] > 0
