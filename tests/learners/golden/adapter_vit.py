"""What the scripts that write the golden arrays of MOS, MoTE, SSIAT and TUNA share: these authors'
transformers are alike (adapters, query, key and value apart), and so are their learners.
"""

import contextlib
import sys
import types
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch
from torch import nn

Batch = namedtuple("Batch", "indices images labels")


class PatchEmbed(nn.Module):
    """timm's, as far as it is used: a convolution."""

    def __init__(self, img_size, patch_size, in_chans, embed_dim):
        super().__init__()
        self.num_patches = (img_size // patch_size) ** 2
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, patch_size)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


def prepare(folder, seed):
    """The authors' `folder` can be imported from, computes in float64 and draws from `seed`."""
    sys.path.insert(0, folder)
    parts = {
        "timm": {},
        "timm.models": {"register_model": None},
        "timm.models.registry": {"register_model": None},
        "timm.models.vision_transformer": {"PatchEmbed": PatchEmbed},
        "timm.models.layers": {"DropPath": None},
        "timm.models.layers.weight_init": {"trunc_normal_": nn.init.trunc_normal_},
    }
    for name, members in parts.items():
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(members)
    torch.set_default_dtype(torch.float64)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(seed)
    # Where they ask for float32, the values are those of float32.
    torch.Tensor.float = lambda value: value.to(torch.float32).to(torch.float64)


def settings(**more):
    """What they call `tuning_config`: parallel adapters of scale 0.1."""
    given = dict(
        ffn_adapt=True,
        ffn_option="parallel",
        ffn_adapter_layernorm_option="none",
        ffn_adapter_init_option="lora",
        ffn_adapter_scalar="0.1",
        vpt_on=False,
        vpt_num=0,
        _device="cpu",
    )
    return types.SimpleNamespace(**given | more)


def drawn(random, shape, deviation, mean=0.0):
    """Normal numbers, rounded to float32."""
    numbers = mean + deviation * random.standard_normal(tuple(shape))
    return torch.tensor(np.float32(numbers), dtype=torch.float64)


def fill_transformer(vit, random):
    """Draws every parameter outside of adapters."""
    for name, value in vit.named_parameters():
        if "adapt" in name:
            continue
        mean, deviation = 0.0, 0.1
        if "norm" in name and name.endswith("weight"):
            mean = 1.0
        elif name.endswith(("token", "pos_embed")):
            deviation = 0.5
        elif name.endswith("weight"):
            deviation = 0.3 if "patch" in name else value.shape[-1] ** -0.5
        value.data = drawn(random, value.shape, deviation, mean)


def fill_adapters(adapters, random, down, up):
    """Draws the adapters of all blocks, with these deviations of their matrices; no dropout."""
    for adapter in adapters:
        adapter.dropout = 0.0
        for layer, deviation in ((adapter.down_proj, down), (adapter.up_proj, up)):
            layer.weight.data = drawn(random, layer.weight.shape, deviation)
            layer.bias.data = drawn(random, layer.bias.shape, 0.1)


def stacked(modules, prefix, read=lambda value: value):
    """prefix/NAME [L, ...]: what is read of each parameter outside of adapters, in each module."""
    each = [dict(module.named_parameters()) for module in modules]
    names = [name for name in each[0] if not name.startswith("adaptmlp")]
    return {
        f"{prefix}/{name}": np.stack([read(named[name]).detach().numpy() for named in each])
        for name in names
    }


def gradients(modules, prefix):
    return stacked(modules, prefix, lambda value: value.grad)


def of_tasks(adapters):
    """NAME [T, ...] from a list of what `stacked` gave."""
    return {name: np.stack([one[name] for one in adapters]) for name in adapters[0]}


def weights_of(vit):
    """vit/NAME and blocks/NAME, the latter with a leading axis of blocks."""
    found = {
        f"vit/{name}": value.detach().numpy().copy()
        for name, value in vit.named_parameters()
        if "adapter" not in name and not name.startswith(("blocks.", "head."))
    }
    return found | stacked(vit.blocks, "blocks")


def drawn_images(random, count):
    """Images uint8 [count, 8, 8, 3], each of noise around a colour of its own."""
    colour, contrast = random.random_sample((2, count, 1, 1, 3))
    noise = random.random_sample((count, 8, 8, 3))
    return np.uint8(255 * (colour + contrast * (noise - colour)))


def pixels(images):
    """The same as the transformers read them: in [0, 1], channels first."""
    return torch.tensor(images.transpose(0, 3, 1, 2) / 255.0)


class Data:
    """Stands for their data manager: tasks of two classes, a data set of theirs is one batch."""

    def __init__(self, images, labels, trained=slice(None)):
        """Training sees the `trained` images of a task."""
        self.images, self.labels, self.trained = pixels(images), labels, trained

    def get_task_size(self, task):
        return 2

    def get_dataset(self, classes, source, mode, ret_data=False):
        rows = np.flatnonzero(np.isin(self.labels, classes))
        if mode == "train":
            rows = rows[self.trained]
        batch = Batch(None, self.images[rows], torch.tensor(self.labels[rows]))
        return (None, None, batch) if ret_data else batch


def one_batch(dataset, **options):
    """Stands for `DataLoader`."""
    return [dataset]


def draw_before_training(learner, draw):
    """Their `_train` calls `draw()` first: what it puts into place is what training then keeps, at
    a rate of 0.
    """
    train = learner._train

    def drawn_first(*loaders):
        draw()
        train(*loaders)

    learner._train = drawn_first


@contextlib.contextmanager
def recorded(owner, name, keep):
    """A list of keep(result, *arguments) for each call of owner.name in the meantime."""
    given, kept = getattr(owner, name), []

    def call(*args, **options):
        result = given(*args, **options)
        kept.append(keep(result, *args, **options))
        return result

    setattr(owner, name, call)
    yield kept
    setattr(owner, name, given)


def value_of(result, *args, **options):
    """For `recorded`: a copy of the result, which may change afterwards."""
    return result.detach().numpy().copy()


def losses_kept():
    """A list of the losses whose gradients are asked for in the meantime."""
    return recorded(torch.Tensor, "backward", lambda _, loss: loss.detach().numpy().copy())


def gap(values):
    """Between the two largest along the last axis."""
    best = np.sort(values, axis=-1)
    return best[..., -1] - best[..., -2]


def write(script, name, arrays):
    """`name` beside the script, with arrays of float64 as float32; single numbers stay."""
    target = Path(script).parent / name
    kept = {
        key: value.astype(np.float32) if value.ndim and value.dtype == np.float64 else value
        for key, value in arrays.items()
    }
    np.savez_compressed(target, **kept)
    print(f"{target}: {target.stat().st_size} bytes, {len(kept)} arrays")
