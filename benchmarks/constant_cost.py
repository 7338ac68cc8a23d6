"""QKD at 10, 100 and 300 tasks: a step on augmented images, an answer, the gate, what is kept.

    taskset -c 0 python -m benchmarks.constant_cost [--tasks 10 100 300] [--rounds 3]

With `distillation.top_k=2` and `fusion.top_k=2` a step and an answer run three old adapters of each
image, however many there are. ViT-Ti/16's shape, so small that whatever else grows would show;
adapters in every block, ten classes per task, one row for each class (`head.prototypes=own`),
random weights. Each round times every number of tasks in turn. At the end a stream of as many tasks
is learned by a still smaller transformer, whose steps are also timed in turn.

The clock is the process's own CPU time, so that others on the same machine do not count; on an
accelerator it says nothing.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.inference import CLASSES_A_TASK, learned_state, routed
from benchmarks.many_tasks import FLAT, measure, rows_of
from benchmarks.many_tasks import SPEC as SMALLER
from benchmarks.pairs import Row, check, table
from benchmarks.transformer import batch_of, vit_b16
from qkd_jax.engine import verbs
from qkd_jax.learners.qkd import gate
from qkd_jax.learners.state import LearnerState, split
from qkd_jax.nn.backbone import Backbone
from qkd_jax.nn.losses import MASKED
from qkd_jax.nn.parameters import init_random
from qkd_jax.nn.vit import ViTSpec
from qkd_jax.protocol.tasks import Task
from qkd_jax.settings.config import Config, Shapes, override

SPEC = ViTSpec(
    width=192, depth=12, num_heads=3, mlp_width=768, patch_size=16, image_size=96, grid=6
)
TOP_K = 2
SETTINGS = ("head.prototypes=own", "fusion.kind=routed", f"fusion.top_k={TOP_K}")
FEW = f"distillation.top_k={TOP_K}"
STREAM = (
    ("step", "stream: a step on augmented images, two teachers", 1e3, "ms", FLAT),
    ("evaluation", "stream: an answer, routed to two adapters", 1e3, "ms", FLAT),
    ("end", "stream: the end of a task, two passes", 1e3, "ms", FLAT),
    ("memory", "stream: resident memory", 1.0, "MiB", FLAT),
)


def in_turn(calls: dict, rounds: int) -> dict:
    """CPU seconds of each call, one after the other in every round; the first calls compile."""
    for call in calls.values():
        call()
    found: dict = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            began = time.process_time()
            call()
            found[name].append(time.process_time() - began)
    return found


def row_of(name: str, found: list[float], peer: list[float], peer_name: str, goal: float) -> Row:
    ratio = statistics.median(b / a for a, b in zip(found, peer, strict=True))
    mine, theirs = (1e3 * statistics.median(times) for times in (found, peer))
    return Row(name, mine, theirs, peer_name, "ms", ratio, goal, "CPU time")


def after_tasks(state: LearnerState, count: int) -> LearnerState:
    """`state`, in which all tasks are learned, as after its first `count` tasks."""
    seen = jnp.arange(len(state.task_of_class)) < count * CLASSES_A_TASK
    owner = jnp.where(seen, state.task_of_class, -1)
    return state.replace(task=jnp.int32(count - 1), task_of_class=owner)


def step_of(state: LearnerState, batch: int) -> Callable[[], float]:
    """A step of the next task on images that are new to every adapter."""
    index = int(state.task) + 1
    first, size = index * CLASSES_A_TASK, state.backbone.spec.image_size
    task = Task(index, tuple(range(first, first + CLASSES_A_TASK)))
    held, moving = split(verbs.one_device().open_task(state, task))
    generator = np.random.default_rng(0)
    images = generator.random((batch, size, size, 3), np.float32)
    labels = first + generator.integers(0, CLASSES_A_TASK, batch).astype(np.int32)
    # What a step takes is donated, and states may share it.
    given, holder = batch_of(images, labels), [jax.tree.map(jnp.copy, moving)]

    def call():
        holder[0], metrics = verbs.one_device().step(held, holder[0], given)
        loss = float(metrics["loss"])
        if not np.isfinite(loss):
            raise AssertionError(f"loss became {loss}")
        return loss

    return call


def last_step(spec: ViTSpec, num_tasks: int, batch: int, *settings: str) -> Callable[[], float]:
    """A step of the last of `num_tasks` tasks."""
    state = learned_state(spec, num_tasks, "adapter.dropout=0.0", *SETTINGS, *settings)
    return step_of(after_tasks(state, num_tasks - 1), batch)


def step_rows(spec: ViTSpec, tasks: tuple[int, ...], batch: int, rounds: int) -> Iterator[Row]:
    calls: dict = {num_tasks: last_step(spec, num_tasks, batch, FEW) for num_tasks in tasks}
    calls["all"] = last_step(spec, tasks[0], batch)
    found, sizes = in_turn(calls, rounds), f"{spec.image_size} px, batch {batch}"
    name = f"step, augmented, two teachers, T = {{}}, {sizes}".format
    for num_tasks in tasks[1:]:
        times = found[num_tasks], found[tasks[0]]
        yield row_of(name(num_tasks), *times, f"T = {tasks[0]}", FLAT)
    times = found[tasks[0]], found["all"]
    yield row_of(name(tasks[0]), *times, f"all {tasks[0] - 1} old adapters as teachers", 0.0)


def answer_rows(spec: ViTSpec, tasks: tuple[int, ...], batch: int, rounds: int) -> Iterator[Row]:
    images = jnp.asarray(
        np.random.default_rng(1).random((batch, spec.image_size, spec.image_size, 3), np.float32)
    )
    calls = {}
    for num_tasks in (tasks[0], tasks[-1]):
        state = learned_state(spec, num_tasks, *SETTINGS)
        calls[num_tasks] = lambda state=state: jax.block_until_ready(routed(state, images))
    found = in_turn(calls, rounds)
    name = f"answer, routed to two, T = {tasks[-1]}, {spec.image_size} px, batch {batch}"
    yield row_of(name, found[tasks[-1]], found[tasks[0]], f"T = {tasks[0]}", FLAT)


def within_rows(num_tasks: int, batch: int, rounds: int, spec: ViTSpec = SMALLER) -> Iterator[Row]:
    """One program, with few and with many of its tasks learned."""
    every = learned_state(spec, num_tasks, "adapter.bottleneck=16", *SETTINGS, FEW)
    images = jnp.asarray(
        np.random.default_rng(1).random((batch, spec.image_size, spec.image_size, 3), np.float32)
    )
    steps, answers = {}, {}
    early, late = max(1, num_tasks // 15), num_tasks - 1 - num_tasks // 20
    for count in (early, late):
        state = after_tasks(every, count)
        steps[count] = step_of(state, batch)
        answers[count] = lambda state=state: jax.block_until_ready(routed(state, images))
    for what, calls in (
        ("a step on augmented images, two teachers", steps),
        ("an answer, routed to two adapters", answers),
    ):
        found = in_turn(calls, 5 * rounds)
        name = f"{what}, with {late} tasks of {num_tasks} learned"
        yield row_of(name, found[late], found[early], f"with {early}", FLAT)


def every_pair(evidence: jax.Array, owner: jax.Array, num_tasks: int) -> jax.Array:
    """What `gate.relevance` sums over the anchors of each task, with all of them for every task."""
    pairs = (owner[:, None] == jnp.arange(num_tasks)[None])[None]
    spread = jnp.where(pairs, evidence[:, :, None], MASKED)
    return jax.nn.log_softmax(jax.nn.logsumexp(spread, axis=1), axis=-1)


def gate_rows(spec: ViTSpec, tasks: tuple[int, ...], batch: int, rounds: int) -> Iterator[Row]:
    """Relevance and its gradient for the query, beside a sum over every pair of class and task."""
    config = gate.GateSettings()
    for num_tasks in (tasks[0], tasks[-1]):
        size = num_tasks * CLASSES_A_TASK
        keys = jax.random.split(jax.random.key(2), 3)
        query = jax.random.normal(keys[0], (batch, spec.width))
        anchors = jax.random.normal(keys[1], (size, spec.width))
        cotangent = jax.random.normal(keys[2], (batch, num_tasks))
        owner, every = jnp.arange(size) // CLASSES_A_TASK, jnp.ones(num_tasks, bool)

        def ours(query, anchors, owner, every):
            return gate.relevance({}, config, query, anchors, owner, every).log_weights

        def theirs(query, anchors, owner, every):
            evidence = gate.similarity({}, config, query, anchors)[0] / config.temperature
            return every_pair(evidence, owner, len(every))

        calls, results = {}, {}
        for name, function in (("ours", ours), ("theirs", theirs)):
            slope = jax.jit(
                jax.value_and_grad(
                    lambda *arguments, f=function, c=cotangent: jnp.sum(c * f(*arguments))
                )
            )
            arguments = query, anchors, owner, every
            calls[name] = lambda s=slope, a=arguments: jax.block_until_ready(s(*a))
            results[name] = calls[name]()
        check("gate", results["ours"], results["theirs"])
        found = in_turn(calls, 5 * rounds)
        name = f"gate, value and gradient, {size:,} classes in {num_tasks} tasks, batch {batch}"
        peer_name = "a sum over every pair of class and task"
        yield row_of(name, found["ours"], found["theirs"], peer_name, 0.0)


def memory_rows(tasks: tuple[int, ...]) -> Iterator[Row]:
    """What a task adds, as the shapes of the state of ViT-B/16 say."""

    def bytes_of(tree) -> int:
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

    def kept(num_tasks: int, prototypes: str) -> tuple[int, int]:
        """(Bytes of all memory, bytes of the adapters in it)."""
        spec = vit_b16(224)
        shapes = Shapes(
            num_classes=num_tasks * CLASSES_A_TASK,
            max_tasks=num_tasks,
            max_task_classes=CLASSES_A_TASK,
        )
        own = (f"head.prototypes={prototypes}", "fusion.frozen_weight=0")  # adapters are measured
        config = override(Config(method="qkd", shapes=shapes), *own)

        def state(key):
            return verbs.init_state(key, Backbone(init_random(key, spec), spec), config)

        memory = jax.eval_shape(state, jax.random.key(0)).memory
        return bytes_of(memory), bytes_of(memory["adapters"])

    few, many = tasks[0], tasks[-1]

    def per_task(prototypes: str) -> np.ndarray:
        more = np.subtract(kept(many, prototypes), kept(few, prototypes))
        return more / (many - few) / 1024.0**2

    (own, adapters), (drift, _) = per_task("own"), per_task("drift")
    span, note, rest = f"{few} to {many} tasks", "counted from the shapes", own - adapters
    name = f"memory for each task, ViT-B/16, {span}, one row for each class"
    peer_name = "a row of every class in every slot (default)"
    yield Row(name, own, drift, peer_name, "MiB", drift / own, 0.0, note)
    name = f"of that on the device, adapters on the host, {span}"
    peer_name = "adapters on the device (default)"
    yield Row(name, rest, own, peer_name, "MiB", own / rest, 0.0, note)


def rows(tasks: tuple[int, ...], rounds: int, spec: ViTSpec = SPEC) -> Iterator[Row]:
    yield from memory_rows(tasks)
    yield from gate_rows(spec, tasks, 16, rounds)
    yield from answer_rows(spec, tasks, 8, rounds)
    yield from step_rows(spec, tasks, 16, rounds)
    yield from within_rows(tasks[-1], 16, rounds)
    stream = measure(
        *(tasks[-1], CLASSES_A_TASK, "head.prototypes=own", FEW),
        steps=2,
        augmented=True,
        clock=time.process_time,
    )
    yield from rows_of(stream, CLASSES_A_TASK, STREAM)


def main(arguments: list[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", type=int, nargs="+", default=(10, 100, 300))
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(arguments)
    found = []
    for row in rows(tuple(options.tasks), options.rounds):
        found.append(row)
        print(table([row]).splitlines()[-1], flush=True)
    print(f"\n{table(found)}", flush=True)
    return found


if __name__ == "__main__":
    main()
