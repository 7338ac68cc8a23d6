"""Answering with many adapters: all of them, or the k that an image asks for.

    python -m benchmarks.inference [--size 96] [--tasks 10 20 50 100] [--pairs 3]

QKD on a ViT-B/16 with an adapter of bottleneck 64 in every block for each of T tasks, ten classes
a task, random weights, float32. The peer answers as one would write it: a Python loop over the
adapters, each a compiled pass over the batch, then the same fused score. Routed inference makes a
pass for the gate and one for each of the k chosen adapters. Memory is what is kept (weights,
adapters, rows) and what the compiled programs need for a while, as XLA states it.
"""

import argparse
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.floors import BOTTLENECK, adapted_forward, block_flops, matmul_rate
from benchmarks.pairs import Row, check, compare, median_seconds, table
from benchmarks.transformer import vit_b16
from qkd_jax.engine import verbs
from qkd_jax.learners import passes
from qkd_jax.learners.shape import learner_of
from qkd_jax.learners.state import LearnerState
from qkd_jax.learners.task_adapters import adapter_of, encode_with
from qkd_jax.nn.backbone import Backbone
from qkd_jax.nn.inputs import Raw
from qkd_jax.nn.parameters import init_random
from qkd_jax.nn.vit import ViTSpec
from qkd_jax.settings.config import Config, Shapes, override

CLASSES_A_TASK = 10


def learned_state(spec: ViTSpec, num_tasks: int, *settings: str) -> LearnerState:
    """QKD as after `num_tasks` tasks, with random adapters and rows."""
    shapes = Shapes(
        num_classes=num_tasks * CLASSES_A_TASK,
        max_tasks=num_tasks,
        max_task_classes=CLASSES_A_TASK,
    )
    config = override(
        Config(method="qkd", shapes=shapes),
        f"backbone.image_size={spec.image_size}",
        f"adapter.bottleneck={BOTTLENECK}",
        "adapter.first_block=0",
        "fusion.frozen_weight=0",  # adapters are measured
        "data.augment=false",
        *settings,
    )
    backbone = Backbone(init_random(jax.random.key(0), spec), spec)
    state = verbs.init_state(jax.random.key(1), backbone, config)
    memory = dict(state.memory)
    for i, name in enumerate(("adapters", "rows", "whitened_rows", "class_means")):
        if name in memory:
            memory[name] = random_like(jax.random.key(2 + i), memory[name])
    owner = jnp.repeat(jnp.arange(num_tasks, dtype=jnp.int32), CLASSES_A_TASK)
    return state.replace(memory=memory, task=jnp.int32(num_tasks - 1), task_of_class=owner)


def random_like(key: jax.Array, tree):
    """Normal numbers of deviation 0.02, as large as trained adapters' are."""
    leaves, treedef = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(leaves))
    drawn = [0.02 * jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)]
    return treedef.unflatten(drawn)


@jax.jit
def one_pass(state: LearnerState, images: jax.Array, slot: jax.Array) -> jax.Array:
    return encode_with(state, adapter_of(state, slot), Raw({"image": images}))


def looped(state: LearnerState, images: jax.Array) -> jax.Array:
    """A pass after the other, from Python."""
    features = [one_pass(state, images, jnp.int32(slot)) for slot in range(int(state.task) + 1)]
    return verbs.one_device().score(state, jnp.stack(features, axis=1))[0]


def all_adapters(state: LearnerState, images: jax.Array) -> jax.Array:
    return verbs.one_device().score(state, verbs.slot_features(state, images))[0]


def routed(state: LearnerState, images: jax.Array) -> jax.Array:
    return verbs.predict(state, images)


def temporary_bytes(function, *arguments) -> int:
    return function.lower(*arguments).compile().memory_analysis().temp_size_in_bytes


