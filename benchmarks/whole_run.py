"""A whole run: ten tasks, trained and evaluated after each, beside the reference toolboxes' way.

    python -m benchmarks.whole_run [--epochs 5] [--experiment renditions]

QKD with the settings of `experiments/renditions.py` on the packaged images, on a ViT-S/16 with
random weights (times do not depend on weights; `--weights` takes the packaged CLIP ViT-B/16 and
longer). Ours is `run`: checkpoints, logs and all. The other side does the same
algorithm with the same compiled transformer, head and gate, but keeps nothing: each step, each end
of a task and each evaluation passes its images, from the pixels, through one adapter after the
other in a Python loop. One pair, as a side takes minutes; what a side compiles counts (the other
finds the small programs compiled by ours). The row says how far the accuracies are apart: training
at a high rate turns rounding into a few images.
"""

import argparse
import dataclasses
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.inference import one_pass
from benchmarks.pairs import Row, table
from benchmarks.transformer import vit_b16
from qkd_jax.data.image_set import ImageSet
from qkd_jax.data.streams import epoch_batches, eval_batches
from qkd_jax.engine import verbs
from qkd_jax.nn.backbone import Backbone
from qkd_jax.nn.parameters import init_random
from qkd_jax.nn.vit import ViTSpec
from qkd_jax.runs.loop import run
from qkd_jax.runs.plan import plan
from qkd_jax.settings.config import Config, override
from qkd_jax.settings.experiments import load_experiment
from qkd_jax.weights.load import load_backbone

FAR_APART = 15  # right images after a task, of 300 at the end: more is another algorithm


def vit_s16(size: int) -> ViTSpec:
    return dataclasses.replace(vit_b16(size), width=384, num_heads=6, mlp_width=1536)


def keeping_nothing(config: Config, backbone: Backbone) -> np.ndarray:
    """Images classified right after each task [T]; every feature is computed when it is asked."""
    config, data, tasks, _ = plan(config)
    settings = config.train
    pixels = {id(part): part.load(np.arange(len(part)), backbone)["image"] for part in data}
    state = verbs.init_state(jax.random.key(config.seed), backbone, config)

    def looped(images: np.ndarray, num_slots: int) -> np.ndarray:
        """[B, T, D], one adapter after the other."""
        features = np.zeros((len(images), config.shapes.max_tasks, backbone.spec.width), np.float32)
        for slot in range(num_slots):
            features[:, slot] = one_pass(state, images, jnp.int32(slot))
        return features

    right = []
    for task in tasks:
        rows = np.flatnonzero(np.isin(data.train.labels, task.classes))
        per_epoch = -(-len(rows) // settings.batch_size)
        state = verbs.begin_task(state, task, settings.epochs * per_epoch)
        for epoch in range(settings.epochs):
            place = {"seed": config.seed, "task": task.index, "epoch": epoch}
            for indices, mask in epoch_batches(len(rows), settings.batch_size, **place):
                batch = batch_of(data.train, pixels, rows[indices], mask)
                batch["features"] = looped(batch["image"], task.index)
                state, metrics = verbs.train_task(state, batch)
                float(metrics["loss"])
        state = verbs.one_device().freeze(state)
        batches = []
        for indices, mask in eval_batches(len(rows), settings.eval_batch_size):
            batch = batch_of(data.train, pixels, rows[indices], mask)
            batches.append({**batch, "features": looped(batch["image"], task.index + 1)})
        state = verbs.one_device().finish(state, batches)
        seen = [c for t in tasks[: task.index + 1] for c in t.classes]
        rows = np.flatnonzero(np.isin(data.test.labels, seen))
        count = 0
        for indices, mask in eval_batches(len(rows), settings.eval_batch_size):
            batch = batch_of(data.test, pixels, rows[indices], mask)
            scores = verbs.one_device().score(state, looped(batch["image"], task.index + 1))[0]
            count += int((np.argmax(scores, axis=1) == batch["label"])[mask].sum())
        right.append(count)
    return np.asarray(right)


def batch_of(part: ImageSet, pixels: dict, rows: np.ndarray, mask: np.ndarray) -> dict:
    return {
        "image": pixels[id(part)][rows],
        "label": part.labels[rows].astype(np.int32),
        "mask": mask,
    }


def rows(experiment: str, settings: tuple[str, ...], backbone_of) -> Iterator[Row]:
    # Nothing of earlier runs is found on disk: the peer has no such help.
    own = ("data.store_gib=0", "fusion.frozen_weight=0")  # which the other loop has not
    config = override(load_experiment(experiment).get_config("qkd"), *own, *settings)
    backbone = backbone_of(config.backbone.image_size)
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        run(config, backbone, Path(folder))
        ours = time.perf_counter() - began
        stored = next(Path(folder).rglob("matrix.json")).read_text()
    began = time.perf_counter()
    right = keeping_nothing(config, backbone)
    theirs = time.perf_counter() - began
    own = np.asarray(json.loads(stored)["correct"]).sum(axis=1)
    apart = np.abs(own - right)
    if apart.max() > FAR_APART:
        raise AssertionError(f"right images a stage: ours {own}, keeping nothing {right}")
    yield Row(
        f"whole run, {len(right)} tasks, {config.train.epochs} epochs, {backbone.spec.width} wide, "
        f"{backbone.spec.image_size} px",
        ours,
        theirs,
        "the same kernels, loop over adapters, nothing kept",
        "s",
        theirs / ours,
        4.0,
        "one pair, compilation counted on both sides; right images of the two differ by at most "
        f"{apart.max()} after a task",
    )


def main(arguments: list[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experiment", default="renditions")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--set", nargs="*", default=[], metavar="SETTING=VALUE")
    parser.add_argument("--weights", action="store_true", help="the packaged CLIP ViT-B/16")
    options = parser.parse_args(arguments)

    def backbone_of(size: int) -> Backbone:
        if options.weights:
            return load_backbone("clip_vit_b16", image_size=size)
        spec = vit_s16(size)
        return Backbone(init_random(jax.random.key(0), spec), spec)

    settings = (f"train.epochs={options.epochs}", *options.set)
    found = list(rows(options.experiment, settings, backbone_of))
    print(table(found), flush=True)
    return found


if __name__ == "__main__":
    main()
