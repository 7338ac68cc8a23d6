"""Write `mote.npz`, the golden arrays of `tests/learners/test_golden_mote.py`: what the authors'
code of MoTE computes on a small random transformer.

The authors' code is read from a folder and none of it is kept here. Run it in an environment of its
own, never in the tests: `pip install torch numpy scipy tqdm`, then

    python tests/learners/golden/make_mote_golden.py MOTE

MOTE is a checkout of Frank-lilinjie/MoTE at 93d20b33c69b0a2d6fc7f43532afdec8c1d70cd1:
models/mote.py `Learner` and utils/inc_net.py `MoteNet` on backbone/vit_mote.py `VisionTransformer`
(width 16, 3 blocks, 2 heads, MLP 16, patches of 4 of 8 x 8 images, sequential adapters of
bottleneck 3) in float64 on weights rounded to float32. `Learner.incremental_train` ran for three
tasks of two classes, three images each, on adapters and rows of the local head that are drawn
before each task's `_train`, which is at a rate of 0. So were made

- in the third task, for a local head of scale 3, the loss and its gradients;
- by `replace_fc` the prototypes;
- by `MoteNet.forward` with test=True the cosines of 15 images, once with every fusion of the
  transformer in the place of the one that `forward_test` calls, and the features that it fuses. The
  images are the first five in a row of random ones with no, one and two experts at home, where no
  two confidences, and no two best classes of an expert, lie closer than 1e-3.

What is replaced in the authors' code, and nothing else: timm (its PatchEmbed is a convolution),
backbone/prompt.py, which they import and which is not there, the data manager and `DataLoader` (a
data set is one batch), `get_backbone` with its sizes, dropout (0) and torch's default type,
float64. `use_init_ptm` and `moni_adam`, which `Learner` reads and does not set, are False.

The arrays: images [18, 8, 8, 3], labels [18], queries [15, 8, 8, 3]; vit/NAME and blocks/NAME as in
the other files; adapter/NAME [3, 3, ...] for each task and block; proxy_rows [2, 16], those of the
third task; then what was computed.
"""

import sys
import types

import adapter_vit
import numpy as np
import torch

WIDTH, BLOCKS, TASKS = 16, 3, 3
FUSIONS = ("vote_re", "filter_and_merge", "merge_and_reweight")
FUSIONS += ("vote_re_merge_only", "vote", "vote_re_reweight_only")
ARRAYS: dict[str, np.ndarray] = {}
RANDOM = np.random.RandomState(4)


def built():
    """Their `Learner` before the first task."""
    prompt = types.ModuleType("backbone.prompt")
    prompt.CodaPrompt = None
    sys.modules["backbone.prompt"] = prompt
    import models.mote
    import utils.inc_net
    from backbone.vit_mote import VisionTransformer

    config = adapter_vit.settings(d_model=WIDTH, ffn_num=3, init=2, inc=2)
    config.ffn_option = "sequential"
    vit = VisionTransformer(
        img_size=8,
        patch_size=4,
        num_classes=0,
        embed_dim=WIDTH,
        depth=BLOCKS,
        num_heads=2,
        mlp_ratio=1,
        tuning_config=config,
    )
    vit.out_dim = WIDTH
    adapter_vit.fill_transformer(vit, RANDOM)
    utils.inc_net.get_backbone = lambda args, pretrained: vit
    models.mote.DataLoader = adapter_vit.one_batch
    learner = models.mote.Learner(
        {
            "device": ["cpu"],
            "backbone_type": "vit",
            "memory_size": 0,
            "batch_size": 6,
            "optimizer": "sgd",
            "scheduler": "constant",
            "init_epochs": 1,
            "init_lr": 0.0,
            "min_lr": 0.0,
            "weight_decay": 0.0,
            "init_cls": 2,
            "increment": 2,
            "adapter_num": TASKS,
            "use_init_ptm": False,
            "alpha": 0.0,
            "beta": 0.0,
        }
    )
    learner.use_init_ptm = learner.moni_adam = False
    return learner


def fused(net, images, fusion):
    """(cosines, features [N, 3, 16] and ten times their cosines [N, 3, 6], which were fused)"""

    def given(_, count, features, logits):
        return torch.stack(features, dim=1).numpy(), torch.stack(logits, dim=1).numpy()

    vit = net.backbone
    vit.merge_and_reweight = getattr(vit, fusion)
    with torch.no_grad(), adapter_vit.recorded(vit, "merge_and_reweight", given) as calls:
        cosines = net(images, test=True)["logits"].numpy()
    del vit.merge_and_reweight
    return cosines, *calls[0]


def queries(net):
    """15 images: five with no, one and two experts at home."""
    images = adapter_vit.drawn_images(RANDOM, 1000)
    _, _, logits = fused(net, adapter_vit.pixels(images), "merge_and_reweight")
    confidence = torch.softmax(torch.tensor(logits), dim=2).numpy()
    apart = np.diff(np.sort(confidence.max(axis=2), axis=1), axis=1).min(axis=1)
    sure = np.minimum(apart, adapter_vit.gap(confidence).min(axis=1)) >= 1e-3
    at_home = (logits.argmax(axis=2) // 2 == np.arange(TASKS)).sum(axis=1)
    rows = [np.flatnonzero(sure & (at_home == count))[:5] for count in range(3)]
    if min(map(len, rows)) < 5:
        raise SystemExit("experts are at home too seldom: take another seed")
    return images[np.concatenate(rows)]


def main(folder):
    adapter_vit.prepare(folder, seed=2506)
    labels = np.repeat(np.arange(6), 3)
    # Images of a class are alike.
    images = adapter_vit.drawn_images(RANDOM, 6)[labels]
    images = images // 2 + adapter_vit.drawn_images(RANDOM, 18) // 2
    learner = built()
    net, vit = learner._network, learner._network.backbone
    ARRAYS.update(images=images, labels=labels, **adapter_vit.weights_of(vit))
    adapters = []

    def draw():
        adapter_vit.fill_adapters(vit.cur_adapter, RANDOM, down=0.25, up=1.0)
        adapters.append(adapter_vit.stacked(vit.cur_adapter, "adapter"))
        rows = net.proxy_fc.weight
        rows.data = adapter_vit.drawn(RANDOM, rows.shape, 1.0)
        net.proxy_fc.sigma.data.fill_(3.0)

    adapter_vit.draw_before_training(learner, draw)
    for _ in range(TASKS):
        trained = vit.cur_adapter
        with adapter_vit.losses_kept() as losses:
            learner.incremental_train(adapter_vit.Data(images, labels))
        learner.after_task()
    ARRAYS.update(adapter_vit.of_tasks(adapters), loss=np.float32(losses[0]))
    ARRAYS.update(adapter_vit.gradients(trained, "grad"))
    ARRAYS["proxy_rows"] = net.proxy_fc.weight.detach().numpy()
    ARRAYS["grad/rows"] = net.proxy_fc.weight.grad.numpy()
    ARRAYS["grad/sigma"] = net.proxy_fc.sigma.grad.numpy()
    ARRAYS["prototypes"] = net.fc.weight.detach().numpy()
    ARRAYS["queries"] = queries(net)
    for name in FUSIONS:
        cosines, features, _ = fused(net, adapter_vit.pixels(ARRAYS["queries"]), name)
        ARRAYS.update({f"fused/{name}": cosines, "features": features})


if __name__ == "__main__":
    main(sys.argv[1])
    adapter_vit.write(__file__, "mote.npz", ARRAYS)
