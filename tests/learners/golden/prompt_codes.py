"""Three public code bases of prompt methods, each on a small transformer, for the scripts that
write `coda_prompt.npz`, `l2p.npz` and `dualprompt.npz`: GT-RIPL/CODA-Prompt and
LAMDA-CL/LAMDA-PILOT (torch, in float64) and google-research/l2p (flax, in float32).

Their code is imported from folders. What stands in its way is replaced here: timm (its PatchEmbed
is a convolution, its Mlp two layers, `create_model` makes a small transformer with given weights),
torchvision, `Tensor.cuda`, torch's default type (float64, in `torch.FloatTensor` too), the tanh
GELU of google's (the exact one), and in GT-RIPL's the start of `ViTZoo` and `Prompt.create_model`,
which make a transformer of width 768. Sizes, rates of 0 and the number of the task are settings.
"""

import contextlib
import functools
import importlib
import io
import json
import sys
from pathlib import Path

import numpy as np
import torch
from timm_stand_in import Anything, Mlp, PatchEmbed
from torch import nn

IMAGE, PATCH, HEADS = 8, 4, 2
# The learner is in task 1 of tasks with two classes each.
TASK, CLASSES = 1, 2


def stand_ins():
    """Modules that the authors' code imports, as far as it uses them, and float64 on the CPU."""
    names = ["timm", "timm.data", "timm.layers", "timm.models", "torchvision", "torchvision.models"]
    parts = ("vision_transformer", "registry", "layers", "layers.weight_init", "helpers")
    for name in (*names, *(f"timm.models.{part}" for part in parts)):
        sys.modules[name] = Anything(name)
    sys.modules["torchvision"].models = sys.modules["torchvision.models"]
    for name in ("timm.models.vision_transformer", "timm.models.layers"):
        sys.modules[name].PatchEmbed, sys.modules[name].Mlp = PatchEmbed, Mlp
    for name in ("timm.models.layers", "timm.models.layers.weight_init"):
        sys.modules[name].trunc_normal_ = nn.init.trunc_normal_
    sys.modules["timm.models.registry"].register_model = lambda function: function
    # A copy, as on a device: they add to `torch.zeros(1, requires_grad=True).cuda()` where it is.
    torch.Tensor.cuda = lambda self: self.clone()
    torch.set_default_dtype(torch.float64)
    torch.FloatTensor = torch.DoubleTensor


def modules_of(folder, *names):
    """Their modules of these names; those of another folder that are named alike are forgotten."""
    for name in list(sys.modules):
        if name.split(".")[0] in ("models", "learners", "utils", "backbone", "configs"):
            del sys.modules[name]
    sys.path.insert(0, folder)
    found = [importlib.import_module(name) for name in names]
    sys.path.pop(0)
    return found


def tensor(array):
    return torch.tensor(array, dtype=torch.float64)


def pixels(images):
    """[B, 3, H, W] of images [B, H, W, 3]."""
    return tensor(images.transpose(0, 3, 1, 2))


def sizes(width, depth, mlp_ratio):
    """The arguments of both torch transformers."""
    return {
        "img_size": IMAGE,
        "patch_size": PATCH,
        "embed_dim": width,
        "depth": depth,
        "num_heads": HEADS,
        "mlp_ratio": mlp_ratio,
    }


class Drawn:
    """Normal numbers rounded to float32, from one generator."""

    def __init__(self, seed):
        self.random = np.random.RandomState(seed)

    def __call__(self, shape, deviation, mean=0.0):
        return np.float32(mean + deviation * self.random.standard_normal(tuple(shape)))


def fill(module, prefix, drawn, deviation):
    """prefix/NAME: a drawn value, away from its usual start, for every parameter of `module`."""
    arrays = {}
    for name, value in module.named_parameters():
        mean = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        arrays[f"{prefix}/{name}"] = drawn(value.shape, deviation, mean)
        value.data = tensor(arrays[f"{prefix}/{name}"])
    return arrays


