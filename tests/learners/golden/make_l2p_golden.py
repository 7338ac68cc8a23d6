"""Write `l2p.npz`, the golden arrays of L2P in `tests/learners/test_golden_l2p_dualprompt.py`: what
three public codes compute on a small random transformer.

The authors' code is read from folders and none of it is kept here. Run it in an environment of its
own, never in the tests: `pip install torch numpy scipy tqdm flax ml_collections`, then

    python tests/learners/golden/make_l2p_golden.py GOOGLE PILOT GTRIPL

GOOGLE is a checkout of google-research/l2p at dd8836e6e372df29f03d83bf3dc3a806114e9d8e, PILOT one
of LAMDA-CL/LAMDA-PILOT at 5240714d3d6071aca824f8aed4a92a46ac6f883c, GTRIPL one of
GT-RIPL/CODA-Prompt at 6417d4f68754be68b697c7ca2323ee61e791e1a3. All run on the same four images and
transformer (two blocks of width 16, two heads, MLP 32, patches of 4 of 8 x 8 images), in task 1 of
two tasks with two classes each, and in the first two a pool of six prompts of length 2, of which
three are chosen:

- pilot/: models/l2p.py `Learner`, with the settings of exps/l2p.json but for sizes, lambda 0.5,
  `batchwise_prompt` off and SGD; `_init_train` on one batch at a rate of 0 gave loss and gradients,
  utils/inc_net.py `PromptVitNet` around backbone/vit_l2p.py the query (its `original_backbone`)
  and the rest, then with a vote (`voted_`);
- google/: models/vit.py `create_model` and `create_original_vit` with the settings of
  configs/cifar100_l2p.py but for sizes, on PILOT's prompts (with the class token's position, which
  PILOT adds), keys and head: with the choice of each image, with the prompts of task 1 as
  `prompt_mask` (`masked_`), which is what their training step makes, and with a vote (`voted_`);
- gtripl/: learners/prompt.py `Prompt.update_model` at a rate of 0, around models/zoo.py `ViTZoo`
  and `L2P` ("deep", pool 6, length 4, of which five are chosen).

What is replaced in the authors' code, and nothing else: what `prompt_codes.py` names, and the
values of parameters. All is drawn anew until nearest keys are at least 1e-3 apart in their cosines
to each query, and a vote that is not tied gives an image other prompts and changes its logits by
more than 0.01.

The arrays: weights/NAME under timm's names, images [4, 8, 8, 3], labels [4], query [4, 16]; of each
code prompts, keys (gtripl/prompt/e_p_I and e_k_I of block I) and head, then what was computed.
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
    vote_overrules,
    weights_and_images,
    weights_of,
)

WIDTH, BLOCKS = 16, 2
POOL = {"length": 2, "top_k": 3}


def pilot_arrays(folder, arrays, drawn):
    """query and pilot/...."""
    learner = pilot_learner(
        folder,
        "l2p",
        weights_of(arrays),
        size=6,
        **POOL,
        batchwise_prompt=False,
        pull_constraint_coeff=0.5,
    )
    net, images = learner._network, arrays["images"]
    vit = net.backbone
    own = fill(vit.prompt, "own", drawn, 0.3) | fill(vit.head, "head", drawn, 0.3)
    found = {
        "prompts": own["own/prompt"],
        "keys": own["own/prompt_key"],
        "head_rows": own["head/weight"],
        "head_bias": own["head/bias"],
    }
    found = {name: np.float64(value) for name, value in found.items()}
    scores = pilot_scores(learner, images)
    found |= {"chosen": scores["prompt_idx"], "similarity": scores["similarity"]}
    found |= {"feature": scores["pre_logits"], "logits": scores["logits"]}
    loss, gradients = pilot_update(learner, images, arrays["labels"])
    found |= {
        "loss": np.array(loss),
        "grad_prompts": gradients["prompt.prompt"],
        "grad_keys": gradients["prompt.prompt_key"],
        "grad_rows": gradients["head.weight"],
        "grad_bias": gradients["head.bias"],
    }
    vit.prompt.batchwise_prompt = True
    scores = pilot_scores(learner, images)
    found |= {"voted_chosen": scores["prompt_idx"], "voted_logits": scores["logits"]}
    query = net.original_backbone(pixels(images))["pre_logits"].detach().numpy()
    return {"query": query} | {f"pilot/{name}": value for name, value in found.items()}


def everything(google, pilot, gtripl, seed):
    drawn = Drawn(seed)
    arrays = weights_and_images(gtripl, drawn, WIDTH, BLOCKS)
    arrays |= pilot_arrays(pilot, arrays, drawn)
    prompts = np.float32(arrays["pilot/prompts"]) + arrays["weights/pos_embed"][0, 0]
    own = {"prompt": prompts[None], "key": np.float32(arrays["pilot/keys"])}
    arrays |= google_arrays(google, "l2p", arrays, {"prompt_pool": own}, pool_size=6, **POOL)
    return arrays | gtripl_arrays(gtripl, "L2P", arrays, drawn, [6, 4, 1])


def usable(arrays):
    clear = apart(arrays["query"], arrays["pilot/keys"], POOL["top_k"])
    for block in range(BLOCKS):
        clear &= apart(arrays["query"], arrays[f"gtripl/prompt/e_k_{block}"], 5)
    return clear and all(vote_overrules(arrays, source) for source in ("pilot", "google"))


def main(google, pilot, gtripl):
    stand_ins()
    draws = (everything(google, pilot, gtripl, seed) for seed in itertools.count(2112))
    saved(Path(__file__).parent / "l2p.npz", next(filter(usable, draws)))


if __name__ == "__main__":
    main(*sys.argv[1:])
