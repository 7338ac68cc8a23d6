"""Write `aper.npz`, the golden arrays of `tests/learners/test_golden_aper.py`: what APER with
adapters in LAMDA-PILOT computes on a small random transformer.

The authors' code is read from a folder and none of it is kept here. Run it in an environment of its
own, never in the tests: `pip install torch numpy scipy tqdm easydict timm==0.6.13` (their 0.6.12
with a repair for Python 3.11), then

    python tests/learners/golden/make_aper_golden.py PILOT

PILOT is a checkout of LAMDA-CL/LAMDA-PILOT at 5240714d3d6071aca824f8aed4a92a46ac6f883c: models/
aper_adapter.py `Learner` with the settings of exps/aper_aperpter.json, backbone/vit_adapter.py
`VisionTransformer` (24 wide, 2 blocks, 2 heads, MLP 48, patches of 4 of 8 x 8 images, adapters of 3
hidden units) and timm's transformer with the same weights, in float64.

- `Learner._train` in the first task, one epoch of one batch at a rate of 0 under a drawn adapter
  and head: in it `_init_train` gave loss and gradients, `construct_dual_branch_network` the network
  of two branches and `replace_fc` the class means of the first task;
- `Learner.incremental_train` the second task;
- the network's forward pass the features and scores of four queries.

What is replaced in the authors' code, and nothing else: the two transformers and their `out_dim` of
768, the dropout of adapters (0), their data sets, the 8 processes that would read them, and torch's
default type, which is float64.

The weights and inputs are not stored. The test draws the same ones by the same generators of NumPy:
RandomState(2025) the transformer, in the order of its names in the test's tree, and
RandomState(1993) the adapter, the head and 14 images: six of the first task, four of the second and
the queries.

The arrays: loss []; logits [6, 3] in the first task; grad_rows [3, 24]; grad_scale [1]; grad_down
[2, 24, 3], grad_down_bias [2, 3], grad_up [2, 3, 24], grad_up_bias [2, 24] of both blocks; rows
[5, 48]; features [4, 48]; scores [4, 5].
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from small_pilot import Tasks, channels_first, noted_losses, of_width, rounded

WIDTH, MLP, HIDDEN, BLOCKS = 24, 48, 3, 2
SIZES = {
    "img_size": 8,
    "patch_size": 4,
    "embed_dim": WIDTH,
    "depth": BLOCKS,
    "num_heads": 2,
    "mlp_ratio": MLP // WIDTH,
}
FIRST, SECOND = (0, 1, 2, 0, 1, 1), (3, 4, 3, 3)


def drawn_weights():
    """The transformer's, by the names of `vit_adapter` and in the order of the test's."""
    random = np.random.RandomState(2025)

    def small(*shape):
        return 0.1 * random.standard_normal(shape)

    def linear(rows, columns):
        bias = small(columns)
        return {"bias": bias, "weight": (random.standard_normal((rows, columns)) * rows**-0.5).T}

    def norm():
        bias = small(WIDTH)
        return {"bias": bias, "weight": 1.0 + small(WIDTH)}

    parts = {}
    for index in range(BLOCKS):
        block = {"fc1": linear(WIDTH, MLP), "fc2": linear(MLP, WIDTH)}
        block |= {"attn.k_proj": linear(WIDTH, WIDTH), "norm1": norm(), "norm2": norm()}
        block |= {f"attn.{name}": linear(WIDTH, WIDTH) for name in ("proj", "q_proj", "v_proj")}
        parts |= {f"blocks.{index}.{name}": value for name, value in block.items()}
    state = {"cls_token": small(WIDTH)[None, None]}
    parts["norm"] = norm()
    patch = linear(3 * 4 * 4, WIDTH)
    patch["weight"] = patch["weight"].reshape(WIDTH, 4, 4, 3).transpose(0, 3, 1, 2)
    parts["patch_embed.proj"] = patch
    state["pos_embed"] = small(5, WIDTH)[None]
    state |= {f"{part}.{name}": a for part, pair in parts.items() for name, a in pair.items()}
    return {name: rounded(value) for name, value in state.items()}


def of_timm(state):
    """The same weights by timm's names."""
    found = {name.replace(".fc", ".mlp.fc"): value for name, value in state.items()}
    for index in range(BLOCKS):
        for part in ("weight", "bias"):
            names = [f"blocks.{index}.attn.{one}_proj.{part}" for one in "qkv"]
            three = torch.cat([found.pop(name) for name in names])
            found[f"blocks.{index}.attn.qkv.{part}"] = three
    return found


