"""Write `care.npz`, the golden arrays of `tests/learners/test_golden_care.py`: what the authors'
code of CaRE computes on a small random transformer.

The authors' code is read from a folder and none of it is kept here. Run it in an environment of its
own, never in the tests: `pip install torch numpy scipy tqdm einops`, then

    python tests/learners/golden/make_care_golden.py CARE

CARE is a checkout of LMMMEng/CaRE at d90800a019aaa300db3f5d1e03660dac1050f2c3:
backbone/vit_brmoe.py `VisionTransformer` (width 8, 12 blocks, for their loss counts to 6, 2 heads,
MLP 16, patches of 4 of 8 x 8 images; experts of 2 and shared adapters of 3 hidden units, 2 routers
of 2 experts) and backbone/linears.py `TunaLinear` for three tasks of two classes, in float64 on
weights rounded to float32, with every number of an expert drawn away from its usual start.

- `VisionTransformer.forward` in evaluation mode gave the features of each task's own pass and of
  the free pass, and models/care.py `Learner._eval_cnn` the scores of both forms of it, taken where
  it asks for the best;
- `Learner._init_train` on one batch of the third task, at a rate of 0 and without dropout, the
  total loss, its two parts and the gradients, with scale 20 and margin 0.1, for both settings of
  `aux_cos_loss` and `self_dist_loss` together;
- `MoEAdapter._init_adapter` in block 0 what a fourth expert starts from;
- `MoEAdapter._get_shared_adapter` in block 0 the shared adapter after it was moved by 1 in every
  number.

What is replaced in the authors' code, and nothing else: timm (its PatchEmbed is a convolution)
and torch's default type, which is float64.

The arrays: images [12, 8, 8, 3], labels [12]; vit/NAME and blocks/NAME as in the other files, the
latter with a leading axis of blocks; experts/NAME [12, 3, ...] for each block and expert, with NAME
adapter.*, latent_head.*, router.* (whose outputs for coming experts are zeros); shared/NAME
[12, ...]; rows [6, 8]; then what was computed.
"""

import logging
import sys
import types
from pathlib import Path

import numpy as np
import torch
from torch import nn

WIDTH, BLOCKS, TASKS, SIZE = 8, 12, 3, 2
ARRAYS: dict[str, np.ndarray] = {}
RANDOM = np.random.RandomState(2026)


class Settings(dict):
    __getattr__ = dict.__getitem__


class PatchEmbed(nn.Module):
    def __init__(self, img_size, patch_size, in_chans, embed_dim):
        super().__init__()
        self.num_patches = (img_size // patch_size) ** 2
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, patch_size)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


