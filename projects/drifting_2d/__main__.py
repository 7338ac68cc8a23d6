"""All fields on all shapes: pictures of samples over training, and one table.

    make project NAME=drifting_2d
    python -m projects.drifting_2d [--out FOLDER] [--seeds "0 1 2"] [--steps 1600]

Every field has one bandwidth for each shape, chosen from four by the same rule: the least energy
distance to the data that it is trained on, after a training with a seed of its own. What is
reported is measured on other samples of the shape.
"""

import argparse
import json
import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from projects.drifting_2d.shapes import SHAPES, judge, sample
from projects.drifting_2d.train import FIELDS, Training, train
from qkd_jax.protocol.metrics import energy_distance

BANDWIDTHS = (0.1, 0.2, 0.4, 0.8)
DATA, HELD_OUT = 4000, 1000
SEED_OF_CHOICE = 1000
FOLDER = Path(__file__).parent / "results"
MEASURES = ("near", "smallest_part", "energy_distance")


def study(shape_name: str, field: str, seeds: list[int], training: Training) -> tuple[dict, list]:
    """The row of one field on one shape, and its samples over training with the first seed."""
    shape, draws = SHAPES[shape_name], np.random.default_rng(0)
    data, held_out = (sample(shape, draws, count) for count in (DATA, HELD_OUT))

    def trained(seed, bandwidth):
        key = jax.random.key(seed)
        return np.asarray(train(key, jnp.asarray(data), jnp.float32(bandwidth), field, training))

    def distance(bandwidth):
        return energy_distance(trained(SEED_OF_CHOICE, bandwidth)[-1], data[:HELD_OUT])

    # A training uses one core: the programs are too small to share it out.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        distances = list(pool.map(distance, BANDWIDTHS))
        bandwidth = BANDWIDTHS[int(np.argmin(distances))]
        runs = list(pool.map(partial(trained, bandwidth=bandwidth), seeds))
    found = [(*judge(shape, drawn[-1]), energy_distance(drawn[-1], held_out)) for drawn in runs]
    row = {"shape": shape_name, "field": field, "bandwidth": bandwidth}
    return {**row, **dict(zip(MEASURES, zip(*found, strict=True), strict=True))}, runs[0]


def table(rows: list[dict]) -> str:
    """Markdown, with means and standard deviations over seeds."""

    def cell(values, digits):
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        return f"{statistics.mean(values):.{digits}f} ± {spread:.{digits}f}"

    lines = [
        "| shape | field | bandwidth | near the shape | smallest part | energy distance |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        cells = (cell(row["near"], 2), cell(row["smallest_part"], 2))
        distance = cell(row["energy_distance"], 4)
        lines.append(
            f"| {row['shape']} | {FIELDS[row['field']]} | {row['bandwidth']} | {cells[0]} "
            f"| {cells[1]} | {distance} |"
        )
    return "\n".join(lines) + "\n"


def picture(shape_name: str, samples: dict[str, np.ndarray], training: Training, path: Path):
    """Samples over training, one row for each field, in front of the data."""
    from matplotlib.figure import Figure

    shape = SHAPES[shape_name]
    data = sample(shape, np.random.default_rng(1), 1000)
    columns = training.pictures + 1
    figure = Figure(figsize=(1.75 * columns, 1.75 * len(samples)), layout="constrained", dpi=130)
    grid = figure.subplots(len(samples), columns, squeeze=False, sharex=True, sharey=True)
    for axes, (field, drawn) in zip(grid, samples.items(), strict=True):
        for k, (place, points) in enumerate(zip(axes, drawn, strict=True)):
            place.scatter(*data.T, s=1.5, color="#c9ced6", lw=0)
            place.scatter(*points.T, s=1.5, color="#0072b2", lw=0)
            place.set(xlim=(-3, 3), ylim=(-3, 3), xticks=[], yticks=[], aspect="equal")
            if place in grid[0]:
                place.set_title(f"step {k * (training.steps // training.pictures)}", fontsize=9)
        axes[0].set_ylabel(FIELDS[field], fontsize=8)
    figure.savefig(path)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("--seeds", default="0 1 2")
    parser.add_argument("--steps", type=int, default=Training().steps)
    options = parser.parse_args(arguments)
    training, seeds = Training(steps=options.steps), [int(seed) for seed in options.seeds.split()]
    if training.steps < training.pictures or not seeds:
        parser.error(f"expected {training.pictures} steps or more, and a seed")
    options.out.mkdir(parents=True, exist_ok=True)
    began, rows = time.perf_counter(), []
    for shape_name in SHAPES:
        samples = {}
        for field in FIELDS:
            row, samples[field] = study(shape_name, field, seeds, training)
            rows.append(row)
            seconds = time.perf_counter() - began
            print(f"{seconds:4.0f} s  {shape_name}, {FIELDS[field]}", flush=True)
        name = shape_name.lower().replace(" ", "_")
        picture(shape_name, samples, training, options.out / f"{name}.png")
    recorded = {"training": training._asdict(), "seeds": seeds, "rows": rows}
    (options.out / "results.json").write_text(json.dumps(recorded, indent=1) + "\n")
    (options.out / "table.md").write_text(table(rows))
    print(f"\n{table(rows)}\n{options.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
