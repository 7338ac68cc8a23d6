"""Write `cdl.npz`, the golden arrays of `tests/learners/cdl`: what the authors' code of continual
distillation learning (CDL, arXiv 2407.13911) computes on two small random transformers.

The authors' code is read from folders and none of it is kept here. Run it in an environment of its
own, never in the tests: `pip install torch numpy`, then

    python tests/learners/golden/make_cdl_golden.py MAIN STUDY FIRST

MAIN is a checkout of IRVLUTD/CDL at d9805774be9a3b8d9ca3506835bf35fa64031da8: all hosts; forms
none, kd, kdp, dkd, fitnets, reviewkd. STUDY is one at bebe528206ee1acaf17e4ef937d33f5a6f0b6471,
which is also the head of IRVLUTD/CDL_Empirical_Study: form kd_token. FIRST is the generation of
July 2024, form cdl_prompt, which is no longer in the repository's history: models/zoo.py at
9511a55e3c4714ad623bc02f03bcc37315e79cad, models/vit.py at d62e6ac745dd7978d67622bcd043d621ec20cd23
and learners/ at 908e3147c5429f90c602826c89a0eff71d1061c0. For the stored arrays FIRST was put
together from the oldest commit of today's history, 69a8b3b, with the text of these files put in
where they differ: their attention_base, forward passes, losses and training loop.

How it is called: `learners.prompt.<Host>(config).learn_batch` in the second of two tasks with three
classes each (two classes would leave nothing for the second term of DKD), one batch of four images,
learning rate 0, so that its two epochs are the same update; then both models in evaluation mode, as
their `validation` calls them. Everything is float64 on the CPU. alpha 0.5, temperature 2, one
process: the key and feature losses are not summed over devices.

What is replaced in the authors' code, and nothing else: the sizes of their transformers named
"tiny" (the student: width 8, 6 blocks, 2 heads) and "small" (the teacher: width 12, 7 blocks, 3
heads), the 12 blocks of a student that ReviewKD writes out (6), the MLP's width (twice the width),
the image (8 px, patch 4), timm (its pretrained weights are the random ones below, its PatchEmbed a
convolution) and `Tensor.cuda`.

In cdl_prompt each batch trains both: the student is given the logits and prompts of the teacher's
training pass, which for these two hosts are those of its evaluation; key losses are sums.

Sizes: L2P++ pool 6, length 4 (2 + 2 rows), top 5, block 0; DualPrompt pool 2, length 6 in blocks
2-4, general length 4 in blocks 0-1; CODA-Prompt pool 5 (of which two components are in a task and
the last in none), length 4, mu 0, blocks 0-4; APT with ema_coeff 0.7; KD prompts "6 6".

The arrays. Inputs are float32 numbers, used in float64; outputs are float64. Names after the last
slash are the authors' own.

images [4, 8, 8, 3], labels [4], query [4, 8]
weights/{teacher,student}/NAME      the frozen transformers under timm's names, where blocks.*.REST
                                    has blocks.0.REST to the last, with an axis for them in front
host/HOST/{teacher,student}/NAME    prompts and keys of l2p, dualprompt, coda_prompt, apt before the
                                    update; for apt also global_merged_prompt as of the first task
host/HOST/mapper/NAME               the mapper of cdl_prompt: e_k, e_a, e_p of each block, of which
                                    only the first pool / 2 components are ever used
head/{teacher,student}/{weight,bias}      classes 0-5; apt divides a row by its norm, and its biases
                                    were 0 in place of these
extra/NAME                          what a form adds to the student: kd_prompt/kd_p_0 (the token) to
                                    kd_p_5, add_T_token, kd_last, project_t_s, ReviewKD_layers
                                    (abfs.0 is of the last block, abfs.5 of the first)
teacher/HOST/...                    the teacher's update: logits [4, 6] before the mask, loss,
                                    loss_ce, loss_key, gradient/NAME; then `distilled` [4, 3], its
                                    logits of the task's classes that the student learns from, and
                                    `scores` [4, 6] and, for apt, `merged` at the end of the task
alone/HOST/...                      the same update of the student without a teacher
student/FORM/HOST/...               the student's update: logits [4, 6], kd_logits [4, 6] where the
                                    form has a second head, loss, loss_ce (before its factor 1 -
                                    alpha), loss_soft (with its factor alpha), loss_key,
                                    loss_feature (with its factor), gradient/NAME of everything that
                                    is trained and has a gradient; at the end scores [4, 6], merged
"""

