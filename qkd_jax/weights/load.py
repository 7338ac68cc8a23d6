"""Loads a checked `Backbone` by its registered name, or from a user's file."""

import dataclasses
import os
from collections.abc import Iterable
from itertools import zip_longest
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qkd_jax.errors import ConfigError, WeightsError
from qkd_jax.nn.backbone import Backbone, Spec, stack_blocks
from qkd_jax.nn.bert import BertSpec
from qkd_jax.nn.parameters import init_random
from qkd_jax.nn.pixels import Preprocessing
from qkd_jax.nn.positions import resample_positions
from qkd_jax.nn.tokens import Tokenizer
from qkd_jax.nn.vit import ViTSpec
from qkd_jax.paths import expanded
from qkd_jax.settings.sections import BackboneConfig
from qkd_jax.weights.fetch import cache_folder, fetch
from qkd_jax.weights.hints import hint, prefixes_of
from qkd_jax.weights.key_maps import KEY_MAPS, SEPARATORS, UNUSED_PREFIXES
from qkd_jax.weights.locate import find_file, format_of
from qkd_jax.weights.readers import READERS, Arrays, DamagedFile
from qkd_jax.weights.registry import Entry, lookup
from qkd_jax.weights.tokenizer import beside, read_tokenizer

TINY_RANDOM = "tiny_random"
TINY_RANDOM_TEXT = "tiny_random_text"
FLOATS = ("float32", "float64", "float16", "bfloat16")  # what a file may hold
SHOWN = 10  # problems in one message


def tiny_random(image_size: int = 32) -> Backbone:
    """A small transformer with fixed random weights, for tests and smoke runs."""
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


def tiny_random_text(num_tokens: int = 16, pooling: str = "mean") -> Backbone:
    """A small text encoder with fixed random weights, whose tokens are single characters."""
    from tokenizers.implementations import BertWordPieceTokenizer

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    words = [*special, *letters, *(f"##{letter}" for letter in letters)]
    library = BertWordPieceTokenizer({word: index for index, word in enumerate(words)})
    spec = BertSpec(
        width=32,
        depth=3,
        num_heads=2,
        mlp_width=64,
        vocabulary=len(words),
        positions=64,
        num_tokens=num_tokens,
        pooling=pooling,
    )
    params = init_random(jax.random.key(0), spec)
    return Backbone(params, spec, Tokenizer(library.to_str()), TINY_RANDOM_TEXT)


def fields_of(name: str) -> tuple[str, ...]:
    """The fields of a batch that a backbone reads, by its registered name; nothing is loaded.

    Raises:
        WeightsError: unknown name.
    """
    random = {TINY_RANDOM: ViTSpec, TINY_RANDOM_TEXT: BertSpec}
    return (random.get(name) or lookup(name).spec).fields


def backbone_of(config: BackboneConfig, weights: str | Path | None = None) -> Backbone:
    """The backbone that the settings name; `weights` is read instead of their file."""
    return load_backbone(
        config.name,
        image_size=config.image_size,
        num_tokens=config.num_tokens or None,
        pooling=config.pooling or None,
        path=weights or config.weights or None,
        preprocessing=config.preprocess or None,
        blocks=config.blocks or None,
    )


