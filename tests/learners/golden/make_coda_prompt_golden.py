"""Write `coda_prompt.npz`, the golden arrays of `tests/learners/test_golden_coda_prompt.py`: what
the authors' code of CODA-Prompt computes on a small random transformer.

The authors' code is read from a folder and none of it is kept here. Run it in an environment of its
own, never in the tests: `pip install torch numpy`, then

    python tests/learners/golden/make_coda_prompt_golden.py CODA

CODA is a checkout of GT-RIPL/CODA-Prompt at 6417d4f68754be68b697c7ca2323ee61e791e1a3. Weights,
prompts, head and images are drawn as in the test, which keeps none of them in the file. In the
second of three tasks with two classes each:

- learners/prompt.py `Prompt.update_model` at a rate of 0, around models/zoo.py `ViTZoo` and
  `CodaPrompt(12, 3, [7, 4, mu], key_dim=12)` and models/vit.py `VisionTransformer` (width 12, six
  blocks, two heads, MLP 12), gave loss and gradients with mu 0 and 0.1;
- `ViTZoo.forward` in evaluation mode gave query and logits, `CodaPrompt.forward` the prompts of
  block 3;
- the constructor of another `CodaPrompt`, and `process_task_count` after its first task's rows were
  moved by 0.2 times normal numbers, gave the start of components (0 in the first task, 1 in the
  second).

What is replaced in the authors' code, and nothing else: what `prompt_codes.py` names, the values of
parameters, and `torch.randn_like`, whose numbers are drawn here and kept.

The arrays: loss, loss_with_penalty, penalty; logits [3, 4] and query [3, 12]; prefix_key and
prefix_value [3, 2, 12] of block 3; rows_gradient [2, 12], bias_gradient [2] and gradient_NAME
[5, 2, ...] of the second task's rows in five blocks, with and without penalty; for components and
keys drawn0_, started0_, trained_ (the first task's), drawn1_ and started1_ [5, 2, ...].
"""

import sys
from pathlib import Path

import numpy as np
import torch
from prompt_codes import (
    Drawn,
    gtripl_learner,
    gtripl_scores,
    gtripl_update,
    modules_of,
    pixels,
    saved,
    stand_ins,
    tensor,
)
from torch import nn

WIDTH, BLOCKS, PROMPTED, POOL, LENGTH = 12, 6, 5, 7, 4
MINE = slice(2, 4)  # the second task's components, and its classes
LETTERS = {"components": "p", "keys": "k", "attention": "a"}
LABELS = np.array([2, 3, 3])


def drawn_weights():
    """The transformer of the test's `inputs`, drawn in the same order, under timm's names."""
    drawn = Drawn(2023)

    def vector(mean=0.0):
        return drawn((WIDTH,), 0.1, mean)

    def linear(rows=WIDTH):
        bias = vector()
        return {"bias": bias, "weight": drawn((rows, WIDTH), rows**-0.5).T}

    def norm():
        bias = vector()
        return {"bias": bias, "weight": vector(1.0)}

    modules = {}
    for block in range(BLOCKS):
        names = ("fc1", "fc2", "key", "norm1", "norm2", "out", "query", "value")
        parts = {name: norm() if "norm" in name else linear() for name in names}
        joined = [parts[name] for name in ("query", "key", "value")]
        parts["qkv"] = {n: np.concatenate([part[n] for part in joined]) for n in joined[0]}
        places = {"mlp.fc1": "fc1", "mlp.fc2": "fc2", "norm1": "norm1", "norm2": "norm2"}
        places |= {"attn.proj": "out", "attn.qkv": "qkv"}
        modules |= {f"blocks.{block}.{place}": parts[name] for place, name in places.items()}
    class_token = vector()
    modules["norm"] = norm()
    patch = linear(4 * 4 * 3)
    patch["weight"] = patch["weight"].reshape(WIDTH, 4, 4, 3).transpose(0, 3, 1, 2)
    modules["patch_embed.proj"] = patch
    weights = {f"{m}.{name}": value for m, part in modules.items() for name, value in part.items()}
    return weights | {
        "cls_token": class_token[None, None],
        "pos_embed": drawn((1, 5, WIDTH), 0.1),
    }


def drawn_inputs():
    """(pool, rows, bias, images) of the test's `inputs`, drawn in the same order."""
    drawn = Drawn(1993)
    pool = {"components": drawn((PROMPTED, POOL, LENGTH, WIDTH), 0.5)}
    pool |= {name: drawn((PROMPTED, POOL, WIDTH), 0.5) for name in ("keys", "attention")}
    rows, bias = drawn((6, WIDTH), 0.3), drawn((6,), 0.3)
    return pool, rows, bias, np.float32(drawn.random.random_sample((3, 8, 8, 3)))


