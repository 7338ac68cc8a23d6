"""What a router could gain: ways to find the task of an image, on one finished run of QKD.

    python -m benchmarks.routers runs/renditions/qkd/seed1993 [--record FILE --name renditions]

Features of all slots are computed once; then each router gives the tasks of a test image weights,
from what the run keeps after its last task. For each: how often the task with the largest weight is
the right one, and the accuracy when the answer is that of this task's slot alone (`chosen`), of the
two slots with the largest weights (`two`), and of all slots, mixed by the weights (`mixed`); each
with the frozen model's part, if the run has one. Routers:

    fidelity      the run's own gate
    measurement   the pretty good measurement of three copies of whitened class means
    ridge         a linear ridge regression of the task on the whitened first feature, which is what
                  recursive least squares reach in any order of tasks; lambda by leave-one-out
    entropy       for each slot, the entropy of its own task's classes alone; the lowest wins
    product       fidelity times exp(-entropy)
    uniform       every slot counts the same; "chosen" is for a slot drawn at random
    oracle        the true task: more than this no router can reach
    newest        the last slot for every image

Beside them `answer`, from the run's predictions: how often its class is one of the right task.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qkd_jax.learners.qkd import fusion, measurement
from qkd_jax.learners.qkd.gate import GateSettings
from qkd_jax.learners.shape import learner_of
from qkd_jax.learners.state import LearnerState
from qkd_jax.nn.losses import entropy
from qkd_jax.reports.predictions import read_predictions
from qkd_jax.runs.load import load_run
from qkd_jax.runs.model import Model
from qkd_jax.runs.plan import Plan, plan
from qkd_jax.runs.provenance import provenance

LAMBDAS = tuple(10.0**k for k in range(-3, 5))


def slot_features(state: LearnerState, planned: Plan) -> tuple[np.ndarray, np.ndarray]:
    """Features of the training images in the first slot [N, D], and of the test images in every
    slot [N, T, D], after the last task.
    """
    model, classes = Model(state), range(state.config.shapes.num_classes)
    train, test = (model.features_of(part) for part in planned.data)
    train.fill(state, [0], classes)
    test.fill(state, learner_of(state.config).slots.score(len(planned.tasks) - 1), classes)
    return train.values[:, 0], test.values


def own_entropy(logits: jax.Array, owner: jax.Array) -> jax.Array:
    """[N, T]: of the softmax over the classes of task t, in slot t."""
    slots = jnp.arange(logits.shape[1])
    own = jnp.where(owner[None, None] == slots[None, :, None], logits, -jnp.inf)
    return entropy(jax.nn.softmax(own, axis=2))


def ridge(train: np.ndarray, tasks: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Scores [N, T] of test [N, D]: ridge regression of the task's indicator, in float64, with the
    lambda of the least leave-one-out error.
    """
    x, queries = (np.c_[a, np.ones(len(a))].astype(np.float64) for a in (train, test))
    targets = np.eye(tasks.max() + 1)[tasks]
    left, values, right = np.linalg.svd(x, full_matrices=False)
    errors, weights = [], []
    for penalty in LAMBDAS:
        shrunk = values**2 / (values**2 + penalty)
        residual = targets - (left * shrunk) @ (left.T @ targets)
        leverage = np.sum(left**2 * shrunk, axis=1)
        errors.append(np.mean((residual / (1 - leverage)[:, None]) ** 2))
        weights.append((right.T * (values / (values**2 + penalty))) @ (left.T @ targets))
    return queries @ weights[int(np.argmin(errors))]


