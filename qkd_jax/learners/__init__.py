"""The methods, each a `Learner`; importing this room registers them all."""

from qkd_jax.learners import apt, ease, finetune, qkd, simplecil

__all__ = ["apt", "ease", "finetune", "qkd", "simplecil"]
