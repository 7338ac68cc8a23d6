"""Class-incremental learning on a frozen transformer: adapters, quantum gate, distillation.

state = qkd_jax.init_state(jax.random.key(0), backbone, config)
for task in tasks:
    state = qkd_jax.begin_task(state, task)
    for batch in batches_of(task):
        state, metrics = qkd_jax.train_task(state, batch)
    state = qkd_jax.end_task(state, batches_of(task))
scores = qkd_jax.predict(state, images)
"""

import qkd_jax.learners  # noqa: F401  registers the methods
from qkd_jax.engine.verbs import (
    begin_task,
    end_task,
    init_state,
    predict,
    predict_with_relevance,
    teacher_outputs,
    train_task,
)
from qkd_jax.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    ProtocolError,
    QkdError,
    WeightsError,
)
from qkd_jax.learners.shape import learner_names
from qkd_jax.nn.tokens import tokenize
from qkd_jax.protocol.tasks import Task, class_order, split_tasks
from qkd_jax.runs.exported import load_learner
from qkd_jax.runs.load import LoadedRun, load_run
from qkd_jax.settings.config import Config, Shapes, apply_preset, override
from qkd_jax.weights.load import load_backbone

__all__ = [
    "CheckpointError",
    "Config",
    "ConfigError",
    "DataError",
    "LoadedRun",
    "ProtocolError",
    "QkdError",
    "Shapes",
    "Task",
    "WeightsError",
    "apply_preset",
    "begin_task",
    "class_order",
    "end_task",
    "init_state",
    "learner_names",
    "load_backbone",
    "load_learner",
    "load_run",
    "override",
    "predict",
    "predict_with_relevance",
    "split_tasks",
    "teacher_outputs",
    "tokenize",
    "train_task",
]
