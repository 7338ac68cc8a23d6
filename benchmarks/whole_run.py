"""A whole run: ten tasks, trained and evaluated after each, beside the reference toolboxes' way.

    python -m benchmarks.whole_run [--epochs 5] [--experiment renditions]

QKD with the settings of `experiments/renditions.py` on the packaged images, on a ViT-S/16 with
random weights (times do not depend on weights; `--weights` takes the packaged CLIP ViT-B/16 and
three times as long). Ours is `run`: checkpoints, logs and all. The other side does the same
algorithm with the same compiled kernels, but keeps nothing: each step computes all old adapters'
features of its batch, each end of a task and each evaluation those of all adapters, each pass
starts from the pixels. Both must end with the same accuracies. One pair, as a side takes minutes;
what a side compiles counts.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from benchmarks.pairs import Row, report
from qkd_jax.cli import load_experiment
from qkd_jax.config import Config, override
from qkd_jax.data.image_set import ImageSet
from qkd_jax.data.streams import epoch_batches, eval_batches
from qkd_jax.learners import base
from qkd_jax.nn.vit import Backbone, ViTSpec, init_random
from qkd_jax.plan import plan
from qkd_jax.run import run
from qkd_jax.weights.load import load_backbone

PACKAGES = ("jax",)


def vit_s16(size: int) -> ViTSpec:
    return ViTSpec(
        width=384,
        depth=12,
        num_heads=6,
        mlp_width=1536,
        patch_size=16,
        image_size=size,
        grid=size // 16,
    )


def keeping_nothing(config: Config, backbone: Backbone) -> np.ndarray:
    """Images classified right after each task [T]; every feature is computed when it is asked."""
    config, data, tasks, _ = plan(config)
    size = config.backbone.image_size
    pixels = {id(part): part.load(np.arange(len(part)), size, "test")["image"] for part in data}
    state = base.init_state(jax.random.key(config.seed), backbone, config)
    right = []
    for task in tasks:
        rows = np.flatnonzero(np.isin(data.train.labels, task.classes))
        per_epoch = -(-len(rows) // config.train.batch_size)
        state = base.begin_task(state, task, config.train.epochs * per_epoch)
        for epoch in range(config.train.epochs):
            order = epoch_batches(
                len(rows),
                config.train.batch_size,
                seed=config.seed,
                task=task.index,
                epoch=epoch,
            )
            for indices, mask in order:
                batch = batch_of(data.train, pixels, rows[indices], mask)
                state, metrics = base.train_task(state, batch)
                float(metrics["loss"])
        evaluation = eval_batches(len(rows), config.train.eval_batch_size)
        state = base.end_task(
            state, [batch_of(data.train, pixels, rows[i], mask) for i, mask in evaluation]
        )
        seen = [c for t in tasks[: task.index + 1] for c in t.classes]
        rows = np.flatnonzero(np.isin(data.test.labels, seen))
        count = 0
        for i, mask in eval_batches(len(rows), config.train.eval_batch_size):
            batch = batch_of(data.test, pixels, rows[i], mask)
            found = np.argmax(base.predict(state, batch["image"]), axis=1)
            count += int((found == batch["label"])[mask].sum())
        right.append(count)
    return np.asarray(right)


def batch_of(part: ImageSet, pixels: dict, rows: np.ndarray, mask: np.ndarray) -> dict:
    return {
        "image": pixels[id(part)][rows],
        "label": part.labels[rows].astype(np.int32),
        "mask": mask,
    }


def rows(experiment: str, settings: tuple[str, ...], backbone_of) -> Iterator[Row]:
    config = override(load_experiment(experiment).get_config("qkd"), *settings)
    backbone = backbone_of(config.backbone.image_size)
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        run(config, backbone, Path(folder))
        ours = time.perf_counter() - began
        stored = next(Path(folder).rglob("matrix.json")).read_text()
    began = time.perf_counter()
    right = keeping_nothing(config, backbone)
    theirs = time.perf_counter() - began
    check_same(stored, right)
    yield Row(
        f"whole run, {len(right)} tasks, {config.train.epochs} epochs, {backbone.spec.width} wide, "
        f"{backbone.spec.image_size} px",
        ours,
        theirs,
        "the same kernels, nothing kept",
        "s",
        theirs / ours,
        4.0,
        "one pair, compilation counted on both sides",
    )


def check_same(stored: str, right: np.ndarray) -> None:
    """Rounding may turn an image that lies on the border; more is another algorithm."""
    ours = np.asarray(json.loads(stored)["correct"]).sum(axis=1)
    if np.abs(ours - right).max() > 2:
        raise AssertionError(f"right images a stage: ours {ours}, keeping nothing {right}")


def main(arguments: list[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experiment", default="renditions")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--weights", action="store_true", help="the packaged CLIP ViT-B/16")
    options = parser.parse_args(arguments)

    def backbone_of(size: int) -> Backbone:
        if options.weights:
            return load_backbone("clip_vit_b16", image_size=size)
        spec = vit_s16(size)
        return Backbone(init_random(jax.random.key(0), spec), spec)

    found = list(rows(options.experiment, (f"train.epochs={options.epochs}",), backbone_of))
    report(found, PACKAGES)
    return found


if __name__ == "__main__":
    main()
