"""Teachers and students on two small transformers, stepped by the passes of an engine."""

from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

import qkd_jax
from qkd_jax.learners import passes
from qkd_jax.learners.optimiser import optimiser
from qkd_jax.learners.shape import learner_of
from qkd_jax.learners.state import LearnerState, join, split
from qkd_jax.learners.step import device_step
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


def new_state(config, backbone, **frozen):
    """The state before the first task, as the engine makes it."""
    key = jax.random.key(7)
    trainable, memory = learner_of(config).init(jax.random.fold_in(key, 0), backbone, config)
    return LearnerState(
        frozen={"backbone": backbone, **frozen},
        config=config,
        key=key,
        task=jnp.int32(-1),
        step=jnp.int32(0),
        num_steps=jnp.int32(0),
        task_classes=jnp.full(config.shapes.max_task_classes, -1, jnp.int32),
        task_of_class=jnp.full(config.shapes.num_classes, -1, jnp.int32),
        trainable=trainable,
        opt_state=optimiser(config.train).init(trainable),
        memory=memory,
    )


@jax.jit
def begin(state, classes, index):
    return passes.begin(state, classes, index, jnp.int32(0))


@jax.jit
def step(state, batch):
    """(state, metrics) after one step; a student is given its teacher's outputs."""
    batch = with_teacher(state, batch)
    held, moving = split(state)
    moving, metrics = device_step(held, moving, batch)
    return join(held, moving), metrics


def with_teacher(state, batch):
    if state.teacher is None:
        return batch
    outputs = learner_of(state.config).teacher.outputs(state, batch["inputs"])
    return {**batch, "teacher": jax.lax.stop_gradient(outputs)}


@jax.jit
def features_of(state, inputs, features, slots):
    return passes.extract(state, inputs, features, slots, jnp.int32(len(slots)))


def slots_of(state, inputs, slots):
    """Slot features [B, S, W] of these slots."""
    size = learner_of(state.config).num_slots(state.config)
    empty = jnp.zeros((inputs.fields["image"].shape[0], size, state.feature_width))
    return features_of(state, inputs, empty, jnp.asarray(slots, jnp.int32)) if slots else empty


@jax.jit
def end(state, features, labels):
    state, learner = passes.freeze(state), learner_of(state.config)
    sums = learner.sums.empty(state.config, features.shape[1], features.shape[2])
    sums = passes.accumulate(state, sums, features, labels, jnp.ones(len(labels), bool))
    return passes.finish(state, sums)


def scores_of(state, images):
    """Scores [B, C] of images after the current task."""
    inputs, task = Raw({"image": jnp.asarray(images)}), int(state.task)
    features = slots_of(state, inputs, learner_of(state.config).slots.score(task))
    return passes.score(state, features)[0]


@pytest.fixture(scope="session")
def cdl(tiny):
    """Settings, states and a run of teacher and student over some tasks."""
    backbone = Backbone(init_random(jax.random.key(5), TEACHER), TEACHER)

    def batch_of(task, seed):
        fields = tiny.batch(task, seed)
        inputs = Raw({"image": jnp.asarray(fields["image"])})
        label = jnp.asarray(fields["label"], jnp.int32)
        return {"inputs": inputs, "label": label, "mask": jnp.ones(len(label), bool)}

    def config_of(host, form, *changes, query_width=0):
        config = tiny.config("method=cdl", f"cdl.host={host}", f"cdl.form={form}", *SMALL)
        config = qkd_jax.override(config, *changes)
        shapes = replace(config.shapes, teacher_width=TEACHER.width, query_width=query_width)
        return config.replace(shapes=shapes)

    def start(config):
        """(teacher or None, student) before the first task."""
        learner = learner_of(config)
        teaching = learner.teacher.config(config)
        if teaching is None:
            return None, new_state(config, tiny.backbone)
        frozen = {}
        if learner.teacher.shares_query(config):
            frozen = {"query": tiny.backbone}
            shapes = replace(teaching.shapes, query_width=tiny.backbone.spec.width)
            teaching = teaching.replace(shapes=shapes)
        teacher = new_state(teaching, backbone, **frozen)
        return teacher, new_state(config, tiny.backbone, teacher=teacher)

    def begin_task(state, task):
        classes = [*task.classes, *[-1] * (2 - len(task.classes))]
        return begin(state, jnp.asarray(classes, jnp.int32), jnp.int32(task.index))

    def end_task(state, task):
        batch, slots = batch_of(task, 0), learner_of(state.config).slots.at_end(task.index)
        return end(state, slots_of(state, batch["inputs"], slots), batch["label"])

    def learn(state, task, steps=2):
        """The state begun, trained and ended."""
        begun = state = begin_task(state, task)
        for seed in range(steps):
            state, metrics = step(state, batch_of(task, seed))
        return SimpleNamespace(
            begun=begun, trained=state, ended=end_task(state, task), metrics=metrics
        )

    def run(config, tasks=tiny.tasks):
        """For each task its two phases."""
        teacher, student = start(config)
        history = []
        for task in tasks:
            taught = None
            if teacher is not None:
                taught = learn(teacher, task)
                teacher = taught.ended
                student = student.taught_by(teacher)
            learned = learn(student, task)
            student = learned.ended
            history.append(SimpleNamespace(teacher=taught, student=learned))
        return history

    return SimpleNamespace(
        teacher=backbone,
        config=config_of,
        start=start,
        begin=begin_task,
        batch=batch_of,
        learn=learn,
        step=step,
        run=run,
        slots=slots_of,
        scores=scores_of,
        with_teacher=with_teacher,
        new_state=new_state,
    )
