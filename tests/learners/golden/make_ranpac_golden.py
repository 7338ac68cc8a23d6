"""Write `ranpac.npz`, the golden arrays of `tests/learners/test_golden_ranpac.py`: what the
authors' code of RanPAC computes on drawn features.

The authors' code is read from a folder and none of it is kept here. Run it in an environment of its
own, never in the tests: `pip install torch numpy tqdm`, then

    python tests/learners/golden/make_ranpac_golden.py RANPAC

RANPAC is a checkout of RanPAC/RanPAC at 012927f86e8d95dc9e7c6015a5e1048e6604c8b6. The whole of
RanPAC.py `Learner.incremental_train` runs for a task of 25 images of two classes and for one of 60
of three, without training (`model_name` "ncm") and with M = 40, in float64: `setup_RP` and
`replace_fc`, in it `optimise_ridge_parameter`, and inc_net.py `SimpleVitNet.update_fc`; then
`SimpleVitNet.forward` on one query of each class.

What is replaced in the authors' code, and nothing else: timm, whose transformer is the identity, so
that images are the drawn features, and its `out_dim` of 768; the random matrix that `setup_RP` asks
torch for; their data sets and the loader that shuffles them, so that the search sees the features
in the stored order; the graphics card, which is the processor; torch's default type, float64.

Features and matrix are drawn again until they ask no more of float32 than the test's error budget
has: the condition of the Gram matrix that the search fits is at most 2e4 in both tasks, that of the
solved system, with its lambda, below 200, and the best mean squared error of the 17 is by 5 %
smaller than the next.

The arrays: projection [12, 40]; features_T [N, 12] of task T in the order of the test's labels;
queries [5, 12]; losses [2, 17] and ridges [2], the errors that the search compares and the lambda
it takes; rows_T [classes, 40], the head after task T; scores [5, 5] of the queries; of the sums
after both tasks moments [40, 5] (Q), gram_row [40] (row 3 of G) and gram_trace [].
"""

import sys
import types
from pathlib import Path

import numpy as np
import torch
from torch import nn

WIDTH, SIZE, CLASSES = 12, 40, 5
LABELS = (np.array([0, 1] * 12 + [0]), np.array([2, 3, 4] * 20))
SETTINGS = {
    "model_name": "ncm",
    "convnet_type": "vit_base_patch16_224",
    "use_RP": True,
    "M": SIZE,
    "batch_size": 16,
    "device": ["cpu"],
}
RANDOM = np.random.RandomState(2307)


class Tasks:
    """Stands for their `DataManager`: a task's data set is its one batch."""

    def __init__(self, features):
        self.batches = [
            (None, torch.tensor(x, dtype=torch.float64), torch.tensor(y))
            for x, y in zip(features, LABELS, strict=True)
        ]

    def get_total_classnum(self):
        return CLASSES

    def get_task_size(self, task):
        return len(np.unique(LABELS[task]))

    def get_dataset(self, classes, source, mode):
        return [batch for batch in self.batches if batch[2][0] in classes]


def on_the_processor():
    """They name the device where they ask for the graphics card, and only there."""
    given = torch.Tensor.to
    torch.Tensor.cuda = nn.Module.cuda = lambda self: self
    torch.Tensor.to = lambda self, *args, device=None: given(self, *args) if args else self


def drawn():
    """(W, the features of each task, the queries) in float32: classes around drawn centres."""
    centers = RANDOM.standard_normal((CLASSES, WIDTH))

    def around(labels):
        return np.float32(centers[labels] + 0.9 * RANDOM.standard_normal((len(labels), WIDTH)))

    projection = np.float32(RANDOM.standard_normal((WIDTH, SIZE)))
    return projection, [around(labels) for labels in LABELS], around(np.arange(CLASSES))


def computed(projection, features, queries):
    """(what their learner computes, the condition of each task's solved system)."""
    import RanPAC

    learner = RanPAC.Learner(SETTINGS)
    network = learner._network
    network.convnet.out_dim = WIDTH
    learner.is_dil = learner.dil_init = False  # as their trainer sets them
    matrix = torch.tensor(projection, dtype=torch.float64)
    losses, ridges, conditions, arrays = [], [], [], {}
    mse_loss, randn, search = RanPAC.F.mse_loss, torch.randn, learner.optimise_ridge_parameter

    def keep_loss(*args):
        losses.append(mse_loss(*args))
        return losses[-1]

    def keep_ridge(*args):
        ridges.append(search(*args))
        return ridges[-1]

    learner.optimise_ridge_parameter = keep_ridge
    RanPAC.F.mse_loss, torch.randn = keep_loss, lambda *sizes: matrix
    tasks = Tasks(features)
    for task in range(len(LABELS)):
        learner.incremental_train(tasks)
        learner.after_task()
        arrays[f"rows_{task}"] = network.fc.weight.detach().numpy().copy()
        solved = learner.G.numpy() + ridges[task] * np.eye(SIZE)
        conditions.append(np.linalg.cond(solved))
    RanPAC.F.mse_loss, torch.randn = mse_loss, randn
    with torch.no_grad():
        scores = network(torch.tensor(queries, dtype=torch.float64))["logits"].numpy()
    return arrays | {
        "losses": np.reshape([loss.item() for loss in losses], (2, 17)),
        "ridges": np.array(ridges),
        "moments": learner.Q.numpy(),
        "scores": scores,
        "gram_trace": np.array(learner.G.trace().item()),
        "gram_row": learner.G[3].numpy(),
    }, conditions


def condition_of_search(features, projection):
    """Of the smaller Gram matrix of the first 80 % of the features, which the search fits."""
    hidden = np.maximum(np.float64(features) @ np.float64(projection), 0.0)
    return np.linalg.cond(hidden[: int(0.8 * len(hidden))]) ** 2


def main(folder):
    sys.path.insert(0, folder)
    sys.modules["timm"] = types.ModuleType("timm")
    sys.modules["timm"].create_model = lambda name, pretrained, num_classes: nn.Identity()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    on_the_processor()
    import RanPAC

    RanPAC.DataLoader = lambda batches, **options: batches
    while True:
        projection, features, queries = drawn()
        if max(condition_of_search(given, projection) for given in features) > 2e4:
            continue
        arrays, conditions = computed(projection, features, queries)
        best, second = np.sort(arrays["losses"], axis=1)[:, :2].T
        if max(conditions) < 200 and (best < 0.95 * second).all():
            break
    given = {"projection": projection, "queries": queries}
    return given | {f"features_{task}": x for task, x in enumerate(features)} | arrays


if __name__ == "__main__":
    found = main(sys.argv[1])
    target = Path(__file__).parent / "ranpac.npz"
    np.savez_compressed(target, **found)
    print(f"{target}: {target.stat().st_size} bytes, {len(found)} arrays")
