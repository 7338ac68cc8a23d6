"""The sections of a `Config`, one a subject, with every default and its reason.

Sections of single methods are named after them. Ranges stand beside the defaults (`ranges.setting`)
and are checked by `config.validate`, all at once.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from qkd_jax.settings.ranges import setting

Conflicts = Iterator[tuple[str, str]]  # (name of the setting, what was expected)


@dataclass(frozen=True)
class BackboneConfig:
    """The frozen transformer: which weights, at which resolution, computed in which type."""

    name: str = "clip_vit_b16"
    weights: str = setting("", may_change=True)  # a local file instead of the registry's source
    image_size: int = setting(96, low=1)
    preprocess: str = ""  # a named preprocessing; empty = the one registered with the weights
    compute_dtype: Literal["float32", "bfloat16"] = "float32"


@dataclass(frozen=True)
class DataConfig:
    """Where images come from and how a training image is varied."""

    source: str = "renditions"
    path: str = setting("", may_change=True)
    split_file: str = setting("", may_change=True)
    follow_links: bool = setting(False, may_change=True)  # read links that lead out of the folder
    # Use only the first classes of the source; 0 = all.
    num_classes: int = setting(0, low=0, zero="all")
    # Test on this part of the training images instead; 0 = the test set.
    validation: float = setting(0.0, low=0, below=1, zero="none")
    augment: bool = False


@dataclass(frozen=True)
class ProtocolConfig:
    """B-m Inc-n: how classes are ordered and cut into tasks."""

    base: int = setting(0, low=0)
    increment: int = setting(10, low=1)
    order_seed: int = setting(1993, low=0, high=2**32 - 1)
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
    scale: float = setting(20.0, above=0)  # start of the learnable scale of the cosine head
    prototypes: Literal["none", "own", "all", "drift"] = "drift"
    whiten: bool = True  # at test, compare in the metric of the stored within-class covariance


@dataclass(frozen=True)
class GateConfig:
    """Relevance of each learned task to an image: which gate, on which states, with which score."""

    kind: Literal["quantum", "pqk", "cosine", "mlp", "attention", "uniform"] = "quantum"
    num_qubits: int = setting(10, low=1, high=20)
    num_layers: int = setting(2, low=1)
    reupload: bool = True
    theta_scale: float = setting(0.1, low=0)  # theta ~ U[0, scale); the paper's start is U[0, 2 pi)
    theta_side: Literal["both", "query"] = "both"
    last_axis: Literal["y", "x", "z"] = "y"
    encoding: Literal["angle", "amplitude"] = "amplitude"
    angle_map: Literal["linear", "separate", "first_q", "pool"] = "linear"
    angle_range: float = setting(3.141592653589793, above=0)  # angles lie in (-range, range)
    # What stands for a task: its adapter's SVD, its class means, or a vector that the gate learns.
    states: Literal["weights", "class", "learned"] = "class"
    stack: Literal["weights", "delta", "product"] = "weights"
    rank: int = setting(12, low=1)
    score: Literal["fidelity", "log_fidelity"] = "log_fidelity"
    temperature: float = setting(0.3, above=0)
    kernel_width: float = setting(1.0, above=0)  # gamma of the projected quantum kernel
    # Routing steps on pseudo-features when a task ends; 0 = never taught.
    calibration_steps: int = setting(200, low=0, zero="never taught")
    calibration_batch: int = setting(128, low=1)
    calibration_rate: float = setting(0.01, low=0)
    # Unseen images lie further out than the stored covariance says.
    calibration_noise: float = setting(2.0, low=0)
    whiten: bool = True  # compare in the metric of the stored within-class covariance
    # Task index after which training no longer moves the gate; -1 = never.
    freeze_after: int = setting(-1, low=-1)
    # Share of the isotropic part in the stored covariance.
    shrinkage: float = setting(0.6, low=0, high=1)


@dataclass(frozen=True)
class DistillationConfig:
    """Task-interaction knowledge distillation (TIKD, Eq. 13)."""

    weight: float = 1.0
    columns: Literal["seen", "all", "own"] = "seen"
    temperature: float = setting(1.0, above=0)
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
    """Inference: every adapter's logits mixed by relevance, adapters mixed in every block, or the
    logits of each image's `top_k` most relevant adapters.
    """

    kind: Literal["logits", "block_mix", "routed"] = "logits"
    top_k: int = setting(2, low=1)


@dataclass(frozen=True)
class EaseConfig:
    """EASE (arXiv 2403.12030): weight of the subspaces that are not a class's own."""

    alpha: float = 0.1
    complement: bool = True


@dataclass(frozen=True)
class SimplecilConfig:
    """SimpleCIL (arXiv 2303.07338), and its comparison in the within-class metric."""

    whiten: bool = False  # compare in the metric of the stored within-class covariance
    shrinkage: float = setting(0.6, low=0, high=1)  # share of the isotropic part in it


