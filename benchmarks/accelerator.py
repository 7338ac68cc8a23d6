"""The library on a GPU or TPU: forward pass, steps, gate and answers, in float32 and bfloat16.

    python -m benchmarks.accelerator            # on the accelerator: less than eight minutes
    python -m benchmarks.accelerator --smoke    # tiny, on anything: seconds

It needs this checkout and what the library itself needs: weights and images are random. Where
PyTorch is installed and sees the same device, it is timed beside ours in the same process, with the
same weights. Rows are printed as they come and written to `results/accelerator.json`.

float32 is what JAX makes of it on this device: a GPU multiplies in TF32 and a TPU in bfloat16
unless `jax_default_matmul_precision` says otherwise. PyTorch is allowed TF32 too, and both sides
are compared at full precision before they are timed.
"""

import argparse
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.constant_cost import FEW, last_step
from benchmarks.floors import adapted_forward, backward, forward_flops, matmul_rate
from benchmarks.inference import all_adapters, learned_state, routed
from benchmarks.pairs import (
    RESULTS,
    Row,
    Timed,
    check,
    compare,
    median_seconds,
    table,
    timed_here,
    write,
)
from benchmarks.qkd_step import NUM_TASKS, gate_alone, last_task, qkd_step
from benchmarks.transformer import batch_of, examples, our_step, step_state, torch_step, vit_b16
from qkd_jax.engine.engine import Engine, MappedEngine
from qkd_jax.learners.state import split
from qkd_jax.learners.step import device_step
from qkd_jax.nn.encode import encode
from qkd_jax.nn.inputs import Raw
from qkd_jax.nn.vit import ViTSpec
from qkd_jax.settings.config import override

MIB = 1024.0**2
# The largest difference of features from PyTorch's, as a part of the largest entry. One rounding is
# 2^-9 in bfloat16 and 2^-12 in TF32 (one block's inputs and outputs: about ten of them), and those
# of 12 blocks add up like random numbers.
TOLERANCES = {"float32": 1e-2, "bfloat16": 8e-2}


class Sizes(NamedTuple):
    """What is timed: the transformer, images of a batch, pairs of a comparison."""

    spec: ViTSpec
    batch: int
    pairs: int


REAL = Sizes(vit_b16(224), batch=64, pairs=5)
SMOKE = Sizes(
    ViTSpec(width=64, depth=2, num_heads=2, mlp_width=64, patch_size=8, image_size=16, grid=2),
    batch=2,
    pairs=2,
)


class TorchPeer(NamedTuple):
    """Where PyTorch computes; `device` is empty where it cannot, for the reason `missing`."""

    device: str
    missing: str


def torch_peer() -> TorchPeer:
    """PyTorch on the kind of device that JAX uses."""
    try:
        import torch
    except ImportError:
        return TorchPeer("", "PyTorch is not installed")
    torch.set_float32_matmul_precision("high")  # TF32, as JAX
    platform = jax.default_backend()
    if platform == "cpu":
        return TorchPeer("cpu", "")
    if platform == "gpu" and torch.cuda.is_available():
        return TorchPeer("cuda", "")
    return TorchPeer("", f"PyTorch {torch.__version__} sees no {platform}")


def alone(name: str, ours: Callable[[], object], peer_name: str, why: str, pairs: int) -> Row:
    """A row without its peer."""
    found = 1e3 * median_seconds(ours, pairs)
    return Row(name, found, math.nan, peer_name, "ms", math.nan, 0.0, why)


def beside_torch(name, ours, peer_name, make_peer, peer: TorchPeer, pairs: int, **kwargs) -> Row:
    """`make_peer`: () -> the peer's call, which is only made where PyTorch can compute."""
    if not peer.device:
        return alone(name, ours, peer_name, peer.missing, pairs)
    return compare(name, ours, make_peer(), peer_name, 0.0, pairs=pairs, **kwargs)


def reached(row: Row, operations: float, peak: float) -> Row:
    """The row with the share of the device's own rate of matrix products that ours reaches."""
    rate = operations / (row.ours / 1e3)
    share = f"ours {rate / 1e12:.3g} of {peak / 1e12:.3g} TFLOP/s, {100 * rate / peak:.0f} %"
    return row._replace(note="; ".join(filter(None, (row.note, share))))


