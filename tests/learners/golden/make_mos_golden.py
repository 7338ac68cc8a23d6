"""Write `mos.npz`, the golden arrays of `tests/learners/test_golden_mos.py`: what the authors' code
of MOS computes on a small random transformer.

The authors' code is read from a folder and none of it is kept here. Run it in an environment of its
own, never in the tests: `pip install torch numpy scipy tqdm`, then

    python tests/learners/golden/make_mos_golden.py MOS

MOS is a checkout of sun-hailong/AAAI25-MOS at 8d5e07c1535176ca2fa0c36881f6fd630418ccbc:
models/mos.py `Learner` and utils/inc_net.py `MOSNet` on backbone/vit_mos.py `VisionTransformer`
(width 12, 3 blocks, 2 heads, MLP 12, patches of 4 of 8 x 8 images, adapters of bottleneck 3, a
head of seven classes) in float64 on weights rounded to float32. `Learner.incremental_train` ran for
three tasks of two classes, four images each, on drawn adapters: its `_train` at a rate of 0 on
five images of a task, with adapter_momentum 0 and `classifer_align` left for later. So were made

- in the third task, before its end and with adapter_momentum 0.1: on a copy, what `adapter_merge`
  leaves of its adapter; on another, what one forward pass in training does, and its features;
- in the third task the logits of the five images, both parts of the loss and the gradients;
- means, covariances and prototypes, and on 20 images the features under each adapter and the scores
  of `_eval_cnn`, taken where it asks for the best five, with `ensemble` and without. The images are
  kept from a row of random ones in which two candidates of an argmax lie 1e-3 apart or more, at
  most two for each way of retrieval, which took eleven ways or more;
- the features of four images after 40 passes with adapter_momentum 0.1;
- in `classifer_align` (2 epochs, 5 draws a class, rate 0.05, decay 0.01) its draws, the head after.

What is replaced in the authors' code, and nothing else: timm (its PatchEmbed is a convolution),
the data manager and `DataLoader` (a data set is one batch), `get_backbone` with its sizes, dropout
(0), torch's default type, float64, and where they ask for float32 its values in float64.

The arrays: images [24, 8, 8, 3], labels [24], batch [5]; vit/NAME and blocks/NAME as in the other
files; adapter/NAME [3, 3, ...] for each task and block; head_weight [6, 12], head_bias [6]; then
what was computed.
"""

import copy
import sys

import adapter_vit
import numpy as np
import torch

WIDTH, BLOCKS, TASKS, CLASSES, PASSES = 12, 3, 3, 7, 40
BATCH = np.array([0, 5, 2, 6, 7])  # of the images of a task
ARRAYS: dict[str, np.ndarray] = {}
RANDOM = np.random.RandomState(1)


def built():
    """Their `Learner` before the first task."""
    import models.mos
    import utils.inc_net
    from backbone.vit_mos import VisionTransformer

    config = adapter_vit.settings(d_model=WIDTH, ffn_num=3, adapter_momentum=0.0)
    vit = VisionTransformer(
        img_size=8,
        patch_size=4,
        num_classes=CLASSES,
        embed_dim=WIDTH,
        depth=BLOCKS,
        num_heads=2,
        mlp_ratio=1,
        tuning_config=config,
    )
    adapter_vit.fill_transformer(vit, RANDOM)
    utils.inc_net.get_backbone = lambda args, pretrained: vit
    models.mos.DataLoader = adapter_vit.one_batch
    learner = models.mos.Learner(
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
            "reg": 0.1,
            "adapter_momentum": 0,
            "ca_storage_efficient_method": "covariance",
            "ca_lr": 0.05,
            "crct_epochs": 2,
            "ensemble": True,
        }
    )
    vit.out_dim = WIDTH
    return learner


def merging(vit):
    """A copy of the transformer that merges adapters."""
    found = copy.deepcopy(vit)
    found.config.adapter_momentum = 0.1
    return found


def merges(vit, images):
    once, passed = merging(vit), merging(vit)
    once.adapter_merge()
    ARRAYS.update(adapter_vit.of_tasks([adapter_vit.stacked(once.cur_adapter, "merged_once")]))
    features = passed(images, adapter_id=TASKS - 1, train=True)["features"]
    ARRAYS["train_features"] = features.detach().numpy()
    ARRAYS.update(adapter_vit.of_tasks([adapter_vit.stacked(passed.cur_adapter, "after_pass")]))


def features_of(vit, images):
    """[N, 3, 12]: under the adapter of each task."""
    with torch.no_grad():
        each = [vit(images, adapter_id=task)["features"] for task in range(TASKS)]
    return torch.stack(each, dim=1).numpy()


def scores_of(learner, images, ensemble):
    learner.ensemble = ensemble
    batch = None, images, torch.zeros(len(images))
    with adapter_vit.recorded(torch, "topk", lambda _, values, **options: values.numpy()) as asked:
        learner._eval_cnn([batch])
    return asked[0]