def weights_and_images(folder, drawn, width, depth):
    """weights/NAME under timm's names, four images and their labels."""
    (vit,) = modules_of(folder, "models.vit")
    arrays = fill(vit.VisionTransformer(**sizes(width, depth, 2)), "weights", drawn, 0.3)
    images = drawn((4, IMAGE, IMAGE, 3), 1.0)
    return arrays | {"images": images, "labels": np.array([2, 3, 3, 2])}


def weights_of(arrays):
    return {k.removeprefix("weights/"): v for k, v in arrays.items() if k.startswith("weights/")}


def width_and_depth(weights):
    return weights["cls_token"].shape[-1], sum("norm1.bias" in name for name in weights)


# GT-RIPL/CODA-Prompt


def gtripl_learner(folder, prompt, head, weights, mlp_ratio=2):
    """Their `Prompt` learner with rate 0 in task 1. `prompt` makes the module of a method from
    their models/zoo.py, `head` is a linear layer.
    """
    zoo, vit_file, prompt_file = modules_of(folder, "models.zoo", "models.vit", "learners.prompt")
    width, depth = width_and_depth(weights)
    # `ViTZoo` without its start, which makes a transformer of 768.
    model = zoo.ViTZoo.__new__(zoo.ViTZoo)
    nn.Module.__init__(model)
    model.feat = vit_file.VisionTransformer(**sizes(width, depth, mlp_ratio))
    model.feat.load_state_dict({name: tensor(value) for name, value in weights.items()})
    model.prompt, model.last, model.task_id = prompt(zoo), head, TASK
    model.prompt.task_count = TASK

    prompt_file.Prompt.create_model = lambda self: model
    config = {
        "prompt_param": None,
        "out_dim": head.out_features,
        "overwrite": True,
        "batch_size": 4,
        "tasks": [],
        "top_k": 1,
        "memory": 0,
        "DW": False,
        "gpuid": [-1],
        "schedule_type": "decay",
        "schedule": [1],
        "lr": 0.0,
        "weight_decay": 0,
        "optimizer": "Adam",
        "momentum": 0.9,
    }
    with contextlib.redirect_stdout(io.StringIO()):
        learner = prompt_file.Prompt(config)
        learner.last_valid_out_dim = learner.add_valid_output_dim(CLASSES * TASK)
        learner.add_valid_output_dim(CLASSES)
    learner.data_weighting(None)
    return learner


def gtripl_update(learner, images, labels):
    """The loss of one update; gradients are in the parameters."""
    learner.model.train()
    loss, _ = learner.update_model(pixels(images), torch.tensor(labels))
    return loss.numpy()


def gtripl_scores(learner, images):
    """(query, feature, logits) in evaluation mode."""
    model = learner.model.eval()
    with torch.no_grad():
        query = model.feat(pixels(images))[0][:, 0]
        feature, logits = model(pixels(images), pen=True), model(pixels(images))
    return query.numpy(), feature.numpy(), logits.numpy()


def gtripl_arrays(folder, name, arrays, drawn, prompt_param):
    """gtripl/...: their L2P or DualPrompt with drawn prompts, keys and head."""
    weights = weights_of(arrays)
    width, _ = width_and_depth(weights)
    learner = gtripl_learner(
        folder,
        lambda zoo: getattr(zoo, name)(width, 2, prompt_param, key_dim=width),
        nn.Linear(width, 2 * CLASSES),
        weights,
    )
    model = learner.model
    own = fill(model.prompt, "prompt", drawn, 0.5) | fill(model.last, "head", drawn, 0.5)
    loss = gtripl_update(learner, arrays["images"], arrays["labels"])
    trained = {n: p.grad for n, p in model.prompt.named_parameters() if p.grad is not None}
    query, feature, logits = gtripl_scores(learner, arrays["images"])
    np.testing.assert_allclose(query, arrays["query"], atol=1e-12)
    found = {
        "loss": loss,
        "logits": logits,
        "feature": feature,
        "head_rows": np.float64(own["head/weight"]),
        "head_bias": np.float64(own["head/bias"]),
        "grad_rows": model.last.weight.grad.numpy(),
        "grad_bias": model.last.bias.grad.numpy(),
        **{f"prompt/{n}": np.float64(own[f"prompt/{n}"]) for n in trained},
        **{f"grad/{n}": gradient.numpy() for n, gradient in trained.items()},
    }
    return {f"gtripl/{key}": value for key, value in found.items()}