def forward_row(sizes: Sizes, dtype: str, peer: TorchPeer, peak: float) -> Row:
    spec, batch, pairs = sizes
    backbone, images, _ = examples(spec, batch)
    inputs = Raw({"image": jnp.asarray(images)})
    encoded = jax.jit(lambda backbone, inputs: encode(backbone, inputs, compute_dtype=dtype)[:, 0])

    def ours():
        return jax.block_until_ready(encoded(backbone, inputs))

    def make_peer():
        import torch

        from benchmarks.torch_vit import Transformer, copy_weights

        model = Transformer(spec)
        copy_weights(model, backbone.params)
        pixels = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).to(peer.device)
        model.to(peer.device)

        low = getattr(torch, dtype)

        @torch.no_grad()
        def theirs(kind=low):
            found = model(pixels.to(kind), class_only=True)
            if peer.device == "cuda":
                torch.cuda.synchronize()
            return found

        torch.set_float32_matmul_precision("highest")
        with jax.default_matmul_precision("highest"):
            exact = np.asarray(jax.jit(lambda: encode(backbone, inputs)[:, 0])())
        check("features", exact, theirs(torch.float32).cpu().numpy())
        torch.set_float32_matmul_precision("high")
        model.to(low)
        found = theirs().float().cpu().numpy()
        check("features", np.asarray(ours(), np.float32), found, TOLERANCES[dtype])
        return theirs

    name = f"ViT forward, {dtype}, {spec.image_size} px, batch {batch}"
    peer_name = f"PyTorch, SDPA, class token alone too, weights in {dtype}"
    row = beside_torch(name, ours, peer_name, make_peer, peer, pairs)
    return reached(row, batch * forward_flops(spec), peak)


def step_rows(sizes: Sizes, dtype: str, peer: TorchPeer, peak: float) -> Iterator[Row]:
    spec, batch, pairs = sizes
    backbone, images, labels = examples(spec, batch)
    compute = f"backbone.compute_dtype={dtype}"
    step = our_step(backbone, images, labels, compute)
    held: list[Callable] = []

    def make_peer():
        theirs = torch_step(
            backbone, images, labels, step.trainable, device=peer.device, dtype=dtype
        )
        for _ in range(3):  # the same losses, so the same gradients
            check("loss", np.float64(step()), np.float64(theirs()), TOLERANCES[dtype])
        held.append(theirs)
        return theirs

    what = f"step of adapters and head, {dtype}, {spec.image_size} px, batch {batch}"
    row = beside_torch(what, step, "PyTorch, SDPA, autocast", make_peer, peer, pairs)
    yield reached(row, batch * (adapted_forward(spec) + backward(spec)), peak)

    parts = split(step_state(backbone, compute))
    compiled = jax.jit(device_step).lower(*parts, batch_of(images, labels)).compile()
    ours, theirs = compiled.memory_analysis().temp_size_in_bytes / MIB, math.nan
    note = peer.missing or "it counts what it allocates on a GPU alone"
    if held and peer.device == "cuda":
        theirs, note = torch_memory(held[0]), "temporary arrays, as XLA states them; theirs: peak"
    yield Row(
        f"memory of that step, {dtype}, {spec.image_size} px, batch {batch}",
        *(ours, theirs, "PyTorch, SDPA, autocast", "MiB", theirs / ours, 0.0, note),
    )


def torch_memory(step: Callable[[], object]) -> float:
    """MiB that one step allocates over what it finds."""
    import torch

    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    return (torch.cuda.max_memory_allocated() - before) / MIB


def qkd_rows(sizes: Sizes, dtype: str) -> Iterator[Row]:
    """QKD's step beside the plain one, and its gate."""
    spec, batch, pairs = sizes
    backbone, images, labels = examples(spec, batch)
    compute = f"backbone.compute_dtype={dtype}"
    state = last_task(spec, compute)
    row = compare(
        f"QKD step, T = {NUM_TASKS}, {dtype}, {spec.image_size} px, batch {batch}",
        qkd_step(state, images, labels),
        our_step(backbone, images, labels, compute),
        "plain adapter step, ours",
        0.0,
        pairs=pairs,
        note="teachers' features kept",
    )
    yield row
    yield compare(
        f"QKD step, augmented, two teachers, T = 100, {dtype}, {spec.image_size} px, batch {batch}",
        *(last_step(spec, num_tasks, batch, FEW, compute) for num_tasks in (100, 10)),
        "T = 10",
        0.91,
        pairs=pairs,
        note="constant cost would be 1",
    )
    gate = 1e3 * median_seconds(gate_alone(state, batch), pairs)
    yield Row(
        f"gate of that step, {dtype}",
        *(gate, row.ours, "that step", "ms", row.ours / gate, 0.0, "value and gradient, alone"),
    )


