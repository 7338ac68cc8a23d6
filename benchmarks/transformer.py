"""ViT-B/16: the forward pass, and one training step of a task's adapters and head, beside PyTorch.

    python -m benchmarks.transformer [--sizes 96 224] [--batch 16] [--pairs 5]

Float32, the same weights, images and threads. The step: cross-entropy of a cosine head, gradients
of the adapters in all blocks and of the head, SGD with momentum; the backbone is frozen on both
sides. Beside the times: the share of this machine's own rate of matrix products, measured in the
same run, that our forward pass reaches. Memory: the largest resident size of a process while it
makes some steps, over that between steps.
"""

import argparse
import ctypes
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.floors import BOTTLENECK, adapted_forward, backward, forward_flops, matmul_rate
from benchmarks.pairs import Row, check, compare, median_seconds, table
from qkd_jax.engine import verbs
from qkd_jax.learners.state import LearnerState, split
from qkd_jax.nn.backbone import Backbone
from qkd_jax.nn.encode import encode
from qkd_jax.nn.inputs import Raw
from qkd_jax.nn.parameters import init_random
from qkd_jax.nn.vit import ViTSpec
from qkd_jax.protocol.tasks import Task
from qkd_jax.settings.config import Config, Shapes, override

CLASSES = 10
LEARNING_RATE, MOMENTUM = 0.05, 0.9
COMPILED = "PyTorch, SDPA, torch.compile"


def vit_b16(size: int) -> ViTSpec:
    return ViTSpec(
        width=768,
        depth=12,
        num_heads=12,
        mlp_width=3072,
        patch_size=16,
        image_size=size,
        grid=size // 16,
    )


def step_state(backbone: Backbone, *settings: str) -> LearnerState:
    """`finetune` in its first task: an adapter in every block and a cosine head."""
    shapes = Shapes(num_classes=CLASSES, max_tasks=1, max_task_classes=CLASSES)
    config = override(
        Config(method="finetune", shapes=shapes),
        f"backbone.image_size={backbone.spec.image_size}",
        *(f"adapter.bottleneck={BOTTLENECK}", "adapter.dropout=0.0", "data.augment=false"),
        *(f"train.learning_rate={LEARNING_RATE}", f"train.momentum={MOMENTUM}"),
        *("train.weight_decay=0.0", "train.schedule=constant"),
        *settings,
    )
    state = verbs.init_state(jax.random.key(0), backbone, config)
    return verbs.one_device().open_task(state, Task(0, tuple(range(CLASSES))))


def batch_of(images: np.ndarray, labels: np.ndarray) -> dict:
    """What a step is given, on the device."""
    return {
        "inputs": Raw({"image": jnp.asarray(images)}),
        "mask": jnp.ones(len(images), bool),
        "label": jnp.asarray(labels),
    }


def our_step(
    backbone: Backbone, images: np.ndarray, labels: np.ndarray, *settings: str
) -> Callable[[], object]:
    """One step after the other."""
    held, moving = split(step_state(backbone, *settings))
    batch, holder = batch_of(images, labels), [moving]

    def call():
        holder[0], metrics = verbs.one_device().step(held, holder[0], batch)
        return float(metrics["loss"])

    call.trainable = jax.device_get(moving.trainable)
    return call


