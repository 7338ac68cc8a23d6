"""Write `simplecil.npz`, the golden arrays of `tests/learners/test_golden_simplecil.py`: what
SimpleCIL in LAMDA-PILOT computes on a small random transformer.

The authors' code is read from a folder and none of it is kept here. Run it in an environment of its
own, never in the tests: `pip install torch numpy scipy tqdm timm==0.6.13` (their 0.6.12 with a
repair for Python 3.11), then

    python tests/learners/golden/make_simplecil_golden.py PILOT

PILOT is a checkout of LAMDA-CL/LAMDA-PILOT at 5240714d3d6071aca824f8aed4a92a46ac6f883c. The whole
of models/simplecil.py `Learner.incremental_train` runs for a task of three classes and for one of
two, with utils/inc_net.py `SimpleVitNet` on timm's `VisionTransformer` (12 wide, 2 blocks, 2 heads,
MLP 24, patches of 4 of 8 x 8 images) in float64 on weights rounded to float32.

What is replaced in the authors' code, and nothing else: the transformer that timm gives them and
its `out_dim` of 768, their data sets, the 8 processes that would read them, and torch's default
type, which is float64.

The arrays: vit/NAME and blocks/NAME as in the other files, query, key and value apart; images
[17, 8, 8, 3], labels [17]; queries [8, 8, 8, 3]: of 80 images the first eight whose best class
leads by more than 0.11 after both tasks; features [8, 12] of the queries; after task T fc/T
[classes, 12], the rows of the head, and logits/T [8, classes] of the queries.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from small_pilot import Tasks, channels_first, fill, lead, of_width, weights_of

WIDTH, SIZES, QUERIES, LEAD = 12, (3, 2), 8, 0.11
LABELS = np.array([1, 2, 2, 1, 2, 1, 2, 0, 0, 3, 4, 4, 3, 4, 3, 4, 4], np.int32)
SETTINGS = {"backbone_type": "vit_base_patch16_224", "memory_size": 0, "device": ["cpu"]}
RANDOM = np.random.RandomState(2303)


def built():
    """Their learner before the first task."""
    import timm
    from models import simplecil
    from timm.models.vision_transformer import VisionTransformer

    vit = of_width(VisionTransformer, WIDTH)(
        img_size=8, patch_size=4, embed_dim=WIDTH, depth=2, num_heads=2, mlp_ratio=2, num_classes=0
    )
    fill(vit, RANDOM)
    timm.create_model = lambda name, pretrained, num_classes: vit
    simplecil.num_workers = 0
    return simplecil.Learner(SETTINGS)


def main(folder):
    sys.path.insert(0, folder)
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    learner = built()
    network = learner._network
    # Most numbers are close to 0 or 1, so that images differ.
    images = RANDOM.beta(0.3, 0.3, (len(LABELS), 8, 8, 3)).astype(np.float32)
    queries = RANDOM.beta(0.3, 0.3, (10 * QUERIES, 8, 8, 3)).astype(np.float32)
    arrays = weights_of(network.backbone) | {"images": images, "labels": LABELS}
    tasks, of_queries = Tasks(images, LABELS, SIZES), {"queries": queries}
    for task in range(len(SIZES)):
        learner.incremental_train(tasks)
        learner.after_task()
        arrays[f"fc/{task}"] = network.fc.weight.detach().numpy().copy()
        with torch.no_grad():
            found = network(channels_first(queries))
        of_queries[f"logits/{task}"] = found["logits"].numpy()
        of_queries["features"] = found["features"].numpy()
    clear = np.all([lead(of_queries[f"logits/{t}"]) > LEAD for t in range(len(SIZES))], axis=0)
    kept = np.flatnonzero(clear)[:QUERIES]
    return arrays | {name: value[kept] for name, value in of_queries.items()}


if __name__ == "__main__":
    found = main(sys.argv[1])
    target = Path(__file__).parent / "simplecil.npz"
    np.savez_compressed(target, **found)
    print(f"{target}: {target.stat().st_size} bytes, {len(found)} arrays")
