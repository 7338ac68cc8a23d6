"""Smoke: three tasks of synthetic patterns on a tiny random transformer; seconds on any machine.

    make run EXP=smoke            (any METHOD)

It shows that everything runs. Its accuracies mean nothing.
"""

from qkd_jax.settings.config import Config, override


def get_config(method: str = "qkd") -> Config:
    """The settings of this experiment for one method; small for every method."""
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
        "alignment.epochs=2",
        "alignment.samples=8",
        "ranpac.projection_dim=64",
        "inflora.rank=2",
        "min.bottleneck=4",
        "min.projection_dim=64",
        "facet.rank=2",
        "coda_prompt.pool=6",
        "coda_prompt.length=2",
        "coda_prompt.blocks=2",
        "l2p.pool=4",
        "l2p.length=2",
        "l2p.top_k=2",
        "dualprompt.general_blocks=1",
        "dualprompt.expert_blocks=1",
        "dualprompt.general_length=2",
        "dualprompt.expert_length=2",
        "teacher.name=tiny_random",
        "teacher.image_size=32",
        "q_tuning.prompt_length=2",
        "q_tuning.queue_size=1",
        "q_tuning.prefix_length=2",
        "q_tuning.reparametrise=8",
        "prog_prompt.prompt_length=2",
        "prog_prompt.reparametrise=8",
        "prompt_per_task.prompt_length=2",
        "prompt_per_task.reparametrise=8",
        "train.epochs=2",
        "train.batch_size=8",
        "train.eval_batch_size=8",
        "train.checkpoint_every=4",
        where_read=True,
    )
