"""The text encoder: the forward pass of MiniLM-L6 beside the transformers library and PyTorch.

    python -m benchmarks.text [--batch 32] [--tokens 64] [--pairs 7]

Float32, random weights of MiniLM's shape, the same on every side, the same token ids and threads.
One row has texts that fill all tokens; one has texts of many lengths, as texts are, where a peer
may leave out padding. The result is the mean over real tokens. Peers: `BertModel` with SDPA, and
`torch.nn.TransformerEncoder`, which in inference takes its fused path and, with a mask, nested
tensors without the padding.
"""

import argparse
import os
from collections.abc import Iterator

import jax
import numpy as np

from benchmarks.pairs import Row, check, compare, table
from qkd_jax.nn.backbone import Backbone
from qkd_jax.nn.bert import BertSpec
from qkd_jax.nn.encode import encode_pooled
from qkd_jax.nn.inputs import Raw
from qkd_jax.nn.parameters import init_random


def minilm(tokens: int) -> BertSpec:
    return BertSpec(384, 6, 12, 1536, vocabulary=30522, positions=512, num_tokens=tokens)


def tensor(array):
    import torch

    return torch.from_numpy(np.array(array))


def fill(layer, values) -> None:
    """Puts a linear layer's or a LayerNorm's parameters in place."""
    kernel = values.get("kernel")
    weight = tensor(values["scale"]) if kernel is None else tensor(kernel).T.contiguous()
    layer.weight.data, layer.bias.data = weight, tensor(values["bias"])


def bert_model(spec: BertSpec, params: dict):
    """transformers' BertModel with these weights."""
    from transformers import BertConfig, BertModel

    model = BertModel(
        BertConfig(
            vocab_size=spec.vocabulary,
            hidden_size=spec.width,
            num_hidden_layers=spec.depth,
            num_attention_heads=spec.num_heads,
            intermediate_size=spec.mlp_width,
            max_position_embeddings=spec.positions,
            attn_implementation="sdpa",
        ),
        add_pooling_layer=False,
    ).eval()
    embeddings = model.embeddings
    embeddings.word_embeddings.weight.data = tensor(params["token"])
    embeddings.position_embeddings.weight.data = tensor(params["position"])
    embeddings.token_type_embeddings.weight.data.zero_()
    fill(embeddings.LayerNorm, params["pre_norm"])
    for layer, values in zip(model.encoder.layer, params["blocks"], strict=True):
        for name in ("query", "key", "value"):
            fill(getattr(layer.attention.self, name), values[name])
        fill(layer.attention.output.dense, values["out"])
        fill(layer.attention.output.LayerNorm, values["norm1"])
        fill(layer.intermediate.dense, values["fc1"])
        fill(layer.output.dense, values["fc2"])
        fill(layer.output.LayerNorm, values["norm2"])
    return model


def torch_encoder(spec: BertSpec, params: dict):
    """torch.nn.TransformerEncoder with these weights, from embeddings on."""
    from torch import nn

    layer = nn.TransformerEncoderLayer(
        spec.width,
        spec.num_heads,
        spec.mlp_width,
        activation="gelu",
        layer_norm_eps=spec.eps,
        batch_first=True,
    )
    encoder = nn.TransformerEncoder(layer, spec.depth).eval()
    for layer, values in zip(encoder.layers, params["blocks"], strict=True):
        parts = [values[name] for name in ("query", "key", "value")]
        kernel = np.concatenate([part["kernel"] for part in parts], axis=1)
        layer.self_attn.in_proj_weight.data = tensor(kernel).T.contiguous()
        bias = np.concatenate([part["bias"] for part in parts])
        layer.self_attn.in_proj_bias.data = tensor(bias)
        fill(layer.self_attn.out_proj, values["out"])
        fill(layer.linear1, values["fc1"])
        fill(layer.linear2, values["fc2"])
        fill(layer.norm1, values["norm1"])
        fill(layer.norm2, values["norm2"])
    return encoder


def rows(batch: int, tokens: int, pairs: int) -> Iterator[Row]:
    import torch
    from torch.nn import functional

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    spec = minilm(tokens)
    backbone = Backbone(init_random(jax.random.key(0), spec), spec)
    params = jax.device_get(backbone.params)
    model, encoder = bert_model(spec, params), torch_encoder(spec, params)
    norm = params["pre_norm"]
    table_of_tokens, positions = tensor(params["token"]), tensor(params["position"])[:tokens]
    scale, bias = tensor(norm["scale"]), tensor(norm["bias"])
    encoded = jax.jit(lambda backbone, inputs: encode_pooled(backbone, inputs))
    generator = np.random.default_rng(0)
    ids = generator.integers(0, spec.vocabulary, (batch, tokens)).astype(np.int32)
    many = np.clip(generator.geometric(2.5 / tokens, batch) + 3, 3, tokens)
    for name, lengths in (
        ("all tokens real", np.full(batch, tokens)),
        (f"{100 * many.mean() / tokens:.0f} % of the tokens real", many),
    ):
        mask = np.arange(tokens)[None, :] < lengths[:, None]
        inputs = jax.device_put(Raw({"token_ids": ids, "token_mask": mask}))
        their_ids, their_mask = tensor(ids).long(), tensor(mask)
        padding = None if mask.all() else ~their_mask

        def pooled(hidden, their_mask=their_mask):
            weights = their_mask[:, : hidden.shape[1], None].to(hidden.dtype)
            return (hidden * weights).sum(1) / weights.sum(1)

        def ours(inputs=inputs):
            return jax.block_until_ready(encoded(backbone, inputs))

        @torch.inference_mode()
        def transformers(ids=their_ids, mask=their_mask, pooled=pooled):
            return pooled(model(ids, attention_mask=mask.long()).last_hidden_state)

        @torch.inference_mode()
        def fused(ids=their_ids, padding=padding, pooled=pooled):
            x = functional.embedding(ids, table_of_tokens) + positions
            x = functional.layer_norm(x, (spec.width,), scale, bias, spec.eps)
            return pooled(encoder(x, src_key_padding_mask=padding))

        title = f"MiniLM-L6 forward, batch {batch}, {tokens} tokens, {name}"
        for peer, call in (
            ("transformers, SDPA", transformers),
            ("torch.nn.TransformerEncoder", fused),
        ):
            check(title, np.asarray(ours()), call().numpy())
            yield compare(title, ours, call, peer, 1.0, pairs=pairs)


def main(arguments: list[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=7)
    options = parser.parse_args(arguments)
    found = list(rows(options.batch, options.tokens, options.pairs))
    print(table(found), flush=True)
    return found


if __name__ == "__main__":
    main()
