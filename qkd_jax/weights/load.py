"""A registered name, or a file of the user, to a checked `Backbone`."""

import dataclasses
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from qkd_jax.errors import ConfigError, WeightsError
from qkd_jax.nn.positions import resample_positions
from qkd_jax.nn.vit import Backbone, ViTSpec, init_random, param_shapes, stack_blocks
from qkd_jax.weights.fetch import fetch
from qkd_jax.weights.key_maps import KEY_MAPS, UNUSED_PREFIXES
from qkd_jax.weights.readers import READERS, Arrays
from qkd_jax.weights.registry import Entry, lookup

TINY_RANDOM = "tiny_random"


def tiny_random(image_size: int = 32) -> Backbone:
    """A small transformer with fixed random weights, for tests and smoke runs: it knows nothing."""
    spec = ViTSpec(
        width=32,
        depth=3,
        num_heads=2,
        mlp_width=64,
        patch_size=8,
        image_size=image_size,
        grid=image_size // 8,
    )
    return Backbone(params=init_random(jax.random.key(0), spec), spec=spec, name=TINY_RANDOM)


def load_backbone(
    name: str,
    *,
    image_size: int | None = None,
    path: str | Path | None = None,
    preprocessing: str | None = None,
    cache_dir: str | Path | None = None,
    dtype=jnp.float32,
    stacked: bool = False,
) -> Backbone:
    """Load a registered transformer with every check.

    Args:
        name: a name of `registry.names()`, or "tiny_random" for smoke runs.
        image_size: side of the images, pixels; positions are resampled to it once, here.
        path: a weight file, or a folder that holds the registered file name. Without it,
            `$QKD_JAX_WEIGHTS` is used, then the cache, then the network.
        preprocessing: one of the entry's named choices; None is its first.
        cache_dir: see `fetch`.
        dtype: of the parameters in memory (float32; bfloat16 halves the memory).
        stacked: give the blocks as one stacked dict (scanned) instead of a list (unrolled).

    Returns:
        Backbone, on the default device.

    Raises:
        WeightsError: unknown name, or a file that is missing, damaged or not this architecture;
            every missing, unexpected, misshapen or non-finite tensor is listed.
        ConfigError: an image size that is no multiple of the patch, or an unknown preprocessing.
    """
    if name == TINY_RANDOM:
        return tiny_random(image_size or 32)
    entry = lookup(name)
    default = next(iter(entry.preprocessings))
    chosen = entry.preprocessings.get(preprocessing or default)
    if chosen is None:
        raise ConfigError(
            f"{name} has no preprocessing {preprocessing!r}; choose one of "
            f"{', '.join(entry.preprocessings)}."
        )
    size = image_size or entry.spec.image_size
    # Validates the size before anything is fetched.
    spec = dataclasses.replace(entry.spec, image_size=size, grid=size // entry.spec.patch_size)

    file = _locate(entry, path, cache_dir)
    kind = _format_of(entry, file)
    params = assemble(READERS[kind](file), kind, entry.spec, f"{file} ({entry.name})")
    params["position"] = resample_positions(
        params["position"], entry.spec.grid, spec.grid, antialias=entry.position_antialias
    )
    params = jax.tree.map(lambda a: jnp.asarray(a, dtype), params)
    if stacked:
        params = stack_blocks(params)
    return Backbone(params=params, spec=spec, preprocessing=chosen, name=name)


def assemble(arrays: Arrays, kind: str, spec: ViTSpec, label: str) -> dict:
    """Fill the parameters of `spec` from a file's tensors.

    Args:
        arrays: as from a reader.
        kind: file format, a key of `KEY_MAPS`.
        spec: architecture of the file.
        label: names the file in the error.

    Returns:
        The pytree of `vit.param_shapes(spec)`, float32 NumPy arrays in native byte order.

    Raises:
        WeightsError: lists every problem found.
    """
    problems, filled, used = [], {}, set()
    for rule in KEY_MAPS[kind](spec):
        parts = []
        for source, shape in rule.sources:
            if source not in used:
                problems += _problems_of(source, arrays.get(source), shape)
            used.add(source)
            parts.append(arrays.get(source))
        if not problems:
            if rule.target in filled:
                problems.append(f"filled twice: {rule.target}")
            value = rule.transform(*(np.asarray(part, dtype=np.float32) for part in parts))
            filled[rule.target] = np.ascontiguousarray(value)
    for name in sorted(set(arrays) - used):
        if not name.startswith(UNUSED_PREFIXES[kind]):
            problems.append(f"unexpected: {name} {arrays[name].shape}")
    if problems:
        lines = "\n  ".join(problems)
        raise WeightsError(
            f"{label} does not hold this architecture; {len(problems)} problems:\n  {lines}\n"
            "Check that the file belongs to this name and is complete."
        )
    paths, treedef = jax.tree_util.tree_flatten_with_path(param_shapes(spec))
    targets = {jax.tree_util.keystr(path, simple=True, separator="/"): s for path, s in paths}
    wrong = [t for t, s in targets.items() if t not in filled or filled[t].shape != s.shape]
    if wrong or len(filled) != len(targets):
        raise WeightsError(f"{label}: the key map of {kind} does not fill {wrong or targets}.")
    return treedef.unflatten([filled[target] for target in targets])


def _problems_of(source: str, array: np.ndarray | None, shape: tuple[int, ...]) -> list[str]:
    if array is None:
        return [f"missing: {source} {shape}"]
    if array.shape != shape:
        return [f"wrong shape: {source} is {array.shape}, expected {shape}"]
    if array.dtype.newbyteorder("=") != np.float32:
        return [f"wrong dtype: {source} is {array.dtype}, expected float32"]
    if not np.isfinite(array).all():
        return [f"not finite: {source} holds NaN or infinity"]
    return []


def _locate(entry: Entry, path: str | Path | None, cache_dir: str | Path | None) -> Path:
    given = path or os.environ.get("QKD_JAX_WEIGHTS")
    if not given:
        return fetch(entry.name, cache_dir)
    file = Path(given).expanduser()
    if file.is_dir():
        file = file / entry.file
    if not file.is_file():
        raise WeightsError(
            f"no weight file at {file} for {entry.name!r}. Give the file, or a folder that holds "
            f"{entry.file}."
        )
    return file


def _format_of(entry: Entry, file: Path) -> str:
    """The file name's ending decides between the forms of one architecture."""
    suffix = file.suffix.lower()
    if suffix == ".onnx" and entry.format.endswith("_onnx"):
        return entry.format
    by_suffix = {".npz": "augreg_npz", ".safetensors": "timm_safetensors"}
    if suffix in by_suffix:
        return by_suffix[suffix]
    raise WeightsError(
        f"{file}: the ending {suffix!r} does not fit {entry.name!r}; expected a file like "
        f"{entry.file} (.npz, .safetensors, or the registered .onnx)."
    )