def torch_step(
    backbone,
    images,
    labels,
    trainable,
    prepare=lambda model: model,
    device: str = "cpu",
    dtype: str = "float32",
) -> Callable[[], object]:
    """`prepare`: what becomes of the model before its first step, such as `torch.compile`. Products
    are in `dtype` (autocast).
    """
    import torch
    from torch.nn import functional

    from benchmarks.torch_vit import Transformer, copy_weights

    model = Transformer(backbone.spec, BOTTLENECK)
    copy_weights(model, backbone.params, trainable["adapter"])
    model.to(device)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("adapter" in name)
    head = trainable["head"]
    rows = torch.tensor(np.array(head["rows"]), requires_grad=True, device=device)
    scale = torch.tensor(float(head["scale"]), requires_grad=True, device=device)
    trained = [p for p in model.parameters() if p.requires_grad] + [rows, scale]
    optimiser = torch.optim.SGD(trained, lr=LEARNING_RATE, momentum=MOMENTUM)
    pixels = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).to(device)
    targets = torch.from_numpy(labels).long().to(device)
    model = prepare(model)
    low = getattr(torch, dtype)

    def call():
        optimiser.zero_grad(set_to_none=True)
        with torch.autocast(device, low, enabled=low != torch.float32):
            found = model(pixels)
        features = functional.normalize(found.float(), dim=1)
        logits = scale * features @ functional.normalize(rows, dim=1).T
        loss = functional.cross_entropy(logits, targets)
        loss.backward()
        optimiser.step()
        return float(loss.detach())

    return call


