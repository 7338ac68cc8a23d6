"""Write `min.npz`, the golden arrays of `tests/learners/test_golden_min.py`: what the authors' code
of MIN computes on a small random transformer.

The authors' code is read from a folder and none of it is kept here. Run it in an environment of its
own, never in the tests: `pip install torch numpy scipy tqdm einops`, then

    python tests/learners/golden/make_min_golden.py MIN

MIN is the folder MiN of their repository at 34b94efbaccd7bd4d94b0aedd9cfef6143beeb5d, which stands
in the history of the public copies thuwng/MiN-NeurIPS2025 and Ngahoang2005/MiN-NeurIPS2025:
utils/inc_net.py `MiNbaseNet` (a projection of 24, ridge 0.5) on backbones/ViT_MiN.py
`VisionTransformer` (width 8, 3 blocks, 2 heads, MLP 16, patches of 4 of 8 x 8 images, noise of 3
numbers) in float64 on weights rounded to float32, three tasks of two classes and eight images each.
In the order of models/MiN.py `MinNet.init_train` and `increment_train`, where training is replaced
by random values of what it trains, away from zero: `MinNet.fit_fc` (three times), `update_fc`,
`update_noise`, `get_task_prototype`, `MinNet.run`, `re_fit`. So were made

- in the first and in the third task, by `MinNet.run` on one batch at a rate of 0, the loss and its
  gradients;
- after each task the weights of the noise, the ridge regression (`MiNbaseNet.weight`) and the
  logits of all images.

What is replaced in the authors' code, and nothing else: timm (its PatchEmbed is a convolution, its
Mlp two layers), the modules that read data sets and count accuracies, the sizes of a transformer
and the device of a noise, which are written into it, and torch's default type, float64, also where
they ask for float32.

The arrays: images [24, 8, 8, 3], labels [24]; vit/NAME and blocks/NAME as in the other files,
query, key and value apart, with the LayerNorms of before the first task; norms/NAME as that task
left them; noise/NAME [3, ...] for each block, where mu.* and sigmma.* have an axis of tasks behind
it; projection [8, 24]; rows/0 [2, 24] and bias/0 [2], rows/2 [6, 24]: the auxiliary heads of the
two losses; then what was computed.
"""

import sys
import types
from pathlib import Path

import numpy as np
import torch
from timm_stand_in import Anything, Mlp, PatchEmbed
from torch import nn

WIDTH, BLOCKS, TASKS, NOISE, SIZE, RIDGE = 8, 3, 3, 3, 24, 0.5
ARRAYS: dict[str, np.ndarray] = {}
RANDOM = np.random.RandomState(2509)


def stand_ins():
    for name in ("timm", "timm.data", "timm.layers", "utils.toolkit", "data_process.data_manger"):
        sys.modules[name] = Anything(name)
    layers = sys.modules["timm.layers"]
    layers.PatchEmbed, layers.Mlp, layers.DropPath = PatchEmbed, Mlp, nn.Identity
    layers.trunc_normal_ = nn.init.trunc_normal_
    layers.get_norm_layer = layers.get_act_layer = lambda given: given
    layers.use_fused_attn = lambda: False
    sys.modules["utils.toolkit"].tensor2numpy = lambda x: x.data.numpy()


def in_float64():
    """Float64 by default, and where they ask for float32."""
    torch.set_default_dtype(torch.float64)
    given = torch.Tensor.to

    def to(value, kind, *rest, **options):
        kind = torch.float64 if kind is torch.float32 else kind
        return given(value, kind, *rest, **options)

    torch.Tensor.to = to


def drawn(value, deviation):
    """A drawn value of the same shape, rounded to float32."""
    numbers = deviation * RANDOM.standard_normal(tuple(value.shape))
    return torch.tensor(np.float32(numbers), dtype=torch.float64)


def built():
    """Their `MinNet` before the first task, without its data."""
    import backbones.ViT_MiN as vit_file
    import utils.inc_net as net_file
    from models.MiN import MinNet

    noise, device = vit_file.PiNoise, torch.device
    torch.device = lambda name: device("cpu")
    vit_file.PiNoise = lambda *sizes: noise(WIDTH, WIDTH, NOISE)
    vit = vit_file.VisionTransformer(
        img_size=8,
        patch_size=4,
        embed_dim=WIDTH,
        depth=BLOCKS,
        num_heads=2,
        mlp_ratio=2,
        num_classes=0,
        weight_init="skip",
        args={"hidden_dim": NOISE},
    )
    torch.device = device
    vit.out_dim, vit.layer_num = WIDTH, BLOCKS
    for name, value in vit.named_parameters():
        if not name.startswith("noise_maker"):
            value.data = drawn(value, 0.4) + (1.0 if "norm" in name and "weight" in name else 0.0)
    for maker in vit.noise_maker:
        maker.w_down, maker.w_up = (drawn(a, 0.5) for a in (maker.w_down, maker.w_up))
    net_file.get_pretrained_backbone = lambda args: vit
    net = net_file.MiNbaseNet({"device": "cpu", "gamma": RIDGE, "buffer_size": SIZE})
    net.buffer.weight = net.buffer.W = drawn(net.buffer.W, 0.3)

    learner = MinNet.__new__(MinNet)
    learner._network, learner.device, learner.cur_task = net, "cpu", -1
    learner.logger = types.SimpleNamespace(info=lambda text: None)
    learner.args = {"optimizer_type": "sgd", "scheduler_type": "step"}
    learner.init_epochs = learner.epochs = 1
    learner.init_lr = learner.lr = learner.init_weight_decay = learner.weight_decay = 0.0
    learner.fit_epoch = 3
    return learner


