# %% [markdown]
# # Quick start
#
# Ten tasks of ten classes, learned one after the other on a frozen vision transformer: emoji in six drawing styles
# to learn from, three styles of other artists to be tested on. It is written for the TPU of a Colab runtime (one chip or
# more; all of them are used) or a GPU, and was tried on CPUs, where it is slow.
#
# **Before you start**, in Colab: *Runtime → Change runtime type → TPU*. Then run the cells from top to bottom.

# %% [markdown]
# ## Run
#
# One command learns all tasks and measures after each one. With several devices every batch is divided among them
# (`jax.pmap`), and what does not divide is padded. The first run fetches 80 MB of CLIP weights.

# %%
from qkd_jax.cli import main

EXPERIMENT = "smoke" if SMOKE else "renditions"
command = ["run", EXPERIMENT, "--out", RUNS]

if main(command):
    raise RuntimeError("Stopped; the reason stands above. Running this cell again continues the run.")

# %% [markdown]
# ## Look
#
# A run leaves a folder behind; its page `report.html` holds all of the following and more. Rows of the matrices are
# explained in `docs/metrics.md`.

# %%
from IPython.display import Image, Markdown, display

folder = Path(RUNS) / EXPERIMENT / "qkd" / "seed1993"
for picture in ("accuracy_curve", "accuracy_matrix", "relevance", "routing", "loss"):
    display(Image(folder / "figures" / f"{picture}.png", width=560))
display(Markdown((Path(RUNS) / EXPERIMENT / "results.md").read_text()))

# %% [markdown]
# ## Resume
#
# A runtime may end at any moment. The run was saved after every task (and in between), so **running the same command
# again continues it**, also in a new session and on another number of devices, as long as `RUNS` is a folder that is
# still there. A run that is finished is not computed again:

# %%
import json
import time

summary = json.loads((folder / "summary.json").read_text())
written = (folder / "summary.json").stat().st_mtime_ns
began = time.monotonic()
if main([*command, "--no-report"]):
    raise RuntimeError("The run cannot be continued; the reason stands above.")
assert (folder / "summary.json").stat().st_mtime_ns == written, "the finished run was computed again"
print(f"The run took {summary['wall_seconds']:.0f} s; asking again {time.monotonic() - began:.0f} s: nothing was recomputed.")

# %% [markdown]
# ## Use it
#
# `load_run` gives back what was learned. `predict` takes images and nothing else: no task is named. The **relevance** is
# what the gate found: how much each task's adapter has to say about an image.

# %%
import numpy as np

from qkd_jax.runs.plan import plan

state, class_names, config = qkd_jax.load_run(folder)
test = plan(config).data.test

rows = np.linspace(0, len(test) - 1, 6).astype(int)
images = test.load(rows, state.backbone)["image"]  # uint8 [6, H, W, 3]
scores, relevance = qkd_jax.predict_with_relevance(state, images)  # [6, classes], [6, tasks]
predicted = np.argmax(scores, axis=1)

for row, label in zip(rows, predicted):
    print(f"{test.ids[row]:40} -> {class_names[label]}")

# %%
# %matplotlib inline
import matplotlib.pyplot as plt

tasks = np.asarray(state.task_of_class)  # the task that brought each class
figure, axes = plt.subplots(2, len(rows), figsize=(2.2 * len(rows), 4), height_ratios=[3, 2], layout="constrained")
for column, (row, image) in enumerate(zip(rows, images)):
    true = test.labels[row]
    axes[0, column].imshow(image)
    axes[0, column].set_axis_off()
    right = predicted[column] == true
    axes[0, column].set_title(class_names[predicted[column]], fontsize=9, color="tab:green" if right else "tab:red")
    numbers = np.arange(relevance.shape[1])
    colours = np.where(numbers == tasks[true], "tab:blue", "lightgray")
    axes[1, column].bar(numbers + 1, relevance[column], color=colours)
    axes[1, column].set(ylim=(0, 1), xlabel="task", xticks=numbers + 1, yticks=[0, 1])
    axes[1, column].tick_params(labelsize=7)
axes[1, 0].set_ylabel("relevance")
figure.suptitle("Predicted class (green: right) and relevance of each task (blue: the image's own task)", fontsize=10)
plt.show()

# %% [markdown]
# ## Next
#
# - Another method on the same images: add `"--method", "ease"` (or `simplecil`, `finetune`) to `command`; it gets its own
#   folder and its own row in the table.
# - Another setting: `"--set", "gate.kind=cosine", "--variant", "cosine"`; `main(["list", "--settings"])` names
#   those that QKD reads, and with `"--method", "ease"` those of another method.
# - Your own loop around the five verbs: notebook 02. What the gate does: 03. Your own images: 04. Texts, and students
#   that learn from teachers: 05.
