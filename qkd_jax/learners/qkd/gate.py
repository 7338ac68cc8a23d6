"""The relevance of tasks to an image: task states, the quantum gate and its classical twins.

Every gate answers one question in one form, `relevance(...) -> weights [B, T]`: it compares the
image's feature h with *anchors* (one vector per task, or one per class), adds up the evidence of
each task's anchors, and takes a softmax over the tasks that are open. The answer for one image
never depends on the rest of the batch. QKD (arXiv 2604.11112), Eq. 2-12.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from qkd_jax import quantum
from qkd_jax.errors import ConfigError
from qkd_jax.nn.fit import fit
from qkd_jax.nn.heads import unit
from qkd_jax.nn.losses import MASKED
from qkd_jax.settings.ranges import setting


@dataclass(frozen=True)
class GateSettings:
    """The gate: its kind, the states that it compares with, its score and its calibration."""

    kind: Literal[
        "quantum", "pqk", "measurement", "cosine", "rbf", "mlp", "attention", "uniform"
    ] = "quantum"
    num_qubits: int = setting(10, low=1, high=20)
    num_layers: int = setting(2, low=1)
    reupload: bool = True
    theta_scale: float = setting(0.1, low=0)  # theta ~ U[0, scale); the paper's start is U[0, 2 pi)
    theta_side: Literal["both", "query"] = "both"
    last_axis: Literal["y", "x", "z"] = "y"
    encoding: Literal["angle", "amplitude"] = "amplitude"
    angle_map: Literal["linear", "separate", "first_q", "pool"] = "linear"
    angle_range: float = setting(3.141592653589793, above=0)  # angles lie in (-range, range)
    # A task's states: the SVD of its adapter, its class means, or a vector that the gate learns.
    states: Literal["weights", "class", "learned"] = "class"
    stack: Literal["weights", "delta", "product"] = "weights"
    rank: int = setting(12, low=1)
    score: Literal["fidelity", "log_fidelity"] = "log_fidelity"
    temperature: float = setting(1.0, above=0)
    # Gamma of the projected quantum kernel and of its twin, the Gaussian kernel (`rbf`).
    kernel_width: float = setting(1.0, above=0)
    # Of `measurement`: copies of each state, and what is added to the Gram matrix's eigenvalues.
    copies: int = setting(3, low=1)
    ridge: float = setting(1e-3, above=0)
    # Calibration steps on pseudo-features when a task ends; 0 = never calibrated.
    calibration_steps: int = setting(200, low=0, zero="never taught")
    calibration_batch: int = setting(128, low=1)
    calibration_rate: float = setting(0.01, low=0, end_rate="*")
    # Factor on the noise, since unseen images vary more than the stored covariance says.
    calibration_noise: float = setting(2.0, low=0)
    whiten: bool = True  # compare in the metric of the stored within-class covariance
    # Task index after which training no longer moves the gate; -1 = never.
    freeze_after: int = setting(-1, low=-1)
    # Share of the isotropic part in the stored covariance. By the number of images, it weighs as
    # much as `prior` of them for each dimension (`nn.whitening.isotropic_share`).
    shrinkage: float = setting(0.0, low=0, high=1, zero="by the number of images")
    prior: float = setting(0.5, above=0)


# The kinds that compare a query and an anchor by a kernel of what `encoding` makes of them.
KERNELS = ("quantum", "pqk", "cosine", "rbf")
# Fidelities of unrelated angles fall like prod cos^2; below this they are no evidence in float32.
FIDELITY_FLOOR = 1e-6


class Relevance(NamedTuple):
    """weights alpha [B, T] (a softmax over open tasks; zeros if none is open), their log, raw
    scores p [B, T] in [0, 1].
    """

    weights: jax.Array
    log_weights: jax.Array
    scores: jax.Array


def feature_map(config: GateSettings) -> quantum.FeatureMap:
    """The feature map of the gate's circuit."""
    return quantum.FeatureMap(
        num_qubits=config.num_qubits,
        num_layers=config.num_layers,
        reupload=config.reupload,
        last_axis=config.last_axis,
    )


