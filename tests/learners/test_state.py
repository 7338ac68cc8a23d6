"""Which classes and rows count, written out for six classes in tasks of three, two and one."""

import jax
import jax.numpy as jnp
import numpy as np

import qkd_jax
from qkd_jax.learners import state as states
from qkd_jax.settings.config import Shapes


def test_masks_and_labels_are_written_out(tiny):
    """The second of four tasks runs, with classes 5 and 1; class 3 has not come yet."""
    config = tiny.config("method=simplecil")
    config = config.replace(shapes=Shapes(num_classes=6, max_tasks=4, max_task_classes=3))
    state = qkd_jax.init_state(jax.random.key(0), tiny.backbone, config).replace(
        task_of_class=jnp.array([0, 1, 0, -1, 0, 1]),
        task_classes=jnp.array([5, 1, -1]),
        task=jnp.int32(1),
    )
    yes, no = True, False
    for found, expected in (
        (states.seen_classes(state), [yes, yes, yes, no, yes, yes]),
        (states.old_classes(state), [yes, no, yes, no, yes, no]),
        (states.valid_task_classes(state), [yes, yes, no]),
        (states.task_class_masks(state), [[yes] * 3, [yes, yes, no], [no] * 3, [no] * 3]),
        (states.local_labels(state, jnp.array([1, 5, 5])), [1, 0, 0]),
    ):
        np.testing.assert_array_equal(found, expected)