# LAMDA-CL/LAMDA-PILOT


def pilot_learner(folder, method, weights, **settings):
    """Their `Learner` in task 1: the settings of their exps/METHOD.json, where not given."""
    learner_file, vit_file = modules_of(folder, f"models.{method}", f"backbone.vit_{method}")
    width, depth = width_and_depth(weights)

    def create_model(name, pretrained, **given):
        given = {key: value for key, value in given.items() if value is not None}
        vit = vit_file.VisionTransformer(**sizes(width, depth, 2), weight_init="skip", **given)
        stored = {key: tensor(value) for key, value in weights.items()}
        names = vit.load_state_dict(vit_file.checkpoint_filter_fn(stored, vit), strict=False)
        assert not names.unexpected_keys
        return vit

    sys.modules["timm"].create_model = create_model
    config = json.loads((Path(folder) / "exps" / f"{method}.json").read_text())
    config |= {"device": ["cpu"], "nb_classes": 2 * CLASSES, "tuned_epoch": 1}
    config |= {"optimizer": "sgd", "init_lr": 0.0}
    learner = learner_file.Learner(config | settings)
    learner._cur_task, learner._known_classes = TASK, CLASSES * TASK
    learner._total_classes = CLASSES * (TASK + 1)
    return learner


def pilot_update(learner, images, labels):
    """(the loss, gradients of everything that is trained) of one batch in their training loop."""
    read, item = [], torch.Tensor.item

    def keep(value):
        read.append(item(value))
        return read[-1]

    batch = None, pixels(images), torch.tensor(labels)
    torch.Tensor.item = keep
    with contextlib.redirect_stderr(io.StringIO()):
        learner._init_train([batch], None, learner.get_optimizer(), None)
    torch.Tensor.item = item
    parameters = learner._network.backbone.named_parameters()
    return read[0], {n: p.grad.numpy().copy() for n, p in parameters if p.requires_grad}


def pilot_scores(learner, images):
    """What their network returns in evaluation mode."""
    with torch.no_grad():
        found = learner._network.eval()(pixels(images))
    return {name: value.numpy() for name, value in found.items() if torch.is_tensor(value)}


# google-research/l2p


def google_params(weights, head, own):
    """Their parameters from timm's, a head and the prompts, keys and prefixes `own`."""

    def affine(name, factor="scale"):
        return {factor: weights[f"{name}.weight"].T, "bias": weights[f"{name}.bias"]}

    def block(name):
        kernel, bias = weights[f"{name}.attn.qkv.weight"], weights[f"{name}.attn.qkv.bias"]
        width = len(bias) // 3
        out = affine(f"{name}.attn.proj", "kernel")
        attention = {"out": out | {"kernel": out["kernel"].reshape(HEADS, -1, width)}}
        for index, part in enumerate(("query", "key", "value")):
            rows = slice(index * width, (index + 1) * width)
            part_kernel = kernel[rows].T.reshape(width, HEADS, -1)
            attention[part] = {"kernel": part_kernel, "bias": bias[rows].reshape(HEADS, -1)}
        return {
            "LayerNorm_0": affine(f"{name}.norm1"),
            "MultiHeadDotProductAttention_0": attention,
            "LayerNorm_1": affine(f"{name}.norm2"),
            "MlpBlock_0": {f"Dense_{i}": affine(f"{name}.mlp.fc{i + 1}", "kernel") for i in (0, 1)},
        }

    _, depth = width_and_depth(weights)
    encoder = {f"encoderblock_{i}": block(f"blocks.{i}") for i in range(depth)}
    patch = weights["patch_embed.proj.weight"].transpose(2, 3, 1, 0)
    return {
        "embedding": {"kernel": patch, "bias": weights["patch_embed.proj.bias"]},
        "cls": weights["cls_token"],
        "Transformer": {
            "posembed_input": {"pos_embedding": weights["pos_embed"]},
            "encoder_norm": affine("norm"),
            **encoder,
        },
        "head": {"kernel": head["rows"].T, "bias": head["bias"]},
        **own,
    }


