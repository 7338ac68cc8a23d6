"""CIFAR-100, B0-Inc10, ViT-B/16-IN21K; the 32 px images are resized to 224.

    make run EXP=cifar100                         (METHOD=ease, mos, ...)

Published: QKD average 94.08; EASE 92.11 average, 87.72 last; SimpleCIL 81.26 last. Not run here:
the data cannot be reached from our machines.
"""

from qkd_jax.settings.config import Config, override
from qkd_jax.settings.published import published

# Those of qkd; its peers have their published ones instead (qkd_jax/settings/published.py).
COMMON = (
    "backbone.name=vit_b16_in21k_augreg",
    "backbone.image_size=224",
    "backbone.preprocess=l2p01",
    "data.source=cifar100",
    "data.augment=true",
    "protocol.increment=10",
    "train.epochs=20",
    "train.learning_rate=0.05",
    "train.weight_decay=0.0005",
    "train.batch_size=32",
)


def get_config(method: str = "qkd") -> Config:
    """The settings of this experiment for one method."""
    config = Config(experiment="cifar100", method=method)
    return override(config, *COMMON, *published(method, "cifar100"), where_read=True)