@dataclass(frozen=True)
class RanpacConfig:
    """RanPAC (arXiv 2307.02251): the random projection and what its ridge regression reads.

    `readout`: how the ridge solution scores. `linear` as published; `cosine` as LAMDA-PILOT's port.
    """

    projection_dim: int = setting(10_000, low=1)  # M; its Gram matrix takes 4 M^2 bytes
    first_session: bool = True  # tune an adapter in the first task, then freeze it
    readout: Literal["linear", "cosine"] = "linear"


@dataclass(frozen=True)
class AptConfig:
    """APT (arXiv 2503.07979): how far a task's end moves the prompt of inference."""

    merge: float = setting(0.3, low=0, high=1)  # m: share of the prompt that the task ends with


@dataclass(frozen=True)
class CodaPromptConfig:
    """CODA-Prompt (arXiv 2211.13218): the pool of prompt components.

    `form`: where a task's components start. `gram_schmidt`: orthonormal, and orthogonal to all
    older ones. `published`: as the authors' later code computes it, which is the same only while
    older components are orthogonal. `paper`: rows of one orthogonal pool drawn before the first
    task.
    """

    pool: int = setting(100, low=1)  # M components, M / T for each task
    length: int = setting(8, low=2)  # L rows of a prompt, half for keys and half for values
    blocks: int = setting(5, low=1)  # prompts sit in the first blocks
    form: Literal["gram_schmidt", "published", "paper"] = "gram_schmidt"
    penalty: float = setting(0.0, low=0)  # mu, weight of the distance from orthogonality

    def conflicts(self) -> Conflicts:
        if self.length % 2:
            yield "length", "an even number: half for keys, half for values"


@dataclass(frozen=True)
class InfloraConfig:
    """InfLoRA (arXiv 2404.00228): the low-rank branches and the memory of directions.

    `first_basis`: how many directions the first task leaves in memory. `reach`: the fewest whose
    share of the energy reaches `lamb`. `below`: as the authors' code, one less, but at least one.
    """

    rank: int = setting(10, low=1)  # of one task's branch
    # Share of the energy in memory after the first task ...
    lamb: float = setting(0.95, low=0, high=1)
    lame: float = setting(1.0, low=0, high=1)  # ... rising towards this
    first_basis: Literal["reach", "below"] = "reach"

    def conflicts(self) -> Conflicts:
        if self.lamb > self.lame:
            yield "lamb", f"at most inflora.lame ({self.lame:g})"


@dataclass(frozen=True)
class L2pConfig:
    """L2P (arXiv 2112.08654): the pool, how images choose from it, and where prompts go.

    `form`: `official` puts prompts before the tokens and classifies the mean of their outputs;
    `gtripl` is "L2P++": prefixes in the first `blocks` blocks, class token. `diversify`: how
    training spreads tasks over the pool (see `learners.l2p`). `start`: U(0, 0.01), U(0, 1) or
    U(-1, 1).
    """

    form: Literal["official", "gtripl"] = "official"
    pool: int = setting(10, low=1)  # M prompts
    # L_p rows of one; in `gtripl` half for keys and half for values.
    length: int = setting(5, low=1)
    top_k: int = setting(5, low=1)  # N chosen by each image
    blocks: int = setting(1, low=1)  # `gtripl` only; 5 = "Deep L2P++"
    start: Literal["small", "unit", "signed"] = "small"
    key_weight: float = setting(0.5, low=0)  # lambda
    key_loss: Literal["mean", "sum", "gtripl_sum"] = "mean"
    diversify: Literal["off", "frequency", "task"] = "off"

    def conflicts(self) -> Conflicts:
        if self.top_k > self.pool:
            yield "top_k", f"at most l2p.pool ({self.pool})"
        if self.form == "gtripl" and self.length % 2:
            yield "length", "an even number: half for keys, half for values"


@dataclass(frozen=True)
class DualPromptConfig:
    """DualPrompt (arXiv 2204.04799): prefixes of all tasks in the first blocks, one set for each
    task in the blocks after them.

    `form`: `official` has one key a task, and `*_length` key rows and as many value rows; `gtripl`
    has a key for each (block, task), and `*_length` is both together. `start`: U(0, 0.01), U(0, 1)
    or U(-1, 1).
    """

    form: Literal["official", "gtripl"] = "official"
    general_blocks: int = setting(2, low=0)  # the first blocks: G-prompts
    expert_blocks: int = setting(3, low=1)  # the blocks after them: E-prompts
    general_length: int = setting(5, low=1)
    expert_length: int = setting(5, low=1)
    # E-prompts, at least one a task (checked; no more are made); 0 = one a task.
    pool: int = setting(0, low=0, zero="one per task")
    start: Literal["small", "unit", "signed"] = "small"
    expert_start: Literal["previous", "random"] = "previous"  # where E-prompts of a task start
    key_weight: float = setting(1.0, low=0)  # lambda
    key_loss: Literal["mean", "sum"] = "mean"

    def conflicts(self) -> Conflicts:
        for name in ("general_length", "expert_length"):
            if self.form == "gtripl" and getattr(self, name) % 2:
                yield name, "an even number: half for keys, half for values"


