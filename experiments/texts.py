"""Your own texts: train/<class>.txt, test/<class>.txt, or train.csv, test.csv; B0-Inc2, MiniLM.

    make run EXP=texts ARGS="--data /path/to/texts"

In a .txt file every line is a text; a table has a header with the columns text and label. Settings
of every method as in `glosses`.
"""

import dataclasses

from qkd_jax.settings.config import Config, override
from qkd_jax.settings.experiments import load_experiment

COMMON = (
    "backbone.num_tokens=64",
    "data.source=texts",
    "protocol.base=0",
    "protocol.increment=2",
)


def get_config(method: str = "qkd") -> Config:
    """The settings of this experiment for one method."""
    like = load_experiment("glosses").get_config(method)
    config = dataclasses.replace(like, experiment="texts")
    return override(config, *COMMON)
