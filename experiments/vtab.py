"""VTAB-50 as class-incremental learning uses it, B0-Inc10: five source sets of ten classes;
ViT-B/16-IN21K.

    make run EXP=vtab ARGS="--data /path/to/vtab"      (METHOD=ease, mos, ...)

Data: the folder that the peers' toolboxes distribute, train/<class>/* and test/<class>/*; no
registry has it. Classes are shuffled with seed 1993, as MoTE does; EASE and MOS do not: --set
protocol.shuffle=false.
Published without shuffling: EASE average 93.61, last 93.55; MoTE shuffled 93.56, 85.94. Not run
here.
"""

from qkd_jax.settings.config import Config, override
from qkd_jax.settings.published import published

# Those of qkd; its peers have their published ones instead (qkd_jax/settings/published.py).
COMMON = (
    "backbone.name=vit_b16_in21k_augreg",
    "backbone.image_size=224",
    "backbone.preprocess=l2p01",
    "data.source=vtab",
    "data.augment=true",
    "protocol.increment=10",
    "adapter.bottleneck=16",
    "train.epochs=20",
    "train.learning_rate=0.05",
    "train.weight_decay=0.005",
    "train.batch_size=32",
)


def get_config(method: str = "qkd") -> Config:
    """The settings of this experiment for one method."""
    config = Config(experiment="vtab", method=method)
    return override(config, *COMMON, *published(method, "vtab"), where_read=True)
