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
    """Inference: every adapter's logits mixed by relevance, adapters mixed in every block, or the
    logits of each image's `top_k` most relevant adapters.
    """

    kind: Literal["logits", "block_mix", "routed"] = "logits"
    top_k: int = 2

    def __post_init__(self):
        if self.top_k < 1:
            raise ConfigError(f"fusion.top_k is {self.top_k!r}; it must be at least 1.")


@dataclass(frozen=True)
class EaseConfig:
    """EASE (arXiv 2403.12030): weight of the subspaces that are not a class's own."""

    alpha: float = 0.1
    complement: bool = True


@dataclass(frozen=True)
class SimplecilConfig:
    """SimpleCIL (arXiv 2303.07338), and its comparison in the within-class metric."""

    whiten: bool = False  # compare in the metric of the stored within-class covariance
    shrinkage: float = 0.6  # share of the isotropic part in it

    def __post_init__(self):
        if not 0 <= self.shrinkage <= 1:
            raise ConfigError(f"simplecil.shrinkage is {self.shrinkage}; it must be in [0, 1].")


@dataclass(frozen=True)
class RanpacConfig:
    """RanPAC (arXiv 2307.02251): the random projection and what its ridge regression reads.

    `readout`: how the ridge solution scores. `linear` as published; `cosine` as LAMDA-PILOT's port.
    """

    projection_dim: int = 10_000  # M; its Gram matrix takes 4 M^2 bytes
    first_session: bool = True  # tune an adapter in the first task, then freeze it
    readout: Literal["linear", "cosine"] = "linear"

    def __post_init__(self):
        if self.projection_dim < 1:
            raise ConfigError(
                f"ranpac.projection_dim is {self.projection_dim}; it must be at least 1."
            )


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
class InfloraConfig:
    """InfLoRA (arXiv 2404.00228): the low-rank branches and the memory of directions.

    `first_basis`: how many directions the first task leaves in memory. `reach`: the fewest whose
    share of the energy reaches `lamb`. `below`: as the authors' code, one less, but at least one.
    """

    rank: int = 10  # of one task's branch
    lamb: float = 0.95  # share of the energy in memory after the first task ...
    lame: float = 1.0  # ... rising towards this
    first_basis: Literal["reach", "below"] = "reach"

    def __post_init__(self):
        if self.rank < 1:
            raise ConfigError(f"inflora.rank is {self.rank}; it must be at least 1.")
        if not 0.0 <= self.lamb <= self.lame <= 1.0:
            raise ConfigError(
                f"inflora.lamb and lame are {self.lamb} and {self.lame}; they must be in [0, 1], "
                "lamb not above lame."
            )


@dataclass(frozen=True)
class L2pConfig:
    """L2P (arXiv 2112.08654): the pool, how images choose from it, and where prompts go.

    `form`: `official` puts prompts before the tokens and classifies the mean of their outputs;
    `gtripl` is "L2P++": prefixes in the first `blocks` blocks, class token. `diversify`: how
    training spreads tasks over the pool (see `learners.l2p`). `start`: U(0, 0.01), U(0, 1) or
    U(-1, 1).
    """

    form: Literal["official", "gtripl"] = "official"
    pool: int = 10  # M prompts
    length: int = 5  # L_p rows of one; in `gtripl` half for keys and half for values
    top_k: int = 5  # N chosen by each image
    blocks: int = 1  # `gtripl` only; 5 = "Deep L2P++"
    start: Literal["small", "unit", "signed"] = "small"
    key_weight: float = 0.5  # lambda
    key_loss: Literal["mean", "sum", "gtripl_sum"] = "mean"
    diversify: Literal["off", "frequency", "task"] = "off"

    def __post_init__(self):
        def refuse(name, found, wanted):
            raise ConfigError(f"l2p.{name} is {found!r}; it must be {wanted}.")

        if self.pool < 1:
            refuse("pool", self.pool, "at least 1")
        if not 1 <= self.top_k <= self.pool:
            refuse("top_k", self.top_k, f"in 1..{self.pool} (l2p.pool)")
        if self.form == "gtripl" and (self.length < 2 or self.length % 2):
            refuse("length", self.length, "even and at least 2: half for keys, half for values")
        if self.length < 1:
            refuse("length", self.length, "at least 1")
        if self.blocks < 1:
            refuse("blocks", self.blocks, "at least 1")
        if self.key_weight < 0:
            refuse("key_weight", self.key_weight, "0 or more")