def google_arrays(folder, method, arrays, own, **pool):
    """google/...: their model with PILOT's head, without a vote, with the prompts of task 1 in
    place of a choice (`masked_`) and with a vote (`voted_`). `pool` are settings that differ from
    their configs/cifar100_METHOD.py.
    """
    import flax.linen
    import jax

    flax.linen.gelu = functools.partial(jax.nn.gelu, approximate=False)
    vit, config_file = modules_of(folder, "models.vit", f"configs.cifar100_{method}")
    weights = weights_of(arrays)
    small = vit.get_testing_config()
    small.patches.size = (PATCH, PATCH)
    small.hidden_size, small.transformer.num_layers = width_and_depth(weights)
    small.transformer.mlp_dim = 2 * small.hidden_size
    small.transformer.num_heads = HEADS
    small.transformer.dropout_rate = 0.0
    vit.MODEL_CONFIGS["small"] = small
    config, images = config_file.get_config(), arrays["images"]
    config.prompt_pool_param.update(pool)
    if config.use_g_prompt:
        config.g_prompt_length = own["prefix"].shape[2]

    def run(make, own, **given):
        model = make(num_classes=2 * CLASSES)
        head = {name: np.float32(arrays[f"pilot/head_{name}"]) for name in ("rows", "bias")}
        params = google_params(weights, head, own)
        expected = jax.eval_shape(model.init, jax.random.key(0), images, **given)["params"]
        assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, expected)
        return model.apply({"params": params}, images, **given)

    query = run(vit.create_original_vit("small")[0], {})["pre_logits"]
    np.testing.assert_allclose(query, arrays["query"], atol=1e-5)
    size, found = config.prompt_pool_param.top_k, {}
    of_task = np.tile(np.arange(TASK * size, (TASK + 1) * size), (len(images), 1))
    kinds = {"": (False, None), "masked_": (False, of_task), "voted_": (True, None)}
    for prefix, (vote, mask) in kinds.items():
        config.prompt_pool_param.batchwise_prompt = vote
        make = vit.create_model("small", config)[0]
        result = run(make, own, cls_features=query, prompt_mask=mask)
        found[f"google/{prefix}logits"] = result["logits"]
        if mask is None:
            found[f"google/{prefix}chosen"] = result["prompt_idx"]
        if not vote:
            found[f"google/{prefix}reduce_sim"] = result["reduce_sim"]
    return {name: np.asarray(value) for name, value in found.items()}


# What both L2P and DualPrompt need of the drawn arrays


def apart(query, keys, chosen, gap=1e-3):
    """Whether the `chosen` nearest keys of every query, and the next one, are `gap` apart."""
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
    cosines = -np.sort(-unit(query) @ unit(keys).T, axis=1)
    return (-np.diff(cosines[:, : chosen + 1]) > gap).all()


def vote_overrules(arrays, source):
    """Whether a vote that is not tied gives an image other prompts, and all such images logits that
    differ by more than 0.01.
    """
    own, voted = arrays[f"{source}/chosen"], arrays[f"{source}/voted_chosen"]
    votes = -np.sort(-np.bincount(own.ravel(), minlength=own.max() + 2))
    tied = votes[own.shape[1] - 1] == votes[own.shape[1]]
    overruled = (np.sort(own, 1) != np.sort(voted, 1)).any(1)
    change = np.abs(arrays[f"{source}/voted_logits"] - arrays[f"{source}/logits"]).max(1)
    return not tied and overruled.any() and (change[overruled] > 0.01).all()


def saved(target, arrays):
    np.savez_compressed(target, **arrays)
    print(f"{target}: {target.stat().st_size} bytes, {len(arrays)} arrays")