import contextlib
import functools
import io
import re
import shutil
import sys
import tempfile
import types
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn

TEACHER, STUDENT = "vit_small_patch16_224", "vit_tiny_patch16_224"
# width, blocks, heads
SIZES = {TEACHER: (12, 7, 3), STUDENT: (8, 6, 2)}
THEIR_SIZES = {TEACHER: (384, 12, 6), STUDENT: (192, 12, 3)}
REVIEWED = {"range(12)": "range(6)", "idx < 11": "idx < 5", "[-12:]": "[-6:]", "/12": "/6"}
IMAGE, PATCH, MLP_RATIO = 8, 4, 2
HOSTS = {
    "l2p": ("L2P", [6, 4, -1]),
    "dualprompt": ("DualPrompt", [2, 6, 4]),
    "coda_prompt": ("CODAPrompt", [5, 4, 0.0]),
    "apt": ("APT", [0.01]),
}
METHODS = {"kd": "KD", "dkd": "DKD", "fitnets": "FitNets", "reviewkd": "ReviewKD"}
METHODS |= {"kdp": "KD_Token", "kd_token": "KD_Token", "cdl_prompt": "KD_Token"}
OF_STUDENT = ("kd_prompt", "kd_last", "project_t_s", "ReviewKD_layers")
LABELS = torch.tensor([3, 5, 4, 3])

ARRAYS: dict[str, np.ndarray] = {}
RANDOM = np.random.RandomState(2407)


def drawn(name: str, shape: tuple[int, ...], deviation: float, mean: float = 0.0) -> torch.Tensor:
    """The array of this name, drawn the first time that it is asked for."""
    if name not in ARRAYS:
        values = mean + deviation * RANDOM.standard_normal(shape)
        ARRAYS[name] = values.astype(np.float32)
    return torch.tensor(ARRAYS[name], dtype=torch.float64)


def fill(prefix: str, module: nn.Module, deviation: float | None = None) -> None:
    """Gives every parameter and buffer a drawn value, away from its usual start."""
    state = dict(module.named_parameters()) | dict(module.named_buffers())
    for name, value in state.items():
        if "_layer_proj" in name:  # APT makes these and never uses them
            continue
        mean, spread = 0.0, deviation
        if deviation is None:
            spread = 0.3
            if re.search(r"norm\w*\.weight$", name):
                mean, spread = 1.0, 0.1
            elif name.endswith("weight"):
                spread = int(np.prod(value.shape[1:])) ** -0.5
        value.data = drawn(f"{prefix}/{name}", tuple(value.shape), spread, mean)


class Transformer(nn.Module):
    """Stands for timm's pretrained model: only its state is read."""

    def __init__(self, module: nn.Module, role: str):
        super().__init__()
        self.module, self.role = module, role

    def state_dict(self):
        fill(f"weights/{self.role}", self.module)
        return dict(self.module.state_dict()) | {"head.weight": None, "head.bias": None}


class PatchEmbed(nn.Module):
    def __init__(self, img_size, patch_size, in_chans, embed_dim):
        super().__init__()
        self.num_patches = (IMAGE // PATCH) ** 2
        self.proj = nn.Conv2d(in_chans, embed_dim, PATCH, PATCH)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


def stand_ins() -> None:
    """Modules that the authors' code imports, as far as it uses them."""
    # A copy, as on a device: they add to `torch.zeros(1, requires_grad=True).cuda()` where it is.
    torch.Tensor.cuda = lambda self, *args, **kwargs: self.clone()
    parts = {
        "timm": {},
        "timm.models": {},
        "timm.models.vision_transformer": {"_cfg": None, "PatchEmbed": PatchEmbed},
        "timm.models.registry": {"register_model": None},
        "timm.models.layers": {"trunc_normal_": nn.init.trunc_normal_, "DropPath": None},
        "timm.models.helpers": {"named_apply": None, "adapt_input_conv": None},
        "torchvision": {},
        "torchvision.models": {},
    }
    for name, members in parts.items():
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(members)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, sys.modules[name])


