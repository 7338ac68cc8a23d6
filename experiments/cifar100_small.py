"""A fifth of CIFAR-100 from a folder: 100 training and 50 test images of each class, CLIP at 96 px.

    make run EXP=cifar100_small ARGS="--data /path/to/images"

Data: the images of CIFAR-100 as files, train/<class>/* and test/<class>/*, of any number; the
recorded runs had 100 of each class of the training part and 50 of the test part. B0-Inc10, order
seed 1993. Settings of every method as in `renditions`. For what needs more images of a class than
`renditions` has.
Expected: docs/results.md.
"""

import dataclasses

from qkd_jax.settings.config import Config, override
from qkd_jax.settings.experiments import load_experiment


def get_config(method: str = "qkd") -> Config:
    """The settings of this experiment for one method."""
    like = load_experiment("folder").get_config(method)
    return override(dataclasses.replace(like, experiment="cifar100_small"))
