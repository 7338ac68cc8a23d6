"""Your own images: train/<class>/* and test/<class>/* under one folder, B0-Inc10, CLIP ViT-B/16.

    make run EXP=folder ARGS="--data /path/to/images"

Settings of every method as in `renditions`, at 96 px and without augmentation, so that it runs on a
laptop. On an accelerator: --set backbone.image_size=224 --set data.augment=true --set
train.epochs=20
"""

import dataclasses

from qkd_jax.settings.config import Config, override
from qkd_jax.settings.experiments import load_experiment


def get_config(method: str = "qkd") -> Config:
    """The settings of this experiment for one method."""
    like = load_experiment("renditions").get_config(method)
    config = dataclasses.replace(like, experiment="folder")
    return override(config, "data.source=folder", "train.checkpoint_every=100")
