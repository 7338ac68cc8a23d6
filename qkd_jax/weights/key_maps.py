"""Which tensors of a file fill which parameter, for each file format.

A key map is a list of `Rule`s, one for every leaf of `spec.param_shapes()`. Targets are leaf paths
("blocks/0/query/kernel"). Every source carries the exact shape it must have in the file, so that
a reshape never hides a wrong tensor.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from qkd_jax.nn.bert import BertSpec
from qkd_jax.nn.vit import ViTSpec

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Rule:
    """target = transform(*sources)."""

    target: str
    sources: tuple[tuple[str, Shape], ...]
    transform: Callable[..., np.ndarray]


def _same(array):
    return array


def _transpose(array):
    return array.T


def _last_axis(array):
    """[1, 1, D] -> [D]."""
    return array.reshape(array.shape[-1])


def _first_row(array):
    """[1, N, D] -> [N, D]."""
    return array[0]


def _flatten_out(array):
    """[D, H, D/H] -> [D, D]."""
    return array.reshape(array.shape[0], -1)


def _flatten_in(array):
    """[..., D] -> [product of the others, D]: the heads of an output kernel, or a patch."""
    return array.reshape(-1, array.shape[-1])


def _flatten(array):
    return array.reshape(-1)


def _convolution(array):
    """[D, 3, P, P] -> [P*P*3, D], rows ordered (row, column, channel)."""
    return array.transpose(2, 3, 1, 0).reshape(-1, array.shape[0])


def _join_positions(class_position, grid):
    """[1, 1, D] and [1, N, D] -> [1 + N, D]."""
    return np.concatenate([class_position[0], grid[0]])


def _third(index: int, kernel: bool) -> Callable[[np.ndarray], np.ndarray]:
    """Part `index` of timm's fused query, key and value ([3D, D] or [3D])."""

    def take(array):
        part = np.split(array, 3)[index]
        return part.T if kernel else part

    return take


def _rule(target, source, shape, transform=_same) -> Rule:
    return Rule(target, ((source, shape),), transform)


def augreg_npz(spec: ViTSpec) -> Iterator[Rule]:
    """Names of vision_transformer's `.npz` checkpoints."""
    d, h, m, p = spec.width, spec.num_heads, spec.mlp_width, spec.patch_size
    head = d // h
    yield _rule("class_token", "cls", (1, 1, d), _last_axis)
    position = "Transformer/posembed_input/pos_embedding"
    yield _rule("position", position, (1, 1 + spec.grid**2, d), _first_row)
    yield _rule("patch/kernel", "embedding/kernel", (p, p, 3, d), _flatten_in)
    yield _rule("patch/bias", "embedding/bias", (d,))
    for leaf in ("scale", "bias"):
        yield _rule(f"norm/{leaf}", f"Transformer/encoder_norm/{leaf}", (d,))
    for i in range(spec.depth):
        to, block = f"blocks/{i}", f"Transformer/encoderblock_{i}"
        attention = f"{block}/MultiHeadDotProductAttention_1"
        for leaf in ("scale", "bias"):
            yield _rule(f"{to}/norm1/{leaf}", f"{block}/LayerNorm_0/{leaf}", (d,))
            yield _rule(f"{to}/norm2/{leaf}", f"{block}/LayerNorm_2/{leaf}", (d,))
        for name in ("query", "key", "value"):
            kernel, bias = f"{attention}/{name}/kernel", f"{attention}/{name}/bias"
            yield _rule(f"{to}/{name}/kernel", kernel, (d, h, head), _flatten_out)
            yield _rule(f"{to}/{name}/bias", bias, (h, head), _flatten)
        yield _rule(f"{to}/out/kernel", f"{attention}/out/kernel", (h, head, d), _flatten_in)
        yield _rule(f"{to}/out/bias", f"{attention}/out/bias", (d,))
        yield _rule(f"{to}/fc1/kernel", f"{block}/MlpBlock_3/Dense_0/kernel", (d, m))
        yield _rule(f"{to}/fc1/bias", f"{block}/MlpBlock_3/Dense_0/bias", (m,))
        yield _rule(f"{to}/fc2/kernel", f"{block}/MlpBlock_3/Dense_1/kernel", (m, d))
        yield _rule(f"{to}/fc2/bias", f"{block}/MlpBlock_3/Dense_1/bias", (d,))


