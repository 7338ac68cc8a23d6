"""100 tasks, 1,000 classes: step time and memory against the task index; one compilation.

    python -m benchmarks.many_tasks [--tasks 100] [--classes 10]

QKD on a small transformer and synthetic images: per task some steps with the old adapters'
features kept, the end of the task, and an evaluation of its own test images by two routed passes.
The first tenth of the tasks stands beside the last.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np

from benchmarks.pairs import Row, table
from qkd_jax.data.packaged import synthetic
from qkd_jax.engine import verbs
from qkd_jax.nn.backbone import Backbone
from qkd_jax.nn.parameters import init_random
from qkd_jax.nn.vit import ViTSpec
from qkd_jax.protocol.tasks import class_order, split_tasks
from qkd_jax.settings.config import Config, Shapes, override

STEPS, IMAGES_A_CLASS, SIDE = 10, 2, 32
SPEC = ViTSpec(
    width=96, depth=4, num_heads=3, mlp_width=384, patch_size=8, image_size=SIDE, grid=SIDE // 8
)


def resident_mib() -> float:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1024**2


def measure(
    num_tasks: int,
    classes: int,
    *settings: str,
    steps: int = STEPS,
    augmented: bool = False,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Per task: seconds of a step, of the end of the task, of an evaluation; resident MiB; and how
    often the step was compiled.

    Augmented images are shifted anew in every step, so that no teacher's features can be kept.
    """
    data = synthetic(num_tasks * classes, IMAGES_A_CLASS, 1, SIDE)
    shapes = Shapes(num_classes=num_tasks * classes, max_tasks=num_tasks, max_task_classes=classes)
    config = override(
        Config(method="qkd", shapes=shapes),
        *(f"backbone.image_size={SIDE}", "data.augment=false"),
        *("adapter.bottleneck=16", "fusion.kind=routed", "fusion.top_k=2"),
        "fusion.frozen_weight=0",  # adapters are measured
        *settings,
    )
    backbone = Backbone(init_random(jax.random.key(0), SPEC), SPEC)
    state = verbs.init_state(jax.random.key(1), backbone, config)
    found = {"step": [], "end": [], "evaluation": [], "memory": []}
    compiled = verbs.one_device().compilations
    for task in split_tasks(class_order(num_tasks * classes, 0), 0, classes):
        train = data.train.take(np.flatnonzero(np.isin(data.train.labels, task.classes)))
        test = data.test.take(np.flatnonzero(np.isin(data.test.labels, task.classes)))
        images = train.load(np.arange(len(train)), backbone)["image"]
        batch = {"image": images, "label": train.labels}
        state = verbs.begin_task(state, task, steps)
        given = batch
        if not augmented:
            teachers = verbs.slot_features(state, images, tuple(range(task.index)))
            given = {**batch, "features": teachers}
        times = []
        for step in range(steps):
            if augmented:
                given = {**batch, "image": np.roll(images, 1 + step, axis=2)}
            began = clock()
            state, metrics = verbs.train_task(state, given)
            float(metrics["loss"])
            times.append(clock() - began)
        found["step"].append(statistics.median(times))
        began = clock()
        state = jax.block_until_ready(verbs.end_task(state, [batch]))
        found["end"].append(clock() - began)
        asked = test.load(np.arange(len(test)), backbone)["image"]
        began = clock()
        jax.block_until_ready(verbs.predict(state, asked))
        found["evaluation"].append(clock() - began)
        found["memory"].append(resident_mib())
    return {**found, "compilations": [verbs.one_device().compilations - compiled]}


FLAT = round(1 / 1.1, 2)
KEPT = (
    ("step", "a step, teachers' features kept", 1e3, "ms", FLAT),
    ("evaluation", "an answer, routed to two adapters", 1e3, "ms", FLAT),
    ("end", "the end of a task, a pass of every adapter", 1e3, "ms", 0.0),
    ("memory", "resident memory", 1.0, "MiB", FLAT),
)


def rows(num_tasks: int, classes: int) -> Iterator[Row]:
    yield from rows_of(measure(num_tasks, classes), classes, KEPT)


def rows_of(found: dict[str, list[float]], classes: int, named: tuple) -> Iterator[Row]:
    """The last tenth of the tasks beside the first, for what `measure` found.

    Args:
      named: (key of `found`, what it is, factor, unit, goal) of every row.
    """
    num_tasks = len(found["step"])
    tenth = max(1, num_tasks // 10)
    (programs,) = found["compilations"]
    for key, name, scale, unit, goal in named:
        # Not the first two tasks: there things are compiled.
        early = statistics.median(found[key][2 : 2 + tenth])
        late = statistics.median(found[key][-tenth:])
        yield Row(
            f"{name}: tasks {num_tasks - tenth + 1}-{num_tasks} of {num_tasks}",
            scale * late,
            scale * early,
            f"tasks 3-{2 + tenth}",
            unit,
            early / late,
            goal,
            f"{num_tasks * classes:,} classes; the step was compiled {programs} times",
        )


def main(arguments: list[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", type=int, default=100)
    parser.add_argument("--classes", type=int, default=10, help="of a task")
    options = parser.parse_args(arguments)
    found = list(rows(options.tasks, options.classes))
    print(table(found), flush=True)
    return found


if __name__ == "__main__":
    main()
