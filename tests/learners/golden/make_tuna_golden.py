"""Write `tuna.npz`, the golden arrays of `tests/learners/test_golden_tuna.py`: what the authors'
code of TUNA computes on a small random transformer.

The authors' code is read from a folder and none of it is kept here. Run it in an environment of its
own, never in the tests: `pip install torch numpy scipy tqdm`, then

    python tests/learners/golden/make_tuna_golden.py TUNA

TUNA is the authors' repository (LAMDA-CL/ICCV2025-TUNA) as it stands in the history of the public
copy Ngahoang2005/ICCV2025-TUNA at 77d4f10ec92368d28d97664a26fb2b36f2e54fdd: models/tuna.py
`Learner` and utils/inc_net.py `TUNANet` on backbone/vit_tuna.py `VisionTransformer` (width 8, 12
blocks, for their loss counts to 12, 2 heads, MLP 8, patches of 4 of 8 x 8 images, their `Adapter`
with bottleneck 2) in float64 on weights rounded to float32. `Learner.incremental_train` ran for
three tasks of two classes, four images each, on drawn adapters and head rows: its `_train` at a
rate of 0 on five images of a task, with `classifer_align` left for later. So were made

- in the third task (scale 20, margin 0.3, reg 2) the total loss and its gradients, and what
  `AngularPenaltySMLoss` and `orth_loss` gave on the way;
- in `merge` the fused adapter of three tasks;
- on nine images the features under each adapter and the fused one, and the scores of `_eval_cnn`,
  taken where it asks for the best five: as it stands, and with the adapter index at which the
  transformer answers with the fused adapter. The images are the first three in a row of random ones
  for each adapter that entropy chooses, where the least entropy is the least by 1e-3;
- in `classifer_align` (7 epochs, 5 draws a class, rate 0.005, decay 0.01, with `decay`) the means
  before and after their scaling, its draws and the rows after.

What is replaced in the authors' code, and nothing else: timm (its PatchEmbed is a convolution),
the data manager and `DataLoader` (a data set is one batch), `get_backbone` with its sizes, the
bottleneck and dropout (0) of an adapter, which are written into the transformer, torch's default
type, float64, and where they ask for float32 its values in float64.

The arrays: images [24, 8, 8, 3], labels [24], batch [5]; vit/NAME and blocks/NAME as in the other
files; adapter/NAME [3, 12, ...] for each task and block; rows [6, 8]; then what was computed.
"""

import sys

import adapter_vit
import numpy as np
import torch

WIDTH, BLOCKS, TASKS = 8, 12, 3
BATCH = np.array([0, 5, 2, 6, 7])  # of the images of a task
ARRAYS: dict[str, np.ndarray] = {}
RANDOM = np.random.RandomState(2508)


def built():
    """Their `Learner` before the first task."""
    import backbone.vit_tuna
    import models.tuna
    import utils.inc_net

    adapter = backbone.vit_tuna.Adapter
    backbone.vit_tuna.Adapter = lambda config, **options: adapter(
        config, **options | {"bottleneck": 2}
    )
    vit = backbone.vit_tuna.VisionTransformer(
        img_size=8,
        patch_size=4,
        num_classes=0,
        embed_dim=WIDTH,
        depth=BLOCKS,
        num_heads=2,
        mlp_ratio=1,
        tuning_config=adapter_vit.settings(d_model=WIDTH),
    )
    adapter_vit.fill_transformer(vit, RANDOM)
    utils.inc_net.get_backbone = lambda args, pretrained: vit
    models.tuna.DataLoader = adapter_vit.one_batch
    learner = models.tuna.Learner(
        {
            "device": ["cpu"],
            "memory_size": 0,
            "batch_size": 1,  # of which alignment draws five times as many a class
            "optimizer": "sgd",
            "scheduler": "constant",
            "tuned_epoch": 1,
            "init_lr": 0.0,
            "min_lr": 0.0,
            "weight_decay": 0.01,
            "scale": 20.0,
            "m": 0.3,
            "use_orth": True,
            "reg": 2.0,
            "ca_storage_efficient_method": "covariance",
            "ca_lr": 0.005,
            "crct_epochs": 7,
            "decay": True,
        }
    )
    vit.out_dim = WIDTH
    return learner


def third_task(learner, data):
    """The last call of `incremental_train`, whose losses are kept."""
    import models.tuna

    value_of = adapter_vit.value_of
    margin = adapter_vit.recorded(models.tuna.AngularPenaltySMLoss, "forward", value_of)
    orthogonality = adapter_vit.recorded(learner, "orth_loss", value_of)
    with margin as ce, orthogonality as orth, adapter_vit.losses_kept() as total:
        learner.incremental_train(data)
    ARRAYS.update(batch=16 + BATCH, total=total[0], orth=orth[0], ce=ce[0])
    vit, head = learner._network.backbone, learner._network.fc.heads[-1][0]
    ARRAYS.update(adapter_vit.of_tasks([adapter_vit.gradients(vit.cur_adapter, "gradient")]))
    ARRAYS["gradient_rows"] = head.weight.grad.numpy().copy()