@dataclass(frozen=True)
class DualPromptConfig:
    """DualPrompt (arXiv 2204.04799): prefixes of all tasks in the first blocks, one set for each
    task in the blocks after them.

    `form`: `official` has one key a task, and `*_length` key rows and as many value rows; `gtripl`
    has a key for each (block, task), and `*_length` is both together. `start`: U(0, 0.01), U(0, 1)
    or U(-1, 1).
    """

    form: Literal["official", "gtripl"] = "official"
    general_blocks: int = 2  # the first blocks: G-prompts
    expert_blocks: int = 3  # the blocks after them: E-prompts
    general_length: int = 5
    expert_length: int = 5
    pool: int = 0  # E-prompts, at least one a task (checked; no more are made); 0 = one a task
    start: Literal["small", "unit", "signed"] = "small"
    expert_start: Literal["previous", "random"] = "previous"  # where E-prompts of a task start
    key_weight: float = 1.0  # lambda
    key_loss: Literal["mean", "sum"] = "mean"

    def __post_init__(self):
        def refuse(name, found, wanted):
            raise ConfigError(f"dualprompt.{name} is {found!r}; it must be {wanted}.")

        if self.general_blocks < 0:
            refuse("general_blocks", self.general_blocks, "0 or more")
        if self.expert_blocks < 1:
            refuse("expert_blocks", self.expert_blocks, "at least 1")
        for name in ("general_length", "expert_length"):
            length = getattr(self, name)
            if length < 1:
                refuse(name, length, "at least 1")
            if self.form == "gtripl" and length % 2:
                refuse(name, length, "even: half for keys, half for values")
        if self.pool < 0:
            refuse("pool", self.pool, "0 (one a task) or more")
        if self.key_weight < 0:
            refuse("key_weight", self.key_weight, "0 or more")


@dataclass(frozen=True)
class AlignmentConfig:
    """The head of mos, tuna and ssiat after a task: SGD on Gaussian pseudo-features of all classes
    seen.
    """

    statistics: Literal["covariance", "variance"] = "covariance"  # kept of each class
    jitter: float = 1e-4  # added to every variance; with few images the covariance is singular
    epochs: int = 30
    learning_rate: float = 0.005
    samples: int = 0  # of a class in an epoch, and a batch; 0 = five times train.batch_size
    period: int = 0  # epochs from the full rate to zero, then up again; 0 = `epochs`

    def __post_init__(self):
        def need(ok, name, wanted):
            if not ok:
                found = getattr(self, name)
                raise ConfigError(f"alignment.{name} is {found!r}; it must be {wanted}.")

        need(self.jitter > 0, "jitter", "above 0")
        need(self.learning_rate >= 0, "learning_rate", "0 or more")
        for name in ("epochs", "samples", "period"):
            need(getattr(self, name) >= 0, name, "0 or more")


@dataclass(frozen=True)
class MosConfig:
    """MOS (arXiv 2412.09441): adapter merging, orthogonality, self-refined retrieval."""

    merge_rate: float = 0.1  # alpha: the step of an adapter towards the mean of the older ones
    # When: after every optimisation step; or, as the authors' code runs, also in every block of
    # every forward pass, which leaves the mean of the older adapters in each slot.
    merge: Literal["step", "every_pass"] = "step"
    orthogonality: float = 0.1  # weight of the loss that keeps features and class means apart
    retrievals: int = 4  # adapters tried for one image at most
    ensemble: bool = True  # add the first adapter's prototypes to the prediction

    def __post_init__(self):
        def need(ok, name, wanted):
            if not ok:
                raise ConfigError(f"mos.{name} is {getattr(self, name)!r}; it must be {wanted}.")

        need(0 <= self.merge_rate < 1, "merge_rate", "in [0, 1)")
        need(self.orthogonality >= 0, "orthogonality", "0 or more")
        need(self.retrievals >= 1, "retrievals", "at least 1")