def stacked(modules, prefix):
    """prefix/NAME [L, ...] of the parameters of a block in each block."""
    names = [name for name, _ in modules[0].named_parameters()]
    each = [dict(module.named_parameters()) for module in modules]
    return {f"{prefix}/{n}": np.stack([p[n].detach().numpy() for p in each]) for n in names}


def store_weights(vit):
    for name, value in vit.named_parameters():
        if not name.startswith(("blocks.", "noise_maker.")):
            ARRAYS[f"vit/{name}"] = value.detach().numpy().copy()
    for name, value in stacked(vit.blocks, "blocks").items():
        if ".qkv." in name:
            for part, piece in zip("qkv", np.split(value, 3, axis=1), strict=True):
                ARRAYS[name.replace("qkv", f"{part}_proj")] = piece
        else:
            ARRAYS[name.replace("mlp.", "")] = value


def loss_and_gradients(learner, batch, task):
    read, item, net = [], torch.Tensor.item, learner._network

    def keep(value):
        read.append(item(value))
        return read[-1]

    head = net.normal_fc
    head.weight.data = drawn(head.weight, 0.5)
    ARRAYS[f"rows/{task}"] = head.weight.detach().numpy().copy()
    if head.bias is not None:
        head.bias.data = drawn(head.bias, 0.5)
        ARRAYS[f"bias/{task}"] = head.bias.detach().numpy().copy()
    torch.Tensor.item = keep
    learner.run([batch])
    torch.Tensor.item = item
    ARRAYS[f"loss/{task}"] = np.array(read[0])
    ARRAYS[f"gradient/{task}/rows"] = head.weight.grad.numpy().copy()
    if head.bias is not None:
        ARRAYS[f"gradient/{task}/bias"] = head.bias.grad.numpy().copy()
    for index, module in ((0, net.backbone.noise_maker), (1, net.backbone.blocks)):
        names = [n for n, p in module[0].named_parameters() if p.grad is not None]
        for name in names:
            if index and "norm" not in name:
                continue
            each = [dict(part.named_parameters())[name].grad.numpy() for part in module]
            ARRAYS[f"gradient/{task}/{name}"] = np.stack(each)
    for name, value in net.backbone.norm.named_parameters():
        if value.grad is not None:
            ARRAYS[f"gradient/{task}/norm.{name}"] = value.grad.numpy().copy()
    for value in net.parameters():
        value.grad = None


def main(folder):
    sys.path.insert(0, folder)
    stand_ins()
    in_float64()
    torch.manual_seed(0)
    images = np.float32(RANDOM.random_sample((24, 8, 8, 3)))
    labels = np.repeat(np.arange(3) * 2, 8) + np.tile([0, 1], 12)
    ARRAYS.update(images=images, labels=labels)
    given = torch.tensor(images.transpose(0, 3, 1, 2), dtype=torch.float64)
    learner = built()
    net = learner._network
    vit = net.backbone
    store_weights(vit)
    ARRAYS["projection"] = net.buffer.W.numpy()
    for task in range(TASKS):
        mine = slice(8 * task, 8 * task + 8)
        batch = None, given[mine], torch.tensor(labels[mine])
        learner.cur_task = task
        if task:
            learner.fit_fc([batch], None)
        net.update_fc(2)
        net.update_noise()
        net.extend_task_prototype(learner.get_task_prototype(net, [batch]))
        for maker in vit.noise_maker:  # "trained"
            trained = [*maker.mu[-1].parameters(), *maker.sigmma[-1].parameters()]
            for value in trained if task else [*maker.MLP.parameters(), *trained]:
                value.data = drawn(value, 0.4)
        if not task:
            norms = [vit.norm, *(n for b in vit.blocks for n in (b.norm1, b.norm2))]
            for value in (p for norm in norms for p in norm.parameters()):
                value.data = value.data + drawn(value, 0.1)
        if task != 1:
            loss_and_gradients(learner, batch, task)
        net.update_task_prototype(learner.get_task_prototype(net, [batch]))
        if not task:
            learner.fit_fc([batch], None)
        learner.re_fit([batch], None)
        with torch.no_grad():
            ARRAYS[f"logits/{task}"] = net(given)["logits"].numpy()
        ARRAYS[f"weights/{task}"] = vit.noise_maker[0].weight_noise.detach().numpy()
        ARRAYS[f"solution/{task}"] = net.weight.numpy().copy()

    norms = stacked(vit.blocks, "norms")
    ARRAYS.update(
        {name: value for name, value in norms.items() if "norm1" in name or "norm2" in name}
    )
    for name, value in vit.norm.named_parameters():
        ARRAYS[f"norms/norm.{name}"] = value.detach().numpy()
    for name, value in stacked(vit.noise_maker, "noise").items():
        part, _, rest = name.removeprefix("noise/").partition(".")
        if part == "MLP":
            ARRAYS[name] = value
        elif rest.startswith("0."):
            rest = rest.removeprefix("0.")
            of_task = [[getattr(maker, part)[t] for maker in vit.noise_maker] for t in range(TASKS)]
            each = [stacked(modules, "x")[f"x/{rest}"] for modules in of_task]
            ARRAYS[f"noise/{part}.{rest}"] = np.stack(each, axis=1)
    for name in ("w_down", "w_up"):
        ARRAYS[f"noise/{name}"] = np.stack([getattr(n, name).numpy() for n in vit.noise_maker])


if __name__ == "__main__":
    main(sys.argv[1])
    target = Path(__file__).parent / "min.npz"
    kept = {
        name: array.astype(np.float32) if array.dtype == np.float64 else array
        for name, array in ARRAYS.items()
    }
    np.savez_compressed(target, **kept)
    print(f"{target}: {target.stat().st_size} bytes, {len(kept)} arrays")
