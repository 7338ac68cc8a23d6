"""Write `ease.npz`, the golden arrays of `tests/learners/test_golden_ease.py`: what the authors'
code of EASE computes on a small random transformer.

The authors' code is read from a folder and none of it is kept here. Run it in an environment of its
own, never in the tests: `pip install torch numpy scipy tqdm easydict timm==0.6.13` (their 0.6.12
with a repair for Python 3.11), then

    python tests/learners/golden/make_ease_golden.py EASE

EASE is a checkout of sun-hailong/CVPR24-Ease at 6d67508ed8b7c4d23350ed4eb28c123914b40ae3. The whole
of models/ease.py `Learner.incremental_train` runs for tasks of three, two and two classes, with the
settings of exps/ease_inr_in21k.json, utils/inc_net.py `EaseNet` and backbone/vit_ease.py
`VisionTransformer` (12 wide, 2 blocks, 2 heads, MLP 24, patches of 4 of 8 x 8 images, adapters of 3
hidden units and scale 0.1), in float64 on weights rounded to float32.

In each task `Learner._train` is replaced by drawn adapters, so that `replace_fc` and in it
`solve_sim_reset` make the rows under them. In the second, `VisionTransformer.forward_train` gives
features under the drawn adapter; then `_train` runs on the eight images of the task as one batch
for four epochs, from a drawn head of scale 3.5, and afterwards the drawn adapter returns.

What is replaced in the authors' code, and nothing else: the sizes of the transformer and its
`out_dim` of 768, also where `CosineLinear.forward_reweight` has it as a default, the weights, the
dropout of adapters (0), their data sets, the 8 processes that would read them, and torch's default
type, which is float64.

Everything is drawn again until no hidden unit of an adapter comes closer than 0.016 to the kink of
its ReLU in training, where float32 could take the other side.

The arrays: vit/NAME and blocks/NAME as in the other files; adapter/NAME [3, 2, ...] of each task
and block; images [23, 8, 8, 3], labels [23]; queries [10, 8, 8, 3]: of 100 images the first ten
whose best class leads by more than 0.019 after each task; head_rows [2, 12] and head_scale [];
train_features [10, 12] in the second task and features [10, 3, 12] after the third; loss [],
grad/NAME, losses [4] and trained/NAME of the second task, with NAME of the adapter [2, ...], rows
and scale; after task T fc/T [classes, 12 T + 12] and scores/T [10, classes].
"""

import copy
import functools
import json
import sys
from pathlib import Path

import numpy as np
import torch
from small_pilot import (
    Tasks,
    channels_first,
    fill,
    lead,
    noted_losses,
    of_width,
    rounded,
    stacked,
    weights_of,
)
from torch.optim.optimizer import register_optimizer_step_pre_hook

WIDTH, SIZES, QUERIES, LEAD, KINK = 12, (3, 2, 2), 10, 0.019, 0.016
LABELS = np.array([2, 1, 0, 2, 1, 2, 1, 2, 0, 4, 3, 4, 4, 4, 3, 3, 4, 6, 5, 5, 5, 6, 5], np.int32)


def replaced():
    """What stands in the way of a small transformer; see above."""
    from backbone import vit_ease
    from backbone.linears import CosineLinear
    from models import ease

    def small(tuning_config, **options):
        tuning_config.d_model = WIDTH
        return of_width(vit_ease.VisionTransformer, WIDTH)(
            img_size=8,
            patch_size=4,
            embed_dim=WIDTH,
            depth=2,
            num_heads=2,
            mlp_ratio=2,
            **options,
            tuning_config=tuning_config,
        )

    vit_ease.vit_base_patch16_224_in21k_ease = small
    CosineLinear.forward_reweight = functools.partialmethod(
        CosineLinear.forward_reweight, out_dim=WIDTH
    )
    ease.num_workers = 0


def built(folder):
    """Their learner before the first task."""
    from models.ease import Learner

    settings = json.loads(Path(folder, "exps", "ease_inr_in21k.json").read_text())
    settings |= {"ffn_num": 3, "init_cls": SIZES[0], "increment": SIZES[1], "device": ["cpu"]}
    return Learner(settings | {"init_epochs": 4, "later_epochs": 4})


