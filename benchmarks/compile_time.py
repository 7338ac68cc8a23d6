"""Seconds until the first step: compiling ours beside plain JAX, and how fast each then is.

    python -m benchmarks.compile_time [--size 96] [--batch 16] [--pairs 3]

The step of `transformer.py`, ViT-B/16, traced, lowered and compiled anew each time, without the
persistent cache. Ours has two forms: blocks unrolled (the default, fastest on a CPU) and one block
scanned. The peer, `plain_jax.py`, gives the same losses.
"""

import argparse
import statistics
import time
from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.pairs import Row, check, compare, table
from benchmarks.plain_jax import make_step
from benchmarks.transformer import (
    LEARNING_RATE,
    MOMENTUM,
    examples,
    our_step,
    step_state,
    vit_b16,
)
from qkd_jax.learners.state import split
from qkd_jax.learners.step import device_step
from qkd_jax.nn.backbone import Backbone, stack_blocks
from qkd_jax.nn.inputs import Raw


def compile_seconds(make, *arguments) -> float:
    """Of a fresh function, from tracing to a program."""
    jax.clear_caches()
    began = time.perf_counter()
    make().lower(*arguments).compile()
    return time.perf_counter() - began


def rows(size: int, batch: int, pairs: int, spec_of=vit_b16) -> Iterator[Row]:
    jax.config.update("jax_enable_compilation_cache", False)
    spec = spec_of(size)
    backbone, images, labels = examples(spec, batch)
    on_device = jnp.asarray(images), jnp.asarray(labels)
    plain, init = make_step(spec, LEARNING_RATE, MOMENTUM)
    trainable = our_step(backbone, images, labels).trainable
    opt_state = init(trainable)
    theirs = (backbone.params, trainable, opt_state, *on_device)
    forms = {
        "blocks unrolled": backbone,
        "blocks scanned": Backbone(stack_blocks(backbone.params), spec),
    }
    compiled = {}
    for name, model in forms.items():
        held, moving = split(step_state(model))
        given = {"inputs": Raw({"image": on_device[0]}), "label": on_device[1]}
        given["mask"] = jnp.ones(len(labels), bool)
        ours = (held, moving, given)
        times = [
            (
                compile_seconds(partial(jax.jit, lambda h, m, b: device_step(h, m, b)), *ours),
                compile_seconds(partial(jax.jit, lambda *a: plain(*a)), *theirs),
            )
            for _ in range(pairs)
        ]
        compiled[name] = our_step(model, images, labels)
        yield Row(
            f"compiling the step, {name}, {size} px",
            statistics.median(a for a, _ in times),
            statistics.median(b for _, b in times),
            "plain JAX, blocks unrolled",
            "s",
            statistics.median(b / a for a, b in times),
            3.0,
        )
    run, holder = jax.jit(plain, donate_argnums=(1, 2)), [jax.device_put((trainable, opt_state))]

    def peer():
        *holder[0], loss = run(backbone.params, *holder[0], *on_device)
        return float(loss)

    for name, ours in compiled.items():
        if name == "blocks unrolled":
            for _ in range(3):  # the same losses, so the same gradients
                check("loss", np.float64(ours()), np.float64(peer()))
        yield compare(
            f"then the step, {name}, {size} px, batch {batch}", ours, peer, "plain JAX, jit", 0.0,
            pairs=pairs,
        )  # fmt: skip


def main(arguments: list[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--pairs", type=int, default=3)
    options = parser.parse_args(arguments)
    found = list(rows(options.size, options.batch, options.pairs))
    print(table(found), flush=True)
    return found


if __name__ == "__main__":
    main()
