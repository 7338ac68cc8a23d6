"""ImageNet-R, B0-Inc20, ViT-B/16-IN21K: the paper's main benchmark.

    make run EXP=imagenet_r                       (METHOD=ease, mos, ...)

Data: tensorflow-datasets `imagenet_r` (30,000 images of 200 classes, only a test split), split
80/20 within each class by the committed rule of `qkd_jax/data/splits.py`; another list by `--set
data.split_file=FILE`. Published (other splits, so a few points apart): QKD last 77.67, gate
ablation 81.79 (quantum), 80.32 (cosine); EASE average 81.74, last 76.17; SimpleCIL 54.55 last. Not
run here: the data cannot be reached from our machines.
"""

from qkd_jax.settings.config import Config, override
from qkd_jax.settings.published import published

# Those of qkd; its peers have their published ones instead (qkd_jax/settings/published.py).
COMMON = (
    "backbone.name=vit_b16_in21k_augreg",
    "backbone.image_size=224",
    "backbone.preprocess=l2p01",
    "data.source=imagenet_r",
    "data.augment=true",
    "protocol.increment=20",
    "train.epochs=20",
    "train.learning_rate=0.05",
    "train.weight_decay=0.005",
    "train.batch_size=32",
)


def get_config(method: str = "qkd") -> Config:
    """The settings of this experiment for one method."""
    config = Config(experiment="imagenet_r", method=method)
    return override(config, *COMMON, *published(method, "imagenet_r"), where_read=True)
