"""One sentence for an error message about what a file that does not fit probably is."""

import math
import re
from collections import Counter
from collections.abc import Iterable

from qkd_jax.nn.backbone import Spec
from qkd_jax.weights.key_maps import KEY_MAPS, SEPARATORS, Shape
from qkd_jax.weights.readers import Arrays
from qkd_jax.weights.registry import ENTRIES, Entry

_RENAME = "expected timm's names, so convert it with timm"

# A pattern of tensor names, and what a file with such a name is.
_FOREIGN = (
    (r"lora_|\bhada_|\blokr_", "a LoRA; merge it into the model that it changes and save that"),
    (
        r"(^|[./])(optimizer\w*|opt_state|exp_avg\w*|param_states|opt/\d)([./]|$)",
        "a checkpoint with an optimiser's state; save the model's own tensors alone",
    ),
    (r"\b(qweight|qzeros|weight_scale\w*|absmax|SCB)\b", "a quantised model; save it in float32"),
    (r"(^|\.)(vision_model|text_model)\.", f"a CLIP of transformers (Hugging Face); {_RENAME}"),
    (
        r"(^|\.)(class_embedding|transformer\.resblocks\.\d+\..*)$",
        f"a CLIP of OpenAI or open_clip; {_RENAME}",
    ),
    (
        r"(^|\.)embeddings\.word_embeddings\.",
        "a text encoder (BERT), which has names of its own: --set backbone.name=bert_base_uncased",
    ),
    (r"(^|\.)encoder\.layer\.\d+\.", f"a ViT of transformers (Hugging Face); {_RENAME}"),
    (
        r"encoderblock/|MlpBlock_0|MultiHeadDotProductAttention_0",
        "a big_vision checkpoint; expected the names of vision_transformer's .npz",
    ),
    (r"(^|\.)fc_norm\.", "a model that averages its tokens (fc_norm); expected a class token's"),
    (r"(^|\.)reg(ister)?_tokens?$", "a model with register tokens; expected one without"),
    (r"(^|\.)dist(illation)?_token$", "a distilled DeiT; expected one class token, not two"),
)


def prefixes_of(names: Iterable[str], needed: Iterable[str], separator: str) -> Counter:
    """How many of the needed names have each prefix ("", or one that ends with the separator)."""
    needed = frozenset(needed)
    counts = Counter()
    for name in names:
        cuts = [0, *(at.end() for at in re.finditer(re.escape(separator), name))]
        counts.update(name[:cut] for cut in cuts if name[cut:] in needed)
    return counts


def hint(
    arrays: Arrays,
    kind: str,
    spec: Spec,
    label: str,
    prefix: str,
    needed: dict[str, Shape],
) -> str:
    """One sentence about what the file is, as far as its names or shapes show it.

    Args:
        arrays: the file's tensors.
        kind: the format it was read as, a key of `KEY_MAPS`.
        spec: the expected architecture.
        label: names the file.
        prefix: what precedes the needed names in the file.
        needed: the tensors of `spec`, by name.
    """
    if re.search(r"-\d+-of-\d+\.safetensors", label):
        return "This is one of several shards: give their folder, which holds their index."
    for pattern, what in _FOREIGN:
        if _any(pattern, arrays) and not _any(pattern, needed):
            return f"This looks like {what}."
    other = {"augreg_npz": "timm_safetensors", "timm_safetensors": "augreg_npz"}.get(kind)
    if other and not prefixes_of(arrays, needed, SEPARATORS[kind]):
        theirs = _needed(other, spec)
        if prefixes_of(arrays, theirs, SEPARATORS[other]):
            endings = {"augreg_npz": ".npz", "timm_safetensors": ".safetensors"}
            return f"These are the names of a {endings[other]} file: save it as one."
    return _architecture(arrays, kind, spec, prefix) or (
        "Check that the file belongs to this name and is complete."
    )


def _any(pattern: str, names: Iterable[str]) -> bool:
    return any(re.search(pattern, name) for name in names)


def _needed(kind: str, spec: Spec) -> dict[str, Shape]:
    return {name: shape for rule in KEY_MAPS[kind](spec) for name, shape in rule.sources}


def _architecture(arrays: Arrays, kind: str, spec: Spec, prefix: str) -> str | None:
    found = _measured(arrays, kind, spec, prefix)
    wrong = {key: value for key, value in found.items() if value != getattr(spec, key)}
    if not wrong:
        return None
    fits = [
        entry.name
        for entry in ENTRIES
        if _may_be(kind, entry) and _fits(arrays, kind, entry.spec, prefix)
    ]
    expected = ", ".join(f"{key} {getattr(spec, key)}" for key in wrong)
    return f"Expected {expected}; found {', '.join(f'{k} {v}' for k, v in wrong.items())}. " + (
        f"The file fits the name {' or '.join(fits)}." if fits else "No registered name fits it."
    )


def _measured(arrays: Arrays, kind: str, spec: Spec, prefix: str) -> dict[str, int]:
    """Fields of the file's own spec, as far as they follow from the sizes of its tensors."""
    names = {rule.target: rule.sources[-1][0] for rule in KEY_MAPS[kind](spec)}

    def size(target):
        array = arrays.get(prefix + names[target]) if target in names else None
        return 0 if array is None else array.size

    width, found = size("blocks/0/norm1/scale"), {}
    first = "blocks/0/norm1/scale"
    number = re.compile(r"0(?=\D)")
    depth = 0
    while prefix + number.sub(str(depth), names[first], count=1) in arrays:
        depth += 1
    if depth:
        found["depth"] = depth
    if width:
        found["width"] = width
        found["mlp_width"] = size("blocks/0/fc1/bias")
        if "class_token" in names:
            found["patch_size"] = math.isqrt(size("patch/kernel") // (3 * width))
            found["grid"] = math.isqrt(size("position") // width)  # of 1 + grid**2
    return {key: value for key, value in found.items() if value}


def _may_be(kind: str, entry: Entry) -> bool:
    """Whether a file of this format can hold the entry: vision_transformer has only plain ViTs."""
    if "bert_safetensors" in (kind, entry.format):
        return kind == entry.format
    plain = entry.format in ("augreg_npz", "timm_safetensors")
    return kind in (entry.format, "timm_safetensors") or (kind == "augreg_npz" and plain)


def _fits(arrays: Arrays, kind: str, spec: Spec, prefix: str) -> bool:
    shapes = {name: array.shape for name, array in arrays.items()}
    same = all(shapes.get(prefix + n) == shape for n, shape in _needed(kind, spec).items())
    return same and _measured(arrays, kind, spec, prefix).get("depth") == spec.depth