def memory_rows(state: LearnerState, images: jax.Array, name: str) -> Iterator[Row]:
    """Of all slots in one program, beside that of one pass: with what both hold, and alone."""
    num_slots = learner_of(state.config).num_slots(state.config)
    empty = jnp.zeros((len(images), num_slots, state.backbone.spec.width))
    slots = jnp.arange(num_slots, dtype=jnp.int32)
    mib = 1024.0**2
    held = sum(leaf.nbytes for leaf in jax.tree.leaves((state.backbone, state.memory))) / mib
    arguments = (Raw({"image": images}), empty, slots, jnp.int32(num_slots))
    ours = temporary_bytes(jax.jit(passes.extract), state, *arguments)
    peer = temporary_bytes(one_pass, state, images, jnp.int32(0))
    ours, peer = ours / mib, peer / mib
    for what, kept in (("memory", held), ("temporary memory alone", 0.0)):
        found = kept + ours, kept + peer
        note = f"weights and adapters, {held:.0f}, on both sides" if kept else ""
        yield Row(
            f"{what}: {name}",
            *found,
            "one pass",
            "MiB",
            found[1] / found[0],
            round(1 / 1.2, 2),
            note,
        )


def rows(size: int, tasks: tuple[int, ...], pairs: int, spec_of=vit_b16) -> Iterator[Row]:
    spec = spec_of(size)
    generator = np.random.default_rng(0)
    across: dict[int, float] = {}
    peak = matmul_rate(8 * spec.num_tokens)
    for num_tasks in tasks:
        state = learned_state(spec, num_tasks)
        for batch in (1, 8) if num_tasks == min(tasks) else (8,):
            images = jnp.asarray(generator.random((batch, size, size, 3), np.float32))
            name = f"all adapters, T = {num_tasks}, {size} px, batch {batch}"
            check(name, *(np.asarray(f(state, images)) for f in (all_adapters, looped)))

            def ours(state=state, images=images):
                return jax.block_until_ready(all_adapters(state, images))

            def peer(state=state, images=images):
                return jax.block_until_ready(looped(state, images))

            repeats = pairs if num_tasks < 50 else 2  # a call takes half a minute there
            everything = compare(
                name, ours, peer, "loop over adapters, jit", 1.1, pairs=repeats, warm=True
            )
            # Up to the MLP of block 0 there is one pass for all adapters.
            again = adapted_forward(spec) - block_flops(spec)
            rate = batch * (num_tasks * again + block_flops(spec)) / (everything.ours / 1e3)
            share = f"{rate / 1e9:.0f} of {peak / 1e9:.0f} GFLOP/s, {100 * rate / peak:.0f} %"
            yield everything._replace(note=share)
            yield from memory_rows(state, images, name)
        for top_k in (1, 2, 3):
            config = override(state.config, "fusion.kind=routed", f"fusion.top_k={top_k}")
            few = state.replace(config=config)

            def chosen(few=few, images=images):
                return jax.block_until_ready(routed(few, images))

            found = 1e3 * median_seconds(chosen, pairs)
            if top_k == 2:
                across[num_tasks] = found
            yield Row(
                f"routed, k = {top_k}, T = {num_tasks}, {size} px, batch 8",
                found,
                everything.ours,
                "all adapters, ours",
                "ms",
                everything.ours / found,
                0.0,
                "beside the row above, not in turn with it",
            )
    few, many = min(across), max(across)
    if few < many:
        yield Row(
            f"routed, k = 2: T = {many} beside T = {few}",
            across[many],
            across[few],
            f"T = {few}",
            "ms",
            across[few] / across[many],
            round(1 / 1.2, 2),
            "two rows above; constant cost would be 1",
        )


def main(arguments: list[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--tasks", type=int, nargs="+", default=(10, 20, 50, 100))
    parser.add_argument("--pairs", type=int, default=3)
    options = parser.parse_args(arguments)
    found = list(rows(options.size, tuple(options.tasks), options.pairs))
    print(table(found), flush=True)
    return found


if __name__ == "__main__":
    main()
