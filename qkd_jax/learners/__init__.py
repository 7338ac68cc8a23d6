"""The methods, each a `Learner`; importing this room registers them all."""

from qkd_jax.learners import ease, finetune, qkd, simplecil

__all__ = ["ease", "finetune", "qkd", "simplecil"]
