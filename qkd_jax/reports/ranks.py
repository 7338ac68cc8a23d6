"""One table of several methods over several streams: accuracies, mean ranks, paired differences."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qkd_jax.errors import DataError
from qkd_jax.protocol.comparison import (
    Interval,
    critical_difference,
    image_values,
    interval,
    mean_ranks,
    resampled,
    resampled_means,
)
from qkd_jax.reports.predictions import Predictions, read_predictions

MEASURES = ("average", "last")


def rankable(folder: Path, methods: Sequence[str]) -> list[str]:
    """Those of the methods that can be ranked together: the most that have predictions of the same
    test images by the same seeds, in the order given. Methods without runs or with damaged files
    are left out.
    """
    groups: dict[tuple, list[str]] = {}
    for method in methods:
        try:
            read = {name: _predictions(run).images for name, run in _seeds(folder / method).items()}
        except DataError:
            continue
        if read:
            groups.setdefault(tuple(sorted(read.items())), []).append(method)
    return max(groups.values(), key=len, default=[])


def _seeds(method: Path) -> dict[int, Path]:
    """The runs of a method, by seed."""
    return {
        int(path.name[4:]): path
        for path in method.glob("seed*")
        if re.fullmatch(r"seed\d+", path.name)
    }


def outcomes(
    folder: Path, methods: Sequence[str], measure: str, seeds: Sequence[int] = ()
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """For each method the `comparison` values [S, N] of its seeds in results/<stream>, or of the
    `seeds` alone; and the tasks [N] of the images.

    Raises:
      DataError: a method has no runs there or no predictions, or others have other seeds or test
        images, or one of the `seeds` is missing.
    """
    found, images, seeds_of, tasks = {}, {}, {}, np.empty(0, int)
    for method in methods:
        runs = _seeds(folder / method)
        if not runs:
            raise DataError(f"{folder / method}: expected runs, seed<k>, found none")
        if missing := sorted(set(seeds) - set(runs)):
            raise DataError(
                f"{folder / method}: expected seeds {_listed(seeds)}, found no {_listed(missing)}"
            )
        runs = {seed: run for seed, run in runs.items() if not seeds or seed in seeds}
        read = {seed: _predictions(runs[seed]) for seed in sorted(runs)}
        seeds_of[method] = tuple(read)
        images[method] = {predictions.images for predictions in read.values()}
        rows = slice(None) if measure == "average" else slice(-1, None)
        found[method] = np.stack([image_values(p.label, p.predicted[rows]) for p in read.values()])
        tasks = next(iter(read.values())).task  # those of all, as is seen below
    for method in methods:
        if seeds_of[method] != seeds_of[methods[0]]:
            raise DataError(
                f"{folder}: expected the same seeds of all methods, found {methods[0]} with "
                f"{_listed(seeds_of[methods[0]])} and {method} with {_listed(seeds_of[method])}; "
                "name those that all have, as in --seeds '1993 1994'"
            )
        if len(images[method] | images[methods[0]]) > 1:
            raise DataError(
                f"{folder}: expected the same test images in all runs, found others in {method} "
                f"than in {methods[0]}"
            )
    return found, tasks


def ranking(
    folders: Sequence[Path],
    methods: Sequence[str],
    measure: str = "average",
    seed: int = 0,
    seeds: Sequence[int] = (),
) -> dict[str, Any]:
    """Accuracies, mean ranks and differences to the best method, with 95 % bootstrap intervals.

    Args:
      folders: results/<stream> or runs/<stream>, one for each stream.
      methods: two or more.
      measure: "average" over tasks, or "last".
      seed: of the bootstrap samples.
      seeds: of the runs that count; without, every one.

    Returns:
      "streams", "methods" (lowest mean rank first), "measure", "critical_difference" (None for one
      stream, on which no difference of ranks would be large enough); and for each method "rank" (an
      `Interval`), "accuracy" and "behind" (an `Interval` for each stream, in percent; behind the
      first method, paired by image and seed, zeros for itself).

    Raises:
      DataError: see `outcomes`; or fewer than two methods.
    """
    if len(set(methods)) < 2 or len(set(methods)) < len(methods):
        raise DataError(f"methods: expected two different ones or more, found {', '.join(methods)}")
    read = [outcomes(Path(folder), methods, measure, seeds) for folder in folders]
    values = [stream for stream, _ in read]
    samples = [
        resampled(seed + k, len(stream[methods[0]]), tasks)
        for k, (stream, tasks) in enumerate(read)
    ]
    accuracy = np.array([[stream[m].mean() for m in methods] for stream in values])
    draws = np.array(
        [
            [resampled_means(stream[m], sample) for m in methods]
            for stream, sample in zip(values, samples, strict=True)
        ]
    )  # [K, M, D]
    ranks, drawn_ranks = mean_ranks(accuracy), mean_ranks(np.moveaxis(draws, -1, 0))
    order = np.argsort(ranks, kind="stable")
    first = order[0]

    def intervals(of, drawn):
        return [interval(100 * v, 100 * d) for v, d in zip(of, drawn, strict=True)]

    return {
        "measure": measure,
        "streams": [Path(folder).name for folder in folders],
        "methods": [methods[m] for m in order],
        "critical_difference": critical_difference(len(methods), len(folders))
        if len(folders) > 1
        else None,
        "rank": {methods[m]: interval(ranks[m], drawn_ranks[:, m]) for m in order},
        "accuracy": {methods[m]: intervals(accuracy[:, m], draws[:, m]) for m in order},
        "behind": {
            methods[m]: intervals(
                accuracy[:, first] - accuracy[:, m], draws[:, first] - draws[:, m]
            )
            for m in order
        },
    }


def ranking_table(found: dict[str, Any]) -> str:
    """Markdown of what `ranking` found."""
    streams, methods = found["streams"], found["methods"]
    first = methods[0]
    lines = [
        f"| method | mean rank | {' | '.join(streams)} |",
        f"| --- | ---: |{' ---: |' * len(streams)}",
    ]
    lines += [
        f"| {m} | {_cell(found['rank'][m], 2)} | "
        f"{' | '.join(_cell(i, 1) for i in found['accuracy'][m])} |"
        for m in methods
    ]
    lines += [
        "",
        f"| behind {first} | {' | '.join(streams)} |",
        f"| --- |{' ---: |' * len(streams)}",
    ]
    lines += [
        f"| {m} | {' | '.join(_cell(i, 1) for i in found['behind'][m])} |" for m in methods[1:]
    ]
    if (critical := found["critical_difference"]) is not None:
        lines += ["", f"Critical difference of mean ranks: {critical:.2f}."]
    return "\n".join(lines) + "\n"


def _cell(shown: Interval, digits: int) -> str:
    return f"{shown.value:.{digits}f} [{shown.low:.{digits}f}, {shown.high:.{digits}f}]"


def _listed(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds))


def _predictions(run: Path) -> Predictions:
    predictions = read_predictions(run)
    if predictions is None:
        raise DataError(
            f"{run}: expected what was predicted of each image, found a record of an older "
            "version; run it again and record it"
        )
    return predictions
