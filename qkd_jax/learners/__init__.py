"""The methods, each a `Learner` (`shape.py`); importing this room registers them all.

A new method is a file here, named in the list below. Its loss may read the slots of old tasks as
teachers (`Slots.loss`); what else is frozen belongs to `LearnerState.frozen` (`state.py`). The
optimiser of the steps is `optimiser.py`; heads that are aligned when a task ends have their own,
in `task_heads.py`.
"""

from qkd_jax.learners import (
    aper,
    apt,
    care,
    clare,
    coda_prompt,
    dualprompt,
    ease,
    facet,
    finetune,
    inflora,
    joint,
    l2p,
    linear_probe,
    min_noise,
    mos,
    mote,
    qd_llm,
    ranpac,
    replay,
    simplecil,
    ssiat,
    tuna,
)
from qkd_jax.learners.cdl import learner as cdl
from qkd_jax.learners.q_tuning import learner as q_tuning
from qkd_jax.learners.qkd import learner as qkd

__all__ = [
    "aper",
    "apt",
    "care",
    "cdl",
    "clare",
    "coda_prompt",
    "dualprompt",
    "ease",
    "facet",
    "finetune",
    "inflora",
    "joint",
    "l2p",
    "linear_probe",
    "min_noise",
    "mos",
    "mote",
    "q_tuning",
    "qd_llm",
    "qkd",
    "ranpac",
    "replay",
    "simplecil",
    "ssiat",
    "tuna",
]
