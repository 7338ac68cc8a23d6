"""Your own images: train/<class>/* and test/<class>/* under one folder, B0-Inc10, CLIP ViT-B/16.

    make run EXP=folder ARGS="--data /path/to/images"

Settings as in `renditions`, at 96 px and without augmentation, so that it runs on a laptop. On an
accelerator: --set backbone.image_size=224 --set data.augment=true --set adapter.first_block=0 --set
train.epochs=20
"""

from qkd_jax.config import Config, override


def get_config(method: str = "qkd") -> Config:
    """The settings of this experiment for one method."""
    return override(
        Config(experiment="folder", method=method),
        "backbone.name=clip_vit_b16",
        "backbone.image_size=96",
        "data.source=folder",
        "adapter.bottleneck=16",
        "adapter.first_block=6",
        "train.epochs=5",
        "train.batch_size=16",
        "train.learning_rate=0.2",
        "train.checkpoint_every=100",
    )
