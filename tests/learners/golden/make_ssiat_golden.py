"""Write `ssiat.npz`, the golden arrays of `tests/learners/test_golden_ssiat.py`: what the authors'
code of SSIAT computes on a small random transformer.

The authors' code is read from a folder and none of it is kept here. Run it in an environment of its
own, never in the tests: `pip install torch numpy scipy tqdm`, then

    python tests/learners/golden/make_ssiat_golden.py SSIAT

SSIAT is a checkout of HAIV-Lab/SSIAT at 3f1f00d044785cb31c47b4c8eadea4314515fd33:
models/SSITA_adapter.py `Learner` and utils/inc_net.py `SimpleVitNet` on
network/vision_transformer_adapter.py `VisionTransformer` (width 16, 3 blocks, 2 heads, MLP 16,
patches of 4 of 8 x 8 images, adapters of bottleneck 3) in float64 on weights rounded to float32.
`Learner.incremental_train` ran for two tasks of two classes and eight images each, on an adapter
and head rows that are drawn again before each task's `_train`, which is at a rate of 0. So were
made

- in the second task (cosface, s 20, m 0.3) the loss and its gradients;
- by `_compute_class_mean` the means after each task and the covariances;
- by `displacement` the shift of the old means, which moved them at sigma 4, and the same at sigma
  1; and for `unpaired` the same with the mean of the new features in every row;
- the logits of all images at the end;
- in `_stage2_compact_classifier`, at a rate of 0, the means that it draws around, its first batch
  of 256 pseudo-features, that batch's loss and gradient.

Their loader shuffles, so that `displacement` is given features of different images; here both
passes are in one order.

What is replaced in the authors' code, and nothing else: timm (its PatchEmbed is a convolution),
the data manager and `DataLoader` (a data set is one batch), `get_convnet` with its sizes, dropout
(0), the name `n8`, which they use and nowhere define, `cuda`, torch's default type, float64, and
where they ask for float32 its values in float64. Pseudo-features are rounded to float16 before the
head reads them, so that they are stored in half the space.

The arrays: images [16, 8, 8, 3], labels [16]; vit/NAME and blocks/NAME as in the other files;
first/NAME and second/NAME [3, ...], the adapter after each task; head [4, 16]; then what was
computed.
"""

import sys

import adapter_vit
import numpy as np
import torch

WIDTH, BLOCKS = 16, 3
ARRAYS: dict[str, np.ndarray] = {}
RANDOM = np.random.RandomState(2403)


def built():
    """Their `Learner` before the first task."""
    import models.base
    import models.SSITA_adapter
    import utils.inc_net
    from network.vision_transformer_adapter import VisionTransformer

    vit = VisionTransformer(
        img_size=8,
        patch_size=4,
        num_classes=0,
        embed_dim=WIDTH,
        depth=BLOCKS,
        num_heads=2,
        mlp_ratio=1,
        tuning_config=adapter_vit.settings(d_model=WIDTH, ffn_num=3),
    )
    vit.out_dim = WIDTH
    adapter_vit.fill_transformer(vit, RANDOM)
    utils.inc_net.get_convnet = lambda args, pretrained: vit
    models.SSITA_adapter.n8 = 0
    models.base.DataLoader = models.SSITA_adapter.DataLoader = adapter_vit.one_batch
    torch.Tensor.cuda = lambda value: value
    return models.SSITA_adapter.Learner(
        {
            "device": ["cpu"],
            "convnet_type": "adapter",
            "batch_size": 8,
            "optimizer": "adam",  # the one whose rate can be set to 0
            "init_epochs": 1,
            "inc_epochs": 1,
            "init_lr": 0.0,
            "min_lr": 0.0,
            "weight_decay": 0.0,
            "scale": 20.0,
            "margin": 0.3,
            "ssca": True,
            "ca": True,
            "ca_epochs": 1,
        }
    )


