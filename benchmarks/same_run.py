"""Whether two folders hold the same run: what was learned, predicted and logged, to the byte."""

import json
from pathlib import Path
from typing import Any

import numpy as np

# What a session says of itself: its times, memory and machine.
OWN_TO_A_SESSION = {
    "compilations",
    "eval_seconds",
    "inference_images_per_second",
    "peak_memory_mb",
    "spent",
    "train_seconds",
    "training_images_per_second",
    "wall_s",
    "wall_seconds",
}
# Of these files, checkpoints are compared by their arrays; the rest is drawn from the others.
NOT_OF_THE_RUN = ("checkpoints/", ".lock", "environment", "figures/", "report", "files.json")


def without_session(content: Any) -> Any:
    """Parsed JSON without what a session says of itself."""
    if not isinstance(content, dict):
        return content
    return {k: without_session(v) for k, v in content.items() if k not in OWN_TO_A_SESSION}


def files_of(folder: Path) -> dict[str, Any]:
    """The content of each file of a run that says what was learned and predicted, by its name."""
    found: dict[str, Any] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name, content = path.relative_to(folder).as_posix(), path.read_bytes()
        if name.startswith(NOT_OF_THE_RUN):
            continue
        if name == "summary.json":
            found[name] = without_session(json.loads(content))
        elif name.endswith(".jsonl"):
            found[name] = [without_session(json.loads(line)) for line in content.splitlines()]
        else:
            found[name] = content
    return found


def learned_in(folder: Path) -> dict[str, Any]:
    """What the newest checkpoint holds: shape, type and bytes of each array (parameters, optimiser
    state, statistics, and those of a teacher), and the counts that are kept beside them.
    """
    from qkd_jax.runs.checkpoint import named_arrays
    from qkd_jax.runs.load import load_run

    arrays = named_arrays(load_run(folder).state)
    found = {name: (a.shape, str(a.dtype), np.asarray(a).tobytes()) for name, a in arrays.items()}
    numbers = (path.name for path in (folder / "checkpoints").iterdir() if path.name.isdigit())
    newest = folder / "checkpoints" / max(numbers, key=int)
    meta = json.loads((newest / "meta/metadata").read_text())
    return found | {"number": newest.name, "meta": without_session(meta)}


def differences(run: Path, other: Path) -> list[str]:
    """The names of files and arrays in which two finished runs differ."""
    return sorted(
        name
        for one, two in ((files_of(run), files_of(other)), (learned_in(run), learned_in(other)))
        for name in one.keys() | two.keys()
        if one.get(name) != two.get(name)
    )
