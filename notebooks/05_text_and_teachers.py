# %% [markdown]
# # Texts, and students that learn from teachers
#
# The same library reads texts: dictionary definitions on a frozen sentence encoder. Two methods learn every task from a
# teacher that learned it first: `cdl`, a small vision transformer with prompts, from a large one, and `qd_llm`, a circuit
# of eleven qubits, from a classifier of texts.

# %% [markdown]
# ## QKD on texts
#
# 38 classes of definitions (what is *a bird that sings*: an animal, a person, an act?) in 12 tasks.

# %%
import json

from qkd_jax.cli import main

TEXTS = ["--set", "train.epochs=1", "--set", "data.num_classes=8", "--set", "protocol.base=0"] if SMOKE else []
TEXTS += ["--set", "protocol.increment=4", "--set", "backbone.name=tiny_random_text"] if SMOKE else []
TEXTS += ["--set", "adapter.first_block=0"] if SMOKE else []


def run(*command):
    if main(["run", *command, "--out", RUNS, "--no-report"]):
        raise RuntimeError("Stopped; the reason stands above. Running this cell again continues the run.")


run("glosses", *TEXTS)

# %%
folder = Path(RUNS) / "glosses" / "qkd" / "seed1993"
main(["predict", str(folder), "a bird that sings at night", "to move very fast", "--top", "3"])

# %% [markdown]
# ## A circuit that learns from a classifier
#
# `qd_llm` reduces a text's feature to eleven angles, runs a circuit of eleven qubits, and reads one number from each.
# It is trained on all classes at once, from labels and from the outputs of a linear classifier. Beside it always stand
# its *twins*, with the circuit replaced by a cosine or a tanh: nearly as many parameters, and no quantum in it.

# %%
JOINT = ["--set", "train.epochs=1", "--set", "data.num_classes=8"] if SMOKE else []
JOINT += ["--set", "backbone.name=tiny_random_text"] if SMOKE else []
found = {}
for variant in ("circuit", "cos", "tanh"):
    changed = [] if variant == "circuit" else ["--set", f"qd_llm.student={variant}"]
    run("glosses", "--method", "qd_llm", "--variant", variant, *changed, *JOINT)
    summary = json.loads((Path(RUNS) / "glosses" / f"qd_llm-{variant}" / "seed1993" / "summary.json").read_text())
    found[variant] = summary["last_accuracy"]
    found["teacher"] = summary["teacher"]["last_accuracy"]
print({name: round(accuracy, 1) for name, accuracy in found.items()})

# %% [markdown]
# The trained circuit for one text, as a program that other frameworks read:

# %%
program = Path("bird.qasm")
circuit = Path(RUNS) / "glosses" / "qd_llm-circuit" / "seed1993"
main(["export-circuit", str(circuit), "--text", "a bird that sings at night", "--out", str(program)])
print(*program.read_text().splitlines()[:14], "...", sep="\n")

# %% [markdown]
# ## A small transformer that learns from a large one
#
# `cdl` gives the prompts of a continual learner (here APT's, one additive prompt for each block) to a small transformer,
# and lets each task's prompts imitate what a ViT-B/16 of the same method says. Two tasks of five classes, to see it work:
# 30 test images cannot tell the two students apart. `docs/results.md` has whole streams.

# %%
SMALL = ["--set", "cdl.host=apt", "--set", f"data.num_classes={4 if SMOKE else 10}"]
SMALL += ["--set", f"protocol.increment={2 if SMOKE else 5}"]
EXPERIMENT = "smoke" if SMOKE else "renditions"
found = {}
for form in ("none", "kdp"):
    run(EXPERIMENT, "--method", "cdl", "--variant", form, "--set", f"cdl.form={form}", *SMALL)
    summary = json.loads((Path(RUNS) / EXPERIMENT / f"cdl-{form}" / "seed1993" / "summary.json").read_text())
    found["student alone" if form == "none" else "student, taught"] = summary["last_accuracy"]
    if "teacher" in summary:
        found["teacher"] = summary["teacher"]["last_accuracy"]

# %%
# %matplotlib inline
import matplotlib.pyplot as plt

figure, axis = plt.subplots(figsize=(4.6, 2.2), layout="constrained")
axis.barh(list(found), list(found.values()), color=["tab:gray", "tab:blue", "tab:orange"])
axis.set(xlabel="accuracy after the last task (%)", xlim=(0, 100))
plt.show()

# %% [markdown]
# ## Next
#
# - Texts of your own: `main(["run", "texts", "--data", "/path"])` with `train/<class>.txt`, one text a line.
# - Soft prompts for texts: methods `q_tuning`, `prog_prompt`, `prompt_per_task` (`docs/texts.md`).
# - How each of these systems works, and what could not be verified: `docs/distillation.md`.