def authors_code(folder: str) -> types.ModuleType:
    """Their `learners.prompt`, imported from a copy in which two transformers are small."""
    copy = Path(tempfile.mkdtemp()) / "code"
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns(".git", "__pycache__"))
    for path, times in (("models/zoo.py", 1), ("learners/default.py", 2)):
        text = (copy / path).read_text()
        for name, (width, blocks, heads) in THEIR_SIZES.items():
            pattern = rf"(embed_dim = ){width}(\s+\w*depth = ){blocks}(\s+\w*num_heads = ){heads}\b"
            new = r"\g<1>{}\g<2>{}\g<3>{}".format(*SIZES[name])
            text, count = re.subn(pattern, new, text)
            if count != times:
                raise SystemExit(f"{folder}/{path}: expected {times} times the sizes of {name}")
        if "class ReviewKD" in text:
            for old, new in REVIEWED.items():
                if text.count(old) != 1:
                    raise SystemExit(f"{folder}/{path}: expected {old} once")
                text = text.replace(old, new)
        (copy / path).write_text(text)
    for name in list(sys.modules):
        if name.split(".")[0] in ("models", "learners", "utils"):
            del sys.modules[name]
    sys.path.insert(0, str(copy))
    import learners.prompt as code
    import models.zoo as zoo

    sys.path.pop(0)
    zoo.VisionTransformer = functools.partial(zoo.VisionTransformer, mlp_ratio=MLP_RATIO)
    for name, role in ((TEACHER, "teacher"), (STUDENT, "student")):
        width, blocks, heads = SIZES[name]
        sizes = dict(embed_dim=width, depth=blocks, num_heads=heads)
        make = lambda pretrained, s=sizes, r=role: Transformer(zoo.VisionTransformer(**s), r)  # noqa: E731
        setattr(zoo.timm_models, name, make)
    return code


def learner_at(code: types.ModuleType, host: str, form: str, teacher: str):
    """Their learner at the start of the second task, with the drawn weights."""
    name, prompt = HOSTS[host]
    learner = getattr(code, name)(
        {
            "num_classes": 6,
            "out_dim": 6,
            "lr": 0.0,
            "momentum": 0.9,
            "weight_decay": 0,
            "schedule": [2],
            "schedule_type": "cosine",
            "model_type": "zoo",
            "model_name": "vit_pt_imnet",
            "optimizer": "Adam",
            "gpuid": [-1],
            "memory": 0,
            "overwrite": True,
            "DW": False,
            "batch_size": 4,
            "tasks": [[0, 1, 2], [3, 4, 5]],
            "top_k": 1,
            "prompt_param": [2, prompt],
            "t_model": teacher,
            "s_model": STUDENT,
            "Soft_T": 2.0,
            "kd_alpha": 0.5,
            "learner_name": name,
            "KD_method": METHODS[form],
            "kd_prompt_param": [6, 6],
            "ema_coeff": 0.7,
        }
    )
    learner.double()
    # The first task is over: what their trainer and the end of `learn_batch` set.
    learner.add_valid_output_dim(3)
    learner.last_valid_out_dim = learner.valid_out_dim
    learner.add_valid_output_dim(3)
    for model in (learner.model, learner.s_model):
        model.task_id = 1
        model.prompt.process_task_count()
    roles = {"teacher": learner.model, "student": learner.s_model}
    if teacher == STUDENT:
        roles = {"student": learner.model}
    for role, model in roles.items():
        fill(f"host/{host}/{role}", model.prompt, 0.5)
        fill(f"head/{role}", model.last)
    for part in OF_STUDENT:
        module = getattr(learner.s_model, part, None)
        if module is not None and "teacher" in roles:
            fill(f"extra/{part}", module)
    if form == "cdl_prompt":
        fill(f"host/{host}/mapper", learner.s_model.project_fc_layers, 0.5)
    if host == "apt":
        for model in (learner.model, learner.s_model):
            model.last.bias.data.zero_()
            model.kd_last.bias.data.zero_()
    if form == "kd_token":
        token = learner.s_model.feat.add_T_token
        token.data = drawn("extra/add_T_token", tuple(token.shape), 0.5)
    return learner


def gradients_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, np.ndarray]:
    trained = {id(value) for group in optimizer.param_groups for value in group["params"]}
    found = {}
    for name, value in model.named_parameters():
        if id(value) in trained and value.grad is not None:
            found[f"gradient/{name}"] = value.grad.numpy().copy()
    return found


