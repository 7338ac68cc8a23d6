"""ImageNet-A, B0-Inc10 (QKD) or B0-Inc20 (its peers: --set protocol.increment=20), ViT-B/16-IN21K.

    make run EXP=imagenet_a                       (METHOD=ease, mos, ...)

Data: tensorflow-datasets `imagenet_a` (7,500 images of 200 classes, only a test split), split 80/20
within each class by the committed rule of `qkd_jax/data/splits.py`; another list by `--set
data.split_file=FILE`.
Published at Inc20: EASE average 65.34, last 55.04; SimpleCIL last 48.91. Not run here: the data
cannot be reached from our machines.
"""

from qkd_jax.settings.config import Config, override
from qkd_jax.settings.published import published

# Those of qkd; its peers have their published ones instead (qkd_jax/settings/published.py).
COMMON = (
    "backbone.name=vit_b16_in21k_augreg",
    "backbone.image_size=224",
    "backbone.preprocess=l2p01",
    "data.source=imagenet_a",
    "data.augment=true",
    "protocol.increment=10",
    "train.epochs=20",
    "train.learning_rate=0.05",
    "train.weight_decay=0.005",
    "train.batch_size=32",
)


def get_config(method: str = "qkd") -> Config:
    """The settings of this experiment for one method."""
    config = Config(experiment="imagenet_a", method=method)
    return override(config, *COMMON, *published(method, "imagenet_a"), where_read=True)