def load_backbone(
    name: str,
    *,
    image_size: int | None = None,
    num_tokens: int | None = None,
    pooling: str | None = None,
    blocks: int | None = None,
    path: str | Path | None = None,
    preprocessing: str | None = None,
    cache_dir: str | Path | None = None,
    dtype=jnp.float32,
    stacked: bool = False,
) -> Backbone:
    """A registered transformer, with all checks of its weights.

    Args:
        name: a name of `registry.names()`, or "tiny_random" or "tiny_random_text" for smoke runs.
        image_size: side of the images, pixels; positions are resampled to it here. A text encoder
            does not read it.
        num_tokens: the most tokens of a text.
        pooling: the feature of a text, "mean" or "first" (`BertSpec`).
        blocks: use only the first of them, before the last LayerNorm.
        path: a weight file, or a folder that holds one (see `locate.find_file`); the tokenizer of
            a text encoder is beside it. Without it, `$QKD_JAX_WEIGHTS` is used, then the cache,
            then the network.
        preprocessing: one of the entry's named choices; None is its first.
        cache_dir: see `fetch`.
        dtype: of the parameters; bfloat16 halves the memory.
        stacked: whether blocks are one stacked dict (scanned) instead of a list (unrolled).

    Returns:
        Backbone, on the default device.

    Raises:
        WeightsError: unknown name, or a file that is missing, damaged or not this architecture;
            missing, unexpected, misshapen and non-finite tensors are counted, the first ten shown.
        ConfigError: an image size that is not a multiple of the patch, too many tokens or blocks,
            unknown pooling or preprocessing, or a setting of the other kind of input.

    Example:
        >>> backbone = load_backbone("tiny_random", image_size=32)
        >>> backbone.spec.width, backbone.spec.depth
        (32, 3)
    """
    of_text = {"num_tokens": num_tokens, "pooling": pooling}
    if name == TINY_RANDOM:
        _refuse(name, "texts", of_text)
        return _first_blocks(tiny_random(image_size or 32), blocks)
    if name == TINY_RANDOM_TEXT:
        _refuse(name, "images", {"preprocessing": preprocessing})
        return _first_blocks(tiny_random_text(num_tokens or 16, pooling or "mean"), blocks)
    entry = lookup(name)
    # Checks the settings before anything is fetched.
    _check_blocks(name, entry.spec, blocks)
    if isinstance(entry.spec, BertSpec):
        _refuse(name, "images", {"preprocessing": preprocessing})
        changes = {key: value for key, value in of_text.items() if value is not None}
        spec, chosen = dataclasses.replace(entry.spec, **changes), None
    else:
        _refuse(name, "texts", of_text)
        chosen = _preprocessing(entry, preprocessing)
        size = image_size or entry.spec.image_size
        spec = dataclasses.replace(entry.spec, image_size=size, grid=size // entry.spec.patch_size)

    file = _locate(entry, path, cache_dir)
    kind = format_of(entry, file)
    arrays = _read(file, kind, cache_dir)
    label = f"{file} ({entry.name})"
    if isinstance(spec, BertSpec):
        spec = dataclasses.replace(spec, vocabulary=_vocabulary(arrays, spec))
        params = assemble(arrays, kind, spec, label)
        given = path or os.environ.get("QKD_JAX_WEIGHTS")
        tokens = beside(file) if given else fetch(name, cache_dir, tokenizer=True)
        chosen = read_tokenizer(tokens, spec.vocabulary)
    else:
        params = assemble(arrays, kind, entry.spec, label)
        params["position"] = resample_positions(
            params["position"], entry.spec.grid, spec.grid, antialias=entry.position_antialias
        )
    backbone = _first_blocks(Backbone(params, spec, chosen, name), blocks)
    params = jax.tree.map(lambda a: jnp.asarray(a, dtype), backbone.params)
    return backbone.replace(params=stack_blocks(params) if stacked else params)


def _first_blocks(backbone: Backbone, count: int | None) -> Backbone:
    """The backbone with the first `count` blocks; None = all."""
    spec, params = backbone.spec, backbone.params
    if count is None:
        return backbone
    _check_blocks(backbone.name, spec, count)
    kept = {**params, "blocks": params["blocks"][:count]}
    return backbone.replace(params=kept, spec=dataclasses.replace(spec, depth=count))


def _check_blocks(name: str, spec: Spec, count: int | None) -> None:
    if count is not None and not 1 <= count <= spec.depth:
        raise ConfigError(f"blocks: expected 1 to {spec.depth}, those of {name}, found {count}")


def _refuse(name: str, what: str, settings: dict[str, Any]) -> None:
    """Raises ConfigError where a setting is given that is only for the other kind of input."""
    for key, value in settings.items():
        if value is not None:
            raise ConfigError(
                f"{key}: expected none, since {name} does not read {what}, found {value!r}"
            )


def _preprocessing(entry: Entry, name: str | None) -> Preprocessing:
    chosen = entry.preprocessings.get(name or next(iter(entry.preprocessings)))
    if chosen is None:
        raise ConfigError(
            f"preprocessing of {entry.name}: expected {' or '.join(entry.preprocessings)}, found "
            f"{name!r}."
        )
    return chosen


def _vocabulary(arrays: Arrays, spec: BertSpec) -> int:
    """The size of a file's own vocabulary: languages share one architecture."""
    tables = [a for name, a in arrays.items() if name.endswith("embeddings.word_embeddings.weight")]
    return tables[0].shape[0] if len(tables) == 1 and tables[0].ndim == 2 else spec.vocabulary


def assemble(arrays: Arrays, kind: str, spec: Spec, label: str) -> dict:
    """The parameters of `spec` from the tensors of a file.

    Narrower floats are widened, float64 is rounded to float32. A prefix that all names of the
    architecture share ("model.", "module.model.", "params/") is ignored.

    Args:
        arrays: as from a reader.
        kind: file format, a key of `KEY_MAPS`.
        spec: architecture of the file.
        label: names the file in the error.

    Returns:
        The pytree of `vit.param_shapes(spec)`, float32 NumPy arrays in native byte order.

    Raises:
        WeightsError: shows the first problems, their number, and what the file probably is.
    """
    rules = list(KEY_MAPS[kind](spec))
    paths, treedef = jax.tree_util.tree_flatten_with_path(spec.param_shapes())
    targets = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths]
    odd = set(targets) ^ {rule.target for rule in rules}
    if odd:
        raise WeightsError(
            f"{label}: expected a format that holds {', '.join(sorted(odd))}, found {kind}; use "
            "the registered file or a .safetensors file with timm's names."
        )
    needed = {name: shape for rule in rules for name, shape in rule.sources}
    prefix = _common_prefix(arrays, kind, needed, label)
    values, problems = _checked(arrays, needed, prefix)
    expected = {prefix + name for name in needed}
    problems["unexpected"] = [
        f"{name}: expected no such tensor, found {arrays[name].shape}"
        for name in sorted(set(arrays) - expected)
        if not _may_be_there(name, kind, prefix)
    ]
    count = sum(map(len, problems.values()))
    if count:
        told = hint(arrays, kind, spec, label, prefix, needed)
        if count == len(problems["dtype"]):
            told = f"Save the tensors as {FLOATS[0]}."
        raise WeightsError(
            f"{label}: expected the {len(needed)} tensors of this architecture, found {count} "
            f"problem{'s' * (count > 1)}:{_first(problems.values(), count)}\n{told}"
        )
    filled = {rule.target: rule.transform(*(values[n] for n, _ in rule.sources)) for rule in rules}
    return treedef.unflatten([np.ascontiguousarray(filled[target]) for target in targets])