@dataclass(frozen=True)
class TunaConfig:
    """TUNA (arXiv 2508.08165): cosine head with margin, orthogonality, universal adapter."""

    scale: float = 20.0  # s of the cosine head; fixed
    margin: float = 0.0  # m, taken off the cosine of an image's own class in training
    orthogonality: float = 1e-3  # weight of the overlap with old adapters, times exp(-(t + 1))
    # Alignment draws around class means that are scaled: not at all, less the newer a class is, or
    # more the newer, as the authors' code does by the sign of a task's size.
    mean_decay: Literal["none", "old", "new"] = "none"
    # The universal adapter: fused from all; or the newest, which the authors' code reads instead.
    universal: Literal["fused", "newest"] = "fused"

    def __post_init__(self):
        def need(ok, name, wanted):
            if not ok:
                raise ConfigError(f"tuna.{name} is {getattr(self, name)!r}; it must be {wanted}.")

        need(self.scale > 0, "scale", "above 0")
        need(self.margin >= 0, "margin", "0 or more")
        need(self.orthogonality >= 0, "orthogonality", "0 or more")


@dataclass(frozen=True)
class MoteConfig:
    """MoTE (arXiv 2506.11038): which experts speak about an image, and how loud."""

    filter: bool = True  # keep experts that predict a class of their own task
    merge: bool = True  # fuse the features of the kept experts; false = the most confident one's
    others: float = 0.1  # factor on the confidence of all kept experts but the best; 1 = none
    sharpness: float = 10.0  # of the cosines in an expert's confidence

    def __post_init__(self):
        def need(ok, name, wanted):
            if not ok:
                raise ConfigError(f"mote.{name} is {getattr(self, name)!r}; it must be {wanted}.")

        need(0 <= self.others <= 1, "others", "in [0, 1]")
        need(self.sharpness > 0, "sharpness", "above 0")


@dataclass(frozen=True)
class SsiatConfig:
    """SSIAT (arXiv 2403.19979): cosine head with margin, shift of old class means, alignment."""

    scale: float = 20.0  # s of the cosine head; fixed
    margin: float = 0.0  # m, taken off the cosine of an image's own class in training
    # How old class means move with the adapter: by how far each image moved; by the difference of
    # means that the authors' code has in expectation, since it shuffles between its two passes; or
    # not at all.
    shift: Literal["paired", "unpaired", "none"] = "paired"
    kernel_width: float = 4.0  # sigma of the weight of an image in the shift of a class
    kernel_floor: float = 1e-5  # added to every weight, so that far images count alike
    mean_decay: float = 0.1  # alignment draws the oldest classes around (1 - this) of their mean

    def __post_init__(self):
        def need(ok, name, wanted):
            if not ok:
                raise ConfigError(f"ssiat.{name} is {getattr(self, name)!r}; it must be {wanted}.")

        need(self.scale > 0, "scale", "above 0")
        need(self.margin >= 0, "margin", "0 or more")
        need(self.kernel_width > 0, "kernel_width", "above 0")
        need(self.kernel_floor > 0, "kernel_floor", "above 0")
        need(0 <= self.mean_decay < 1, "mean_decay", "in [0, 1)")


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
    # By step to zero; by epoch to a hundredth, as CODA-Prompt and InfLoRA do; or not at all.
    schedule: Literal["cosine", "quarter_cosine", "constant"] = "cosine"
    adapter_start: Literal["random", "previous"] = "random"
    epochs: int = 20
    later_epochs: int = 0  # epochs of every task after the first; 0 = `epochs`
    batch_size: int = 32
    eval_batch_size: int = 32
    task_chunk: int = 0  # adapters that `predict` evaluates in one pass; 0 = what fills the device
    checkpoint_every: int = 200  # steps; a finished task is always saved
    devices: int = 0  # 0 = all local devices
    model_devices: int = 1  # devices that share one copy of the frozen arrays
