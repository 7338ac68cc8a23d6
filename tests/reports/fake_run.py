"""A run folder whose every number is known, written without a run."""

import json

import numpy as np

from qkd_jax.protocol import metrics

CIRCUIT = """0: ──RY(0.10)─╭●────┤ ╭Probs
1: ──RY(0.20)─╰X─╭●─┤ ├Probs
2: ──RY(0.30)────╰X─┤ ╰Probs"""


def write_run(folder, num_tasks=3, finished=True, relevance=True, **summary):
    """A run of `num_tasks` tasks of 2 classes, 4 test images a class, one error in every task."""
    (folder / "predictions").mkdir(parents=True)
    correct, total = metrics.empty_matrix(num_tasks)
    task_of_class = np.repeat(np.arange(num_tasks), 2)
    for stage in range(num_tasks):
        labels = np.repeat(np.arange(2 * (stage + 1)), 4)
        predictions = labels.copy()
        predictions[::8] = (labels[::8] + 1) % (2 * num_tasks)
        correct, total = metrics.record(correct, total, stage, labels, predictions, task_of_class)
        arrays = {
            "id": np.array([f"image-{n}" for n in range(len(labels))]),
            "label": labels,
            "task": task_of_class[labels],
            "predicted": predictions,
            "top5": np.tile(predictions[:, None], 5),
        }
        if relevance:  # padded to the number of tasks, uniform but for the true task
            weights = np.where(np.arange(num_tasks) <= stage, 0.5 / (stage + 1), 0.0)
            arrays["relevance"] = np.tile(weights, (len(labels), 1))
            arrays["relevance"][np.arange(len(labels)), arrays["task"]] += 0.5
        np.savez(folder / f"predictions/after_task_{stage}.npz", **arrays)
    numbers = metrics.summarise(correct, total) | {
        "experiment": "toy",
        "method": "qkd",
        "variant": "",
        "seed": 1,
        "num_tasks": num_tasks,
        "routing_accuracy": 100.0,
        "wall_seconds": 12.5,
        "training_images_per_second": 800.0,
        "trainable_parameters": 1189632,
        "finished": finished,
    }
    matrix = {"correct": correct.tolist(), "total": total.tolist()}
    environment = {"note": "<script>alert(1)</script>"}
    for name, content in (
        ("summary", numbers | summary),
        ("matrix", matrix),
        ("config", {"method": "qkd", "seed": 1, "train": {"epochs": 5}}),
        ("environment", environment),
    ):
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    with open(folder / "metrics.jsonl", "w", encoding="utf-8") as stream:
        for step in range(6 * num_tasks):
            line = {"step": step, "task": step // 6, "images_seen": 32 * (step + 1)}
            line |= {"loss": 1 / (step + 1), "loss_ce": 0.9 / (step + 1), "epoch": 0}
            if step >= 6:
                line |= {"loss_kd": 0.1, "gate_entropy": 0.5, "note": None}
            stream.write(json.dumps(line) + "\n")
    (folder / "circuit.txt").write_text(CIRCUIT, encoding="utf-8")
    return correct, total