def drawing(config: GateSettings) -> str:
    """The gate's circuit as text; empty for classical gates.

    Amplitude states have no circuit; the drawing shows how their fidelity is measured, as the
    probability of all zeros after preparing one state and undoing the other.
    """
    if config.kind not in ("quantum", "pqk"):
        return ""
    if config.encoding == "angle":
        return quantum.draw(quantum.feature_circuit(feature_map(config)))
    end = "─" if config.kind == "pqk" else "─|φ(s)⟩†─⟨0|─"
    return "".join(f"{wire}: ─|ψ(h)⟩{end}\n" for wire in range(config.num_qubits))


def init_gate(key: jax.Array, config: GateSettings, width: int, max_tasks: int) -> dict:
    """Parameters of a gate over features of `width`, as a dict of arrays.

    The classical gates get about as many parameters as the quantum one's map D -> q and its angles.

    Raises:
      ConfigError: the qubits do not fit the width, or a measurement of other states than classes.
    """
    _check_width(config, width)
    if config.kind == "measurement" and config.states != "class":
        raise ConfigError(
            "gate.states: expected class, since gate.kind=measurement tells classes apart, found "
            f"{config.states}"
        )
    keys = jax.random.split(key, 5)
    params: dict = {}
    if config.states == "learned":
        params["states"] = jax.random.normal(keys[4], (max_tasks, width))
    if config.kind in ("measurement", "uniform"):
        return {}

    def dense(key, rows, columns):
        return jax.random.normal(key, (rows, columns)) * jnp.float32(rows) ** -0.5

    projected = config.encoding == "angle"
    mapped = projected and config.angle_map in ("linear", "separate")
    if config.kind in KERNELS and mapped:
        params["map"] = dense(keys[0], width, config.num_qubits)
        if config.angle_map == "separate":
            params["anchor_map"] = dense(keys[1], width, config.num_qubits)
    if config.kind in ("quantum", "pqk") and projected:
        shape = (config.num_layers, config.num_qubits)
        params["theta"] = jax.random.uniform(keys[2], shape, maxval=config.theta_scale)
    if config.kind == "mlp":
        params["map"] = dense(keys[0], width, config.num_qubits)
        params["out"] = dense(keys[3], config.num_qubits, 1)[:, 0]
    if config.kind == "attention":
        columns = max(1, config.num_qubits // 2)  # two maps: half the columns each
        params["map"] = dense(keys[0], width, columns)
        params["anchor_map"] = dense(keys[1], width, columns)
    return params


def _check_width(config: GateSettings, width: int) -> None:
    qubits = config.num_qubits
    if config.kind not in KERNELS:
        return
    if config.encoding == "amplitude":
        if config.kind in ("quantum", "pqk") and 2**qubits < width:
            raise ConfigError(
                f"gate.num_qubits: expected at least {(width - 1).bit_length()}, since "
                f"gate.encoding=amplitude holds the feature's {width} numbers in 2**num_qubits "
                f"amplitudes, found {qubits}; set gate.num_qubits={(width - 1).bit_length()}"
            )
    elif config.angle_map in ("first_q", "pool") and qubits > width:
        raise ConfigError(
            f"gate.num_qubits: expected at most {width}, since gate.angle_map={config.angle_map} "
            f"takes the angles from a feature of {width} numbers, found {qubits}"
        )


def angles(params: dict, config: GateSettings, vectors: jax.Array, side: str) -> jax.Array:
    """Eq. 5: angles [..., q] of vectors [..., D], in (-range, range), radians.

    Vectors are scaled to length sqrt(D): with unit length all angles would be near 0 and every
    fidelity near 1. `side` is "query" or "anchor", which differ only for `angle_map="separate"`.
    """
    width = vectors.shape[-1]
    scaled = unit(vectors) * jnp.float32(width) ** 0.5
    if config.angle_map == "first_q":
        reduced = scaled[..., : config.num_qubits]
    elif config.angle_map == "pool":
        usable = width // config.num_qubits * config.num_qubits
        groups = scaled[..., :usable].reshape(*vectors.shape[:-1], config.num_qubits, -1)
        reduced = groups.mean(-1) * jnp.float32(groups.shape[-1]) ** 0.5
    else:
        name = "anchor_map" if side == "anchor" and "anchor_map" in params else "map"
        reduced = jnp.matmul(scaled, params[name], precision="highest")
    return config.angle_range * jnp.tanh(reduced)


def similarity(
    params: dict, config: GateSettings, query: jax.Array, anchors: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(evidence, p), both [B, A], of query [B, D] with anchors [A, D].

    p in [0, 1] is the fidelity |<psi(h)|phi(s)>|^2 (Eq. 10) or its closest classical counterpart.
    The evidence, divided by the temperature, enters the softmax.
    """
    if config.kind in KERNELS:
        p = _overlap(params, config, query, anchors)
        if config.kind == "cosine":
            return p, (1.0 + p) / 2.0
        return evidence_of(config, p), p
    size = jnp.float32(query.shape[-1]) ** 0.5
    a, b = unit(query) * size, unit(anchors) * size
    if config.kind == "mlp":
        # One hidden layer shared by both sides, compared unit by unit.
        hidden_query = jnp.tanh(jnp.matmul(a, params["map"], precision="highest"))
        hidden_anchor = jnp.tanh(jnp.matmul(b, params["map"], precision="highest"))
        weighted = hidden_query * params["out"][None, :]
        evidence = jnp.matmul(weighted, hidden_anchor.T, precision="highest")
    else:
        left = jnp.matmul(a, params["map"], precision="highest")
        right = jnp.matmul(b, params["anchor_map"], precision="highest")
        evidence = jnp.matmul(left, right.T, precision="highest")
        evidence = evidence / jnp.float32(left.shape[-1]) ** 0.5
    return evidence, jax.nn.sigmoid(evidence)


def evidence_of(config: GateSettings, p: jax.Array) -> jax.Array:
    """The evidence that fidelities p are for their anchors."""
    return jnp.log(p + FIDELITY_FLOOR) if config.score == "log_fidelity" else p


def _overlap(params: dict, config: GateSettings, query: jax.Array, anchors: jax.Array) -> jax.Array:
    """Fidelity, other kernel or cosine of every query with every anchor: [B, A]."""
    if config.encoding == "amplitude":
        if config.kind == "cosine":
            return jnp.matmul(unit(query), unit(anchors).T, precision="highest")
        if config.kind == "rbf":
            return gaussian_kernel(unit(query), unit(anchors), config.kernel_width)
        psi = quantum.amplitude_state(query, config.num_qubits)
        phi = quantum.amplitude_state(anchors, config.num_qubits)
        if config.kind == "pqk":
            return _projected(psi, phi, config)
        return jnp.matmul(psi, phi.T, precision="highest") ** 2  # real amplitudes
    a = angles(params, config, query, "query")
    b = angles(params, config, anchors, "anchor")
    if config.kind == "cosine":
        return jnp.matmul(unit(a), unit(b).T, precision="highest")
    if config.kind == "rbf":
        return gaussian_kernel(a, b, config.kernel_width)
    circuit, theta = feature_map(config), params["theta"]
    theta_b = jnp.zeros_like(theta) if config.theta_side == "query" else None
    if config.kind == "quantum":
        return quantum.fidelity_matrix(circuit, a, b, theta, theta_b)
    state = jax.vmap(quantum.feature_state, in_axes=(None, 0, None))
    return _projected(
        state(circuit, a, theta), state(circuit, b, theta if theta_b is None else theta_b), config
    )


def gaussian_kernel(a: jax.Array, b: jax.Array, gamma: float) -> jax.Array:
    """exp(-gamma |a - b|^2) [B, A] of a [B, D] and b [A, D]."""
    return jnp.exp(-gamma * jnp.sum((a[:, None, :] - b[None, :, :]) ** 2, axis=-1))


def _projected(psi: jax.Array, phi: jax.Array, config: GateSettings) -> jax.Array:
    bloch = jax.vmap(quantum.bloch_vectors)
    return quantum.projected_kernel(bloch(psi), bloch(phi), config.kernel_width)


def relevance(
    params: dict,
    config: GateSettings,
    query: jax.Array,
    anchors: jax.Array,
    owner: jax.Array,
    open_tasks: jax.Array,
) -> Relevance:
    """Eq. 12: alpha = softmax over open tasks of the evidence of their anchors.

    With one anchor per task this is softmax(p / tau); with several (class states) the task's
    evidence is the log-sum-exp over its anchors, so that a task without a centre is found by any
    one of its classes.

    Args:
      query: [B, D], the feature h of each image.
      anchors: [A, D].
      owner: int [A], the task of each anchor; -1 = empty.
      open_tasks: bool [T], the tasks that may be chosen.
    """
    if config.kind == "uniform":
        evidence = jnp.where(open_tasks, 0.0, MASKED)
        evidence = jnp.broadcast_to(evidence, (query.shape[0], open_tasks.shape[0]))
        scores = jnp.broadcast_to(open_tasks.astype(jnp.float32), evidence.shape)
        return _softmax(evidence, scores, open_tasks)
    evidence, p = similarity(params, config, query, anchors)
    return relevance_of(config, evidence, p, owner, open_tasks)


def relevance_of(
    config: GateSettings,
    evidence: jax.Array,
    p: jax.Array,
    owner: jax.Array,
    open_tasks: jax.Array,
) -> Relevance:
    """`relevance` from the evidence and scores p [B, A] of every query with every anchor."""
    num_tasks = open_tasks.shape[0]
    # A division would round differently from the runs in results/.
    scaled = evidence * jnp.exp(-jnp.log(jnp.float32(config.temperature)))
    evidence, scores = _by_task(scaled, p, owner, num_tasks)
    evidence = jnp.where(open_tasks[None, :], evidence, MASKED)
    scores = jnp.where(open_tasks[None, :], scores, 0.0)
    return _softmax(evidence, scores, open_tasks)


def _softmax(evidence: jax.Array, scores: jax.Array, open_tasks: jax.Array) -> Relevance:
    any_open = jnp.any(open_tasks)
    log_weights = jax.nn.log_softmax(evidence, axis=-1)
    weights = jnp.where(any_open, jnp.exp(log_weights), 0.0)
    return Relevance(jnp.where(open_tasks[None, :], weights, 0.0), log_weights, scores)


def _by_task(
    evidence: jax.Array, p: jax.Array, owner: jax.Array, num_tasks: int
) -> tuple[jax.Array, jax.Array]:
    """(log-sum-exp of `evidence`, mean of `p`) [B, T] over the anchors of each task, from [B, A].

    Sums run over the anchors of each task alone, so that the work is B A and not B A T. A task
    without anchors has `MASKED` and 0.
    """
    place = jnp.where(owner >= 0, owner, num_tasks)  # one more segment for empty anchors

    def summed(values):
        return jax.ops.segment_sum(values, place, num_tasks + 1)

    columns = evidence.T
    largest = jax.ops.segment_max(lax.stop_gradient(columns), place, num_tasks + 1)
    count = summed(jnp.ones((len(owner), 1)))
    total = summed(jnp.exp(columns - largest[place]))
    found = jnp.where(count > 0, largest + jnp.log(jnp.where(count > 0, total, 1.0)), MASKED)
    means = summed(p.T) / jnp.maximum(count, 1.0)
    return found[:num_tasks].T, means[:num_tasks].T


def task_embedding(adapter: dict, start: dict, config: GateSettings) -> jax.Array:
    """Eq. 3-4: the state s~ [D] of a task from its adapter's weights, by truncated SVD.

    S = [down_1, ..., down_L, up_1^T, ..., up_L^T] in R^{D x 2LR}; S^(12) = its best rank-12
    approximation; s = S^(12) 1; s~ = s / |s|. It does not depend on the signs of singular vectors.

    Args:
      adapter: {"down": {"kernel": [L, D, R]}, "up": {"kernel": [L, R, D]}}.
      start: the same pytree before training, used by `stack="delta"`.
    """
    down, up = adapter["down"]["kernel"], adapter["up"]["kernel"]
    if config.stack == "delta":
        down, up = down - start["down"]["kernel"], up - start["up"]["kernel"]
    if config.stack == "product":
        blocks = jnp.einsum("ldr,lre->lde", down, up, precision="highest")
        matrix = jnp.concatenate(list(jnp.swapaxes(blocks, 1, 2)), axis=1)
    else:
        matrix = jnp.concatenate([*down, *jnp.swapaxes(up, 1, 2)], axis=1)
    # S^(r) 1 = U_r U_r^T S 1, and U comes from the small Gram matrix S S^T (D x D).
    gram = jnp.matmul(matrix, matrix.T, precision="highest")
    _, vectors = jnp.linalg.eigh(gram)
    leading = vectors[:, -min(config.rank, gram.shape[0]) :]
    row_sum = matrix.sum(axis=1)
    coordinates = jnp.matmul(row_sum, leading, precision="highest")
    s = jnp.matmul(leading, coordinates, precision="highest")
    return unit(s)


def calibrate(
    key: jax.Array,
    params: dict,
    config: GateSettings,
    class_means: jax.Array,
    task_of_class: jax.Array,
    factor: jax.Array,
    anchors: jax.Array,
    owner: jax.Array,
    max_tasks: int,
) -> dict:
    """The gate's parameters after learning to route: cross-entropy of the task on pseudo-features.

    A pseudo-feature is a stored class mean of h plus noise of the stored shrunk covariance; classes
    are drawn uniformly from those seen. In training the gate never sees the current task, so it
    gets this signal here. The temperature is not learned: pseudo-features lie inside their own
    covariance and would drive it to zero.

    Args:
      class_means: [C, D] of h as the gate reads it.
      task_of_class: int [C], -1 = not seen.
      factor: [D, D], F of the noise covariance F F^T.
      anchors, owner: as in `relevance`; ignored where the gate has learned states.
    """
    if not params or config.calibration_steps == 0:
        return params
    optimiser = optax.adam(config.calibration_rate)
    log_class = jnp.where(task_of_class >= 0, 0.0, MASKED)
    open_tasks = jnp.arange(max_tasks) <= jnp.max(task_of_class)

    def loss(params, key):
        key_class, key_noise = jax.random.split(key)
        drawn = jax.random.categorical(key_class, log_class, shape=(config.calibration_batch,))
        noise = jax.random.normal(key_noise, (config.calibration_batch, factor.shape[0]))
        query = class_means[drawn] + config.calibration_noise * (noise @ factor.T)
        states, owners = anchor_states(params, anchors, owner)
        log_weights = relevance(params, config, query, states, owners, open_tasks).log_weights
        target = task_of_class[drawn]
        return -jnp.mean(jnp.take_along_axis(log_weights, target[:, None], axis=1))

    keys = jax.random.split(key, config.calibration_steps)
    start = optimiser.init(params)
    return fit(params, start, loss, lambda i: keys[i], optimiser, config.calibration_steps)[0]


def anchor_states(
    params: dict, anchors: jax.Array, owner: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(anchors, owner) that a gate compares with: its learned states if any, else those given."""
    if "states" in params:
        return params["states"], jnp.arange(params["states"].shape[0])
    return anchors, owner
