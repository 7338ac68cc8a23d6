"""The methods, each a `Learner`; importing this package registers them all."""

from qkd_jax.learners import (
    aper,
    apt,
    coda_prompt,
    dualprompt,
    ease,
    finetune,
    inflora,
    joint,
    l2p,
    linear_probe,
    mos,
    mote,
    ranpac,
    simplecil,
    ssiat,
    tuna,
)
from qkd_jax.learners.qkd import learner as qkd

__all__ = [
    "aper",
    "apt",
    "coda_prompt",
    "dualprompt",
    "ease",
    "finetune",
    "inflora",
    "joint",
    "l2p",
    "linear_probe",
    "mos",
    "mote",
    "qkd",
    "ranpac",
    "simplecil",
    "ssiat",
    "tuna",
]
