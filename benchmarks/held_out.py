"""Chooses one setting for each of some methods on held-out training examples, by one rule for all.

    python -m benchmarks.held_out renditions --methods qkd mos --start 0.2
    python -m benchmarks.held_out renditions --methods qkd --setting adapter.start \
        --values random previous

Part of the training examples is held out (`data.validation`) and the rest is learned from, of the
first classes (`PARTS`; `--set` changes both); the test set is not read. Every value is a run with
seed 1993 whose other settings are those of the experiment. A number is looked for on a grid:
`--start`, a factor above and a factor below, and further while an end of the grid is the best, up
to five steps from `--start` (where a method does best untrained, no rate is too small). The best
average accuracy is chosen; of equal ones the first, which on a grid is the smallest. A run
whose numbers become infinite counts as the worst. `--record` keeps all of it in a JSON, where a
method's row of the same setting is replaced, with the commit that each run was made with. Finished
runs stay in `--runs` and are not learned again; Ctrl-C or SIGTERM saves the run that is learned,
and the same command goes on from there.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qkd_jax.errors import QkdError
from qkd_jax.reports.records import without_paths
from qkd_jax.runs.folder import run_folder
from qkd_jax.runs.loop import Interrupted, run
from qkd_jax.runs.plan import plan
from qkd_jax.settings.config import Config, override
from qkd_jax.settings.experiments import load_experiment
from qkd_jax.weights.load import backbone_of

# What is held out: two of the six styles of `renditions`, elsewhere a fifth of every class.
PARTS = {
    "renditions": ("data.validation=0.34", "data.num_classes=50"),
    "glosses": ("data.validation=0.2", "data.num_classes=20"),
}
OTHERS = ("data.validation=0.2", "data.num_classes=50")
FARTHEST = 5  # steps from the start of a grid


def searched(score: Callable[[float], float], start: float, factor: float) -> dict[float, float]:
    """Scores on the grid start * factor**k, in ascending order: `start` and its neighbours, and
    beyond an end as long as the end is the best of all, to `FARTHEST` steps from `start`.
    """
    scores: dict[float, float] = {}

    def look(step: int) -> None:
        value = float(f"{start * factor**step:.3g}")
        scores[value] = score(value)

    low, high = -1, 1
    for step in range(low, high + 1):
        look(step)
    while (best := chosen(scores)) in (min(scores), max(scores)):
        step = low - 1 if best == min(scores) else high + 1
        if abs(step) > FARTHEST:
            break
        look(step)
        low, high = min(low, step), max(high, step)
        scores = dict(sorted(scores.items()))
    return scores


def chosen(scores: dict) -> Any:
    """The first of the values with the best score."""
    return max(scores, key=scores.__getitem__)


def accuracies(config: Config, out: Path, variant: str) -> list[float] | None:
    """[average, last] accuracy in percent of a run; None if it ended with an error that a smaller
    rate may not have: numbers that are not finite.
    """
    try:
        summary = run(config, backbone_of(config.backbone), out, variant=variant)
    except QkdError as error:
        if "finite" not in str(error):
            raise
        print(f"  {error}")
        return None
    return [round(summary[f"{name}_accuracy"], 2) for name in ("average", "last")]


def commit_of(folder: Path) -> str | None:
    """The commit that a run was made with, which a command that finds it finished may not have."""
    made = json.loads((folder / "environment.json").read_text())
    return f"{made['commit']} and changes" if made["dirty"] else made["commit"]


def row(config: Config, options: argparse.Namespace) -> dict[str, Any]:
    """All values that were tried of one method, and the one that is chosen."""
    found: dict = {}
    commits: dict = {}

    def score(value: Any) -> float:
        tried = override(config, f"{options.setting}={value}", where_read=True)
        name = "-".join([*options.variant, f"{options.setting}={value}"])
        found[value] = accuracies(tried, options.runs, name)
        commits[value] = commit_of(run_folder(options.runs, tried, name))
        print(f"{config.method} {name}: {found[value]}", flush=True)
        return found[value][0] if found[value] else -1.0

    if options.values:
        scores = {value: score(value) for value in options.values}
    else:
        scores = searched(score, options.start, options.factor)
    return {
        "examples": len(plan(config).data.test),
        "accuracies": {str(value): found[value] for value in scores},
        "chosen": str(chosen(scores)),
        "commits": {str(value): commits[value] for value in scores},
    }


def table(rows: dict[str, Any]) -> str:
    """The table of one experiment in docs/results.md: average / last accuracy of every value."""
    lines = ["| method and setting | average / last accuracy on held-out examples |"]
    lines.append("| --- | --- |")
    for name, row in rows.items():
        cells = []
        for value, found in row["accuracies"].items():
            text = f"{value}: " + (f"{found[0]:.1f} / {found[1]:.1f}" if found else "not finite")
            cells.append(f"**{text}**" if value == row["chosen"] else text)
        method, setting = name.split(" ")
        lines.append(f"| `{method}`, `{setting}` | {'; '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiment")
    parser.add_argument("--methods", nargs="+", required=True)
    parser.add_argument("--setting", default="train.learning_rate")
    parser.add_argument("--values", nargs="+", help="instead of a grid of numbers")
    parser.add_argument("--start", type=float, default=0.05, help="middle of the first three")
    parser.add_argument("--factor", type=float, default=4.0)
    parser.add_argument("--set", nargs="+", default=[], metavar="key=value", dest="extra")
    parser.add_argument("--variant", nargs="*", default=[], help="names what --set makes of them")
    parser.add_argument("--runs", type=Path, default=Path("runs/held-out"))
    parser.add_argument("--record", type=Path)
    options = parser.parse_args(arguments)
    settings = [*PARTS.get(options.experiment, OTHERS), *options.extra]
    for method in options.methods:
        config = load_experiment(options.experiment).get_config(method)
        try:
            found = row(override(config, *settings), options)
        except Interrupted:  # told by the run itself; it is saved
            raise SystemExit(130) from None
        print(f"{method}: {options.setting}={found['chosen']}", flush=True)
        if options.record:
            rows = json.loads(options.record.read_text()) if options.record.exists() else {}
            name = " ".join(["-".join([method, *options.variant]), options.setting])
            shown = without_paths(settings)
            rows.setdefault(options.experiment, {})[name] = {"settings": shown, **found}
            options.record.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