def run(code: types.ModuleType, host: str, form: str, teacher: str = TEACHER):
    """Results of one update of the teacher and one of the student: (of teacher, of student)."""
    with contextlib.redirect_stdout(io.StringIO()):
        learner = learner_at(code, host, form, teacher)
    model, student = learner.model, learner.s_model
    images = torch.tensor(ARRAYS["images"], dtype=torch.float64).permute(0, 3, 1, 2)
    found = {"teacher": {}, "student": {}}
    last = {}

    def keep(name, value):
        last[name] = value.detach().clone().numpy().squeeze()

    # The outputs are kept before the update masks them where they are.
    def outputs(module, args, values):
        if module.training:
            names = ("logits", "kd_logits", "loss_key", None, "loss_feature")
            if module is model:
                names = ("logits", "loss_key")
            for name, value in zip(names, values, strict=False):
                if name and value is not None:
                    keep(name, value)

    def criterion(*args, original=learner.criterion):
        value = original(*args)
        keep("loss_ce", value)
        return value

    def update(*args, original=learner.update_model):
        last.clear()
        values = original(*args)
        keep("loss", values[0])
        found["teacher"] = last | gradients_of(model, learner.optimizer)
        return values

    def s_update(*args, original=learner.s_update_model):
        last.clear()
        found["distilled"] = args[2].detach().clone().numpy()
        values = original(*args)
        keep("loss", values[0])
        keep("loss_soft", values[1])
        found["student"] = last | gradients_of(student, learner.s_optimizer)
        return values

    model.register_forward_hook(outputs)
    student.register_forward_hook(outputs)
    learner.criterion, learner.update_model, learner.s_update_model = criterion, update, s_update
    with contextlib.redirect_stdout(io.StringIO()):
        learner.learn_batch([(images, LABELS, None)], None, "", None)
    with torch.no_grad():
        scores, prompts, *_ = model(images)
        given = {"t_p_list_": prompts} if form == "cdl_prompt" else {}
        found["teacher"] |= {"scores": scores.numpy()}
        found["student"] |= {"scores": student(images, **given).numpy()}
        query = student.s_feat(images)[0][:, 0].numpy()
    np.testing.assert_array_equal(query, ARRAYS.setdefault("query", query))
    if host == "apt":
        for role, one in (("teacher", model), ("student", student)):
            found[role]["merged"] = one.prompt.global_merged_prompt.numpy().copy()
    found["teacher"]["distilled"] = found["distilled"]
    return found["teacher"], found["student"]


def store(prefix: str, found: dict[str, np.ndarray]) -> None:
    for name, value in found.items():
        key = f"{prefix}/{name}"
        if key in ARRAYS:
            np.testing.assert_array_equal(ARRAYS[key], value)
        ARRAYS[key] = np.asarray(value)


def stacked(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """`arrays` with the weights of all blocks of a transformer in one array: each array costs some
    hundred bytes beside its numbers.
    """
    found, blocks = {}, {}
    for name, value in arrays.items():
        start, number, end = re.fullmatch(r"(weights/\w+/blocks\.)(\d+)(\..*)|.*", name).groups()
        if number is None:
            found[name] = value
        else:
            blocks.setdefault(f"{start}*{end}", []).append(value)
    return found | {name: np.stack(values) for name, values in blocks.items()}


def main(main_folder: str, study_folder: str, first_folder: str) -> None:
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    stand_ins()
    ARRAYS["images"] = RANDOM.random_sample((4, IMAGE, IMAGE, 3)).astype(np.float32)
    ARRAYS["labels"] = LABELS.numpy().astype(np.int32)
    code = authors_code(main_folder)
    for host in HOSTS:
        store(f"alone/{host}", run(code, host, "kd", STUDENT)[0])
        more = ("dkd", "fitnets", "reviewkd") if host == "coda_prompt" else ()
        for form in ("kd", "kdp", *more):
            teacher, student = run(code, host, form)
            store(f"teacher/{host}", teacher)
            store(f"student/{form}/{host}", student)
    code = authors_code(study_folder)
    for host in ("l2p", "dualprompt", "coda_prompt"):
        teacher, student = run(code, host, "kd_token")
        store(f"teacher/{host}", teacher)
        store(f"student/kd_token/{host}", student)
    code = authors_code(first_folder)
    for host in ("l2p", "coda_prompt"):
        teacher, student = run(code, host, "cdl_prompt")
        for name in ("distilled", "scores"):
            np.testing.assert_allclose(teacher[name], ARRAYS[f"teacher/{host}/{name}"], atol=1e-12)
        store(f"student/cdl_prompt/{host}", student)
    np.savez_compressed(Path(__file__).parent / "cdl.npz", **stacked(ARRAYS))


if __name__ == "__main__":
    main(*sys.argv[1:])