def timm_safetensors(spec: ViTSpec) -> Iterator[Rule]:
    """Names of timm's VisionTransformer (also its DINOv2 and CLIP forms)."""
    d, m, p = spec.width, spec.mlp_width, spec.patch_size
    yield _rule("class_token", "cls_token", (1, 1, d), _last_axis)
    yield _rule("position", "pos_embed", (1, 1 + spec.grid**2, d), _first_row)
    yield _rule("patch/kernel", "patch_embed.proj.weight", (d, 3, p, p), _convolution)
    if spec.patch_bias:
        yield _rule("patch/bias", "patch_embed.proj.bias", (d,))
    for leaf, name in (("scale", "weight"), ("bias", "bias")):
        yield _rule(f"norm/{leaf}", f"norm.{name}", (d,))
        if spec.pre_norm:
            yield _rule(f"pre_norm/{leaf}", f"norm_pre.{name}", (d,))
    for i in range(spec.depth):
        to, block = f"blocks/{i}", f"blocks.{i}"
        for leaf, name in (("scale", "weight"), ("bias", "bias")):
            yield _rule(f"{to}/norm1/{leaf}", f"{block}.norm1.{name}", (d,))
            yield _rule(f"{to}/norm2/{leaf}", f"{block}.norm2.{name}", (d,))
        for part, name in enumerate(("query", "key", "value")):
            qkv = f"{block}.attn.qkv"
            yield _rule(f"{to}/{name}/kernel", f"{qkv}.weight", (3 * d, d), _third(part, True))
            yield _rule(f"{to}/{name}/bias", f"{qkv}.bias", (3 * d,), _third(part, False))
        for name, source, out_in in (
            ("out", "attn.proj", (d, d)),
            ("fc1", "mlp.fc1", (m, d)),
            ("fc2", "mlp.fc2", (d, m)),
        ):
            yield _rule(f"{to}/{name}/kernel", f"{block}.{source}.weight", out_in, _transpose)
            yield _rule(f"{to}/{name}/bias", f"{block}.{source}.bias", out_in[:1])
        if spec.layer_scale:
            yield _rule(f"{to}/scale1", f"{block}.ls1.gamma", (d,))
            yield _rule(f"{to}/scale2", f"{block}.ls2.gamma", (d,))


def clip_onnx(spec: ViTSpec) -> Iterator[Rule]:
    """Names of a CLIP image tower as `read_onnx` gives them."""
    d, m, p = spec.width, spec.mlp_width, spec.patch_size
    embeddings = "vision_model.embeddings"
    yield _rule("class_token", f"{embeddings}.class_embedding", (d,))
    yield _rule("position", f"{embeddings}.position_embedding.weight", (1 + spec.grid**2, d))
    patch = f"{embeddings}.patch_embedding.weight"
    yield _rule("patch/kernel", patch, (d, 3, p, p), _convolution)
    for leaf, name in (("scale", "weight"), ("bias", "bias")):
        # "layrnorm" is the spelling of the checkpoint.
        yield _rule(f"pre_norm/{leaf}", f"vision_model.pre_layrnorm.{name}", (d,))
        yield _rule(f"norm/{leaf}", f"vision_model.post_layernorm.{name}", (d,))
    for i in range(spec.depth):
        to, block = f"blocks/{i}", f"vision_model.encoder.layers.{i}"
        for leaf, name in (("scale", "weight"), ("bias", "bias")):
            yield _rule(f"{to}/norm1/{leaf}", f"{block}.layer_norm1.{name}", (d,))
            yield _rule(f"{to}/norm2/{leaf}", f"{block}.layer_norm2.{name}", (d,))
        yield from _dense_rules(
            to,
            block,
            {
                "query": ("self_attn.q_proj", d, d),
                "key": ("self_attn.k_proj", d, d),
                "value": ("self_attn.v_proj", d, d),
                "out": ("self_attn.out_proj", d, d),
                "fc1": ("mlp.fc1", d, m),
                "fc2": ("mlp.fc2", m, d),
            },
        )


