"""What QKD's step costs beyond a plain adapter's: the gate and the distillation.

    python -m benchmarks.qkd_step [--sizes 96 224] [--batch 16] [--pairs 5]

The tenth of ten tasks, ViT-B/16, adapters in every block, float32. The features of the nine old
adapters, the teachers, come with the batch, as in a run without augmentation. The plain step is
that of `transformer.py`: an adapter, a cosine head, cross-entropy.
"""

import argparse
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.inference import CLASSES_A_TASK, learned_state
from benchmarks.pairs import Row, compare, median_seconds, table
from benchmarks.transformer import batch_of, examples, our_step, vit_b16
from qkd_jax.engine import verbs
from qkd_jax.learners.qkd.fusion import route
from qkd_jax.learners.state import LearnerState, split
from qkd_jax.nn.vit import ViTSpec
from qkd_jax.protocol.tasks import Task

NUM_TASKS = 10
GATES = {
    "amplitude states (default)": (),
    "angle states, 9 qubits, trained": (
        "gate.encoding=angle",
        "gate.states=learned",
        "gate.whiten=false",
        "gate.num_qubits=9",
        "gate.freeze_after=-1",
    ),
}


def last_task(spec: ViTSpec, *settings: str) -> LearnerState:
    """QKD in its last task: nine adapters learned, the tenth begun."""
    state = learned_state(spec, NUM_TASKS, "adapter.dropout=0.0", *settings)
    first = (NUM_TASKS - 1) * CLASSES_A_TASK
    new = jnp.arange(NUM_TASKS * CLASSES_A_TASK) >= first
    owner = jnp.where(new, -1, state.task_of_class)
    state = state.replace(task=jnp.int32(NUM_TASKS - 2), task_of_class=owner)
    task = Task(NUM_TASKS - 1, tuple(range(first, first + CLASSES_A_TASK)))
    return verbs.one_device().open_task(state, task)


def qkd_step(state: LearnerState, images: np.ndarray, labels: np.ndarray) -> Callable[[], float]:
    """A step on images and their teachers' features; advances the state it holds."""
    held, moving = split(state)
    moving = jax.tree.map(jnp.copy, moving)  # what a step takes is donated
    teachers = 0.1 * np.random.default_rng(1).standard_normal(
        (len(images), NUM_TASKS, state.backbone.spec.width), np.float32
    )
    labels = labels + (NUM_TASKS - 1) * CLASSES_A_TASK
    batch = {**batch_of(images, labels), "features": jnp.asarray(teachers)}
    holder = [moving]

    def call():
        holder[0], metrics = verbs.one_device().step(held, holder[0], batch)
        loss = float(metrics["loss"])
        if not np.isfinite(loss):
            raise AssertionError(f"loss became {loss}")
        return loss

    return call


def gate_alone(state: LearnerState, batch: int) -> Callable[[], object]:
    """Relevance of the nine old tasks to a batch, and its gradient for the gate's parameters."""
    tasks = jnp.arange(NUM_TASKS)
    query = jax.random.normal(jax.random.key(5), (batch, state.backbone.spec.width))
    cotangent = jax.random.normal(jax.random.key(6), (batch, NUM_TASKS))

    @jax.jit
    def run(state, query):
        def objective(params):
            return jnp.sum(cotangent * route(state, params, query, tasks < state.task).weights)

        return jax.value_and_grad(objective)(state.trainable["gate"])

    return lambda: jax.block_until_ready(run(state, query))


def rows(sizes: tuple[int, ...], batch: int, pairs: int, spec_of=vit_b16) -> Iterator[Row]:
    for size in sizes:
        spec = spec_of(size)
        backbone, images, labels = examples(spec, batch)
        plain = our_step(backbone, images, labels)
        for name, settings in GATES.items():
            state = last_task(spec, *settings)
            gate = gate_alone(state, batch)
            step = qkd_step(state, images, labels)
            row = compare(
                f"QKD step, T = 10, {name}, {size} px, batch {batch}",
                step,
                plain,
                "plain adapter step, ours",
                round(1 / 1.15, 2),
                pairs=pairs,
            )
            yield row
            share = 1e3 * median_seconds(gate, pairs) / row.ours
            yield Row(
                f"gate of that step, {name}",
                100 * share,
                1.0,
                "the goal",
                "%",
                0.01 / share,
                1.0,
                "share of the step; timed alone",
            )


def main(arguments: list[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=(96, 224))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--pairs", type=int, default=5)
    options = parser.parse_args(arguments)
    found = list(rows(tuple(options.sizes), options.batch, options.pairs))
    print(table(found), flush=True)
    return found


if __name__ == "__main__":
    main()