def of_blocks(prompt, name):
    """Their parameters of this name, one for each block."""
    return [getattr(prompt, f"e_{LETTERS[name]}_{block}") for block in range(PROMPTED)]


def second_task(folder, penalty):
    """Their learner with the drawn values in the second task, and the images."""
    pool, rows, bias, images = drawn_inputs()
    learner = gtripl_learner(
        folder,
        lambda zoo: zoo.CodaPrompt(WIDTH, 3, [POOL, LENGTH, penalty], key_dim=WIDTH),
        nn.Linear(WIDTH, 6),
        drawn_weights(),
        mlp_ratio=1,
    )
    for name, values in pool.items():
        for value, mine in zip(of_blocks(learner.model.prompt, name), values, strict=True):
            value.data = tensor(mine)
    learner.model.last.weight.data, learner.model.last.bias.data = tensor(rows), tensor(bias)
    return learner, images


def losses_and_gradients(folder):
    arrays = {}
    for penalty, suffix in ((0.0, ""), (0.1, "_with_penalty")):
        learner, images = second_task(folder, penalty)
        model, outputs = learner.model, []
        model.register_forward_hook(lambda module, args, values, kept=outputs: kept.append(values))
        arrays[f"loss{suffix}"] = gtripl_update(learner, images, LABELS)
        for name in LETTERS:
            each = [value.grad.numpy()[MINE] for value in of_blocks(model.prompt, name)]
            arrays[f"gradient_{name}{suffix}"] = np.stack(each)
    arrays["penalty"] = outputs[0][1].sum().detach().numpy()
    arrays["rows_gradient"] = model.last.weight.grad.numpy()[MINE]
    arrays["bias_gradient"] = model.last.bias.grad.numpy()[MINE]
    return arrays


def prompts_and_logits(folder):
    learner, images = second_task(folder, 0.0)
    query, _, logits = gtripl_scores(learner, images)
    with torch.no_grad():
        (key, value), *_ = learner.model.prompt(tensor(query), 3, pixels(images))
    return {
        "logits": logits[:, :4],
        "query": query,
        "prefix_key": key.numpy(),
        "prefix_value": value.numpy(),
    }


def starts(folder):
    """The start of components in the first and in the second task."""
    (zoo,) = modules_of(folder, "models.zoo")
    drawn, kept, arrays = Drawn(2211), [], {}

    def randn_like(value):
        kept.append(drawn(value.shape, 1.0))
        return tensor(kept[-1])

    def keep(task):
        """Of three vectors for P, K and A each, the first two kinds: keys come before attention."""
        rows = [row.reshape(LENGTH, WIDTH) for row in kept if row.size > WIDTH]
        short = [row for row in kept if row.size == WIDTH]
        arrays[f"drawn{task}_components"] = np.stack(rows).reshape(PROMPTED, 2, LENGTH, WIDTH)
        arrays[f"drawn{task}_keys"] = np.stack(short).reshape(PROMPTED, 2, 2, WIDTH)[:, 0]
        for name in ("components", "keys"):
            mine = slice(2 * task, 2 * task + 2)
            each = [value.detach().numpy()[mine] for value in of_blocks(prompt, name)]
            arrays[f"started{task}_{name}"] = np.stack(each)
        kept.clear()

    given, torch.randn_like = torch.randn_like, randn_like
    prompt = zoo.CodaPrompt(WIDTH, 3, [POOL, LENGTH, 0.0], key_dim=WIDTH)
    keep(0)
    for name in ("components", "keys"):
        for value in of_blocks(prompt, name):
            moved = value.detach().numpy()[:2] + drawn(value[:2].shape, 0.2)
            value.data[:2] = tensor(np.float32(moved))
        each = [value.detach().numpy()[:2] for value in of_blocks(prompt, name)]
        arrays[f"trained_{name}"] = np.stack(each)
    prompt.process_task_count()
    keep(1)
    torch.randn_like = given
    return arrays


def main(folder):
    stand_ins()
    torch.manual_seed(0)
    arrays = losses_and_gradients(folder) | prompts_and_logits(folder) | starts(folder)
    kept = {name: a.astype(np.float32) if a.ndim else a for name, a in arrays.items()}
    saved(Path(__file__).parent / "coda_prompt.npz", kept)


if __name__ == "__main__":
    main(sys.argv[1])
