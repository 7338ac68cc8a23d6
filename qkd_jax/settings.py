"""The sections of a `Config`, one a subject, with every default and its reason.

Sections of single methods are named after them. A section that has ranges to check does so when it
is made.
"""

from dataclasses import dataclass
from typing import Literal

from qkd_jax.errors import ConfigError


@dataclass(frozen=True)
class BackboneConfig:
    """The frozen transformer: which weights, at which resolution, computed in which type."""

    name: str = "clip_vit_b16"
    weights: str = ""  # a local file instead of the registry's source
    image_size: int = 96
    preprocess: str = ""  # a named preprocessing; empty = the one registered with the weights
    compute_dtype: Literal["float32", "bfloat16"] = "float32"


@dataclass(frozen=True)
class DataConfig:
    """Where images come from and how a training image is varied."""

    source: str = "renditions"
    path: str = ""
    split_file: str = ""
    num_classes: int = 0  # use only the first classes of the source; 0 = all
    validation: float = 0.0  # test on this part of the training images instead; 0 = the test set
    augment: bool = False
    canvas: int = 0  # side of the squashed image that crops are cut from; 0 = twice the crop


@dataclass(frozen=True)
class ProtocolConfig:
    """B-m Inc-n: how classes are ordered and cut into tasks."""

    base: int = 0
    increment: int = 10
    order_seed: int = 1993
    shuffle: bool = True


@dataclass(frozen=True)
class HeadConfig:
    """The classifier over a feature.

    `prototypes`: what becomes of the rows of a task's classes when the task ends. `none` keeps the
    trained rows; `own` puts the class means under the task's own adapter in their place; `all`
    keeps one row for each (adapter, class): the class mean under every adapter known when the class
    is learned, and its own adapter's for later ones; `drift` moves the latter by how much similar
    classes moved.
    """

    kind: Literal["cosine", "linear"] = "cosine"
    scale: float = 20.0  # start of the learnable scale of the cosine head
    prototypes: Literal["none", "own", "all", "drift"] = "drift"
    whiten: bool = True  # at test, compare in the metric of the stored within-class covariance


@dataclass(frozen=True)
class GateConfig:
    """Relevance of each learned task to an image: which gate, on which states, with which score."""

    kind: Literal["quantum", "pqk", "cosine", "mlp", "attention", "uniform"] = "quantum"
    num_qubits: int = 10
    num_layers: int = 2
    reupload: bool = True
    theta_scale: float = 0.1  # theta ~ U[0, scale); the paper's start is U[0, 2 pi)
    theta_side: Literal["both", "query"] = "both"
    last_axis: Literal["y", "x", "z"] = "y"
    encoding: Literal["angle", "amplitude"] = "amplitude"
    angle_map: Literal["linear", "separate", "first_q", "pool"] = "linear"
    angle_range: float = 3.141592653589793  # angles lie in (-range, range)
    # What stands for a task: its adapter's SVD, its class means, or a vector that the gate learns.
    states: Literal["weights", "class", "learned"] = "class"
    stack: Literal["weights", "delta", "product"] = "weights"
    rank: int = 12
    score: Literal["fidelity", "log_fidelity"] = "log_fidelity"
    temperature: float = 0.3
    kernel_width: float = 1.0  # gamma of the projected quantum kernel
    calibration_steps: int = (
        200  # routing steps on pseudo-features when a task ends; 0 = never taught
    )
    calibration_batch: int = 128
    calibration_rate: float = 0.01
    calibration_noise: float = 2.0  # unseen images lie further out than the stored covariance says
    whiten: bool = True  # compare in the metric of the stored within-class covariance
    freeze_after: int = -1  # task index after which training no longer moves the gate; -1 = never
    shrinkage: float = 0.6  # share of the isotropic part in the stored covariance


@dataclass(frozen=True)
class DistillationConfig:
    """Task-interaction knowledge distillation (TIKD, Eq. 13)."""

    weight: float = 1.0
    columns: Literal["seen", "all", "own"] = "seen"
    temperature: float = 1.0
    target: Literal["logits", "features"] = "logits"


@dataclass(frozen=True)
class SparsityConfig:
    """L1 sparsity of the relevance (Eq. 11). `l1_softmax` is literal and constant: a softmax
    sums to 1.
    """

    kind: Literal["l1_softmax", "l1_scores", "entropy"] = "entropy"
    weight: float = 0.05


@dataclass(frozen=True)
class FusionConfig:
    """Inference: every adapter's logits mixed by relevance, or adapters mixed in every block."""

    kind: Literal["logits", "block_mix"] = "logits"


@dataclass(frozen=True)
class EaseConfig:
    """EASE (arXiv 2403.12030): weight of the subspaces that are not a class's own."""

    alpha: float = 0.1
    complement: bool = True


@dataclass(frozen=True)
class AptConfig:
    """APT (arXiv 2503.07979): how far a task's end moves the prompt of inference."""

    merge: float = 0.3  # m: share of the prompt that the task ends with

    def __post_init__(self):
        if not 0 <= self.merge <= 1:
            raise ConfigError(f"apt.merge is {self.merge}; it must be in [0, 1].")


@dataclass(frozen=True)
class CodaPromptConfig:
    """CODA-Prompt (arXiv 2211.13218): the pool of prompt components.

    `form`: where a task's components start. `gram_schmidt`: orthonormal, and orthogonal to all
    older ones. `published`: as the authors' later code computes it, which is the same only while
    older components are orthogonal. `paper`: rows of one orthogonal pool drawn before the first
    task.
    """

    pool: int = 100  # M components, M / T for each task
    length: int = 8  # L rows of a prompt, half for keys and half for values
    blocks: int = 5  # prompts sit in the first blocks
    form: Literal["gram_schmidt", "published", "paper"] = "gram_schmidt"
    penalty: float = 0.0  # mu, weight of the distance from orthogonality

    def __post_init__(self):
        def refuse(name, found, wanted):
            raise ConfigError(f"coda_prompt.{name} is {found!r}; it must be {wanted}.")

        if self.pool < 1:
            refuse("pool", self.pool, "at least 1")
        if self.length < 2 or self.length % 2:
            refuse("length", self.length, "even and at least 2: half for keys, half for values")
        if self.blocks < 1:
            refuse("blocks", self.blocks, "at least 1")
        if self.penalty < 0:
            refuse("penalty", self.penalty, "0 or more")


@dataclass(frozen=True)
class TrainConfig:
    """Optimisation of one task."""

    optimizer: Literal["sgd", "adam"] = "sgd"
    learning_rate: float = 0.05
    head_rate: float = 1.0  # factor on the rate of the head
    momentum: float = 0.9
    weight_decay: float = 5e-4
    decay_leaves: tuple[str, ...] = ("kernel", "rows")
    clip_norm: float = 0.0  # clip the gradient's global norm to this; 0 = never
    schedule: Literal["cosine", "constant"] = "cosine"
    adapter_start: Literal["random", "previous"] = "random"
    epochs: int = 20
    batch_size: int = 32
    eval_batch_size: int = 32
    checkpoint_every: int = 200  # steps; a finished task is always saved
    devices: int = 0  # 0 = all local devices
