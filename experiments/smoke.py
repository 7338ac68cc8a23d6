"""Smoke: three tasks of synthetic patterns on a tiny random transformer; seconds on any machine.

    make run EXP=smoke

It shows that everything runs. Its accuracies mean nothing.
"""

from qkd_jax.config import Config, override


def get_config(method: str = "qkd") -> Config:
    """The settings of this experiment for one method."""
    return override(
        Config(experiment="smoke", method=method),
        "backbone.name=tiny_random",
        "backbone.image_size=32",
        "data.source=synthetic",
        "data.num_classes=6",
        "protocol.increment=2",
        "adapter.bottleneck=4",
        "gate.num_qubits=5",
        "gate.calibration_steps=20",
        "coda_prompt.pool=6",
        "coda_prompt.blocks=3",
        "train.epochs=2",
        "train.batch_size=8",
        "train.eval_batch_size=8",
        "train.checkpoint_every=4",
    )