def ways_of(learner, images):
    """The adapters that `_eval_cnn` takes for each image, one after the other."""

    def asked_for(result, x, fc_only=False, **options):
        return x if fc_only else None

    vit = learner._network.backbone
    with adapter_vit.recorded(vit, "forward", asked_for) as taken:
        scores_of(learner, images, ensemble=True)
    features = features_of(vit, images).reshape(-1, WIDTH)
    ways = [()] * len(images)
    for x in taken:
        if x is not None:
            image, task = divmod(int(np.abs(features - x.numpy()).sum(axis=1).argmin()), TASKS)
            ways[image] += (task,)
    return ways


def clear(learner, images):
    """Whether no argmax of an image's retrieval has a close second."""
    net, seen = learner._network, learner._total_classes
    with torch.no_grad():
        cosines = net.forward_orig(images)["logits"][:, None, :seen]
        logits = net.backbone(torch.tensor(features_of(net.backbone, images)), fc_only=True)
    values = torch.cat([cosines, logits["logits"][..., :seen]], dim=1).numpy()
    return adapter_vit.gap(values).min(axis=1) >= 1e-3


def queries(learner):
    """(20 images, the way of each)"""
    images = adapter_vit.drawn_images(RANDOM, 500)
    given = adapter_vit.pixels(images)
    sure = clear(learner, given)
    chosen, ways = [], []
    for index, way in enumerate(ways_of(learner, given)):
        if sure[index] and len(chosen) < 20 and ways.count(way) < 2:
            chosen.append(index)
            ways.append(way)
    if len(chosen) < 20 or len(set(ways)) < 11 or max(map(len, ways)) < 4:  # 4 is in a circle
        raise SystemExit(f"{len(chosen)} images, {len(set(ways))} ways: take another seed")
    return images[chosen], ways


def align(learner):
    head = learner._network.backbone.head
    draws = adapter_vit.recorded(head, "forward", lambda _, features: features.numpy())
    labels = adapter_vit.recorded(
        torch.nn.functional, "cross_entropy", lambda _, logits, targets: targets.numpy()
    )
    for part in ("weight", "bias"):
        ARRAYS[f"unaligned_{part}"] = getattr(head, part).detach().numpy().copy()
    del learner.classifer_align  # what stood in its place
    with draws as given, labels as targets:
        learner.classifer_align(learner._network.backbone)
    ARRAYS["draws"] = np.stack(given)
    ARRAYS["draw_labels"] = np.stack(targets).astype(np.int8)
    for part in ("weight", "bias"):
        ARRAYS[f"aligned_{part}"] = getattr(head, part).detach().numpy()


def main(folder):
    adapter_vit.prepare(folder, seed=2412)
    images = adapter_vit.drawn_images(RANDOM, 24)
    labels = np.repeat(np.arange(6), 4)
    given = adapter_vit.pixels(images)
    learner = built()
    net, vit = learner._network, learner._network.backbone
    ARRAYS.update(images=images, labels=labels, **adapter_vit.weights_of(vit))
    for name in ("weight", "bias"):
        ARRAYS[f"head_{name}"] = getattr(vit.head, name).detach().numpy()[:6].copy()
    adapters = []

    def draw():
        adapter_vit.fill_adapters(vit.cur_adapter, RANDOM, down=0.7, up=0.8)
        adapters.append(adapter_vit.stacked(vit.cur_adapter, "adapter"))
        if len(adapters) == TASKS:
            merges(vit, given[:4])

    adapter_vit.draw_before_training(learner, draw)
    learner.classifer_align = lambda model: None
    for _ in range(TASKS):
        losses = adapter_vit.recorded(torch.nn.functional, "cross_entropy", adapter_vit.value_of)
        with losses as parts:
            learner.incremental_train(adapter_vit.Data(images, labels, BATCH))
        learner.after_task()
    ARRAYS.update(adapter_vit.of_tasks(adapters))
    ARRAYS.update(batch=16 + BATCH, ce=parts[0], orth=parts[1])
    ARRAYS.update(adapter_vit.of_tasks([adapter_vit.gradients(vit.cur_adapter, "gradient")]))
    ARRAYS["gradient_rows"] = vit.head.weight.grad[4:6].numpy().copy()
    ARRAYS["gradient_bias"] = vit.head.bias.grad[4:6].numpy().copy()
    with torch.no_grad():
        logits = vit(given[16 + BATCH], adapter_id=TASKS - 1)["logits"]
    ARRAYS["logits"] = logits[:, 4:6].numpy()

    ARRAYS["prototypes"] = net.fc.weight.numpy()
    ARRAYS["means"] = torch.stack([learner.cls_mean[c] for c in range(6)]).numpy()
    ARRAYS["covariances"] = torch.stack([learner.cls_cov[c] for c in (0, 5)]).numpy()
    asked, ways = queries(learner)
    ARRAYS.update(queries=asked, used=np.array([way[-1] for way in ways], np.int32))
    asked = adapter_vit.pixels(asked)
    ARRAYS["features"] = features_of(vit, asked)
    ARRAYS["ensemble"] = scores_of(learner, asked, ensemble=True)
    ARRAYS["single"] = scores_of(learner, asked, ensemble=False)

    drifting = merging(vit)
    for _ in range(PASSES):
        ARRAYS["drifted_features"] = features_of(drifting, given[:4])
    align(learner)


if __name__ == "__main__":
    main(sys.argv[1])
    adapter_vit.write(__file__, "mos.npz", ARRAYS)
