"""Write `dualprompt.npz`, the golden arrays of DualPrompt in
`tests/learners/test_golden_l2p_dualprompt.py`: what three public codes compute on a small random
transformer.

The authors' code is read from folders and none of it is kept here. Run it in an environment of its
own, never in the tests: `pip install torch numpy scipy tqdm flax ml_collections`, then

    python tests/learners/golden/make_dualprompt_golden.py GOOGLE PILOT GTRIPL

GOOGLE is a checkout of google-research/l2p at dd8836e6e372df29f03d83bf3dc3a806114e9d8e, PILOT one
of LAMDA-CL/LAMDA-PILOT at 5240714d3d6071aca824f8aed4a92a46ac6f883c, GTRIPL one of
GT-RIPL/CODA-Prompt at 6417d4f68754be68b697c7ca2323ee61e791e1a3. All run on the same four images and
transformer (five blocks of width 8, two heads, MLP 16, patches of 4 of 8 x 8 images), in task 1 of
two tasks with two classes each, and in the first two with G-prompts of length 2 in blocks 0-1 and
two sets of E-prompts of length 3 in blocks 2-4:

- pilot/: models/dualprompt.py `Learner`, with the settings of exps/dualprompt.json but for sizes,
  lambda 0.1, `batchwise_prompt` off and SGD; `_init_train` at a rate of 0 gave losses and
  gradients, utils/inc_net.py `PromptVitNet` around backbone/vit_dualprompt.py the query (its
  `original_backbone`) and the rest. Their port mixes the images of a batch, so each image is a
  batch, and gradients are the means of four; `batch_logits` are of the batch of four;
- google/: models/vit.py `create_model` and `create_original_vit` with the settings of
  configs/cifar100_dualprompt.py but for sizes, on PILOT's prompts, keys and head: with the choice
  of each image, with the prompts of task 1 as `prompt_mask` (`masked_`), which is what their
  training step makes, and with a vote (`voted_`);
- gtripl/: learners/prompt.py `Prompt.update_model` at a rate of 0, around models/zoo.py `ViTZoo`
  and `DualPrompt` (pool 2, E 6, G 4).

What is replaced in the authors' code, and nothing else: what `prompt_codes.py` names, and the
values of parameters. All is drawn anew until both keys are nearest to an image, at least 1e-3
nearer in their cosines than the other, a vote that is not tied gives an image other prompts and
changes its logits by more than 0.01, and PILOT's mixture changes all of them by more than 0.1.

The arrays: weights/NAME under timm's names, images [4, 8, 8, 3], labels [4], query [4, 8];
pilot/general and pilot/experts as [blocks, key or value, (pool,) length, heads, width of a head];
of GT-RIPL the prompts g_p_I, e_p_I and keys e_k_I of block I; heads; then what was computed.
"""

import itertools
import sys
from pathlib import Path

import numpy as np
from prompt_codes import (
    Drawn,
    apart,
    fill,
    google_arrays,
    gtripl_arrays,
    pilot_learner,
    pilot_scores,
    pilot_update,
    pixels,
    saved,
    stand_ins,
    tensor,
    vote_overrules,
    weights_and_images,
    weights_of,
)

WIDTH, BLOCKS = 8, 5
LENGTH, GENERAL_LENGTH, SETS = 3, 2, 2


def pilot_arrays(folder, arrays, drawn):
    """query and pilot/...."""
    learner = pilot_learner(
        folder,
        "dualprompt",
        weights_of(arrays),
        size=SETS,
        length=LENGTH,
        g_prompt_length=GENERAL_LENGTH,
        batchwise_prompt=False,
        pull_constraint_coeff=0.1,
    )
    vit, images, labels = learner._network.backbone, arrays["images"], arrays["labels"]
    vit.g_prompt.data = tensor(drawn(vit.g_prompt.shape, 0.5))
    own = fill(vit.e_prompt, "own", drawn, 0.5) | fill(vit.head, "head", drawn, 0.5)
    found = {
        "general": vit.g_prompt.detach().numpy(),
        "experts": own["own/prompt"],
        "keys": own["own/prompt_key"],
        "head_rows": own["head/weight"],
        "head_bias": own["head/bias"],
    }
    found = {name: np.float64(value) for name, value in found.items()}
    batches = [slice(i, i + 1) for i in range(len(images))]
    scores = [pilot_scores(learner, images[batch]) for batch in batches]
    for name, theirs in (("chosen", "prompt_idx"), ("feature", "pre_logits"), ("logits", "logits")):
        found[name] = np.concatenate([each[theirs] for each in scores])
    updates = [pilot_update(learner, images[batch], labels[batch]) for batch in batches]
    found["losses"] = np.array([loss for loss, _ in updates])
    for name, theirs in (
        ("general", "g_prompt"),
        ("experts", "e_prompt.prompt"),
        ("keys", "e_prompt.prompt_key"),
        ("rows", "head.weight"),
        ("bias", "head.bias"),
    ):
        found[f"grad_{name}"] = np.mean([gradients[theirs] for _, gradients in updates], axis=0)
    found["batch_logits"] = pilot_scores(learner, images)["logits"]
    query = learner._network.original_backbone(pixels(images))["pre_logits"].detach().numpy()
    return {"query": query} | {f"pilot/{name}": value for name, value in found.items()}


def everything(google, pilot, gtripl, seed):
    drawn = Drawn(seed)
    arrays = weights_and_images(gtripl, drawn, WIDTH, BLOCKS)
    arrays |= pilot_arrays(pilot, arrays, drawn)
    general = np.float32(arrays["pilot/general"])
    # One for each block, of which two are used.
    prefix = np.zeros((BLOCKS, *general.shape[1:]), np.float32)
    prefix[: len(general)] = general
    pool = {name: np.float32(arrays[f"pilot/{name}"]) for name in ("experts", "keys")}
    own = {"prompt_pool": {"prompt": pool["experts"], "key": pool["keys"]}, "prefix": prefix}
    arrays |= google_arrays(google, "dualprompt", arrays, own, pool_size=SETS, length=LENGTH)
    return arrays | gtripl_arrays(gtripl, "DualPrompt", arrays, drawn, [SETS, 6, 4])


def usable(arrays):
    query = arrays["query"]
    keys = [arrays["pilot/keys"], *(arrays[f"gtripl/prompt/e_k_{block}"] for block in (2, 3, 4))]
    mixed = np.abs(arrays["pilot/batch_logits"] - arrays["pilot/logits"]).max(1)
    return (
        all(apart(query, each, 1) for each in keys)
        and set(arrays["pilot/chosen"].ravel()) == set(range(SETS))
        and vote_overrules(arrays, "google")
        and (mixed > 0.1).all()
    )


def main(google, pilot, gtripl):
    stand_ins()
    draws = (everything(google, pilot, gtripl, seed) for seed in itertools.count(2204))
    saved(Path(__file__).parent / "dualprompt.npz", next(filter(usable, draws)))


if __name__ == "__main__":
    main(*sys.argv[1:])
