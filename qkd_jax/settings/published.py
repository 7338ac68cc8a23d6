"""The published settings of the peers, by method and data set, for the experiment files.

Sources, all for ViT-B/16 and mostly its ImageNet-21k weights: the json files of
sun-hailong/CVPR24-Ease (ease), sun-hailong/AAAI25-MOS (mos), Frank-lilinjie/MoTE (mote),
HAIV-Lab/SSIAT (ssiat), LAMDA-CL/ICCV2025-TUNA in its first commit (tuna; CUB and VTAB from the
paper's text), LAMDA-CL/LAMDA-PILOT (aper, l2p, dualprompt, coda_prompt), RanPAC/RanPAC `args/*.csv`
with PILOT's row for ImageNet-R, where the csv has no adapter (ranpac), liangyanshuo/InfLoRA
(inflora), LMMMEng/CaRE (care; its paper names other rates, batches and epochs),
ASCIIJK/MiN-NeurIPS2025 (min), and the scripts of Additive-Prompt-Tuning (apt) and of IRVLUTD/CDL
(cdl, for teacher and student alike; the settings of its hosts stand where the method is declared).
With tasks of one size, EASE and MoTE read `init_lr` and `init_epochs` in every task, whatever their
`later_lr` says. CLARE and FACET have no code: of CLARE rate, batch and epochs are the paper's and
the decay is ours, of FACET all four are (`learners/clare.py`, `learners/facet.py`).

A data set that a method's authors did not publish settings for takes those of `STANDS_IN`.
Finetune, joint and linear probe are references without published settings: the first two train
EASE's adapter as EASE does, the last has rate, batch, decay, epochs and the constant rate of
RanPAC's `joint_linear`, and a plain linear head. Where a method's own file names a
form of the authors' code as a defect (`mos.merge=every_pass`, `tuna.universal=newest`, ...), the
table keeps our default; set the form to get their literal numbers.
"""

# (learning rate, batch, weight decay, epochs) by data set.
RUNS = {
    "ease": {
        "cifar100": (0.025, 48, 0.0005, 20),
        "cub200": (0.008, 32, 0.0005, 20),
        "imagenet_r": (0.05, 16, 0.005, 20),
        "imagenet_a": (0.05, 32, 0.005, 20),
        "vtab": (0.03, 16, 0.005, 45),
    },
    "mos": {
        "cifar100": (0.03, 48, 0.0005, 20),
        "cub200": (0.01, 32, 0.0005, 10),
        "imagenet_r": (0.05, 16, 0.005, 10),
        "imagenet_a": (0.05, 32, 0.005, 10),
        "vtab": (0.03, 32, 0.005, 20),
    },
    "mote": {
        "cifar100": (0.025, 48, 0.0005, 20),
        "cub200": (0.01, 32, 0.0005, 20),
        "imagenet_r": (0.05, 16, 0.005, 20),
        "imagenet_a": (0.1, 32, 0.005, 20),
        "vtab": (0.1, 16, 0.005, 45),
    },
    "tuna": {
        "cifar100": (0.01, 16, 0.0005, 15),
        "cub200": (0.01, 48, 0.0005, 20),
        "imagenet_r": (0.02, 32, 0.0005, 10),
        "imagenet_a": (0.01, 16, 0.0005, 20),
        "vtab": (0.01, 48, 0.0005, 20),
    },
    "ssiat": {
        "cifar100": (0.01, 48, 0.0005, 20),
        "cub200": (0.01, 48, 0.0005, 20),
        "imagenet_r": (0.01, 48, 0.0005, 20),
        "imagenet_a": (0.01, 48, 0.0005, 20),
    },
    "aper": {"cifar100": (0.01, 48, 0.0005, 20), "imagenet_r": (0.05, 16, 0.005, 10)},
    "ranpac": {
        "cifar100": (0.01, 48, 0.0005, 20),
        "cub200": (0.01, 48, 0.0005, 20),
        "imagenet_r": (0.05, 16, 0.005, 10),
        "imagenet_a": (0.01, 48, 0.0005, 20),
        "vtab": (0.01, 48, 0.0005, 20),
    },
    "l2p": {"cifar100": (0.001875, 16, 0.0, 5), "imagenet_r": (0.001875, 32, 0.0, 10)},
    "dualprompt": {"cifar100": (0.001, 24, 0.0, 5), "imagenet_r": (0.001, 24, 0.0, 10)},
    "coda_prompt": {"cifar100": (0.001, 128, 0.0, 20), "imagenet_r": (0.001, 128, 0.0, 50)},
    "apt": {
        "cifar100": (0.004, 64, 0.0, 30),
        "cub200": (0.02, 64, 0.0, 25),
        "imagenet_r": (0.003, 64, 0.0, 30),
    },
    "care": {
        "cifar100": (0.05, 64, 0.0005, 60),
        "imagenet_r": (0.02, 32, 0.0005, 60),
        "imagenet_a": (0.01, 16, 0.0005, 20),
        "vtab": (0.01, 16, 0.0005, 30),
    },
    "cdl": {"cifar100": (0.001, 64, 0.0, 20), "imagenet_r": (0.001, 64, 0.0, 35)},
    "clare": {"cifar100": (0.02, 32, 0.0, 25)},
    "facet": {"cifar100": (0.01, 16, 0.0005, 20)},
    "inflora": {"cifar100": (0.0005, 128, 0.0, 20), "imagenet_r": (0.0005, 128, 0.0, 50)},
    "min": dict.fromkeys(("cifar100", "cub200", "imagenet_r"), (0.001, 128, 0.0005, 10)),
    "linear_probe": {"cifar100": (0.01, 128, 0.0005, 30)},
}
RUNS["finetune"] = RUNS["joint"] = RUNS["ease"]
# The data sets whose settings stand in: the first of them that the method has.
STANDS_IN = {
    "cub200": ("cifar100",),
    "vtab": ("cifar100",),
    "imagenet_r": ("cifar100",),
    "imagenet_a": ("imagenet_r", "cifar100"),
}
BOTTLENECK = {"facet": 384, "mos": 16, "tuna": 16}  # all others 64 ...
# ... and on VTAB all others 16.
ON_VTAB = {"aper": 64, "clare": 64, "facet": 384, "ranpac": 64}

