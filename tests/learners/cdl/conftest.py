"""Teachers and students on two small transformers."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

import qkd_jax
from qkd_jax.engine import verbs
from qkd_jax.nn.backbone import Backbone
from qkd_jax.nn.inputs import Raw
from qkd_jax.nn.parameters import init_random
from qkd_jax.nn.vit import ViTSpec

# Wider and deeper than the student.
TEACHER = ViTSpec(width=16, depth=3, num_heads=2, mlp_width=16, patch_size=4, image_size=8, grid=2)
SMALL = (
    "coda_prompt.blocks=2",
    "coda_prompt.pool=8",
    "coda_prompt.length=4",
    "dualprompt.general_blocks=1",
    "dualprompt.expert_blocks=1",
    "dualprompt.general_length=2",
    "dualprompt.expert_length=4",
    "l2p.pool=6",
    "l2p.top_k=2",
    "l2p.length=4",
    "cdl.map_components=3",
    "train.optimizer=adam",
    "train.learning_rate=0.01",
    "train.weight_decay=0",
)


@pytest.fixture(scope="session")
def cdl(tiny):
    """Settings, states and a run of teacher and student over some tasks."""
    backbone = Backbone(init_random(jax.random.key(5), TEACHER), TEACHER)

    def config_of(host, form, *changes):
        config = tiny.config("method=cdl", f"cdl.host={host}", f"cdl.form={form}", *SMALL)
        return qkd_jax.override(config, *changes)

    def start(config):
        """The student before the first task, with its teacher in it."""
        return qkd_jax.init_state(jax.random.key(7), tiny.backbone, config, teacher=backbone)

    def learn(state, task, steps=2):
        """The state begun, trained and ended, each safe from donation."""
        state = qkd_jax.begin_task(state, task)
        begun = tiny.copy(state)
        metrics = None
        for seed in range(steps):
            state, metrics = qkd_jax.train_task(state, tiny.batch(task, seed))
        trained = tiny.copy(state)
        ended = qkd_jax.end_task(state, [tiny.batch(task, 0)])
        return SimpleNamespace(
            begun=begun, trained=trained, ended=tiny.copy(ended), metrics=metrics
        )

    def run(config, tasks=tiny.tasks, steps=2):
        """For each task its two phases."""
        student, history = start(config), []
        teacher = student.teacher
        for task in tasks:
            taught = None
            if teacher is not None:
                taught = learn(teacher, task, steps)
                teacher = taught.ended
                student = student.taught_by(teacher)
            learned = learn(student, task, steps)
            student = learned.ended
            history.append(SimpleNamespace(teacher=taught, student=learned))
        return history

    def batch_of(task, seed):
        """A batch as the loss of a learner takes it."""
        fields = tiny.batch(task, seed)
        inputs = Raw({"image": jnp.asarray(fields["image"])})
        return {"inputs": inputs, "label": jnp.asarray(fields["label"], jnp.int32)}

    def slots_of(state, images, slots):
        return verbs.one_device().features(state, Raw({"image": jnp.asarray(images)}), slots)

    return SimpleNamespace(
        teacher=backbone,
        config=config_of,
        start=start,
        batch=batch_of,
        learn=learn,
        run=run,
        slots=slots_of,
        scores=qkd_jax.predict,
    )
