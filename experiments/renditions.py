"""Renditions: 100 emoji classes drawn by many artists; test on styles never trained on.

    make run                      (python -m qkd_jax run renditions)
    make compare                  (every method, three seeds)

Data: packaged, 600 training images (six styles) and 300 test images (three styles of other
artists), B0-Inc10, order seed 1993. Backbone: packaged CLIP ViT-B/16 at 96 px, frozen. Every method
has 5 epochs, batches of 16 and, where it has adapters, bottleneck 16; all else as published for
ImageNet-R, but for the rates, which were chosen on held-out styles (docs/results.md), and what
`published.on_few_images` leaves out: twenty steps for each task are few. QKD has the defaults of
this library. In `cdl` this backbone is the teacher's; the student is the packaged ViT-S/14 at 84
px, after 11 of its 12 blocks.
Expected: docs/results.md.
"""

from qkd_jax.settings.config import Config, override
from qkd_jax.settings.published import on_few_images

COMMON = (
    "backbone.name=clip_vit_b16",
    "backbone.image_size=96",
    "data.source=renditions",
    "adapter.bottleneck=16",
    "train.epochs=5",
    "train.batch_size=16",
    "train.checkpoint_every=50",
)
# Teacher and student have 37 tokens each; the student is read before its last block, which is poor.
CDL = (
    *("backbone.name=dinov2_vit_s14", "backbone.image_size=84", "backbone.blocks=11"),
    *("teacher.name=clip_vit_b16", "teacher.image_size=96"),
)
METHODS = {
    "cdl": (*on_few_images("cdl"), *CDL),
    "replay": ("alignment.learning_rate=20.0",),
}
RATES = {
    "qkd": 0.2,
    "aper": 0.2,
    "apt": 0.012,
    "care": 0.05,
    "cdl": 0.004,
    "clare": 0.05,
    "coda_prompt": 0.004,
    "dualprompt": 0.004,
    "ease": 0.2,
    "facet": 0.05,
    "finetune": 0.05,
    "inflora": 0.001,
    "joint": 0.2,
    "l2p": 0.0075,
    "min": 0.005,
    "mos": 0.2,
    "mote": 0.2,
}


def get_config(method: str = "qkd") -> Config:
    """The settings of this experiment for one method."""
    config = Config(experiment="renditions", method=method)
    own = METHODS.get(method, on_few_images(method))
    rate = [f"train.learning_rate={RATES[method]}"] if method in RATES else []
    return override(config, *COMMON, *own, *rate, where_read=True)
