"""Joint: one adapter and one head trained on all classes at once; the upper reference.

This is not a continual method: all classes are one task, so that its accuracy is what the adapter
reaches when nothing can be forgotten. Otherwise it is `finetune`. With a single stage, average
accuracy equals last accuracy, and every forgetting is 0.
"""

from qkd_jax.learners import finetune
from qkd_jax.learners.shape import register
from qkd_jax.learners.task_heads import HeadSettings
from qkd_jax.nn.adapters import AdapterSpec

LEARNER = register(
    finetune.LEARNER._replace(name="joint"),
    defaults=("protocol.kind=joint",),
    adapter=AdapterSpec,
    head=HeadSettings,
)
