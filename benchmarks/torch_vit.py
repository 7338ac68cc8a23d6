"""The peer of the transformer's benchmarks: the same ViT with adapters in PyTorch, as one would
write it there: fused query-key-value, scaled_dot_product_attention, frozen parameters without grad.
"""

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from qkd_jax.nn.vit import ViTSpec


class Adapter(nn.Module):
    """scale * up(relu(down(x)))."""

    def __init__(self, width: int, bottleneck: int, scale: float):
        super().__init__()
        self.down, self.up = nn.Linear(width, bottleneck), nn.Linear(bottleneck, width)
        self.scale = scale

    def forward(self, x):
        return self.scale * self.up(functional.relu(self.down(x)))


class Block(nn.Module):
    def __init__(self, spec: ViTSpec, adapter: Adapter | None):
        super().__init__()
        self.heads = spec.num_heads
        self.norm1 = nn.LayerNorm(spec.width, eps=spec.eps)
        self.qkv = nn.Linear(spec.width, 3 * spec.width)
        self.out = nn.Linear(spec.width, spec.width)
        self.norm2 = nn.LayerNorm(spec.width, eps=spec.eps)
        self.fc1 = nn.Linear(spec.width, spec.mlp_width)
        self.fc2 = nn.Linear(spec.mlp_width, spec.width)
        self.adapter = adapter

    def class_token(self, x):
        """[B, 1, D]: the first token alone, as a last block needs it."""
        batch, tokens, width = x.shape
        normed = self.norm1(x)
        of_query, of_rest = self.qkv.weight[:width], self.qkv.weight[width:]
        query = functional.linear(normed[:, :1], of_query, self.qkv.bias[:width])
        rest = functional.linear(normed, of_rest, self.qkv.bias[width:])
        query = query.reshape(batch, 1, self.heads, -1).transpose(1, 2)
        key, value = rest.reshape(batch, tokens, 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value)
        x = x[:, :1] + self.out(mixed.transpose(1, 2).reshape(batch, 1, width))
        y = x + self.fc2(functional.gelu(self.fc1(self.norm2(x))))
        return y if self.adapter is None else y + self.adapter(x)

    def forward(self, x):
        batch, tokens, width = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(batch, tokens, 3, self.heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, tokens, width))
        y = x + self.fc2(functional.gelu(self.fc1(self.norm2(x))))
        return y if self.adapter is None else y + self.adapter(x)


class Transformer(nn.Module):
    """Images [B, 3, S, S], already normalised, to the class token's feature [B, D]."""

    def __init__(self, spec: ViTSpec, bottleneck: int = 0, scale: float = 0.1):
        super().__init__()
        self.patch = nn.Conv2d(3, spec.width, spec.patch_size, spec.patch_size)
        self.class_token = nn.Parameter(torch.zeros(spec.width))
        self.position = nn.Parameter(torch.zeros(spec.num_tokens, spec.width))
        self.blocks = nn.ModuleList(
            Block(spec, Adapter(spec.width, bottleneck, scale) if bottleneck else None)
            for _ in range(spec.depth)
        )
        self.norm = nn.LayerNorm(spec.width, eps=spec.eps)

    def forward(self, images, class_only: bool = False):
        x = self.patch(images).flatten(2).transpose(1, 2)
        class_token = self.class_token.expand(len(x), 1, -1)
        x = torch.cat([class_token, x], dim=1) + self.position
        for block in self.blocks[:-1]:
            x = block(x)
        x = self.blocks[-1].class_token(x) if class_only else self.blocks[-1](x)
        return self.norm(x)[:, 0]


def copy_weights(model: Transformer, params: dict, adapter: dict | None = None) -> None:
    """Puts the parameters of `qkd_jax.nn.vit` (list form) and of one adapter set into the model."""

    def tensor(array):
        return torch.from_numpy(np.array(array))

    def linear(layer, values):
        layer.weight.data, layer.bias.data = tensor(values["kernel"]).T, tensor(values["bias"])

    def norm(layer, values):
        layer.weight.data, layer.bias.data = tensor(values["scale"]), tensor(values["bias"])

    side = model.patch.kernel_size[0]
    kernel = tensor(params["patch"]["kernel"]).reshape(side, side, 3, -1)
    model.patch.weight.data = kernel.permute(3, 2, 0, 1).contiguous()
    model.patch.bias.data = tensor(params["patch"]["bias"])
    model.class_token.data = tensor(params["class_token"])
    model.position.data = tensor(params["position"])
    norm(model.norm, params["norm"])
    for index, (block, values) in enumerate(zip(model.blocks, params["blocks"], strict=True)):
        parts = [values[name] for name in ("query", "key", "value")]
        joined = {n: np.concatenate([p[n] for p in parts], axis=-1) for n in ("kernel", "bias")}
        linear(block.qkv, joined)
        for name in ("out", "fc1", "fc2"):
            linear(getattr(block, name), values[name])
        for name in ("norm1", "norm2"):
            norm(getattr(block, name), values[name])
        for name in ("down", "up") if adapter is not None else ():
            one = {leaf: array[index] for leaf, array in adapter[name].items()}
            linear(getattr(block.adapter, name), one)
    for module in model.modules():  # transposed views are slow to multiply with
        if isinstance(module, nn.Linear):
            module.weight.data = module.weight.data.contiguous()
