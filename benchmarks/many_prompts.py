"""Q-tuning over 70 tasks: a step and memory at the first task and the last; a queue of all tasks.

    python -m benchmarks.many_prompts [--tasks 70] [--length 5]

A small text encoder with random weights and random tokens, two classes in each task. Q-tuning's
queue has room for five prompts, whatever the number of tasks; that of Progressive Prompts must have
room for all of them from the start, since shapes do not change within a run. Both keep one model
(`evaluation=final`). Three tasks are timed, the others take one step each. Each method has a
process of its own, so that its memory is its own.
"""

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import jax
import numpy as np

from benchmarks.many_tasks import resident_mib
from benchmarks.pairs import Row, table
from qkd_jax.engine import verbs
from qkd_jax.nn.backbone import Backbone
from qkd_jax.nn.bert import BertSpec
from qkd_jax.nn.parameters import init_random
from qkd_jax.protocol.tasks import Task
from qkd_jax.settings.config import Config, Shapes, override

STEPS, BATCH, CLASSES, TOKENS = 7, 8, 2, 24


class Measured(NamedTuple):
    """Of one method: per task the seconds of a step and resident MiB; and how often the step was
    compiled.
    """

    step: list[float]
    memory: list[float]
    programs: int


def told(num_tasks: int) -> tuple[int, int, int]:
    """The first task, the middle one and the last."""
    return 0, num_tasks // 2 - 1, num_tasks - 1


def measure(method: str, num_tasks: int, length: int) -> Measured:
    positions = TOKENS + length * (num_tasks + 1)
    spec = BertSpec(64, 2, 2, 256, vocabulary=1000, positions=positions, num_tokens=TOKENS)
    backbone = Backbone(init_random(jax.random.key(0), spec), spec, name="small")
    shapes = Shapes(CLASSES * num_tasks, num_tasks, CLASSES)
    own = [f"q_tuning.prefix_length={length}"] if method == "q_tuning" else []
    config = override(
        Config(method=method, shapes=shapes),
        *("train.optimizer=adam", "train.learning_rate=0.01", *own),
        *(f"{method}.prompt_length={length}", f"{method}.evaluation=final"),
    )
    state = verbs.init_state(jax.random.key(1), backbone, config)
    random, steps, memory = np.random.default_rng(0), [], []
    for index in range(num_tasks):
        classes = tuple(range(CLASSES * index, CLASSES * (index + 1)))
        batch = {
            "token_ids": random.integers(0, spec.vocabulary, (BATCH, TOKENS)),
            "token_mask": np.ones((BATCH, TOKENS), bool),
            "label": np.resize(classes, BATCH),
        }
        state = verbs.begin_task(state, Task(index, classes), STEPS)
        times = []
        for _ in range(STEPS if index in told(num_tasks) else 1):
            began = time.perf_counter()
            state, metrics = verbs.train_task(state, batch)
            float(metrics["loss"])
            times.append(time.perf_counter() - began)
        steps.append(statistics.median(times))
        state = verbs.end_task(state, [batch])
        memory.append(resident_mib())
    return Measured(steps, memory, verbs.one_device().compilations)


def rows(num_tasks: int, length: int) -> Iterator[Row]:
    spawn, found = multiprocessing.get_context("spawn"), {}
    for method in ("q_tuning", "prog_prompt"):
        with ProcessPoolExecutor(1, mp_context=spawn) as pool:
            found[method] = pool.submit(measure, method, num_tasks, length).result()
    ours, peer = found["q_tuning"], found["prog_prompt"]
    at = told(num_tasks)
    for name, key, scale, unit in (
        ("a step", "step", 1e3, "ms"),
        ("resident memory", "memory", 1.0, "MiB"),
    ):
        mine, theirs = (
            [scale * getattr(measured, key)[task] for task in at] for measured in (ours, peer)
        )
        values = ", ".join(f"{value:.3g}" for value in mine)
        yield Row(
            f"{name} of Q-tuning: task {num_tasks} of {num_tasks}",
            mine[-1],
            mine[0],
            "task 1",
            unit,
            mine[0] / mine[-1],
            round(1 / 1.1, 2),
            f"tasks {at[0] + 1}, {at[1] + 1}, {at[2] + 1}: {values} {unit}; the step was compiled "
            f"{ours.programs} times",
        )
        values = ", ".join(f"{value:.3g}" for value in theirs)
        yield Row(
            f"{name} of Q-tuning, room for 5 prompts of {length}",
            mine[-1],
            theirs[-1],
            f"Progressive Prompts, room for {num_tasks}",
            unit,
            theirs[-1] / mine[-1],
            0.0,
            f"theirs at the same tasks: {values} {unit}; compiled {peer.programs} times",
        )


def main(arguments: list[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", type=int, default=70)
    parser.add_argument("--length", type=int, default=5, help="rows of a prompt")
    options = parser.parse_args(arguments)
    found = list(rows(options.tasks, options.length))
    print(table(found), flush=True)
    return found


if __name__ == "__main__":
    main()