def trained(train, network):
    """(what `train()`, their `_train` on its loaders, computes, how close it comes to a kink)."""
    adapter, head = network.backbone.cur_adapter, network.proxy_fc
    closest, arrays = [], {}

    def keep(name, read):
        found = stacked(adapter, read)
        found |= {"rows": read(head.weight).copy(), "scale": read(head.sigma)[0]}
        arrays.update({f"{name}/{key}": value for key, value in found.items()})

    def keep_gradients(optimizer, args, options):
        if len(closest) == len(adapter):  # the first step
            keep("grad", lambda value: value.grad.numpy())

    def keep_distance(module, args, values):
        closest.append(args[0].abs().min().detach().numpy())

    for part in adapter:
        part.non_linear_func.register_forward_hook(keep_distance)
    hook = register_optimizer_step_pre_hook(keep_gradients)
    with noted_losses() as losses:
        train()
    hook.remove()
    keep("trained", lambda value: value.detach().numpy())
    return arrays | {"loss": np.array(losses[0]), "losses": np.array(losses)}, min(closest)


def made(folder, random):
    """(the arrays, how close a hidden unit comes to its kink in training)."""
    learner = built(folder)
    network, vit, train = learner._network, learner._network.backbone, learner._train
    fill(vit, random)
    # Most numbers are close to 0 or 1, so that images differ.
    images = random.beta(0.3, 0.3, (len(LABELS), 8, 8, 3)).astype(np.float32)
    queries = random.beta(0.3, 0.3, (10 * QUERIES, 8, 8, 3)).astype(np.float32)
    rows = rounded(0.5 * random.standard_normal((SIZES[1], WIDTH)))
    arrays = weights_of(vit) | {"images": images, "labels": LABELS}
    arrays |= {"head_rows": np.float32(rows), "head_scale": np.float32(3.5)}
    of_queries, adapters, distances = {"queries": queries}, [], []
    given = channels_first(queries)

    def under_a_drawn_adapter(train_loader, test_loader):
        fill(vit.cur_adapter, random)
        for part in vit.cur_adapter:
            part.dropout = 0.0
        adapters.append(stacked(vit.cur_adapter))
        if learner._cur_task != 1:
            return
        with torch.no_grad():
            of_queries["train_features"] = vit.forward_train(given).numpy()
        network.proxy_fc.weight.data = rows.clone()
        network.proxy_fc.sigma.data.fill_(3.5)
        drawn = copy.deepcopy(vit.cur_adapter.state_dict())
        found, distance = trained(lambda: train(train_loader, test_loader), network)
        vit.cur_adapter.load_state_dict(drawn)
        arrays.update(found)
        distances.append(distance)

    learner._train = under_a_drawn_adapter
    tasks = Tasks(images, LABELS, SIZES)
    for task in range(len(SIZES)):
        learner.incremental_train(tasks)
        arrays[f"fc/{task}"] = network.fc.weight.detach().numpy().copy()
        with torch.no_grad():
            of_queries[f"scores/{task}"] = network(given, test=True)["logits"].numpy()
        if task == len(SIZES) - 1:
            features = [x[:, 0].detach().numpy() for x in vit.forward_test(given)]
            of_queries["features"] = np.stack(features, axis=1)
        learner.after_task()
    for name in adapters[0]:
        arrays[f"adapter/{name}"] = np.float32([adapter[name] for adapter in adapters])
    clear = np.all([lead(of_queries[f"scores/{t}"]) > LEAD for t in range(len(SIZES))], axis=0)
    kept = np.flatnonzero(clear)[:QUERIES]
    return arrays | {name: value[kept] for name, value in of_queries.items()}, distances[0]


def main(folder):
    sys.path.insert(0, folder)
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    replaced()
    random = np.random.RandomState(2403)
    while True:
        arrays, distance = made(folder, random)
        if distance > KINK:
            return arrays


if __name__ == "__main__":
    found = main(sys.argv[1])
    target = Path(__file__).parent / "ease.npz"
    np.savez_compressed(target, **found)
    print(f"{target}: {target.stat().st_size} bytes, {len(found)} arrays")
