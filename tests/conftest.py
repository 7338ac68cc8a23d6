"""Strict settings for every test: eight simulated devices, no silent promotion of dtype or rank."""

import ctypes
import functools
import gc
import os
import tempfile
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

# Most of the suite's time is compilation, and tests look at numbers, not at speed. Subprocesses
# inherit it. JAX_DISABLE_MOST_OPTIMIZATIONS=0 runs the suite as users compile.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# Must stand before jax is imported: XLA reads it once. The older code generator compiles in two
# thirds of the time, in one piece and without a search for library calls in three quarters of that.
# Newer versions may have these settings no more, and end a process that asks for them.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
        " --xla_cpu_use_onednn=false"
        if os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1"
        and tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11)
        else "",
    ]
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Programs that took long to compile are shared by all tests, their processes, and the next session;
# and those that a test's command line keeps stay out of the user's own.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", f"{tempfile.gettempdir()}/qkd_jax_tests_{os.getuid()}"
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

import jax
import numpy as np
import pytest
from hypothesis import settings

import qkd_jax
from qkd_jax.learners.shape import learner_of
from qkd_jax.nn.backbone import Backbone
from qkd_jax.nn.parameters import init_random
from qkd_jax.nn.vit import ViTSpec
from qkd_jax.protocol.tasks import Task
from qkd_jax.weights.load import tiny_random_text

if not hasattr(jax, "enable_x64"):  # as it was called before jax 0.8
    from jax.experimental import enable_x64

    jax.enable_x64 = enable_x64

# What the frozen model computes is kept for other runs: here for those of this session alone.
STORE = tempfile.TemporaryDirectory(prefix="qkd_jax_store_")
os.environ["QKD_JAX_STORE"] = STORE.name

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Traces leave many small objects that live long, and the collector walks through all of them.
gc.set_threshold(100_000, 50, 100)

settings.register_profile("default", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("default")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """The folder of compiled programs: what several runs share is compiled once in a session, and
    processes that are given it start fast.
    """
    names = (
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
    )
    before = [getattr(jax.config, name) for name in names]
    folder = str(tmp_path_factory.getbasetemp() / "compiled")
    for name, value in zip(names, (folder, 0.0, -1), strict=True):
        jax.config.update(name, value)
    yield folder
    for name, value in zip(names, before, strict=True):
        jax.config.update(name, value)


@pytest.fixture(scope="module", autouse=True)
def forgotten_programs():
    """Compiled programs of finished files are dropped once they fill memory: the whole suite's
    would take 6 GB in each worker.
    """
    yield
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        give_back = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):  # not Linux, not glibc
        return
    if pages * os.sysconf("SC_PAGE_SIZE") > 2 * 1024**3:
        jax.clear_caches()
        give_back(0)  # freed memory stays with the process otherwise


@pytest.fixture
def key():
    """A fresh typed key, the same in every run."""
    return jax.random.key(0)


# A run small enough to compile in seconds: 2 blocks, width 12, 8 px, three small tasks.
SPEC = ViTSpec(width=12, depth=2, num_heads=2, mlp_width=16, patch_size=4, image_size=8, grid=2)
# The second task is smaller than the padding; class 3 and 6 and the fourth task never come.
TASKS = (Task(0, (4, 1)), Task(1, (0,)), Task(2, (5, 2)))
TEXTS = ("alpha", "bravo", "car", "delta!", "eee", "fox (x)", "gnu 12")
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
    "min.bottleneck=3",
    "min.projection_dim=16",
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


def texts_of(task, seed=0, size=4, classes=TEXTS):
    """Tokens of words of different lengths, one for each class, with a random ending."""
    generator = np.random.default_rng([task.index, seed])
    label = np.resize(task.classes, size)
    ends = ["xyz"[generator.integers(3)] * generator.integers(3) for _ in label]
    words = [f"{classes[c % len(classes)]} {end}" for c, end in zip(label, ends, strict=True)]
    return {**qkd_jax.tokenize(text_encoder(), words), "label": label}


@functools.cache
def text_encoder():
    """The random text encoder, for texts of up to 8 tokens."""
    return tiny_random_text(8)


def run(backbone, config, tasks=TASKS, steps=2, batch_of=batch_of):
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
        config_of=config_of,
        batch=batch_of,
        copy=copy_of,
        run=run,
    )


@pytest.fixture(scope="session")
def texts(tiny):
    """The same as `tiny` for methods that read texts."""
    fields = vars(tiny) | {"backbone": text_encoder(), "batch": texts_of}
    return SimpleNamespace(**fields | {"run": functools.partial(run, batch_of=texts_of)})


@pytest.fixture(scope="module")
def fresh(tiny):
    """A method that trains in every task, before its first one."""
    config = tiny.config("method=finetune")
    return qkd_jax.init_state(jax.random.key(0), tiny.backbone, config)


@pytest.fixture(scope="module")
def begun(fresh, tiny):
    """The same in its first task."""
    return qkd_jax.begin_task(fresh, tiny.tasks[0])
