"""The cost of a QKD run in operations, bytes and collectives: arithmetic, checked against XLA.

    python -m benchmarks.cost_model

Prints the tables of docs/scale.md. One multiplication and addition are two operations; matrix
products alone are counted by hand, XLA's own analysis counts everything else too. Seconds are
operations over peak times an assumed utilisation: nothing here was timed on the accelerators.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.floors import BOTTLENECK, adapted_forward, backward, forward_flops
from benchmarks.transformer import step_state, vit_b16
from qkd_jax.learners.state import split
from qkd_jax.learners.step import device_step
from qkd_jax.nn.backbone import Backbone
from qkd_jax.nn.encode import encode
from qkd_jax.nn.inputs import Raw
from qkd_jax.nn.vit import ViTSpec


class Stream(NamedTuple):
    """A benchmark of the paper: images, classes, classes a task."""

    name: str
    train: int
    test: int
    classes: int
    increment: int
    epochs: int = 20
    batch: int = 32

    @property
    def tasks(self) -> int:
        return self.classes // self.increment


STREAMS = (
    Stream("CIFAR-100", 50_000, 10_000, 100, 10),
    Stream("CUB-200", 9_430, 2_358, 200, 20),
    Stream("ImageNet-R", 24_000, 6_000, 200, 20),
    Stream("ImageNet-A", 5_981, 1_519, 200, 10),
    Stream("VTAB-50", 1_796, 8_619, 50, 10),
)


class Machine(NamedTuple):
    """Peak operations and bytes a second of a device, from the makers' sheets. The CPU's operations
    are those that `floors.matmul_rate` found, its bytes were not measured (0).
    """

    name: str
    devices: int
    flops: float
    bandwidth: float
    utilisation: float

    @property
    def rate(self) -> float:
        """Operations a second of all devices as they are assumed to be used."""
        return self.devices * self.flops * self.utilisation


MACHINES = (
    Machine("TPU v5e-8, bfloat16", 8, 197e12, 819e9, 0.4),
    Machine("one H100 SXM, bfloat16", 1, 989e12, 3.35e12, 0.4),
    Machine("2 cores of an EPYC (Zen 4), float32", 2, 105e9, 0.0, 0.9),
)


def counted_by_xla(spec: ViTSpec, batch: int) -> tuple[float, float]:
    """Operations of (a frozen forward pass, a step of an adapter and head), of one image."""
    params = spec.param_shapes()
    shape = (batch, spec.image_size, spec.image_size, 3)
    images = jax.ShapeDtypeStruct(shape, jnp.float32)
    labels = jax.ShapeDtypeStruct((batch,), jnp.int32)
    raw, mask = Raw({"image": images}), jax.ShapeDtypeStruct((batch,), jnp.bool)
    forward = jax.jit(lambda p, x: encode(Backbone(p, spec), x)).lower(params, raw).cost_analysis()
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), params)
    held, moving = split(step_state(Backbone(zeros, spec)))
    step = jax.jit(lambda h, m, b: device_step(h, m, b))
    given = {"inputs": raw, "label": labels, "mask": mask}
    step = step.lower(held, moving, given).cost_analysis()
    return forward["flops"] / batch, step["flops"] / batch


def run_flops(stream: Stream, spec: ViTSpec, cached_teachers: bool) -> dict[str, float]:
    """Operations of a whole run by what they are for."""
    a_pass, tasks = adapted_forward(spec), stream.tasks
    per_task = stream.train / tasks
    old = tasks * (tasks - 1) / 2  # sum over tasks of the old adapters
    teachers = per_task * old * (1 if cached_teachers else stream.epochs)
    return {
        "steps": stream.epochs * stream.train * (a_pass + backward(spec)),
        "teachers": teachers * a_pass,
        "ends": per_task * (tasks if cached_teachers else old + tasks) * a_pass,
        "tests": stream.test * tasks * a_pass,
    }


def naive_tests(stream: Stream, spec: ViTSpec) -> float:
    """Evaluating every adapter on every seen image after each task."""
    tasks = stream.tasks
    passes = sum((t + 1) * (t + 1) for t in range(tasks)) * stream.test / tasks
    return passes * adapted_forward(spec)


def duration(seconds: float) -> str:
    for limit, unit in ((90, 1), (5400, 60), (172_800, 3600)):
        if seconds < limit:
            return (
                f"{seconds / unit:.{0 if seconds / unit >= 10 else 1}f} "
                + {
                    1: "s",
                    60: "min",
                    3600: "h",
                }[unit]
            )
    return f"{seconds / 86400:.0f} days"


def counts_table(sizes: tuple[int, ...] = (96, 224), batch: int = 16) -> str:
    lines = [
        "| ViT-B/16, one image | by hand, GFLOP | XLA, GFLOP | XLA / hand |",
        "| --- | ---: | ---: | ---: |",
    ]
    for size in sizes:
        spec = vit_b16(size)
        forward, step = counted_by_xla(spec, batch)
        for name, hand, xla in (
            (f"frozen forward, {size} px", forward_flops(spec), forward),
            (
                f"step of adapters and head, {size} px",
                adapted_forward(spec) + backward(spec),
                step,
            ),
        ):
            lines.append(f"| {name} | {hand / 1e9:.2f} | {xla / 1e9:.2f} | {xla / hand:.3f} |")
    return "\n".join(lines)


def runs_table(spec: ViTSpec) -> str:
    names = " | ".join(machine.name for machine in MACHINES)
    lines = [
        f"| stream, {spec.image_size} px | tasks | steps | teachers | end of tasks | tests | "
        f"PFLOP in all | {names} | tests without keeping features |",
        "| --- |" + " ---: |" * (7 + len(MACHINES)),
    ]
    for stream in STREAMS:
        for cached in (False, True):
            parts = run_flops(stream, spec, cached)
            total = sum(parts.values())
            shares = " | ".join(f"{100 * value / total:.0f} %" for value in parts.values())
            times = " | ".join(duration(total / m.rate) for m in MACHINES)
            more = naive_tests(stream, spec) / parts["tests"]
            form = "no augmentation" if cached else "augmented"
            lines.append(
                f"| {stream.name}, {form} | {stream.tasks} | {shares} | {total / 1e15:.1f} | "
                f"{times} | {more:.1f} times |"
            )
    return "\n".join(lines)


def memory_table(spec: ViTSpec) -> str:
    """Bytes of what QKD keeps, as config and sizes give them."""
    width, gib = spec.width, 1024.0**3
    adapter = 4 * spec.depth * (2 * width * BOTTLENECK + BOTTLENECK + width)
    lines = [
        "| float32, GiB | 10 tasks, 100 classes | 100 tasks, 1,000 classes | "
        "1,000 tasks, 21,000 classes |",
        "| --- | ---: | ---: | ---: |",
    ]
    sizes = ((10, 100), (100, 1_000), (1_000, 21_000))
    kept = {
        "adapters": lambda t, c: t * adapter,
        "rows of every class in every slot (`head.prototypes=drift`)": lambda t, c: (
            2 * 4 * t * c * width
        ),
        "rows of every class once (`own`)": lambda t, c: 2 * 4 * c * width,
        "one metric per slot (with `drift`): scatter, factor": lambda t, c: 2 * 4 * t * width**2,
        "one metric (`own`)": lambda t, c: 2 * 4 * width**2,
        "test features of 100,000 images, every slot": lambda t, c: 4 * 100_000 * t * width,
    }
    for name, size in kept.items():
        row = " | ".join(f"{size(*s) / gib:,.3g}" for s in sizes)
        lines.append(f"| {name} | {row} |")
    return "\n".join(lines)


def step_table(batch: int = 32) -> str:
    """Of one step without teachers at 224 px: operations, bytes and what is sent."""
    spec = vit_b16(224)
    weights = sum(leaf.size for leaf in jax.tree.leaves(spec.param_shapes()))
    trained = spec.depth * (2 * spec.width * BOTTLENECK + BOTTLENECK + spec.width)
    trained += 20 * spec.width + 1
    flops = batch * (adapted_forward(spec) + backward(spec))
    # Read forward and backward; activations at least once written and read in every block.
    per_token = 6 * spec.width + 2 * spec.mlp_width + spec.num_heads * spec.num_tokens
    activations = 2 * batch * spec.num_tokens * spec.depth * per_token
    lines = [
        f"| step, 224 px, batch {batch} | |",
        "| --- | ---: |",
        f"| operations | {flops / 1e12:.2f} TFLOP |",
        f"| frozen weights read twice, float32 | {2 * 4 * weights / 1e6:.0f} MB |",
        f"| activations written and read, at least, bfloat16 | {2 * activations / 1e6:,.0f} MB |",
        f"| gradients averaged over devices, float32 | {4 * trained / 1e6:.1f} MB |",
    ]
    for m in MACHINES:
        compute = flops / m.rate
        line = f"| {m.name}: operations at {100 * m.utilisation:.0f} % of peak"
        times = f"{1e3 * compute:,.3g} ms" if compute < 1 else f"{compute:.3g} s"
        if m.bandwidth:
            # Every device reads all weights and its share of the activations.
            move = (2 * 4 * weights + 2 * activations / m.devices) / m.bandwidth
            line, times = f"{line}; bytes at full bandwidth", f"{times}; {1e3 * move:.2g} ms"
        lines.append(f"{line} | {times} |")
    return "\n".join(lines)


def main() -> None:
    print(counts_table(), step_table(), runs_table(vit_b16(224)), sep="\n\n")
    print("\n" + memory_table(vit_b16(224)))


if __name__ == "__main__":
    main()