def dinov2_onnx(spec: ViTSpec) -> Iterator[Rule]:
    """Names of the packaged DINOv2 graph as `read_onnx` gives them."""
    d, m, p = spec.width, spec.mlp_width, spec.patch_size
    embeddings = "backbone.embeddings"
    yield _rule("class_token", f"{embeddings}.cls_token", (1, 1, d), _last_axis)
    # The exporter folded the position table into two constants that carry only numbers as names.
    grid = (1, spec.grid**2, d)
    yield Rule(
        "position",
        (("onnx::Concat_1957", (1, 1, d)), ("onnx::Reshape_1962", grid)),
        _join_positions,
    )
    patch = f"{embeddings}.patch_embeddings.projection"
    yield _rule("patch/kernel", f"{patch}.weight", (d, 3, p, p), _convolution)
    yield _rule("patch/bias", f"{patch}.bias", (d,))
    for leaf, name in (("scale", "weight"), ("bias", "bias")):
        yield _rule(f"norm/{leaf}", f"backbone.layernorm.{name}", (d,))
    for i in range(spec.depth):
        to, block = f"blocks/{i}", f"backbone.encoder.layer.{i}"
        for leaf, name in (("scale", "weight"), ("bias", "bias")):
            yield _rule(f"{to}/norm1/{leaf}", f"{block}.norm1.{name}", (d,))
            yield _rule(f"{to}/norm2/{leaf}", f"{block}.norm2.{name}", (d,))
        yield from _dense_rules(
            to,
            block,
            {
                "query": ("attention.attention.query", d, d),
                "key": ("attention.attention.key", d, d),
                "value": ("attention.attention.value", d, d),
                "out": ("attention.output.dense", d, d),
                "fc1": ("mlp.fc1", d, m),
                "fc2": ("mlp.fc2", m, d),
            },
        )
        yield _rule(f"{to}/scale1", f"{block}.layer_scale1.lambda1", (d,))
        yield _rule(f"{to}/scale2", f"{block}.layer_scale2.lambda1", (d,))


def bert_safetensors(spec: BertSpec) -> Iterator[Rule]:
    """Names of transformers' BERT, whose older files say gamma and beta (`readers.read_bert`)."""
    d, m = spec.width, spec.mlp_width
    yield _rule("token", "embeddings.word_embeddings.weight", (spec.vocabulary, d))
    yield Rule(
        "position",
        (
            ("embeddings.position_embeddings.weight", (spec.positions, d)),
            ("embeddings.token_type_embeddings.weight", (2, d)),
        ),
        lambda position, segment: position + segment[0],
    )
    norms = {"pre_norm": "embeddings.LayerNorm"}
    for i in range(spec.depth):
        to, block = f"blocks/{i}", f"encoder.layer.{i}"
        norms |= {f"{to}/norm1": f"{block}.attention.output.LayerNorm"}
        norms |= {f"{to}/norm2": f"{block}.output.LayerNorm"}
        table = {
            "query": ("attention.self.query", d, d),
            "key": ("attention.self.key", d, d),
            "value": ("attention.self.value", d, d),
            "out": ("attention.output.dense", d, d),
            "fc1": ("intermediate.dense", d, m),
            "fc2": ("output.dense", m, d),
        }
        for name, (source, fan_in, fan_out) in table.items():
            source = f"{block}.{source}"
            yield _rule(f"{to}/{name}/kernel", f"{source}.weight", (fan_out, fan_in), _transpose)
            yield _rule(f"{to}/{name}/bias", f"{source}.bias", (fan_out,))
    for target, source in norms.items():
        yield _rule(f"{target}/scale", f"{source}.weight", (d,))
        yield _rule(f"{target}/bias", f"{source}.bias", (d,))


def _dense_rules(to, block, table) -> Iterator[Rule]:
    for name, (source, fan_in, fan_out) in table.items():
        yield _rule(f"{to}/{name}/kernel", f"{block}.{source}.kernel", (fan_in, fan_out))
        yield _rule(f"{to}/{name}/bias", f"{block}.{source}.bias", (fan_out,))


KEY_MAPS: dict[str, Callable[[Any], Iterator[Rule]]] = {
    "augreg_npz": augreg_npz,
    "timm_safetensors": timm_safetensors,
    "clip_onnx": clip_onnx,
    "dinov2_onnx": dinov2_onnx,
    "bert_safetensors": bert_safetensors,
}

# Separators between the parts of a tensor's name.
SEPARATORS: dict[str, str] = {kind: "/" if kind == "augreg_npz" else "." for kind in KEY_MAPS}

# Prefixes of tensors that a file may hold but features do not need: classifiers, CLIP's projection
# to its joint space with text, the saliency decoder of the packaged DINOv2, and BERT's heads and
# pooler. Any other tensor that is not needed is an error.
UNUSED_PREFIXES: dict[str, tuple[str, ...]] = {
    "augreg_npz": ("head/", "pre_logits/"),
    "timm_safetensors": ("head.", "head_dist.", "pre_logits."),
    "clip_onnx": ("visual_projection.",),
    "dinov2_onnx": ("decoder.",),
    "bert_safetensors": ("pooler.", "cls.", "classifier.", "embeddings.position_ids"),
}
