"""The loss of drifting models: value and gradient, beside the authors' own JAX code.

    DRIFTING=FOLDER python -m benchmarks.drifting_field [--batch 256] [--width 768] [--pairs 7]

FOLDER is a checkout of lambertae/drifting, whose `drift_loss.py` imports einops; without one the
row says that the peer was not measured. One label, three temperatures, float32. The second row is
our own loss beside the matrix products that it cannot do without, alone: distances between samples
and targets, and three sums of targets.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gate import blocking
from benchmarks.pairs import Row, check, compare, median_seconds, table
from qkd_jax.generators.fields import TEMPERATURES, drifting_loss

BATCH, WIDTH = 256, 768


def authors() -> Callable | None:
    """(generated [1, B, D], positives [1, B, D]) -> losses [1], or None where there is no code."""
    if "DRIFTING" not in os.environ:
        return None
    clip = jnp.clip
    # As the argument was called in the versions of JAX that the code was written for.
    jnp.clip = lambda array, *bounds, a_min=None, **named: (
        clip(array, *bounds, **named) if a_min is None else clip(array, min=a_min)
    )
    sys.path.insert(0, os.environ["DRIFTING"])
    from drift_loss import drift_loss

    return lambda generated, positives: drift_loss(generated, positives)[0]


def matmuls(generated: jax.Array, positives: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Products of the sizes that the loss has, of numbers that mean nothing."""
    targets = jnp.concatenate([generated[0], positives[0]])
    dots = jnp.matmul(generated[0], targets.T, precision="highest")
    weights = jnp.concatenate([dots + k for k in range(len(TEMPERATURES))])
    return dots, jnp.matmul(weights, targets, precision="highest")


def rows(batch: int, width: int, pairs: int) -> Iterator[Row]:
    draws = np.random.default_rng(0)
    arrays = [jnp.asarray(draws.normal(size=(1, batch, width)), jnp.float32) for _ in range(2)]
    arrays[1] = arrays[1] + 0.1

    def value_and_gradient(losses):
        return jax.jit(jax.value_and_grad(lambda *arrays: jnp.sum(losses(*arrays))))

    name = f"drifting loss, value and gradient, {batch} + {batch} of width {width}"
    ours, theirs = value_and_gradient(drifting_loss), authors()
    run = blocking(ours, arrays)
    if theirs is None:
        mine = 1e3 * median_seconds(run, pairs)
        missing = float("nan")
        yield Row(name, mine, missing, "the authors' JAX code", "ms", missing, 1.0, "no checkout")
    else:
        peer = value_and_gradient(theirs)
        check("the authors' code", peer(*arrays), ours(*arrays))
        yield compare(name, run, blocking(peer, arrays), "the authors' JAX code", 1.0, pairs=pairs)
    floor = blocking(jax.jit(matmuls), arrays)
    yield compare(name, run, floor, "its matrix products alone", 0.0, pairs=pairs)


def main(arguments: list[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--width", type=int, default=WIDTH)
    parser.add_argument("--pairs", type=int, default=7)
    options = parser.parse_args(arguments)
    found = list(rows(options.batch, options.width, options.pairs))
    print(table(found), flush=True)
    return found


if __name__ == "__main__":
    main()
