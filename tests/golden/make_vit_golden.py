"""Write the golden arrays that `tests/nn/test_vit.py` and `tests/weights` compare with.

An independent implementation (timm on PyTorch, float32 on CPU) with small random weights. Run it in
an environment of its own, never in the tests: `pip install torch timm`, then
`python tests/golden/make_vit_golden.py`. The versions used are stored in each file.

vit_<variant>.safetensors   timm's own tensor names; plus "golden.images", "golden.feature",
                            "golden.tokens" (after the last norm) and "golden.block.<i>"
vit_augreg.npz              vision_transformer's names, read by timm's own npz loader; plus
                            "golden/images" and "golden/feature"
positions.npz               position grids resampled by timm (antialias) and by torch (without)
"""

import json
from functools import partial
from pathlib import Path

import numpy as np
import timm
import torch
from safetensors.numpy import save_file
from timm.layers import QuickGELU, resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer

HERE = Path(__file__).parent
VERSIONS = {"torch": torch.__version__, "timm": timm.__version__, "numpy": np.__version__}
SMALL = {
    "img_size": 12,
    "patch_size": 4,
    "embed_dim": 24,
    "depth": 3,
    "num_heads": 3,
    "mlp_ratio": 2.0,
}


def randomise(model, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim >= 2 and "embed" not in name and "token" not in name:
                parameter.copy_(noise * parameter[0].numel() ** -0.5 * 1.5)
            elif ("norm" in name and name.endswith("weight")) or "gamma" in name:
                parameter.copy_(1.0 + 0.3 * noise)
            else:
                parameter.copy_(0.3 * noise)


def images(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((4, 3, 12, 12), generator=generator)


def to_numpy(tensor):
    return np.ascontiguousarray(tensor.detach().numpy())


def write_variant(name, seed, **settings):
    model = VisionTransformer(**{**SMALL, "num_classes": 0, **settings}).eval()
    randomise(model, seed)
    x = images(seed + 1)
    arrays = {key: to_numpy(value) for key, value in model.state_dict().items()}
    with torch.no_grad():
        stages = []
        hooks = [
            block.register_forward_hook(lambda _m, _i, out: stages.append(out))
            for block in model.blocks
        ]
        tokens = model.forward_features(x)
        for hook in hooks:
            hook.remove()
        arrays["golden.images"] = to_numpy(x.permute(0, 2, 3, 1))
        arrays["golden.tokens"] = to_numpy(tokens)
        arrays["golden.feature"] = to_numpy(tokens[:, 0])
        for index, stage in enumerate(stages):
            arrays[f"golden.block.{index}"] = to_numpy(stage)
    save_file(arrays, HERE / f"vit_{name}.safetensors", metadata={"versions": json.dumps(VERSIONS)})


def write_augreg_npz(seed):
    """Random tensors under vision_transformer's names, read by timm's own npz loader."""
    rng = np.random.default_rng(seed)
    d, heads, mlp, patch, depth, grid = 24, 3, 48, 4, 3, 3

    def normal(*shape, std=0.3):
        return (std * rng.normal(size=shape)).astype(np.float32)

    arrays = {
        "cls": normal(1, 1, d),
        "Transformer/posembed_input/pos_embedding": normal(1, 1 + grid**2, d),
        "embedding/kernel": normal(patch, patch, 3, d),
        "embedding/bias": normal(d),
        "Transformer/encoder_norm/scale": 1 + normal(d),
        "Transformer/encoder_norm/bias": normal(d),
        "head/kernel": normal(d, 5),
        "head/bias": normal(5),
    }
    for i in range(depth):
        block = f"Transformer/encoderblock_{i}"
        attention = f"{block}/MultiHeadDotProductAttention_1"
        for norm in ("LayerNorm_0", "LayerNorm_2"):
            arrays[f"{block}/{norm}/scale"] = 1 + normal(d)
            arrays[f"{block}/{norm}/bias"] = normal(d)
        for part in ("query", "key", "value"):
            arrays[f"{attention}/{part}/kernel"] = normal(d, heads, d // heads)
            arrays[f"{attention}/{part}/bias"] = normal(heads, d // heads)
        arrays[f"{attention}/out/kernel"] = normal(heads, d // heads, d)
        arrays[f"{attention}/out/bias"] = normal(d)
        for dense, fan_in, fan_out in (("Dense_0", d, mlp), ("Dense_1", mlp, d)):
            arrays[f"{block}/MlpBlock_3/{dense}/kernel"] = normal(fan_in, fan_out)
            arrays[f"{block}/MlpBlock_3/{dense}/bias"] = normal(fan_out)
    path = HERE / "vit_augreg.npz"
    np.savez(path, **arrays)
    model = VisionTransformer(**SMALL, num_classes=5).eval()
    model.load_pretrained(str(path))
    x = images(seed + 1)
    with torch.no_grad():
        feature = model.forward_features(x)[:, 0]
    arrays["golden/images"] = to_numpy(x.permute(0, 2, 3, 1))
    arrays["golden/feature"] = to_numpy(feature)
    arrays["golden/versions"] = np.array(json.dumps(VERSIONS))
    np.savez_compressed(path, **arrays)


def write_positions(seed):
    generator = torch.Generator().manual_seed(seed)
    arrays = {"versions": np.array(json.dumps(VERSIONS))}
    tables = {
        old: torch.randn((1, 1 + old * old, 4), generator=generator) for old in (14, 6, 7, 3, 37)
    }
    for old, new in ((14, 6), (14, 9), (6, 14), (7, 5), (3, 4), (37, 16)):
        table = tables[old]
        arrays[f"{old}/position"] = to_numpy(table[0])
        timm_form = resample_abs_pos_embed(table, [new, new], antialias=True)
        arrays[f"{old}/{new}/antialias"] = to_numpy(timm_form[0])
        patches = table[:, 1:].reshape(1, old, old, 4).permute(0, 3, 1, 2)
        patches = torch.nn.functional.interpolate(
            patches, size=(new, new), mode="bicubic", align_corners=False
        )
        patches = patches.permute(0, 2, 3, 1).reshape(new * new, 4)
        arrays[f"{old}/{new}/plain"] = to_numpy(torch.cat([table[0, :1], patches]))
    np.savez_compressed(HERE / "positions.npz", **arrays)


if __name__ == "__main__":
    norm = partial(torch.nn.LayerNorm, eps=1e-5)
    write_variant("augreg", 10)
    write_variant("clip", 20, pre_norm=True, act_layer=QuickGELU, norm_layer=norm, num_classes=7)
    write_variant("dinov2", 30, init_values=1.0)
    write_augreg_npz(40)
    write_positions(50)