DECAY_ALL = "train.decay_leaves=kernel,bias,rows,scale"
ADAM = "train.optimizer=adam"
QUARTER = "train.schedule=quarter_cosine"
# Settings of a method on every data set.
FORM = {
    "ease": ("head.scale=1.0", DECAY_ALL),
    "finetune": ("head.scale=1.0", DECAY_ALL),
    "joint": ("head.scale=1.0", DECAY_ALL),
    "aper": ("head.scale=1.0", DECAY_ALL),
    "ranpac": ("head.scale=1.0", DECAY_ALL, "ranpac.projection_dim=10000"),
    "mote": ("head.scale=1.0", DECAY_ALL, "adapter.placement=sequential"),
    "mos": (
        *(DECAY_ALL, "train.head_rate=0.1", "mos.merge_rate=0.1", "mos.orthogonality=0.1"),
        *("alignment.epochs=30", "alignment.learning_rate=0.005"),
    ),
    "tuna": (
        *(DECAY_ALL, "tuna.scale=20.0", "alignment.epochs=30", "alignment.learning_rate=0.005"),
        "alignment.period=5",
    ),
    "ssiat": (
        *(DECAY_ALL, "ssiat.scale=20.0", "train.later_epochs=10", "alignment.epochs=5"),
        *("alignment.learning_rate=0.01", "alignment.samples=256", "alignment.jitter=0.001"),
    ),
    "care": (
        *(DECAY_ALL, "care.scale=20.0", "alignment.epochs=30", "alignment.learning_rate=0.005"),
        *("alignment.period=5", "care.passes=every_task"),
    ),
    "min": (DECAY_ALL, "train.schedule=constant", "min.projection_dim=16384", "min.ridge=100.0"),
    "l2p": (
        *(ADAM, "train.schedule=constant", "l2p.pool=10", "l2p.length=5", "l2p.top_k=5"),
        *("l2p.key_weight=0.1", "l2p.start=signed"),
    ),
    "dualprompt": (
        *(ADAM, "train.schedule=constant", "dualprompt.general_length=5"),
        *("dualprompt.expert_length=5", "dualprompt.key_weight=0.1", "dualprompt.start=signed"),
    ),
    "coda_prompt": (
        *(ADAM, QUARTER, "coda_prompt.pool=100", "coda_prompt.length=8", "coda_prompt.penalty=0.0"),
    ),
    "apt": (ADAM, QUARTER, "apt.merge=0.3"),
    "clare": ("clare.search=0.2", "clare.keep=0.05", "clare.sparsity=0.0001"),
    "facet": ("facet.rank=8", "facet.consistency=2.0"),
    "cdl": (ADAM, QUARTER, "cdl.alpha=0.5", "cdl.temperature=2.0", "cdl.kd_length=6"),
    "linear_probe": (DECAY_ALL, "train.schedule=constant", "head.kind=linear"),
    "inflora": (ADAM, QUARTER, "inflora.rank=10", "inflora.lamb=0.95"),
}
# The two transformers of cdl, with 197 tokens each: the teacher is that of the other methods, the
# student the smaller one that the library has. The authors' student, a ViT-S/16 of the same
# training, is not among its weights.
PAIR = (
    *("backbone.name=dinov2_vit_s14", "backbone.image_size=196", "backbone.blocks=11"),
    "backbone.preprocess=",
    *("teacher.name=vit_b16_in21k_augreg", "teacher.image_size=224", "teacher.preprocess=l2p01"),
)
# Settings of a method on one data set.
SPECIAL = {
    ("ease", "cub200"): ("ease.alpha=0.05",),
    ("mos", "imagenet_a"): ("alignment.statistics=variance",),
    ("tuna", "cifar100"): ("tuna.orthogonality=0.0",),
    ("tuna", "imagenet_r"): ("tuna.mean_decay=old",),
    ("tuna", "imagenet_a"): (
        *("tuna.mean_decay=old", "tuna.margin=0.3"),
        *("alignment.epochs=10", "alignment.learning_rate=0.01"),
    ),
    ("ssiat", "imagenet_a"): ("ssiat.margin=0.3",),
    ("care", "imagenet_r"): ("care.mean_decay=old",),
    ("care", "imagenet_a"): (
        *("care.mean_decay=old", "care.margin=0.3", "care.perceptron_loss=cross_entropy"),
        *("care.distill=false", "alignment.statistics=variance"),
        *("alignment.epochs=10", "alignment.learning_rate=0.01"),
    ),
    ("care", "vtab"): ("care.mean_decay=old",),
    ("min", "imagenet_r"): ("min.ridge=500.0",),
    ("apt", "imagenet_r"): ("apt.merge=0.2",),
    ("inflora", "imagenet_r"): ("inflora.lamb=0.98",),
}


