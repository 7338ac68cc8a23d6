"""Frozen arrays divided over devices: the same run as on one device, and each holds its part."""

import jax
import numpy as np
import pytest

from qkd_jax.engine import verbs
from qkd_jax.engine.sharding import ShardedEngine, engine_of
from qkd_jax.errors import ConfigError
from qkd_jax.reports.files import read_run
from qkd_jax.runs.load import load_run
from qkd_jax.runs.loop import run, run_folder
from qkd_jax.settings.config import Shapes, override
from qkd_jax.settings.experiments import load_experiment
from qkd_jax.settings.sections import TrainConfig
from qkd_jax.weights.load import load_backbone

pytestmark = pytest.mark.usefixtures("compiled")


def config(method, *settings):
    smoke = load_experiment("smoke").get_config(method)
    return override(smoke, "train.epochs=1", "head.scale=10.0", *settings, where_read=True)


SLOW = [("ease", 1e-5), ("qkd", 1e-4)]


@pytest.mark.parametrize(
    "method, budget",
    [("finetune", 1e-5)] + [pytest.param(*m, marks=pytest.mark.slow) for m in SLOW],
)
def test_a_divided_run_is_the_run(method, budget, tmp_path):
    """Parameters and memory, relative: float32 sums in another order, 1e-5; qkd's memory holds
    inverses of covariance factors, which multiply it by their condition, about 10.
    """
    backbone = load_backbone("tiny_random", image_size=32)
    calm = ("gate.encoding=angle", "gate.calibration_steps=0")  # rounding is not amplified
    divided = config(method, "train.devices=4", "train.model_devices=2", *calm)
    whole = config(method, "train.devices=1", *calm)
    run(divided, backbone, tmp_path / "divided")
    run(whole, backbone, tmp_path / "whole")
    folders = run_folder(tmp_path / "divided", divided), run_folder(tmp_path / "whole", whole)
    np.testing.assert_array_equal(*(read_run(folder).correct for folder in folders))
    one, other = (load_run(folder).state for folder in folders)
    for part in ("trainable", "memory"):
        a, b = (jax.tree.leaves(jax.device_get(getattr(state, part))) for state in (one, other))
        gap = sum(float(np.sum((np.float64(x) - y) ** 2)) for x, y in zip(a, b, strict=True))
        assert gap <= budget**2 * sum(float(np.sum(np.float64(y) ** 2)) for y in b), part


def bytes_on(device, tree):
    shards = [s for leaf in jax.tree.leaves(tree) for s in leaf.addressable_shards]
    return sum(shard.data.nbytes for shard in shards if shard.device == device)


def test_a_device_holds_its_part_of_the_frozen_arrays():
    backbone = load_backbone("tiny_random", image_size=32)
    shapes = Shapes(num_classes=6, max_tasks=3, max_task_classes=2)
    settings = config("ease").replace(shapes=shapes)
    state = verbs.init_state(jax.random.key(0), backbone, settings)
    engine = engine_of(config("ease", "train.devices=8", "train.model_devices=4").train)
    assert isinstance(engine, ShardedEngine) and engine.num_parts == 2
    placed, device = engine.place(state), jax.devices()[0]
    for name in ("frozen", "memory"):
        part = getattr(placed, name)
        whole = sum(leaf.nbytes for leaf in jax.tree.leaves(part))
        # A quarter, and a copy of the vectors: biases, scales, tokens.
        assert 0.25 <= bytes_on(device, part) / whole < 0.32, name
    trained = jax.tree.leaves(placed.trainable)
    assert bytes_on(device, trained) == sum(leaf.nbytes for leaf in trained)


def test_devices_that_form_no_groups_are_refused():
    with pytest.raises(ConfigError, match="expected a divisor of 8 devices, found 3"):
        engine_of(TrainConfig(devices=8, model_devices=3))
    assert (
        engine_of(TrainConfig(devices=8, model_devices=4)).padded(7) == 8
    )  # two groups share a batch
