"""CIFAR-100 from a folder, 50 classes with more images: CLIP at 64 px, 100 to train of a class.

    make run EXP=cifar100_more ARGS="--data /path/to/images"

Data: the images of CIFAR-100 as files, train/<class>/* and test/<class>/*; the first 50 classes in
alphabetical order, of each the first 100 images to train on and the first 20 to test on, in the
order of their names. B0-Inc10, 5 tasks, order seed 1993; one epoch of batches of 8, 125 steps for
each task. All else, rates too, as in `cifar100_few`: nothing was chosen on these images.
Expected: 78.0 average and 71.5 last accuracy with `qkd`, 71.0 and 59.9 with `ranpac`, means of two
seeds (docs/results.md).
"""

import dataclasses

from qkd_jax.settings.config import Config, override
from qkd_jax.settings.experiments import load_experiment

MORE = ("data.num_classes=50", "data.train_per_class=100", "data.test_per_class=20")


def get_config(method: str = "qkd") -> Config:
    """The settings of this experiment for one method."""
    like = load_experiment("cifar100_few").get_config(method)
    return override(dataclasses.replace(like, experiment="cifar100_more"), *MORE)
