"""The methods, each a `Learner`; importing this room registers them all."""

from qkd_jax.learners import (
    apt,
    coda_prompt,
    dualprompt,
    ease,
    finetune,
    inflora,
    l2p,
    mote,
    qkd,
    simplecil,
)

__all__ = [
    "apt",
    "coda_prompt",
    "dualprompt",
    "ease",
    "finetune",
    "inflora",
    "l2p",
    "mote",
    "qkd",
    "simplecil",
]
