"""What the scripts that run code of LAMDA-PILOT put in the place of its data sets and transformers:
tasks of given images, and small transformers whose random weights are stored as the tests read
them. Nothing of the authors' code is here.
"""

import contextlib

import numpy as np
import torch
from torch.nn import functional
from torch.utils.data import TensorDataset

# The first part that stands in a parameter's name gives the deviation of its numbers.
DEVIATIONS = {
    "down_proj": 0.3,
    "up_proj.weight": 5.0,
    "up_proj.bias": 1.5,
    "norm": 0.1,
    "bias": 0.1,
    "cls_token": 0.1,
    "pos_embed": 0.3,
    "patch_embed": 0.9,
    "attn": 0.7,
    "fc": 0.25,
}


class Tasks:
    """Stands for their `DataManager`: `images` [N, H, W, 3] with `labels` [N], of which each task
    has the next classes, as many as `sizes` says.
    """

    def __init__(self, images, labels, sizes):
        self.images, self.sizes = channels_first(images), sizes
        self.labels = torch.tensor(labels, dtype=torch.int64)

    def get_task_size(self, task):
        return self.sizes[task]

    def get_dataset(self, classes, source, mode):
        mine = torch.isin(self.labels, torch.tensor(classes))
        found = TensorDataset(torch.arange(int(mine.sum())), self.images[mine], self.labels[mine])
        found.labels = self.labels[mine].numpy()
        return found


def channels_first(images):
    return torch.tensor(images.transpose(0, 3, 1, 2), dtype=torch.float64)


def of_width(transformer, width):
    """The class `transformer` with an `out_dim` of `width`, also where they set it to 768."""
    out_dim = property(lambda self: width, lambda self, value: None)
    return type(transformer.__name__, (transformer,), {"out_dim": out_dim})


def rounded(values):
    """A tensor of float64 with numbers of float32."""
    return torch.tensor(np.float32(values), dtype=torch.float64)


def fill(module, random):
    """Gives every parameter of a transformer or its adapters drawn numbers."""
    for name, value in module.named_parameters():
        deviation = next(d for part, d in DEVIATIONS.items() if part in name)
        mean = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        value.data = rounded(mean + deviation * random.standard_normal(tuple(value.shape)))


def stacked(modules, read=lambda value: value.detach().numpy()):
    """NAME [L, ...] of the parameters that each of `modules` has, as `read` takes them."""
    each = [dict(module.named_parameters()) for module in modules]
    return {name: np.stack([read(part[name]) for part in each]) for name in each[0]}


def weights_of(vit):
    """vit/NAME, and blocks/NAME with an axis of blocks in front and query, key and value apart, in
    float32.
    """
    found = {
        f"vit/{name}": value.detach().numpy()
        for name, value in vit.named_parameters()
        if not name.startswith(("blocks.", "cur_adapter."))
    }
    for name, value in stacked(vit.blocks).items():
        if ".qkv." in name:
            for part, piece in zip("qkv", np.split(value, 3, axis=1), strict=True):
                found[f"blocks/{name.replace('qkv', f'{part}_proj')}"] = piece
        else:
            found[f"blocks/{name.removeprefix('mlp.')}"] = value
    return {name: value.astype(np.float32) for name, value in found.items()}


@contextlib.contextmanager
def noted_losses():
    """A list of the cross-entropies that are computed meanwhile."""
    losses, given = [], functional.cross_entropy

    def noted(*args):
        loss = given(*args)
        losses.append(loss.item())
        return loss

    functional.cross_entropy = noted
    yield losses
    functional.cross_entropy = given


def lead(scores):
    """By how much the best class of each row leads."""
    best = np.sort(scores, axis=1)
    return best[:, -1] - best[:, -2]
