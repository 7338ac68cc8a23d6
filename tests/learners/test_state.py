"""Which classes and rows count, written out for six classes in tasks of three, two and one, and
what inputs several backbones read.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qkd_jax
from qkd_jax.learners import state as states
from qkd_jax.nn.backbone import Backbone
from qkd_jax.nn.parameters import init_random
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


@pytest.mark.parametrize("student, teacher", [(8, 16), (16, 8), (8, 8)])
def test_inputs_have_the_form_of_the_largest_backbone(tiny, student, teacher):
    form = tiny.backbone.spec
    specs = [replace(form, image_size=size, grid=size // 4) for size in (student, teacher)]
    backbones = [Backbone(init_random(jax.random.key(seed), s), s) for seed, s in enumerate(specs)]
    config = tiny.config("method=cdl", "cdl.host=apt")
    state = qkd_jax.init_state(jax.random.key(0), backbones[0], config, teacher=backbones[1])
    largest = max(student, teacher)
    assert state.reader.spec.input_size == largest
    assert state.raw({}).resize == (student != teacher)
    assert not state.teacher.replace(frozen={"backbone": backbones[1]}).resizes
