"""Joint: one adapter and one head trained on all classes at once; the upper reference.

Not a continual method: a run gives every class in one task, so that the accuracy after it is what
the same adapter reaches when nothing can be forgotten. Everything but the single task is
`finetune`'s, whose cross-entropy over the classes of the task is here one over all classes. One
stage has no old task: average accuracy is last accuracy, and every forgetting is 0.
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
