"""The sections of a `Config` that every method reads, with every default and its reason.

Ranges stand beside the defaults (`ranges.setting`) and are checked by `config.validate`, all at
once. A method's own settings stand in its file.
"""

from dataclasses import dataclass
from typing import Literal

from qkd_jax.settings.ranges import setting


@dataclass(frozen=True)
class BackboneConfig:
    """The frozen transformer: which weights, at which resolution, computed in which type."""

    name: str = "clip_vit_b16"
    weights: str = setting("", may_change=True)  # a local file instead of the registry's source
    image_size: int = setting(96, low=1)  # of backbones that read images
    # Read after this many blocks, where a later one is poor; the last LayerNorm follows.
    blocks: int = setting(0, low=0, zero="all")
    # Of text encoders: the most tokens of a text, and its feature.
    num_tokens: int = setting(0, low=0, zero="as registered with the weights")
    pooling: Literal["", "mean", "first"] = ""  # empty = as registered
    preprocess: str = ""  # a named preprocessing; empty = the one registered with the weights
    compute_dtype: Literal["float32", "bfloat16"] = "float32"


@dataclass(frozen=True)
class DataConfig:
    """Where examples come from and how a training image is varied."""

    source: str = "renditions"
    path: str = setting("", may_change=True)
    split_file: str = setting("", may_change=True)
    follow_links: bool = setting(False, may_change=True)  # read links that lead out of the folder
    # Where texts are in tables, the columns with them and with their classes.
    text_column: str = "text"
    label_column: str = "label"
    # Use only the first classes of the source; 0 = all.
    num_classes: int = setting(0, low=0, zero="all")
    # Use only the first examples of each class, in the order of their ids; 0 = all.
    train_per_class: int = setting(0, low=0, zero="all")
    test_per_class: int = setting(0, low=0, zero="all")
    # Test on this part of the training images instead; 0 = the test set.
    validation: float = setting(0.0, low=0, below=1, zero="none")
    augment: bool = setting(False, of_steps=True)
    # Disk for what the frozen model computes of inputs, shared by all runs; GiB.
    store_gib: float = setting(4.0, low=0, zero="nothing is stored", may_change=True)


@dataclass(frozen=True)
class ProtocolConfig:
    """B-m Inc-n: how classes are ordered and cut into tasks; `joint` is all classes in one task."""

    kind: Literal["incremental", "joint"] = "incremental"
    base: int = setting(0, low=0)
    increment: int = setting(10, low=1)
    order_seed: int = setting(1993, low=0, high=2**32 - 1)
    shuffle: bool = True


@dataclass(frozen=True)
class TrainConfig:
    """Optimisation of one task."""

    optimizer: Literal["sgd", "adam"] = setting("sgd", of_steps=True)
    learning_rate: float = setting(0.05, low=0, of_steps=True)
    head_rate: float = setting(1.0, low=0, of_steps=True)  # factor on the rate of the head
    momentum: float = setting(0.9, low=0, below=1, of_steps=True)
    weight_decay: float = setting(5e-4, low=0, of_steps=True)
    decay_leaves: tuple[str, ...] = setting(("kernel", "rows"), of_steps=True)
    # Clip the gradient's global norm to this; 0 = never.
    clip_norm: float = setting(0.0, low=0, zero="never", of_steps=True)
    # By step to zero; by epoch to a hundredth, as CODA-Prompt and InfLoRA do; or not at all.
    schedule: Literal["cosine", "quarter_cosine", "constant"] = setting("cosine", of_steps=True)
    epochs: int = setting(20, low=0, of_steps=True)
    # Epochs of every task after the first; 0 = `epochs`.
    later_epochs: int = setting(0, low=0, zero="as train.epochs", of_steps=True)
    batch_size: int = setting(32, low=1, of_steps=True)
    eval_batch_size: int = setting(32, low=1, may_change=True)
    # Adapters evaluated in one pass; 0 = as many as fill the device.
    task_chunk: int = setting(0, low=0, zero="by device", may_change=True)
    # Steps; a finished task is always saved.
    checkpoint_every: int = setting(200, low=1, may_change=True, of_steps=True)
    devices: int = setting(0, low=0, zero="all", may_change=True)  # 0 = all local devices
    # Devices that share one copy of the frozen arrays.
    model_devices: int = setting(1, low=1, may_change=True)


@dataclass(frozen=True)
class LogConfig:
    """Where the numbers of a run go beside metrics.jsonl; each needs the extra of its name."""

    tensorboard: bool = setting(False, may_change=True)  # event files in the run's folder
    wandb: bool = setting(False, may_change=True)  # Weights & Biases, offline


@dataclass(frozen=True)
class ClassifierConfig:
    """What classifies the features: the method's own classifier, or one in closed form
    (`nn.closed_form`) in its place, on features of the slots that the method reads.
    """

    kind: Literal["own", "whitened", "rls", "ranpac", "klda", "anacp", "lr_rgda"] = "own"
    # Those of the slots that all tasks have in common, side by side, or of the newest slot where
    # there are none; those of the newest slot, such as the newest adapter's; or those of all slots
    # side by side, where the newest of an image's own task stands in for slots not filled yet.
    features: Literal["shared", "newest", "joined"] = "shared"
    # M of rls, ranpac, klda, anacp; 8 M^2 bytes are kept for each projection.
    projection_dim: int = setting(0, low=0, zero="as published")
    ridge: float = setting(0.0, low=0, zero="as published")  # of rls, klda, anacp
    # Of whitened: share of the isotropic part in the covariance. By the number of images, it weighs
    # as much as `prior` of them for each dimension (`nn.whitening.isotropic_share`).
    shrinkage: float = setting(0.0, low=0, high=1, zero="by the number of images")
    prior: float = setting(0.5, above=0)
    kernel_gamma: float = setting(1e-4, above=0)  # of klda: its kernel is exp(-gamma |x - y|^2)
    num_projections: int = setting(3, low=1)  # of anacp
    # Of lr_rgda: factors of the class's covariance, of the mean one and of the identity, and how
    # many directions are kept of each class.
    class_share: float = setting(0.2, low=0)
    shared_share: float = setting(0.2, low=0)
    identity_share: float = setting(0.2, above=0)
    rank: int = setting(64, low=1)
