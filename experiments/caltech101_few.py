"""Caltech-101 from a folder, few images, larger: ViT-S/14 at 154 px, 20 to train and 10 to test.

    make run EXP=caltech101_few ARGS="--data /path/to/images"

Data: photographs as files, train/<class>/* and test/<class>/*; of each class the first 20 and 10 in
the order of their names. B0-Inc10, order seed 1993; one epoch of batches of 8, 25 steps for each
task. Backbone: the packaged ViT-S/14, read after 11 of its 12 blocks as in `cdl` (the last one was
tuned for saliency), 122 tokens. Settings of every method as in `cifar100_few`, but for the rates
below, which were chosen on held-out training images of this stream (docs/results.md).
Expected: 86.1 average and 81.7 last accuracy with `qkd`, 84.9 and 80.3 with `ranpac`, means of two
seeds (docs/results.md).
"""

import dataclasses

from qkd_jax.settings.config import Config, override
from qkd_jax.settings.experiments import load_experiment

SMALL = ("backbone.name=dinov2_vit_s14", "backbone.image_size=154", "backbone.blocks=11")

RATES = {
    "qkd": 0.000781,
    "aper": 0.00313,
    "clare": 0.05,
    "facet": 0.05,
    "joint": 0.05,
    "mos": 0.05,
    "ranpac": 4.88e-05,
    "ssiat": 0.01,
    "tuna": 0.00125,
}


def get_config(method: str = "qkd") -> Config:
    """The settings of this experiment for one method."""
    like = load_experiment("cifar100_few").get_config(method)
    rate = [f"train.learning_rate={RATES[method]}"] if method in RATES else []
    return override(dataclasses.replace(like, experiment="caltech101_few"), *SMALL, *rate)