def shifts(learner, old, new, means):
    """`displacement` at both sigmas, for features of the same images and for the mean of the new
    features, which is what unpaired features give on average over all orders.
    """
    mean = new.mean(dim=0, keepdim=True).expand_as(new)
    for kind, moved in (("paired", new), ("unpaired", mean)):
        for sigma in (4.0, 1.0):
            shift = type(learner).displacement(learner, old, moved, means, sigma)
            ARRAYS[f"shift/{kind}/{sigma}"] = shift


def second_task(learner, data):
    """`incremental_train`, whose losses, gradients, shifts and draws are kept."""
    import models.base

    net, vit = learner._network, learner._network.convnet
    forward, train, seen = net.ca_forward, learner._train, ([], [])
    net.ca_forward = lambda features: forward(features.half().double())

    def train_and_keep(*loaders):
        train(*loaders)
        adapters = [block.adaptmlp for block in vit.blocks]
        ARRAYS.update(adapter_vit.gradients(adapters, "grad"))
        ARRAYS["grad/head"] = net.fc.heads[1][0].weight.grad.numpy().copy()
        for head, kept in zip(net.fc.heads, seen, strict=True):  # in the alignment, which follows
            head[0].weight.register_hook(lambda value, kept=kept: kept.append(value.numpy().copy()))

    learner._train = train_and_keep
    moves = adapter_vit.recorded(
        learner, "displacement", lambda _, old, new, means, sigma: (old, new, means.copy())
    )
    means = adapter_vit.recorded(
        models.base, "MultivariateNormal", lambda _, mean, covariance: mean.numpy()
    )
    draws = adapter_vit.recorded(net, "ca_forward", lambda _, features: features.numpy())
    labels = adapter_vit.recorded(
        torch.nn.functional, "cross_entropy", lambda _, logits, targets: targets.numpy()
    )
    losses = adapter_vit.losses_kept()
    with moves as moved, means as centres, draws as given, labels as targets, losses as found:
        learner.incremental_train(data)
    ARRAYS["loss"], ARRAYS["align/loss"] = np.float32(found[:2])
    shifts(learner, *moved[0])
    ARRAYS["align/means"] = np.stack(centres)
    ARRAYS["align/features"] = given[0].astype(np.float16)
    ARRAYS["align/labels"] = targets[0].astype(np.uint8)
    ARRAYS["align/grads"] = np.stack([kept[0] for kept in seen])


def main(folder):
    adapter_vit.prepare(folder, seed=2403)
    images = adapter_vit.drawn_images(RANDOM, 16)
    labels = np.repeat(np.arange(4), 4)
    learner = built()
    net, vit = learner._network, learner._network.convnet
    ARRAYS.update(images=images, labels=labels, **adapter_vit.weights_of(vit))
    names = iter(("first", "second"))

    def draw():
        adapters = [block.adaptmlp for block in vit.blocks]
        adapter_vit.fill_adapters(adapters, RANDOM, down=0.25, up=2.0)
        ARRAYS.update(adapter_vit.stacked(adapters, next(names)))
        head = net.fc.heads[-1][0]
        head.weight.data = adapter_vit.drawn(RANDOM, head.weight.shape, 1.0)

    adapter_vit.draw_before_training(learner, draw)
    data = adapter_vit.Data(images, labels)
    learner.incremental_train(data)
    learner.after_task()
    ARRAYS["means/0"] = learner._class_means.copy()
    second_task(learner, data)
    ARRAYS["means/1"] = learner._class_means
    ARRAYS["covariances/1"] = learner._class_covs.numpy()
    heads = [head[0].weight.detach().numpy() for head in net.fc.heads]
    ARRAYS["head"] = np.concatenate(heads)
    with torch.no_grad():
        ARRAYS["logits"] = net(adapter_vit.pixels(images))["logits"].numpy()


if __name__ == "__main__":
    main(sys.argv[1])
    adapter_vit.write(__file__, "ssiat.npz", ARRAYS)