def stand_ins():
    """timm, which the authors' files import."""
    names = ("timm", "timm.models", "timm.models.vision_transformer", "timm.models.layers")
    for name in (*names, "timm.models.layers.weight_init"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules["timm.models.vision_transformer"].PatchEmbed = PatchEmbed
    sys.modules["timm.models.vision_transformer"].DropPath = nn.Identity
    sys.modules["timm.models.layers.weight_init"].trunc_normal_ = nn.init.trunc_normal_
    data = types.ModuleType("utils.data_manager")  # which reads data sets
    sys.modules["utils.data_manager"] = data


def fill(module, deviation):
    """Gives every parameter a drawn value, rounded to float32."""
    for name, value in module.named_parameters():
        mean = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        drawn = mean + deviation * RANDOM.standard_normal(tuple(value.shape))
        value.data = torch.tensor(np.float32(drawn), dtype=torch.float64)


def built():
    """(the transformer with three experts in each block, the head)."""
    from backbone.linears import TunaLinear
    from backbone.vit_brmoe import VisionTransformer

    config = Settings(
        ffn_option="parallel",
        d_model=WIDTH,
        _device="cpu",
        expert_dim=2,
        adapter_dim=3,
        topk_routers=2,
        topk_experts=2,
        init_cls=SIZE,
    )
    vit = VisionTransformer(
        img_size=8,
        patch_size=4,
        embed_dim=WIDTH,
        depth=BLOCKS,
        num_heads=2,
        mlp_ratio=2,
        qkv_bias=True,
        norm_layer=lambda width: nn.LayerNorm(width, eps=1e-6),
        num_classes=0,
        tuning_config=config,
    )
    head = TunaLinear(WIDTH, SIZE)
    for _ in range(TASKS - 1):
        vit.update_adapters(SIZE)
        head.update(SIZE)
    fill(vit, 0.4)
    fill(head, 1.0)
    for module in vit.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return vit, head


def store_weights(vit, head):
    state = {name: value.detach().numpy() for name, value in vit.named_parameters()}
    for name, value in state.items():
        if name.startswith("blocks.0."):
            rest = name.removeprefix("blocks.0.")
            each = [state[f"blocks.{i}.{rest}"] for i in range(BLOCKS)]
            ARRAYS[f"blocks/{rest}"] = np.stack(each)
        elif not name.startswith(("blocks.", "adapter.")):
            ARRAYS[f"vit/{name}"] = value
    ARRAYS.update(stacked(state))
    ARRAYS["rows"] = np.concatenate([part[0].weight.detach().numpy() for part in head.heads])


def stacked(state, tasks=range(TASKS)):
    """experts/NAME [12, tasks, ...] and shared/NAME [12, ...] of named arrays."""
    found = {}
    first = "adapter.adapter_layer0."
    for name in state:
        if not name.startswith(first):
            continue
        part, _, rest = name.removeprefix(first).partition(".")
        blocks = [f"adapter.adapter_layer{i}." for i in range(BLOCKS)]
        if part == "shared_adapter":
            found[f"shared/{rest}"] = np.stack([state[f"{b}{part}.{rest}"] for b in blocks])
        elif rest.startswith(f"{tasks[0]}."):
            rest = rest.partition(".")[2]
            each = [[state[f"{b}{part}.{t}.{rest}"] for t in tasks] for b in blocks]
            if part == "router":
                each = [[padded(value) for value in row] for row in each]
            found[f"experts/{part}.{rest}"] = np.stack([np.stack(row) for row in each])
    return found


def padded(value):
    return np.pad(value, ((0, TASKS - len(value)),) + ((0, 0),) * (value.ndim - 1))


def learner_of(vit, head, task, **settings):
    """Their `Learner` in `task`, without its data."""
    from models.care import Learner

    learner = Learner.__new__(Learner)
    learner._network = nn.Module()
    learner._network.backbone, learner._network.fc = vit, head
    learner._cur_task, learner._known_classes = task, SIZE * task
    learner._total_classes, learner._device = SIZE * (task + 1), "cpu"
    learner.args = {"scale": 20.0, "m": 0.1}
    learner.self_dist_loss = learner.aux_cos_loss = True
    learner.use_amp, learner.iter_pred, learner.topk = False, True, SIZE
    learner.scaler = torch.amp.GradScaler(enabled=False)
    for name, value in settings.items():
        setattr(learner, name, value)
    return learner


def scores_of(learner, images):
    """What `_eval_cnn` asks for the best of, last."""
    asked, topk = [], torch.topk

    def keep(values, *args, **kwargs):
        asked.append(values)
        return topk(values, *args, **kwargs)

    torch.topk = keep
    learner._eval_cnn([(None, images, torch.zeros(len(images)))])
    torch.topk = topk
    return asked[-1].detach().numpy()


def loss_and_gradients(learner, images, labels):
    """(losses in the order in which they are read: total, main, blocks; the gradients)."""
    read, item = [], torch.Tensor.item

    def keep(value):
        read.append(item(value))
        return read[-1]

    vit, head = learner._network.backbone, learner._network.fc
    parameters = [p for p in [*vit.adapter.parameters(), *head.parameters()] if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.0)
    torch.Tensor.item = keep
    learner._init_train([(None, images, labels)], None, optimizer, None, 1)
    torch.Tensor.item = item
    gradients = {
        name: value.grad.numpy() for name, value in vit.named_parameters() if value.grad is not None
    }
    return (
        np.array(read[:3]),
        stacked(gradients, [learner._cur_task]),
        head.heads[-1][0].weight.grad,
    )


def main(folder):
    sys.path.insert(0, folder)
    stand_ins()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    logging.disable()
    images = np.float32(RANDOM.random_sample((12, 8, 8, 3)))
    labels = np.arange(12) % (SIZE * TASKS)
    ARRAYS.update(images=images, labels=labels)
    given = torch.tensor(images.transpose(0, 3, 1, 2), dtype=torch.float64)
    vit, head = built()
    store_weights(vit, head)

    vit.eval()
    with torch.no_grad():
        own = [vit(given, adapter_id=t, with_task_id=True)["features"] for t in range(TASKS)]
        free = vit(given, adapter_id=None, with_task_id=False)["features"]
    ARRAYS["features"] = torch.stack([*own, free], dim=1).numpy()
    task = TASKS - 1
    ARRAYS["scores/every_task"] = scores_of(learner_of(vit, head, task), given)
    ARRAYS["scores/one"] = scores_of(learner_of(vit, head, task, iter_pred=False), given)

    mine = labels >= SIZE * task
    of_task = given[torch.tensor(mine)], torch.tensor(labels[mine])
    for name, both in (("cosface", True), ("cross_entropy", False)):
        learner = learner_of(vit, head, task, aux_cos_loss=both, self_dist_loss=both)
        losses, gradients, rows = loss_and_gradients(learner, *of_task)
        ARRAYS[f"{name}/losses"] = losses
        ARRAYS.update({f"{name}/gradient/{key}": value for key, value in gradients.items()})
        ARRAYS[f"{name}/gradient/rows"] = rows.numpy().copy()

    block = vit.adapter["adapter_layer0"]
    for name, value in block._init_adapter().named_parameters():
        ARRAYS[f"start/{name}"] = value.detach().numpy()
    block._load_shared_adapter(use_ema=True)
    for value in block.shared_adapter.parameters():
        value.data += 1.0
    block.train()
    for name, value in block._get_shared_adapter().named_parameters():
        ARRAYS[f"pulled/{name}"] = value.detach().numpy()


if __name__ == "__main__":
    main(sys.argv[1])
    target = Path(__file__).parent / "care.npz"
    kept = {
        name: array.astype(np.float32) if array.dtype == np.float64 else array
        for name, array in ARRAYS.items()
    }
    np.savez_compressed(target, **kept)
    print(f"{target}: {target.stat().st_size} bytes, {len(kept)} arrays")
