"""A run small enough to compile in seconds: 2 blocks, width 12, 8 px, three small tasks."""

from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qkd_jax
from qkd_jax.learners.shape import learner_of
from qkd_jax.nn.vit import Backbone, ViTSpec, init_random
from qkd_jax.protocol.tasks import Task

SPEC = ViTSpec(width=12, depth=2, num_heads=2, mlp_width=16, patch_size=4, image_size=8, grid=2)
# The second task is smaller than the padding; class 3 and 6 and the fourth task never come.
TASKS = (Task(0, (4, 1)), Task(1, (0,)), Task(2, (5, 2)))
SETTINGS = (
    "backbone.image_size=8",
    "backbone.compute_dtype=float32",
    "data.augment=false",
    "num_classes=7",
    "max_tasks=4",
    "max_task_classes=2",
    "adapter.bottleneck=3",
    "adapter.scale=1.0",
    "adapter.dropout=0.1",
    "adapter.first_block=0",
    "gate.encoding=angle",
    "gate.num_qubits=3",
    "gate.num_layers=2",
    "gate.calibration_steps=3",
    "gate.calibration_batch=8",
    "gate.freeze_after=-1",
    "head.scale=5.0",
    "head.kind=cosine",
    "train.optimizer=sgd",
    "train.schedule=cosine",
    "train.learning_rate=0.05",
    "train.momentum=0.9",
    "train.weight_decay=0.0005",
    "train.decay_leaves=kernel,rows",
)


def config_of(*assignments, common=()):
    """A config from assignments, among them the method and the shapes. Of `common`, what the method
    does not read is left out.
    """
    given = dict(text.split("=", 1) for text in (*common, *assignments))
    names = ("num_classes", "max_tasks", "max_task_classes", "max_task_images")
    shapes = {name: int(given[name]) for name in names if name in given}
    config = qkd_jax.Config(method=given.get("method", "qkd"), shapes=qkd_jax.Shapes(**shapes))

    def settings(texts):
        return [text for text in texts if text.split("=")[0] not in ("method", *names)]

    config = qkd_jax.override(config, *settings(common), where_read=True)
    return qkd_jax.override(config, *settings(assignments))


def batch_of(task, seed=0, size=4):
    """Noise images [B, 8, 8, 3] in [0, 1], brighter with the class, with every class present."""
    generator = np.random.default_rng([task.index, seed])
    label = np.resize(task.classes, size)
    image = 0.5 * generator.random((size, 8, 8, 3)) + label[:, None, None, None] / 14
    return {"image": image.astype(np.float32), "label": label}


def copy_of(state):
    """The state with its own copy of what a step donates."""
    fresh = jax.tree.map(lambda a: a.copy(), (state.trainable, state.opt_state, state.step))
    return state.replace(trainable=fresh[0], opt_state=fresh[1], step=fresh[2])


def run(backbone, config, tasks=TASKS, steps=2):
    """begun, trained and ended state of every task, each safe from donation."""
    state, history = qkd_jax.init_state(jax.random.key(7), backbone, config), []
    learner = learner_of(config)
    for task in tasks:
        state = qkd_jax.begin_task(state, task, num_steps=4)
        begun = copy_of(state)
        trains = learner.loss is not None and learner.trains(config, task.index)
        for step in range(steps if trains else 0):
            state, _ = qkd_jax.train_task(state, batch_of(task, step))
        trained = copy_of(state)
        state = qkd_jax.end_task(state, [batch_of(task, step) for step in range(2)])
        history.append(SimpleNamespace(begun=begun, trained=trained, ended=copy_of(state)))
    return history


@pytest.fixture(scope="session")
def tiny():
    """The small backbone and what the learners' tests share."""
    return SimpleNamespace(
        backbone=Backbone(init_random(jax.random.key(0), SPEC), SPEC),
        tasks=TASKS,
        config=lambda *changes: config_of(*changes, common=SETTINGS),
        batch=batch_of,
        copy=copy_of,
        run=run,
    )


@pytest.fixture(scope="module")
def fresh(tiny):
    """A method that trains in every task, before its first one."""
    config = tiny.config("method=finetune")
    return qkd_jax.init_state(jax.random.key(0), tiny.backbone, config)


@pytest.fixture(scope="module")
def begun(fresh, tiny):
    """The same in its first task."""
    return qkd_jax.begin_task(fresh, tiny.tasks[0])


# Names of a block's parts here and in the reference repositories.
PARTS = {
    "norm1": "norm1",
    "query": "attn.q_proj",
    "key": "attn.k_proj",
    "value": "attn.v_proj",
    "out": "attn.proj",
    "norm2": "norm2",
    "fc1": "fc1",
    "fc2": "fc2",
}


def linear_of(arrays, prefix):
    """torch keeps weights as [out, in]; here kernels are [in, out]."""
    weight, bias = arrays[f"{prefix}.weight"], arrays[f"{prefix}.bias"]
    return {"kernel": jnp.asarray(weight.swapaxes(-1, -2)), "bias": jnp.asarray(bias)}


def norm_of(arrays, prefix):
    scale, bias = arrays[f"{prefix}.weight"], arrays[f"{prefix}.bias"]
    return {"scale": jnp.asarray(scale), "bias": jnp.asarray(bias)}


def adapter_of(arrays, prefix):
    """An adapter set from `<prefix>/down_proj.weight` and so on."""
    return {name: linear_of(arrays, f"{prefix}/{name}_proj") for name in ("down", "up")}


def backbone_of(arrays, num_heads=2, image_size=8):
    """A `Backbone` from `vit/<name>` and `blocks/<name>`, the latter with a leading block axis."""
    depth, mlp_width, width = arrays["blocks/fc1.weight"].shape
    patch = arrays["vit/patch_embed.proj.weight"]
    side = patch.shape[-1]
    stacked = {
        ours: (norm_of if "norm" in ours else linear_of)(arrays, f"blocks/{theirs}")
        for ours, theirs in PARTS.items()
    }
    params = {
        "patch": {
            "kernel": jnp.asarray(patch.transpose(2, 3, 1, 0).reshape(-1, width)),
            "bias": jnp.asarray(arrays["vit/patch_embed.proj.bias"]),
        },
        "class_token": jnp.asarray(arrays["vit/cls_token"][0, 0]),
        "position": jnp.asarray(arrays["vit/pos_embed"][0]),
        "blocks": [jax.tree.map(lambda a, i=i: a[i], stacked) for i in range(depth)],
        "norm": norm_of(arrays, "vit/norm"),
    }
    grid = image_size // side
    return Backbone(params, ViTSpec(width, depth, num_heads, mlp_width, side, image_size, grid))


@pytest.fixture(scope="session")
def golden():
    """name -> arrays of golden/<name>.npz, and the transformer and adapters in them."""

    def load(name):
        with np.load(Path(__file__).parent / "golden" / f"{name}.npz") as stored:
            arrays = dict(stored)
        return SimpleNamespace(
            arrays=arrays,
            config=config_of,
            backbone=backbone_of(arrays),
            adapter=lambda prefix: adapter_of(arrays, prefix),
        )

    return load
