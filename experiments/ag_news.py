"""AG News, B0-Inc2: four kinds of news from their titles and first sentences, MiniLM.

    make run EXP=ag_news                         (METHOD=ease, mos, ...)

Data: tensorflow-datasets (ag_news_subset; 120,000 training and 7,600 test texts), prepared once, or
a folder of texts by --data. Settings of every method as in `glosses`. Not run here: the data cannot
be reached from our machines.
"""

import dataclasses

from qkd_jax.settings.config import Config, override
from qkd_jax.settings.experiments import load_experiment

COMMON = (
    "backbone.num_tokens=64",
    "data.source=ag_news",
    "protocol.base=0",
    "protocol.increment=2",
    "train.epochs=1",
    "train.batch_size=32",
    "train.checkpoint_every=200",
)


def get_config(method: str = "qkd") -> Config:
    """The settings of this experiment for one method."""
    like = load_experiment("glosses").get_config(method)
    config = dataclasses.replace(like, experiment="ag_news")
    return override(config, *COMMON, where_read=True)
