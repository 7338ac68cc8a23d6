"""Glosses: 38 kinds of meaning, learned from dictionary definitions of English nouns and verbs.

    make run EXP=glosses

Data: packaged, 100 training and 50 test definitions of each class from WordNet 3.1. A class is a
lexicographer file, such as noun.animal or verb.motion. B5-Inc3: twelve tasks, of five and then
of three classes; order seed 1993. Backbone: MiniLM with 6 blocks, frozen; definitions are cut to 24
tokens. Settings of every method as in `renditions`, but for the rates below, which were chosen on
held-out training texts (docs/results.md). QKD has the defaults of this library.
Expected: docs/results.md.
"""

import dataclasses

from qkd_jax.settings.config import Config, override
from qkd_jax.settings.experiments import load_experiment

COMMON = (
    "backbone.name=minilm_l6",
    "backbone.num_tokens=24",
    "data.source=glosses",
    "protocol.base=5",
    "protocol.increment=3",
    "adapter.bottleneck=16",
    "train.epochs=5",
    "train.batch_size=16",
    "train.checkpoint_every=100",
)
PROMPTED = ("train.optimizer=adam", "train.weight_decay=0", "train.epochs=3")
METHODS = {
    "qkd": ("train.learning_rate=3.2",),
    "mos": ("train.learning_rate=0.8",),
    "ranpac": ("train.learning_rate=3.2",),
    "qd_llm": (
        *("train.optimizer=adam", "train.weight_decay=0", "train.learning_rate=0.03"),
        *("qd_llm.teacher_rate=0.003", "train.epochs=20", "train.batch_size=128"),
    ),
    "q_tuning": (
        *PROMPTED,
        "q_tuning.prompt_length=4",
        "q_tuning.prefix_length=4",
        "q_tuning.queue_size=3",
        "q_tuning.reparametrise=0",
        "train.learning_rate=0.01",
    ),
    "prog_prompt": (
        *PROMPTED,
        "prog_prompt.prompt_length=4",
        "prog_prompt.reparametrise=0",
        "train.learning_rate=0.01",
    ),
    "prompt_per_task": (
        *PROMPTED,
        "prompt_per_task.prompt_length=4",
        "prompt_per_task.reparametrise=0",
        "train.learning_rate=0.01",
    ),
}


def get_config(method: str = "qkd") -> Config:
    """The settings of this experiment for one method."""
    like = load_experiment("renditions").get_config(method)
    config = dataclasses.replace(like, experiment="glosses")
    return override(config, *COMMON, *METHODS.get(method, ()), where_read=True)