def examples(spec: ViTSpec, batch: int) -> tuple[Backbone, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    images = generator.random((batch, spec.image_size, spec.image_size, 3), np.float32)
    labels = generator.integers(0, CLASSES, batch).astype(np.int32)
    return Backbone(init_random(jax.random.key(0), spec), spec), images, labels


def rows(sizes: tuple[int, ...], batch: int, pairs: int, spec_of=vit_b16) -> Iterator[Row]:
    import torch

    from benchmarks.torch_vit import Transformer, copy_weights

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    for size in sizes:
        spec = spec_of(size)
        backbone, images, labels = examples(spec, batch)
        peer = Transformer(spec)
        copy_weights(peer, backbone.params)
        pixels = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
        encoded = jax.jit(lambda backbone, inputs: encode(backbone, inputs)[:, 0])
        on_device = Raw({"image": jnp.asarray(images)})

        def ours(backbone=backbone, inputs=on_device, encoded=encoded):
            return jax.block_until_ready(encoded(backbone, inputs))

        def theirs(peer=peer, pixels=pixels):
            with torch.no_grad():
                return peer(pixels)

        def theirs_for_the_class(peer=peer, pixels=pixels):
            with torch.no_grad():
                return peer(pixels, class_only=True)

        name = f"ViT-B/16 forward, {size} px, batch {batch}"
        for call in (theirs, theirs_for_the_class):
            check(name, np.asarray(ours()), call().numpy())
        row = compare(name, ours, theirs, "PyTorch, SDPA", 1.05, pairs=pairs)
        peak = matmul_rate(batch * spec.num_tokens)
        rate = batch * forward_flops(spec) / (row.ours / 1e3)
        spared = 100 * (1 - forward_flops(spec) / forward_flops(spec, class_only=False))
        note = f"ours {rate / 1e9:.0f} of {peak / 1e9:.0f} GFLOP/s, {100 * rate / peak:.0f} %; "
        note += f"its last block computes the class token alone, {spared:.1f} % less work"
        yield row._replace(note=note)
        yield compare(name, ours, theirs_for_the_class, "PyTorch, SDPA, class token alone too",
                      0.0, pairs=pairs)  # fmt: skip
        yield beside_compiled(name, ours, compiled_forward(peer, pixels), pairs)

        mine = our_step(backbone, images, labels)
        step = torch_step(backbone, images, labels, mine.trainable)
        for _ in range(3):  # the same losses, so the same gradients
            check("loss", np.float64(mine()), np.float64(step()))
        row = compare(f"step of adapters and head, {size} px, batch {batch}", mine, step,
                      "PyTorch, SDPA", 1.0, pairs=pairs)  # fmt: skip
        rate = batch * (adapted_forward(spec) + backward(spec)) / (row.ours / 1e3)
        note = f"ours {rate / 1e9:.0f} of {peak / 1e9:.0f} GFLOP/s, {100 * rate / peak:.0f} %"
        yield row._replace(note=note)
        # Both from the same start again, so that each of the losses is compared.
        yield beside_compiled(
            f"step of adapters and head, {size} px, batch {batch}",
            our_step(backbone, images, labels),
            torch_step(backbone, images, labels, mine.trainable, torch.compile),
            pairs,
        )
        with tempfile.TemporaryDirectory() as programs:
            sides = ("ours", "torch", "ours")
            found = [peak_over_weights(side, size, batch, programs) for side in sides]
        (memory, first), peer, (_, second) = found
        for name, found, note in (
            (
                "memory of that step",
                (memory, peer[0]),
                "largest resident size over that between steps",
            ),
            (
                "memory of the first step",
                (first, peer[1]),
                "over that before it; ours compiles in it",
            ),
            (
                "memory of the first step, second run",
                (second, peer[1]),
                "over that before it; ours loads the program that the first run kept",
            ),
        ):
            yield Row(
                f"{name}, {size} px, batch {batch}",
                *found,
                "PyTorch, SDPA",
                "MiB",
                found[1] / found[0],
                1.0,
                note,
            )


def compiled_forward(model, pixels) -> Callable[[], object]:
    import torch

    compiled = torch.compile(model)

    def call():
        with torch.no_grad():
            return compiled(pixels).numpy()

    return call


def beside_compiled(
    name: str, ours: Callable[[], object], theirs: Callable[[], object], pairs: int
) -> Row:
    """The row beside `torch.compile`, after three calls of each that give the same.

    Where it cannot compile, as without a C++ compiler, the row says so and has no ratio.
    """
    import torch

    torch._dynamo.reset()  # another size is not recompiled as a dynamic one, but for itself
    began = time.perf_counter()
    try:
        first = theirs()
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        note = f"it could not compile: {type(error).__name__}: {reason[:200]}"
        mine = 1e3 * median_seconds(ours, pairs)
        return Row(name, mine, math.nan, COMPILED, "ms", math.nan, 1.0, note)
    took = time.perf_counter() - began
    for expected in (first, theirs(), theirs()):
        check(name, np.asarray(ours(), np.float64), np.asarray(expected, np.float64))
    note = f"its first call, which compiles, took {took:.0f} s and is not counted"
    return compare(name, ours, theirs, COMPILED, 1.0, pairs=pairs, warm=True, note=note)


def peak_over_weights(side: str, size: int, batch: int, programs: str) -> tuple[float, float]:
    """`measure_memory` in a process of its own, which keeps compiled programs in a folder."""
    command = [sys.executable, "-m", "benchmarks.transformer", "--measure-memory", side]
    command += ["--sizes", str(size), "--batch", str(batch)]
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": programs}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    printed = done.stdout
    steps, first = map(float, printed.split())
    return steps, first


def measure_memory(side: str, size: int, batch: int) -> tuple[float, float]:
    """MiB that three steps take over what stands between steps, and that the first takes over what
    stood before it: weights, images, libraries.
    """
    backbone, images, labels = examples(vit_b16(size), batch)
    step = our_step(backbone, images, labels)
    if side == "torch":
        step = torch_step(backbone, images, labels, step.trainable)

    def peak(times: int) -> float:
        # A step's arrays are freed by another thread, just after its loss is there.
        time.sleep(0.5)
        # What was freed goes back to the kernel, and its peak starts anew (`ru_maxrss` would begin
        # at the parent's): what drawing the weights or compiling took is over.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = kernel_kib("VmRSS")
        for _ in range(times):
            step()
        return (kernel_kib("VmHWM") - before) / 1024

    first = peak(1)
    return peak(3), first


def kernel_kib(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))


def main(arguments: list[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=(96, 224))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--measure-memory", choices=("ours", "torch"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.measure_memory:
        print(*measure_memory(options.measure_memory, options.sizes[0], options.batch))
        return []
    found = list(rows(tuple(options.sizes), options.batch, options.pairs))
    print(table(found), flush=True)
    return found


if __name__ == "__main__":
    main()
