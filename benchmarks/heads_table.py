"""Classifiers in closed form on the features of several methods, on held-out training styles.

    python -m benchmarks.heads_table [--methods simplecil aper] [--runs runs/held-out] [--write]
    python -m benchmarks.heads_table --methods qkd --set adapter.first_block=6 \
        adapter.start=random gate.temperature=0.3 gate.shrinkage=0.6 head.covariance=seen \
        fusion.frozen_weight=0 --write

Every method learns `renditions` once, with seed 1993 and its own classifier, on four of the six
training styles; the other two are the images that are classified (`data.validation=0.34`). The test
set is not read. Then each classifier in closed form is learned task by task from the features that
the method had when the task ended, and classifies by those it has after the last task: what a run
with `classifier.kind` set does. Random projections have 2,000 columns for all; every other setting
is the published one. `--write` records the counts in results/heads_table.json.
"""

import argparse
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from qkd_jax.learners.classifier import columns_read, new_classifier, solved, with_task
from qkd_jax.learners.shape import feature_width, learner_of
from qkd_jax.learners.state import LearnerState
from qkd_jax.nn.closed_form import HEADS
from qkd_jax.runs.load import load_run
from qkd_jax.runs.loop import run, run_folder
from qkd_jax.runs.model import Model
from qkd_jax.runs.plan import Plan, plan
from qkd_jax.settings.config import override
from qkd_jax.settings.experiments import load_experiment
from qkd_jax.weights.load import backbone_of

METHODS = ("simplecil", "aper", "qkd", "mos", "joint")
FEATURES = ("shared", "newest", "joined")
SETTINGS = ("data.validation=0.34",)
CLASSIFIERS = ("classifier.projection_dim=2000",)
RECORD = Path(__file__).parent / "results" / "heads_table.json"
# Left out where more than two slots are joined: an eigendecomposition of 7,680 x 7,680.
LEFT_OUT = {("anacp", "joined")}


def learned(method: str, extra: list[str], out: Path) -> tuple[LearnerState, Plan, int]:
    """(the state after the last task, the plan, images that its own classifier gets right)."""
    config = override(load_experiment("renditions").get_config(method), *SETTINGS, *extra)
    run(config, backbone_of(config.backbone), out, show_progress=True)
    folder = run_folder(out, config)
    correct = json.loads((folder / "matrix.json").read_text())["correct"]
    return load_run(folder).state, plan(config), sum(correct[-1])


def features_of(state: LearnerState, planned: Plan) -> tuple[np.ndarray, np.ndarray]:
    """Slot features [N, S, D] of the training images, each under the slots that were filled when
    its task ended, and of the held-out images under those of the last task. Slots never change.
    """
    model, slots = Model(state), learner_of(state.config).slots
    train, test = (model.features_of(part) for part in planned.data)
    for task in planned.tasks:
        train.fill(state, slots.score(task.index), task.classes)
    last = slots.score(len(planned.tasks) - 1)
    test.fill(state, last, range(state.config.shapes.num_classes))
    return train.values, test.values


def correct_with(state: LearnerState, planned: Plan, train, test, *settings: str) -> int:
    """Held-out images that a classifier in closed form gets right."""
    config = override(state.config, *CLASSIFIERS, *settings)
    slots = learner_of(config).slots
    state = state.replace(config=config)
    state = state.replace(classifier=new_classifier(state, slots, feature_width(state)))
    for task in planned.tasks:
        rows = planned.rows(task)
        state = state.replace(task=jnp.int32(task.index))
        state = with_task(state, slots, train[rows], planned.data.train.labels[rows])
    scores, _ = learner_of(config).score(solved(state), jnp.asarray(test))
    return int(np.sum(np.argmax(scores, axis=1) == planned.data.test.labels))


def row(method: str, extra: list[str], out: Path) -> dict:
    """The counts of one method: {"own": ..., "shared": {kind: ...}, ...}."""
    state, planned, own = learned(method, extra, out)
    train, test = features_of(state, planned)
    counts: dict = {"images": len(planned.data.test), "own": own}
    known: list = []
    for features in FEATURES:
        setting = f"classifier.features={features}"
        columns = columns_read(learner_of(state.config).slots, override(state.config, setting))
        if columns.tolist() in known:  # the method has one slot
            continue
        known.append(columns.tolist())
        counts[features] = {}
        for kind in HEADS:
            if (kind, features) in LEFT_OUT and columns.shape[1] > 2:
                continue
            kind_setting = f"classifier.kind={kind}"
            found = correct_with(state, planned, train, test, setting, kind_setting)
            counts[features][kind] = found
            print(f"{method} {features} {kind} {found / len(test):.1%}", flush=True)
    return counts


def table(counts: dict) -> str:
    """The table of docs/methods.md, in percent of the held-out images."""
    lines = [
        f"| method | features | own | {' | '.join(HEADS)} |",
        f"| --- | --- | {' | '.join(['---:'] * (len(HEADS) + 1))} |",
    ]
    for method, found in counts.items():
        for features in FEATURES:
            if features not in found:
                continue
            several = sum(name in found for name in FEATURES) > 1
            cells = [found["own"], *(found[features].get(kind) for kind in HEADS)]
            shown = ("–" if c is None else f"{100 * c / found['images']:.1f}" for c in cells)
            label = features if several else "one slot"
            lines.append(f"| `{method}` | {label} | {' | '.join(shown)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--set", nargs="+", default=[], metavar="key=value", dest="extra")
    parser.add_argument("--runs", type=Path, default=Path("runs/held-out"))
    parser.add_argument("--write", action="store_true", help=f"record the counts in {RECORD.name}")
    chosen = parser.parse_args()
    recorded = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    counts = recorded.get("counts", {})
    for method in chosen.methods:
        counts[method] = row(method, chosen.extra, chosen.runs)
        if chosen.write:
            settings = [*SETTINGS, *CLASSIFIERS]
            record = {"experiment": "renditions", "seed": 1993, "settings": settings}
            counts = {name: counts[name] for name in METHODS if name in counts}
            RECORD.write_text(json.dumps({**record, "counts": counts}, indent=1) + "\n")
    print(table(counts))


if __name__ == "__main__":
    main()