def _common_prefix(arrays: Arrays, kind: str, needed: Iterable[str], label: str) -> str:
    """The prefix of all needed names or, if there is none, of more than half of them."""
    needed = list(needed)
    counts = prefixes_of(arrays, needed, SEPARATORS[kind])
    complete = sorted(prefix for prefix, count in counts.items() if count == len(needed))
    if len(complete) > 1:
        raise WeightsError(
            f"{label}: expected the tensors of one model, found {len(complete)}, under the "
            f"prefixes {', '.join(map(repr, complete))}; save the one that is meant alone."
        )
    if complete:
        return complete[0]
    prefix, count = max(counts.items(), key=lambda item: item[1], default=("", 0))
    return prefix if 2 * count > len(needed) else ""


def _checked(
    arrays: Arrays, needed: dict[str, tuple[int, ...]], prefix: str
) -> tuple[Arrays, dict[str, list[str]]]:
    """(needed tensors in float32 by name without prefix, problems of others by kind)."""
    values: Arrays = {}
    problems = {"missing": [], "shape": [], "values": []}
    wrong_dtype: dict[str, list[str]] = {}
    for source, shape in needed.items():
        name = prefix + source
        array = arrays.get(name)
        if array is None:
            problems["missing"].append(f"{name}: expected {shape}, found no such tensor")
        elif array.shape != shape:
            problems["shape"].append(f"{name}: expected shape {shape}, found {array.shape}")
        elif array.dtype.newbyteorder("=").name not in FLOATS:
            wrong_dtype.setdefault(array.dtype.name, []).append(name)
        else:
            with np.errstate(over="ignore"):
                values[source] = np.asarray(array, dtype=np.float32)
            if not np.isfinite(values[source]).all():
                problems["values"].append(
                    f"{name}: expected finite values in float32, found NaN or infinity"
                )
    problems["dtype"] = [
        f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}: "
        f"expected {', '.join(FLOATS[:-1])} or {FLOATS[-1]}, found {dtype}"
        for dtype, names in wrong_dtype.items()
    ]
    return values, problems


def _may_be_there(name: str, kind: str, prefix: str) -> bool:
    """Whether a file may hold this tensor although it is not needed (`UNUSED_PREFIXES`).

    Any level of the prefix may precede it: with "module.model." also "module.head.weight" and
    "head.weight" are allowed.
    """
    separator = SEPARATORS[kind]
    levels = prefix.split(separator)
    above = [separator.join([*levels[:n], ""]) for n in range(len(levels))]
    return any(name.startswith(level + start) for level in above for start in UNUSED_PREFIXES[kind])


def _first(kinds: Iterable[list[str]], count: int) -> str:
    """Ten problems, one per line, of each kind in turn, and the number of the others."""
    in_turn = [line for lines in zip_longest(*kinds) for line in lines if line is not None]
    more = f"\n  ... and {count - SHOWN} more" if count > SHOWN else ""
    return "".join(f"\n  {line}" for line in in_turn[:SHOWN]) + more


def _locate(entry: Entry, path: str | Path | None, cache_dir: str | Path | None) -> Path:
    given = path or os.environ.get("QKD_JAX_WEIGHTS")
    if not given:
        return fetch(entry.name, cache_dir)
    return find_file(expanded(given, WeightsError), entry, "weights" if path else "QKD_JAX_WEIGHTS")


def _read(file: Path, kind: str, cache_dir: str | Path | None) -> Arrays:
    try:
        return READERS[kind](file)
    except DamagedFile as error:
        if file.parent.resolve() != cache_folder(cache_dir).resolve():
            raise
        raise WeightsError(f"{error} Delete it and fetch it again.") from error
