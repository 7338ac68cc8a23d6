# %% [markdown]
# # Your own loop
#
# Everything that learns is one immutable state and five functions over it: `init_state`, `begin_task`, `train_task`,
# `end_task`, `predict`. Here they are, with a loop that you can change: three tasks of ten emoji each.

# %% [markdown]
# ## What is learned, and from what
#
# A `Config` has every setting. An experiment gives it; `override` changes it as `--set` does on the command line.
# `Shapes` fixes the shape of every array from the start, so that a new task compiles nothing.

# %%
import dataclasses

import numpy as np

from qkd_jax.data.sources import load_split
from qkd_jax.settings.experiments import load_experiment

NUM_CLASSES, INCREMENT = (6, 2) if SMOKE else (30, 10)
config = load_experiment("smoke" if SMOKE else "renditions").get_config("qkd")
shapes = qkd_jax.Shapes(num_classes=NUM_CLASSES, max_tasks=3, max_task_classes=INCREMENT)
config = dataclasses.replace(qkd_jax.override(config, "train.batch_size=16"), shapes=shapes)

data = load_split(config.data.source)
backbone = qkd_jax.load_backbone(config.backbone.name, image_size=config.backbone.image_size)
tasks = qkd_jax.split_tasks(qkd_jax.class_order(NUM_CLASSES, seed=1993), base=0, increment=INCREMENT)
for task in tasks:
    print(f"task {task.index + 1}: {', '.join(data.train.class_names[label] for label in task.classes)}")

# %% [markdown]
# ## Batches
#
# A batch is a dict: images as uint8 [B, H, W, 3], labels as the original class ids. Only the classes of the current task
# may stand in it; anything else is refused before a step is made. The last batch is filled up, and `mask` says which
# rows count, so that all batches have one shape and the step compiles once.

# %%


def batches_of(split, classes, size=config.train.batch_size, seed=None):
    """The batches of some classes, in a random order if there is a seed."""
    rows = np.flatnonzero(np.isin(split.labels, list(classes)))
    if seed is not None:
        rows = np.random.default_rng(seed).permutation(rows)
    for start in range(0, len(rows), size):
        chosen = rows[start : start + size]
        filled = np.resize(chosen, size)
        yield {
            **split.load(filled, backbone),
            "label": split.labels[filled],
            "mask": np.arange(size) < len(chosen),
        }


# %% [markdown]
# ## The loop
#
# `train_task` makes one step and *donates* the state it is given: keep the returned one. `end_task` looks at the task's
# images once more, for class means and the gate's statistics; after it the images can go. `predict` has no argument for
# a task: it answers among all classes seen.

# %%
state = qkd_jax.init_state(jax.random.key(0), backbone, config)
accuracy = np.full((len(tasks), len(tasks)), np.nan)
for task in tasks:
    steps = -(-sum(np.isin(data.train.labels, list(task.classes))) // config.train.batch_size)
    state = qkd_jax.begin_task(state, task, num_steps=steps * config.train.epochs)
    for epoch in range(config.train.epochs):
        for batch in batches_of(data.train, task.classes, seed=epoch):
            state, metrics = qkd_jax.train_task(state, batch)
    state = qkd_jax.end_task(state, batches_of(data.train, task.classes))
    for old in tasks[: task.index + 1]:
        right = [
            np.argmax(qkd_jax.predict(state, batch["image"]), axis=1)[batch["mask"]] == batch["label"][batch["mask"]]
            for batch in batches_of(data.test, old.classes)
        ]
        accuracy[task.index, old.index] = 100 * np.mean(np.concatenate(right))
    shown = {name: round(float(value), 3) for name, value in metrics.items() if name in ("loss", "loss_kd", "gate_entropy")}
    print(f"task {task.index + 1}: {shown}, accuracy by task {np.round(accuracy[task.index, : task.index + 1], 1)}")

# %% [markdown]
# ## What was not touched
#
# The transformer, the adapters of old tasks and their head rows stay as they were, byte for byte; a state is a pytree, so
# this is one comparison.

# %%
before = jax.tree.map(np.array, state.memory["adapters"])  # copies: `train_task` donates what it changes
again = qkd_jax.init_state(jax.random.key(0), backbone, config)
for task in tasks[:2]:
    again = qkd_jax.begin_task(again, task)
    again, _ = qkd_jax.train_task(again, next(batches_of(data.train, task.classes)))
    again = qkd_jax.end_task(again, batches_of(data.train, task.classes))
    if task.index == 0:
        first = jax.tree.map(lambda leaf: np.array(leaf[0]), again.memory["adapters"])
same = jax.tree.map(lambda old, now: np.array_equal(old, np.asarray(now)[0]), first, again.memory["adapters"])
print("adapter 1 after task 2 is the adapter 1 after task 1:", all(jax.tree.leaves(same)))

# %%
# %matplotlib inline
import matplotlib.pyplot as plt

figure, axis = plt.subplots(figsize=(4.4, 3.6), layout="constrained")
drawn = axis.imshow(accuracy, vmin=max(0, np.nanmin(accuracy) - 5), vmax=100, cmap="Blues")
for (row, column), value in np.ndenumerate(accuracy):
    if np.isfinite(value):
        axis.text(column, row, f"{value:.0f}", ha="center", va="center")
axis.set(
    xticks=range(len(tasks)),
    yticks=range(len(tasks)),
    xticklabels=range(1, len(tasks) + 1),
    yticklabels=range(1, len(tasks) + 1),
    xlabel="evaluated task",
    ylabel="after task",
    title="Accuracy (%), no task given",
)
plt.show()

# %% [markdown]
# ## Change it
#
# - Another method: `get_config("mos")`. The loop stays as it is.
# - A step of your own: everything in `state.trainable` is what one step changes; `state.memory` is what is kept.
# - A whole method of your own, in one file: `docs/your-own-method.md`.
