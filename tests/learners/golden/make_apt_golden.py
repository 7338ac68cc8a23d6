"""Write `apt.npz`, the golden arrays of `tests/learners/test_golden_apt.py`: what the authors' code
of APT (additive prompt tuning) computes on a random transformer of two blocks.

The authors' code is read from a folder and none of it is kept here. Run it in an environment of its
own, never in the tests: `pip install torch numpy`, then

    python tests/learners/golden/make_apt_golden.py APT

APT is a checkout of HaoranChen/Additive-Prompt-Tuning at 9b293dade6972c41ebbb90afcc68ed42fac53578.
Its `learners.prompt.APT_Learner` makes the model (models/zoo.py `vit_pt_imnet` on models/vit.py
`VisionTransformer`) for two tasks of two classes, with an ema_coeff of 0.7, in float64; the prompt
itself is float32 there. APT is written for heads of 768 = 12 x 64 numbers, so the width stays.

- `learn_batch` with no epochs ended the first task with the first prompt;
- `update_model` on three images of the second task, with the second prompt and at a rate of 0, gave
  the loss and the gradients of the prompt and of the rows of the new classes;
- `learn_batch` with no epochs ended the second task and gave the merged prompt, and `predict` the
  logits of all four classes.

What is replaced in the authors' code, and nothing else: timm (its pretrained weights are the random
ones below, its PatchEmbed is a convolution), torchvision and matplotlib, which are imported and not
used, `Tensor.cuda`, torch's default type, and of the transformer that the zoo makes the number of
blocks (2), the width of the MLP (24), the image (8 px) and the patch (4).

The weights and inputs are not stored. The test draws the same ones by the same generators of NumPy:
RandomState(2025) the weights, in the order of their names in the test's tree, and RandomState(1993)
two prompts [4, 768], whose rows are key and value of block 0, then of block 1, rows of classes
[4, 768] and images [3, 8, 8, 3].

The arrays: loss []; prompt_gradient [4, 768]; rows_gradient [2, 768]; merged [4, 48], every 16th
column; logits [3, 4].
"""

import sys
import types
from pathlib import Path

import numpy as np
import torch
from torch import nn

WIDTH, BLOCKS, MLP, PATCH, IMAGE = 768, 2, 24, 4, 8
LABELS = torch.tensor([2, 3, 3])
CONFIG = {
    "out_dim": 4,
    "tasks": [[0, 1], [2, 3]],
    "model_type": "zoo",
    "model_name": "vit_pt_imnet",
    "prompt_param": [2, [0.0]],
    "ema_coeff": 0.7,
    "optimizer": "Adam",
    "lr": 0.0,
    "momentum": 0.9,
    "weight_decay": 0,
    "schedule": [0],
    "schedule_type": "decay",
    "batch_size": 3,
    "top_k": 1,
    "memory": 0,
    "DW": False,
    "gpuid": [-1],
    "overwrite": True,
}


class PatchEmbed(nn.Module):
    def __init__(self, img_size, patch_size, in_chans, embed_dim):
        super().__init__()
        self.num_patches = (img_size // patch_size) ** 2
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, patch_size)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


class Pretrained:
    """Stands for timm's pretrained model, of which only the state is read."""

    def __init__(self, pretrained):
        self.state = timm_state(drawn_weights())

    def state_dict(self):
        return self.state | {"head.weight": None, "head.bias": None}


def stand_ins():
    """Modules that the authors' code imports, as far as it uses them."""
    torch.Tensor.cuda = lambda self: self
    parts = {
        "timm": {},
        "timm.models": {"vit_base_patch16_224": Pretrained},
        "timm.models.vision_transformer": {"_cfg": None, "PatchEmbed": PatchEmbed},
        "timm.models.registry": {"register_model": None},
        "timm.models.layers": {
            "trunc_normal_": nn.init.trunc_normal_,
            "DropPath": None,
            "PatchEmbed": PatchEmbed,
        },
        "timm.models.layers.helpers": {"to_2tuple": None},
        "timm.models.helpers": {"named_apply": None, "adapt_input_conv": None},
        "torchvision": {},
        "torchvision.models": {},
        "matplotlib": {},
        "matplotlib.pyplot": {},
    }
    for name, members in parts.items():
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(members)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, sys.modules[name])


