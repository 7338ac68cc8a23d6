"""The model card of an exported learner, as model hubs read it: YAML, then Markdown."""

import json
from collections.abc import Sequence
from typing import Any

from qkd_jax.reports.files import RunFiles

# Of summary.json, as docs/metrics.md defines them.
MEASURES = {
    "average_accuracy": "average accuracy, over stages, on all classes seen",
    "last_accuracy": "accuracy on all classes after the last task",
    "forgetting": "forgetting: best before the final stage minus final",
    "within_task_last_accuracy": "accuracy after the last task when the task is given",
    "routing_accuracy": "inputs whose most relevant task is the true one",
}
SHOWN_CLASSES = 30  # names in one task's row

OVERLAP = """\
**Pre-training overlap.** The frozen backbone was pre-trained on a large collection that may contain
the classes, and even some of the images or texts, of this stream. So these accuracies are not those
of classes that the model never met, and they are not comparable with runs on other weights.
"""


def model_card(
    run: RunFiles,
    class_names: Sequence[str],
    *,
    task_of_class: Sequence[int],
    licence: str,
    backbone: dict[str, str],
    reads_texts: bool,
) -> str:
    """The text of the card.

    Args:
      run: the files of the run that was exported.
      class_names: C names.
      task_of_class: [C], the task that brought each class; -1 = not learned.
      licence: of what was learned, as hubs abbreviate it.
      backbone: its name, licence and notes.
      reads_texts: whether inputs are texts, and not images.
    """
    summary, config = run.summary, run.config
    name = f"{summary.get('method', config.get('method'))} on {config.get('experiment')}"
    measured = {key: summary[key] for key in MEASURES if summary.get(key) is not None}
    return "\n".join(
        [
            _front_matter(run, name, measured, licence, reads_texts),
            f"# {name}\n",
            _method(run, backbone),
            _data(run, class_names, task_of_class),
            _metrics(run, measured),
            "## How to use\n",
            _usage(reads_texts),
            "## Limits\n",
            OVERLAP,
            "It answers with one of the classes above, whatever it is shown. Its scores are not "
            "calibrated.\n",
            "## Licence\n",
            f"What was learned: {licence}. The backbone `{backbone['name']}`, which is not in this "
            f"folder: {backbone['licence']}.\n",
        ]
    )


def _front_matter(
    run: RunFiles, name: str, measured: dict[str, float], licence: str, reads_texts: bool
) -> str:
    """The YAML block; JSON is YAML, so every value is written as JSON."""
    source = run.config.get("data", {}).get("source", "")
    kind = f"{'text' if reads_texts else 'image'}-classification"
    accuracies = {key: value for key, value in measured.items() if key.endswith("_accuracy")}
    results = [
        {
            "task": {"type": kind},
            "dataset": {"name": source, "type": source},
            "metrics": [
                {"type": "accuracy", "name": MEASURES[key], "value": round(value, 4)}
                for key, value in accuracies.items()
            ],
        }
    ]
    fields: dict[str, Any] = {
        "license": licence,
        "library_name": "qkd_jax",
        "pipeline_tag": kind,
        "tags": ["class-incremental-learning", "continual-learning", "jax"],
        "metrics": ["accuracy"],
        "model-index": [{"name": name, "results": results}],
    }
    lines = (f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in fields.items())
    return "\n".join(["---", *lines, "---", ""])


def _method(run: RunFiles, backbone: dict[str, str]) -> str:
    config, summary = run.config, run.summary
    section = config.get("backbone", {})
    size = section.get("image_size")
    reading = f", images of {size} pixels" if size else ""
    trained = summary.get("trainable_parameters")
    return (
        "## Method\n\n"
        f"Class-incremental learning by `{config.get('method')}` of qkd_jax on the frozen "
        f"transformer `{backbone['name']}`{reading}. {backbone['notes']}\n"
        + (f"\nNumbers trained in one task: {trained:,}.\n" if trained is not None else "")
        + f"\nSeed {config.get('seed')}; all settings are in `learner.json`.\n"
    )


def _data(run: RunFiles, class_names: Sequence[str], task_of_class: Sequence[int]) -> str:
    source = run.config.get("data", {}).get("source", "")
    fingerprint = run.environment.get("data_fingerprint", "")
    lines = [
        "## Data\n",
        f"`{source}`, {len(class_names)} classes"
        + f", split sha256 {fingerprint}" * bool(fingerprint)
        + ". Classes came in tasks; no example of an earlier task was kept.\n",
        "| task | classes |",
        "| ---: | --- |",
    ]
    for task in range(max(task_of_class, default=-1) + 1):
        own = [n for n, t in zip(class_names, task_of_class, strict=True) if t == task]
        more = f" and {len(own) - SHOWN_CLASSES} more" if len(own) > SHOWN_CLASSES else ""
        shown = ", ".join(own[:SHOWN_CLASSES]).replace("|", "\\|").replace("\n", " ")
        lines.append(f"| {task + 1} | {shown}{more} |")
    return "\n".join([*lines, ""])


def _metrics(run: RunFiles, measured: dict[str, float]) -> str:
    rows = [f"| {MEASURES[key]} | {value:.2f} |" for key, value in measured.items()]
    images = int(run.total[run.stages - 1].sum()) if run.stages else 0
    noun = run.environment.get("examples", "images")
    return "\n".join(
        [
            "## Metrics\n",
            f"One run with one seed, in percent, on {images} test {noun}; no task id is given at "
            "test time.\n",
            "| measure | % |",
            "| --- | ---: |",
            *rows,
            "",
        ]
    )


def _usage(reads_texts: bool) -> str:
    shown = '"a text to classify"' if reads_texts else "photo.jpg"
    inputs = 'qkd_jax.tokenize(trained.state.reader, ["a text"])' if reads_texts else "images"
    return (
        "With the library `qkd_jax` installed:\n\n"
        "```\n"
        f"qkd-jax predict FOLDER {shown}\n"
        "```\n\n"
        "```python\n"
        "import qkd_jax\n\n"
        'trained = qkd_jax.load_learner("FOLDER")  # this folder\n'
        f"scores = qkd_jax.predict(trained.state, {inputs})  # [B, classes]\n"
        "names = [trained.class_names[label] for label in scores.argmax(axis=1)]\n"
        "```\n"
    )
