"""CUB-200-2011, B0-Inc20, ViT-B/16-IN21K.

    make run EXP=cub200                           (METHOD=ease, mos, ...)

Data: tensorflow-datasets `caltech_birds2011` with its own split (5,994 / 5,794); the peers'
toolboxes use an 80/20 list, which `--set data.split_file=FILE` takes.
Published at Inc10: EASE average 92.23, last 86.81; SimpleCIL last 86.73. Not run here: the data
cannot be reached from our machines.
"""

from qkd_jax.settings.config import Config, override
from qkd_jax.settings.published import published

# Those of qkd; its peers have their published ones instead (qkd_jax/settings/published.py).
COMMON = (
    "backbone.name=vit_b16_in21k_augreg",
    "backbone.image_size=224",
    "backbone.preprocess=l2p01",
    "data.source=cub200",
    "data.augment=true",
    "protocol.increment=20",
    "train.epochs=20",
    "train.learning_rate=0.05",
    "train.weight_decay=0.0005",
    "train.batch_size=32",
)


def get_config(method: str = "qkd") -> Config:
    """The settings of this experiment for one method."""
    config = Config(experiment="cub200", method=method)
    return override(config, *COMMON, *published(method, "cub200"), where_read=True)