def source_of(method: str, data_set: str) -> str:
    """The data set whose published settings a method takes on `data_set`."""
    for name in (data_set, *STANDS_IN.get(data_set, ())):
        if name in RUNS[method]:
            return name
    raise KeyError(data_set)


def published(method: str, data_set: str) -> tuple[str, ...]:
    """Settings of a peer on cifar100, cub200, imagenet_r, imagenet_a or vtab.

    None for methods that have no published settings of their own: qkd, whose settings the
    experiment files name, and simplecil and replay, which make no step.
    """
    if method not in RUNS:
        return ()
    source = source_of(method, data_set)
    rate, batch, decay, epochs = RUNS[method][source]
    bottleneck = BOTTLENECK.get(method, 64)
    if data_set == "vtab":
        bottleneck = ON_VTAB.get(method, 16)
    return (
        f"train.learning_rate={rate}",
        f"train.batch_size={batch}",
        f"train.weight_decay={decay}",
        f"train.epochs={epochs}",
        f"adapter.bottleneck={bottleneck}",
        *FORM.get(method, ()),
        *SPECIAL.get((method, source), ()),
        *(PAIR if method == "cdl" else ()),
    )


def on_few_images(method: str) -> tuple[str, ...]:
    """Settings of a peer on small streams; epochs, batch and bottleneck are the experiment's.

    Form, rate and decay are those published for ImageNet-R, which also consists of renditions. Few
    steps move a scale too little, so cosine heads keep our start of it; later tasks train as long
    as the first; care answers in one pass, as its authors have it for long sequences; min has the
    2,048 random projections that are its default.
    """
    if method not in RUNS:
        return ()
    source = source_of(method, "imagenet_r")
    rate, _, decay, _ = RUNS[method][source]
    long = ("train.later_epochs", "head.scale", "care.passes", "min.projection_dim")
    form = [setting for setting in FORM.get(method, ()) if not setting.startswith(long)]
    return (
        f"train.learning_rate={rate}",
        f"train.weight_decay={decay}",
        *form,
        *SPECIAL.get((method, source), ()),
    )