def scores_of(learner, images):
    """(the scores, the adapter that entropy chooses, entropies [3, N])"""
    batch = None, images, torch.zeros(len(images))
    values = adapter_vit.recorded(torch, "topk", lambda _, values, **options: values.numpy())
    choices = adapter_vit.recorded(
        torch, "argmin", lambda result, doubt, **options: (result.numpy(), doubt.numpy())
    )
    with values as asked, choices as chosen:
        learner._eval_cnn([batch])
    return asked[-1], *chosen[0]


def queries(learner):
    """Nine images, three for each adapter."""
    images = adapter_vit.drawn_images(RANDOM, 500)
    _, chosen, doubt = scores_of(learner, adapter_vit.pixels(images))
    sure = adapter_vit.gap(-doubt.T) >= 1e-3
    rows = [np.flatnonzero(sure & (chosen == task))[:3] for task in range(TASKS)]
    if min(map(len, rows)) < 3:
        raise SystemExit("an adapter was chosen too seldom: take another seed")
    return images[np.concatenate(rows)]


def predictions(learner, images):
    vit = learner._network.backbone
    with torch.no_grad():
        # The fused adapter answers for numbers above that of stored adapters.
        each = [vit(images, adapter_id=i)["features"] for i in (*range(TASKS), TASKS + 1)]
    ARRAYS["features"] = torch.stack(each, dim=1).numpy()
    ARRAYS["scores_newest"], ARRAYS["used"], _ = scores_of(learner, images)
    forward = vit.forward
    vit.forward = lambda x, adapter_id, train: forward(x, adapter_id + (adapter_id == TASKS), train)
    ARRAYS["scores_fused"], *_ = scores_of(learner, images)
    vit.forward = forward


def align(learner):
    import models.tuna

    net = learner._network
    means = adapter_vit.recorded(
        models.tuna, "MultivariateNormal", lambda _, mean, covariance: mean.numpy()
    )
    draws = adapter_vit.recorded(net.fc, "forward", lambda _, features: features.numpy())
    labels = adapter_vit.recorded(
        torch.nn.functional, "cross_entropy", lambda _, logits, targets: targets.numpy()
    )
    del learner.classifer_align  # what stood in its place
    with means as centres, draws as given, labels as targets:
        learner.classifer_align(net.backbone)
    ARRAYS["draws"] = np.stack(given)
    ARRAYS["draw_labels"] = np.stack(targets).astype(np.int8)
    ARRAYS["means"] = torch.stack([learner.cls_mean[c] for c in range(6)]).numpy()
    ARRAYS["drawn_means"] = np.stack(centres[:6])


def rows_of(learner):
    heads = learner._network.fc.heads
    return np.concatenate([head[0].weight.detach().numpy() for head in heads])


def main(folder):
    adapter_vit.prepare(folder, seed=2508)
    images = adapter_vit.drawn_images(RANDOM, 24)
    labels = np.repeat(np.arange(6), 4)
    learner = built()
    net, vit = learner._network, learner._network.backbone
    ARRAYS.update(images=images, labels=labels, **adapter_vit.weights_of(vit))
    adapters = []

    def draw():
        adapter_vit.fill_adapters(vit.cur_adapter, RANDOM, down=0.7, up=0.8)
        adapters.append(adapter_vit.stacked(vit.cur_adapter, "adapter"))
        head = net.fc.heads[-1][0]
        head.weight.data = adapter_vit.drawn(RANDOM, head.weight.shape, 0.3)

    adapter_vit.draw_before_training(learner, draw)
    learner.classifer_align = lambda model: None
    data = adapter_vit.Data(images, labels, BATCH)
    for _ in range(TASKS - 1):
        learner.incremental_train(data)
        learner.after_task()
    third_task(learner, data)
    ARRAYS.update(adapter_vit.of_tasks(adapters), rows=rows_of(learner))
    ARRAYS.update(adapter_vit.of_tasks([adapter_vit.stacked(vit.merged_adapter, "fused")]))
    ARRAYS["queries"] = queries(learner)
    predictions(learner, adapter_vit.pixels(ARRAYS["queries"]))
    align(learner)
    ARRAYS["aligned_rows"] = rows_of(learner)


if __name__ == "__main__":
    main(sys.argv[1])
    adapter_vit.write(__file__, "tuna.npz", ARRAYS)