def routers(
    state: LearnerState, planned: Plan, train: np.ndarray, test: jax.Array
) -> tuple[dict[str, jax.Array], np.ndarray]:
    """Weights [N, T] of each router, and the true tasks [N]."""
    owner, learned = state.task_of_class, fusion.learned(state)
    logits = fusion.logits_in_all(state, test)
    fidelity = fusion.route(state, state.trainable["gate"], test[:, 0], learned).weights
    query, (vectors, _) = fusion.gate_inputs(state, test[:, 0]), fusion.anchors(state)
    settings = GateSettings(kind="measurement")
    root = measurement.root(vectors, owner >= 0, settings.copies, settings.ridge)
    measured = measurement.relevance(root, settings, query, vectors, owner, learned).weights
    true_tasks = np.asarray(owner)[planned.data.test.labels]
    whitened = np.asarray(fusion.gate_inputs(state, jnp.asarray(train)))
    linear = ridge(whitened, np.asarray(owner)[planned.data.train.labels], np.asarray(query))
    unsure = own_entropy(logits, owner)
    product = fidelity * jnp.exp(-unsure)
    slots = len(planned.tasks)
    weights = {
        "fidelity": fidelity,
        "measurement": measured,
        "ridge": jax.nn.one_hot(np.argmax(linear, axis=1), slots),
        "entropy": jax.nn.softmax(-unsure, axis=1),
        "product": product / product.sum(axis=1, keepdims=True),
        "uniform": jnp.full((len(test), slots), 1 / slots),
        "oracle": jax.nn.one_hot(true_tasks, slots),
        "newest": jax.nn.one_hot(np.full(len(test), slots - 1), slots),
    }
    return weights, true_tasks


def rows(state: LearnerState, planned: Plan, train: np.ndarray, test: np.ndarray) -> dict[str, Any]:
    """Counts of images: `routed` right, answered right by the `chosen` slot, by the `two` of the
    largest weights and by all `mixed`, for each router; with a uniform one, which prefers no slot,
    `routed` and `chosen` are means over the slots.
    """
    test, labels, slots = jnp.asarray(test), planned.data.test.labels, len(planned.tasks)
    weights, true_tasks = routers(state, planned, train, test)

    def right(weights: jax.Array) -> int:
        scores = fusion.fused_scores(state, test, weights)
        return int(np.sum(np.asarray(jnp.argmax(scores, axis=1)) == labels))

    def kept(weights: jax.Array, count: int) -> jax.Array:
        shares, tasks = fusion.most_relevant(weights, count)
        return jnp.sum(shares[:, :, None] * jax.nn.one_hot(tasks, slots), axis=1)

    counts: dict[str, dict[str, float | None]] = {
        name: {
            "routed": int(np.sum(np.argmax(w, axis=1) == true_tasks)),
            "chosen": right(kept(w, 1)),
            "two": right(kept(w, 2)),
            "mixed": right(w),
        }
        for name, w in weights.items()
    }
    each = [right(jnp.tile(alone, (len(labels), 1))) for alone in jnp.eye(slots)]
    counts["uniform"] |= {
        "routed": round(len(labels) / slots, 1),
        "chosen": round(float(np.mean(each)), 1),
        "two": None,
    }
    return {"images": len(labels), "slots": each, "routers": counts}


def right_task(run: Path) -> float:
    """Percent of the test images for which the run's last answer is a class of the right task."""
    found = read_predictions(run)
    answer = found.predicted[-1]
    task_of_class = np.full(max(found.label.max(), answer.max()) + 1, -1)
    task_of_class[found.label] = found.task
    return float(100 * np.mean(task_of_class[answer] == found.task))


def table(recorded: dict[str, Any], answers: dict[str, float]) -> str:
    """The table of docs/results.md, in percent of the test images; `answers` by `right_task`."""
    lines = [
        "| router | stream | right task | chosen slot | best two | mixed |",
        "| --- | --- " + "| ---: " * 4 + "|",
    ]
    for router in next(iter(recorded.values()))["routers"]:
        for stream, found in recorded.items():
            counts = found["routers"][router].values()
            cells = ("–" if n is None else f"{100 * n / found['images']:.1f}" for n in counts)
            lines.append(f"| {router} | {stream} | {' | '.join(cells)} |")
    lines += [f"| answer | {s} | {found:.1f} | – | – | – |" for s, found in answers.items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--data", help="where the images of the run are now")
    parser.add_argument("--name", help="of the stream in the record")
    parser.add_argument("--record", type=Path)
    options = parser.parse_args()
    state = load_run(options.run).state
    planned = plan(state.config)
    found = rows(state, planned, *slot_features(state, planned))
    name = options.name or state.config.experiment
    print(table({name: found}, {name: right_task(options.run)}))
    if options.record:
        recorded = json.loads(options.record.read_text()) if options.record.exists() else {}
        code = {key: provenance()[key] for key in ("commit", "dirty")}
        settings = json.loads((options.run / "config.json").read_text())["data"]
        recorded[name] = {**found, "validation": settings["validation"], **code}
        options.record.write_text(json.dumps(recorded, indent=1) + "\n")


if __name__ == "__main__":
    main()