def shapes():
    """Of the weights, by the test's names and in its order: sorted by name."""
    block = {"norm1.bias": (WIDTH,), "norm1.scale": (WIDTH,)}
    block |= {"norm2.bias": (WIDTH,), "norm2.scale": (WIDTH,)}
    sizes = {"fc1": (WIDTH, MLP), "fc2": (MLP, WIDTH)}
    sizes |= {name: (WIDTH, WIDTH) for name in ("query", "key", "value", "out")}
    for name, size in sizes.items():
        block |= {f"{name}.bias": size[1:], f"{name}.kernel": size}
    found = {f"blocks.{i}.{name}": shape for i in range(BLOCKS) for name, shape in block.items()}
    found |= {"class_token": (WIDTH,), "position": (1 + (IMAGE // PATCH) ** 2, WIDTH)}
    found |= {"norm.bias": (WIDTH,), "norm.scale": (WIDTH,)}
    found |= {"patch.bias": (WIDTH,), "patch.kernel": (3 * PATCH**2, WIDTH)}
    return dict(sorted(found.items()))


def drawn_weights():
    random, weights = np.random.RandomState(2025), {}
    for name, shape in shapes().items():
        values = random.standard_normal(shape)
        if name.endswith("kernel"):
            values = values * shape[0] ** -0.5
        else:
            values = 1.0 + 0.1 * values if name.endswith("scale") else 0.1 * values
        weights[name] = torch.tensor(values.astype(np.float32), dtype=torch.float64)
    return weights


def timm_state(weights):
    """The same weights by timm's names and in its shapes."""
    kernel = weights.pop("patch.kernel").reshape(PATCH, PATCH, 3, WIDTH)
    state = {
        "cls_token": weights.pop("class_token")[None, None],
        "pos_embed": weights.pop("position")[None],
        "patch_embed.proj.weight": kernel.permute(3, 2, 0, 1),
        "patch_embed.proj.bias": weights.pop("patch.bias"),
    }
    for index in range(BLOCKS):
        block = f"blocks.{index}."
        for part in ("kernel", "bias"):
            of_three = [weights.pop(f"{block}{name}.{part}") for name in ("query", "key", "value")]
            weights[f"{block}attn.qkv.{part}"] = torch.cat(of_three, dim=-1)
            weights[f"{block}attn.proj.{part}"] = weights.pop(f"{block}out.{part}")
            for name in ("fc1", "fc2"):
                weights[f"{block}mlp.{name}.{part}"] = weights.pop(f"{block}{name}.{part}")
    for name, value in weights.items():
        module, part = name.rsplit(".", 1)
        part = "bias" if part == "bias" else "weight"
        state[f"{module}.{part}"] = value.T if name.endswith("kernel") else value
    return state


def built():
    """Their learner before the first task, on the small transformer."""
    import models.zoo as zoo
    from learners.prompt import APT_Learner

    given = zoo.VisionTransformer
    sizes = {"img_size": IMAGE, "patch_size": PATCH, "depth": BLOCKS, "mlp_ratio": MLP / WIDTH}
    zoo.VisionTransformer = lambda **settings: given(**settings | sizes)
    return APT_Learner(CONFIG)


def main(folder):
    sys.path.insert(0, folder)
    stand_ins()
    torch.set_default_dtype(torch.float64)
    random = np.random.RandomState(1993)
    first, second = (0.5 * random.standard_normal((2, 4, WIDTH))).astype(np.float32)
    rows = (0.05 * random.standard_normal((4, WIDTH))).astype(np.float32)
    images = random.random_sample((3, IMAGE, IMAGE, 3)).astype(np.float32)
    images = torch.tensor(images, dtype=torch.float64).permute(0, 3, 1, 2)

    learner = built()
    model = learner.model
    prompt, used = model.prompt, slice(0, 2 * BLOCKS)
    model.last.weight.data = torch.tensor(rows, dtype=torch.float64)
    learner.add_valid_output_dim(2)
    prompt.prompt_tokens.data[used] = torch.tensor(first)
    learner.learn_batch([], None, None)

    learner.add_valid_output_dim(2)
    prompt.prompt_tokens.data[used] = torch.tensor(second)
    model.train()
    loss, _ = learner.update_model(images, LABELS)
    arrays = {
        "loss": loss.numpy(),
        "prompt_gradient": prompt.prompt_tokens.grad[used].numpy(),
        "rows_gradient": model.last.weight.grad[2:].numpy().astype(np.float32),
    }
    learner.learn_batch([], None, None)
    arrays["merged"] = prompt.global_merged_prompt[used, ::16].numpy()
    with torch.no_grad():
        arrays["logits"] = learner.predict(images).numpy().astype(np.float32)
    return arrays


if __name__ == "__main__":
    found = main(sys.argv[1])
    target = Path(__file__).parent / "apt.npz"
    np.savez_compressed(target, **found)
    print(f"{target}: {target.stat().st_size} bytes, {len(found)} arrays")