@dataclass(frozen=True)
class AlignmentConfig:
    """The head of mos, tuna and ssiat after a task: SGD on Gaussian pseudo-features of all classes
    seen.
    """

    statistics: Literal["covariance", "variance"] = "covariance"  # kept of each class
    # Added to every variance; with few images the covariance is singular.
    jitter: float = setting(1e-4, above=0)
    epochs: int = setting(30, low=0)
    learning_rate: float = setting(0.005, low=0)
    # Of a class in an epoch, and a batch; 0 = five times train.batch_size.
    samples: int = setting(0, low=0)
    # Epochs from the full rate to zero, then up again; 0 = `epochs`.
    period: int = setting(0, low=0)


@dataclass(frozen=True)
class MosConfig:
    """MOS (arXiv 2412.09441): adapter merging, orthogonality, self-refined retrieval."""

    # Alpha: the step of an adapter towards the mean of the older ones.
    merge_rate: float = setting(0.1, low=0, below=1)
    # When: after every optimisation step; or, as the authors' code runs, also in every block of
    # every forward pass, which leaves the mean of the older adapters in each slot.
    merge: Literal["step", "every_pass"] = "step"
    # Weight of the loss that keeps features and class means apart.
    orthogonality: float = setting(0.1, low=0)
    retrievals: int = setting(4, low=1)  # adapters tried for one image at most
    ensemble: bool = True  # add the first adapter's prototypes to the prediction


@dataclass(frozen=True)
class TunaConfig:
    """TUNA (arXiv 2508.08165): cosine head with margin, orthogonality, universal adapter."""

    scale: float = setting(20.0, above=0)  # s of the cosine head; fixed
    # M, taken off the cosine of an image's own class in training.
    margin: float = setting(0.0, low=0)
    # Weight of the overlap with old adapters, times exp(-(t + 1)).
    orthogonality: float = setting(1e-3, low=0)
    # Alignment draws around class means that are scaled: not at all, less the newer a class is, or
    # more the newer, as the authors' code does by the sign of a task's size.
    mean_decay: Literal["none", "old", "new"] = "none"
    # The universal adapter: fused from all; or the newest, which the authors' code reads instead.
    universal: Literal["fused", "newest"] = "fused"


@dataclass(frozen=True)
class MoteConfig:
    """MoTE (arXiv 2506.11038): which experts speak about an image, and how loud."""

    filter: bool = True  # keep experts that predict a class of their own task
    merge: bool = True  # fuse the features of the kept experts; false = the most confident one's
    # Factor on the confidence of all kept experts but the best; 1 = none.
    others: float = setting(0.1, low=0, high=1)
    sharpness: float = setting(10.0, above=0)  # of the cosines in an expert's confidence


@dataclass(frozen=True)
class SsiatConfig:
    """SSIAT (arXiv 2403.19979): cosine head with margin, shift of old class means, alignment."""

    scale: float = setting(20.0, above=0)  # s of the cosine head; fixed
    # M, taken off the cosine of an image's own class in training.
    margin: float = setting(0.0, low=0)
    # How old class means move with the adapter: by how far each image moved; by the difference of
    # means that the authors' code has in expectation, since it shuffles between its two passes; or
    # not at all.
    shift: Literal["paired", "unpaired", "none"] = "paired"
    # Sigma of the weight of an image in the shift of a class.
    kernel_width: float = setting(4.0, above=0)
    # Added to every weight, so that far images count alike.
    kernel_floor: float = setting(1e-5, above=0)
    # Alignment draws the oldest classes around (1 - this) of their mean.
    mean_decay: float = setting(0.1, low=0, below=1)


@dataclass(frozen=True)
class TrainConfig:
    """Optimisation of one task."""

    optimizer: Literal["sgd", "adam"] = "sgd"
    learning_rate: float = setting(0.05, low=0)
    head_rate: float = setting(1.0, low=0)  # factor on the rate of the head
    momentum: float = setting(0.9, low=0, below=1)
    weight_decay: float = setting(5e-4, low=0)
    decay_leaves: tuple[str, ...] = ("kernel", "rows")
    # Clip the gradient's global norm to this; 0 = never.
    clip_norm: float = setting(0.0, low=0, zero="never")
    # By step to zero; by epoch to a hundredth, as CODA-Prompt and InfLoRA do; or not at all.
    schedule: Literal["cosine", "quarter_cosine", "constant"] = "cosine"
    adapter_start: Literal["random", "previous"] = "random"
    epochs: int = setting(20, low=0)
    # Epochs of every task after the first; 0 = `epochs`.
    later_epochs: int = setting(0, low=0, zero="as train.epochs")
    batch_size: int = setting(32, low=1)
    eval_batch_size: int = setting(32, low=1, may_change=True)
    # Adapters that `predict` evaluates in one pass; 0 = what fills the device.
    task_chunk: int = setting(0, low=0, zero="by device", may_change=True)
    # Steps; a finished task is always saved.
    checkpoint_every: int = setting(200, low=1, may_change=True)
    devices: int = setting(0, low=0, zero="all", may_change=True)  # 0 = all local devices
    # Devices that share one copy of the frozen arrays.
    model_devices: int = setting(1, low=1, may_change=True)