def answer_row(sizes: Sizes, dtype: str) -> Row:
    spec, batch, pairs = sizes
    images = jnp.asarray(examples(spec, batch)[1])
    state = learned_state(spec, NUM_TASKS, f"backbone.compute_dtype={dtype}")
    few = state.replace(config=override(state.config, "fusion.kind=routed", "fusion.top_k=2"))
    return compare(
        f"routed answer, k = 2, T = {NUM_TASKS}, {dtype}, {spec.image_size} px, batch {batch}",
        lambda: jax.block_until_ready(routed(few, images)),
        lambda: jax.block_until_ready(all_adapters(state, images)),
        "all adapters, ours",
        0.0,
        pairs=pairs,
        note="3 passes beside 10",
    )


def devices_row(sizes: Sizes, dtype: str) -> Row:
    """A step on all devices of this host, each with a batch of its own, beside one on one."""
    spec, batch, pairs = sizes
    devices = jax.local_devices()
    count = len(devices)

    def step_on(engine: Engine, size: int) -> Callable[[], float]:
        backbone, images, labels = examples(spec, size)
        held, moving = split(engine.place(step_state(backbone, f"backbone.compute_dtype={dtype}")))
        given, holder = batch_of(images, labels), [moving]

        def call():
            holder[0], metrics = engine.step(held, holder[0], given)
            return float(metrics["loss"])

        return call

    return compare(
        f"step on {count} devices, {dtype}, {spec.image_size} px, batch {count * batch}",
        step_on(MappedEngine(devices), count * batch),
        step_on(Engine(), batch),
        f"one device, batch {batch}",
        0.9,
        pairs=pairs,
        note=f"{count} times the images; 1 would be {count} times as fast",
    )


def peak_row() -> Row:
    counted = jax.local_devices()[0].memory_stats() or {}
    peak, limit = (counted.get(name, math.nan) for name in ("peak_bytes_in_use", "bytes_limit"))
    note = "of this whole process" if counted else "this device does not count its memory"
    name = "largest memory of our arrays and programs"
    return Row(name, peak / MIB, limit / MIB, "the device's", "MiB", limit / peak, 0.0, note)


def rows(
    sizes: Sizes, dtypes: tuple[str, ...] = ("float32", "bfloat16"), until: float = math.inf
) -> Iterator[Row]:
    """The rows; after `until` (of `time.monotonic`) no further subject is begun."""
    peer = torch_peer()
    several = jax.local_device_count() > 1
    for dtype in dtypes:
        peak = matmul_rate(sizes.batch * sizes.spec.num_tokens, dtype)
        subjects = {
            "forward": lambda d=dtype, p=peak: [forward_row(sizes, d, peer, p)],
            "step": lambda d=dtype, p=peak: step_rows(sizes, d, peer, p),
            "QKD": lambda d=dtype: qkd_rows(sizes, d),
            "answer": lambda d=dtype: [answer_row(sizes, d)],
        }
        if several:
            subjects["devices"] = lambda d=dtype: [devices_row(sizes, d)]
        for name, subject in subjects.items():
            if time.monotonic() > until:
                print(f"left out, since the time is over: {name}, {dtype}", flush=True)
                continue
            yield from subject()
    yield peak_row()


def measured(found: list[Row]) -> Timed:
    """The rows with the machine and its accelerators."""
    timed = timed_here(found)
    devices = {"device": jax.devices()[0].device_kind, "devices": jax.device_count()}
    return timed._replace(machine={**timed.machine, **devices})


def main(arguments: list[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="tiny, to see that it runs")
    parser.add_argument("--batch", type=int, help=f"images; default {REAL.batch}")
    parser.add_argument("--minutes", type=float, default=7, help="begin nothing after them")
    parser.add_argument("--out", type=Path, help="default results/accelerator.json; smoke: none")
    options = parser.parse_args(arguments)
    # PyTorch needs its share of the memory, which JAX would take whole.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    until = time.monotonic() + 60 * options.minutes
    if jax.default_backend() == "cpu" and not options.smoke:
        parser.error("expected a GPU or TPU, found only CPUs; --smoke tries the command on a CPU")
    sizes = SMOKE if options.smoke else REAL
    sizes = sizes._replace(batch=options.batch or sizes.batch)
    out = options.out or (None if options.smoke else RESULTS / "accelerator.json")
    found: list[Row] = []
    for row in rows(sizes, until=until):
        found.append(row)
        print(table([row]).splitlines()[-1], flush=True)
        if out:
            write({"accelerator": measured(found)}, out)
    print(f"\n{measured(found).machine}\n\n{table(found)}", flush=True)
    return found


if __name__ == "__main__":
    main()
