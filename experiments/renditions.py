"""Renditions: 100 emoji classes drawn by many artists; test on styles never trained on. The
embedded default.

    make run                      (python -m qkd_jax run renditions)

Data: packaged, 600 training images (six styles) and 300 test images (three styles of other
  artists), B0-Inc10.
Backbone: packaged CLIP ViT-B/16 at 96 px, frozen.
"""

from qkd_jax.config import Config, override


def get_config(method: str = "qkd") -> Config:
    """The settings of this experiment for one method."""
    config = override(
        Config(experiment="renditions", method=method),
        "backbone.name=clip_vit_b16",
        "backbone.image_size=96",
        "data.source=renditions",
        "adapter.bottleneck=16",
        "adapter.first_block=6",
        "adapter.dropout=0.1",
        "train.epochs=5",
        "train.batch_size=16",
        "train.learning_rate=0.2",
        "train.checkpoint_every=50",
    )
    return config