def built(folder):
    """Their learner in its first task, before training."""
    import timm
    from backbone import vit_adapter
    from models import aper_adapter
    from timm.models.vision_transformer import VisionTransformer

    weights = drawn_weights()

    def with_adapters(tuning_config, **options):
        tuning_config.d_model = WIDTH
        vit = of_width(vit_adapter.VisionTransformer, WIDTH)(
            **SIZES, **options, tuning_config=tuning_config
        )
        vit.load_state_dict(weights, strict=False)
        for block in vit.blocks:
            block.adaptmlp.dropout = 0.0
        return vit

    def frozen(name, pretrained, num_classes):
        vit = of_width(VisionTransformer, WIDTH)(**SIZES, num_classes=num_classes)
        vit.load_state_dict(of_timm(weights))
        return vit

    vit_adapter.vit_base_patch16_224_adapter, timm.create_model = with_adapters, frozen
    aper_adapter.num_workers = 0
    settings = json.loads(Path(folder, "exps", "aper_aperpter.json").read_text())
    settings |= {"ffn_num": HIDDEN, "init_cls": 3, "device": ["cpu"]}
    settings |= {"tuned_epoch": 1, "init_lr": 0.0}
    return aper_adapter.Learner(settings)


def main(folder):
    sys.path.insert(0, folder)
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    random = np.random.RandomState(1993)

    def normal(*shape, factor=1.0):
        return rounded(factor * random.standard_normal(shape))

    down, down_bias = normal(2, WIDTH, HIDDEN, factor=WIDTH**-0.5), normal(2, HIDDEN, factor=0.3)
    up, up_bias = normal(2, HIDDEN, WIDTH), normal(2, WIDTH, factor=0.3)
    rows = normal(3, WIDTH)
    images = random.random_sample((14, 8, 8, 3)).astype(np.float32)
    tasks, queries = Tasks(images[:10], FIRST + SECOND, (3, 2)), channels_first(images[10:])

    learner = built(folder)
    tuned = learner._network
    adapters = [block.adaptmlp for block in tuned.backbone.blocks]
    for index, adapter in enumerate(adapters):
        adapter.down_proj.weight.data, adapter.down_proj.bias.data = down[index].T, down_bias[index]
        adapter.up_proj.weight.data, adapter.up_proj.bias.data = up[index].T, up_bias[index]
    tuned.update_fc(3)
    tuned.fc.weight.data = rows
    tuned.fc.sigma.data.fill_(2.5)
    learner._cur_task, learner._total_classes = 0, 3
    learner.train_dataset = tasks.get_dataset(range(3), "train", "train")
    mine = channels_first(images[:6])
    with torch.no_grad():
        arrays = {"logits": tuned(mine)["logits"].numpy()}
    batch = [(None, mine, torch.tensor(FIRST))]
    with noted_losses() as losses:
        learner._train(batch, batch, batch)
    learner.after_task()
    arrays["loss"] = np.array(losses[0])
    for name in ("down", "up"):
        linears = [getattr(adapter, f"{name}_proj") for adapter in adapters]
        arrays[f"grad_{name}"] = np.stack([linear.weight.grad.numpy().T for linear in linears])
        arrays[f"grad_{name}_bias"] = np.stack([linear.bias.grad.numpy() for linear in linears])
    arrays |= {"grad_rows": tuned.fc.weight.grad.numpy(), "grad_scale": tuned.fc.sigma.grad.numpy()}

    learner.incremental_train(tasks)
    network = learner._network
    with torch.no_grad():
        found = network(queries)
    arrays["rows"] = network.fc.weight.detach().numpy()
    return arrays | {"features": found["features"].numpy(), "scores": found["logits"].numpy()}


if __name__ == "__main__":
    found = main(sys.argv[1])
    target = Path(__file__).parent / "aper.npz"
    np.savez_compressed(target, **found)
    print(f"{target}: {target.stat().st_size} bytes, {len(found)} arrays")
