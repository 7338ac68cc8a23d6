"""Where generated samples should go: the field of drifting models, and gradient flows.

Both move samples x of a generator with law q towards data of law p, and both vanish where p = q.
With a kernel k, the mean shift towards a law r is the mean of its samples near x, less x,

    V_r(x) = E_{y~r}[k(x, y) (y - x)] / E_{y~r}[k(x, y)]

**Drifting** (Deng et al., "Generative Modeling via Drifting", arXiv 2602.04770): V = V_p - V_q with
the kernel exp(-|x - y| / tau), `drifting_velocity`. What its code trains with is more than that:
affinities normalised over both sides, several temperatures, forces of unit size (`drifting_goal`,
after lambertae/drifting).

**Gradient Flow Drifting** (arXiv 2603.10592): the kernel exp(-|x - y|^2 / 2h^2), for which V_r is
h^2 grad log r_h of the smoothed density r_h. With ratio r = q_h / p_h the velocity by which q flows
down a divergence D_f(q || p) = E_p f(r) is

    -grad f'(r) = r f''(r) (grad log p_h - grad log q_h)

so that h^2 times it is r f''(r) (V_p - V_q): all divergences have one direction, and each a weight
of its own (`WEIGHTS`). The paper calls KL(q || p) the forward one; the names here are formulas.

A generator is trained by regression: loss |x - sg(x + V)|^2, whose gradient is -2 V.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

Divergence = Literal["kl_qp", "kl_pq", "chi2_qp", "mixed", "mmd"]

# R of the kernels exp(-|x - y| / (R s)), where s is the mean distance.
TEMPERATURES = (0.02, 0.05, 0.2)
# log(q_h / p_h) is kept within +- this.
LOG_RATIO_LIMIT = 6.0
# r f''(r), up to a constant factor, as a function of log r = log(q_h / p_h).
WEIGHTS = {
    "kl_qp": jnp.ones_like,  # f = r log r
    "kl_pq": lambda log_ratio: jnp.exp(-log_ratio),  # f = -log r
    "chi2_qp": jnp.exp,  # f = (r - 1)^2 / 2
    "mixed": lambda log_ratio: jnp.exp(log_ratio) + jnp.exp(-log_ratio),
}
# As in the authors' code: below these a scale, a mean square, a product of affinities, a squared
# distance count as these.
LEAST_SCALE, LEAST_SQUARE, LEAST_AFFINITY, LEAST_DISTANCE = 1e-3, 1e-8, 1e-6, 1e-8


def squared_distances(x: jax.Array, y: jax.Array) -> jax.Array:
    """|x_i - y_j|^2 [..., N, M] of x [..., N, D] and y [..., M, D]."""
    dot = jnp.matmul(x, jnp.swapaxes(y, -1, -2), precision="highest")
    squares = jnp.sum(x * x, -1)[..., :, None] + jnp.sum(y * y, -1)[..., None, :]
    return jnp.maximum(squares - 2.0 * dot, 0.0)


def _without_self(logits: jax.Array) -> jax.Array:
    """Logits [..., N, N] of samples among themselves, with -inf on the diagonal."""
    return jnp.where(jnp.eye(logits.shape[-1], dtype=bool), -jnp.inf, logits)


def mean_shift(x: jax.Array, y: jax.Array, log_kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The mean shift V [..., N, D] of points x towards samples y, and the log of the mean kernel
    [..., N]; entries of `log_kernel` [..., N, M] that are -inf are left out.
    """
    total = jax.nn.logsumexp(log_kernel, axis=-1)
    shares = jnp.exp(log_kernel - total[..., None])
    shift = jnp.matmul(shares, y, precision="highest") - x
    count = jnp.sum(log_kernel > -jnp.inf, axis=-1)
    return shift, total - jnp.log(count.astype(total.dtype))


def drifting_velocity(
    x: jax.Array, data: jax.Array, generated: jax.Array, tau: float, *, own: bool = False
) -> jax.Array:
    """V_p(x) - V_q(x) with the kernel exp(-|x - y| / tau): arXiv 2602.04770, its idealised field.

    Args:
      x: [..., N, D], where the field is asked for.
      data: [..., P, D], samples of p.
      generated: [..., G, D], samples of q.
      own: x are the generated samples, and none repels itself.

    Returns:
      [..., N, D], in the units of x.
    """

    def shift(y, leave_out):
        logits = -jnp.sqrt(squared_distances(x, y)) / tau
        return mean_shift(x, y, _without_self(logits) if leave_out else logits)[0]

    return shift(data, False) - shift(generated, own)


def gradient_flow_velocity(
    x: jax.Array,
    data: jax.Array,
    generated: jax.Array,
    bandwidth: float | jax.Array,
    divergence: Divergence,
    *,
    own: bool = False,
) -> jax.Array:
    """h^2 times the velocity of the gradient flow of a divergence between smoothed densities:
    arXiv 2603.10592.

    Args:
      x, data, generated, own: as for `drifting_velocity`.
      bandwidth: h of the Gaussian kernel, in the units of x.
      divergence: `kl_qp` KL(q || p); `kl_pq` KL(p || q); `chi2_qp` chi^2(q || p); `mixed`, the sum
        of the last two; `mmd`, half the squared maximum mean discrepancy.

    Returns:
      [..., N, D], in the units of x.
    """

    def shift(y, leave_out):
        logits = -squared_distances(x, y) / (2.0 * bandwidth**2)
        return mean_shift(x, y, _without_self(logits) if leave_out else logits)

    (towards_p, log_p), (towards_q, log_q) = shift(data, False), shift(generated, own)
    if divergence == "mmd":  # no division by the densities
        return jnp.exp(log_p)[..., None] * towards_p - jnp.exp(log_q)[..., None] * towards_q
    log_ratio = jnp.clip(log_q - log_p, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return WEIGHTS[divergence](log_ratio)[..., None] * (towards_p - towards_q)


def drifting_loss(
    generated: jax.Array,
    positives: jax.Array,
    negatives: jax.Array | None = None,
    negative_weight: float | jax.Array = 1.0,
    temperatures: tuple[float, ...] = TEMPERATURES,
) -> jax.Array:
    """Loss [L] of samples of L labels, as in the authors' code of arXiv 2602.04770.

    Samples are compared within their label only, but the scale of distances and the size of forces
    are means over all labels.

    Args:
      generated: [L, G, D], which are pushed apart and pulled to the positives.
      positives: [L, P, D], data of the label.
      negatives: [L, U, D], data that push away too, for guidance; None = none.
      negative_weight: [L, U], or one number for all.
    """
    goal, scale = drifting_goal(
        lax.stop_gradient(generated), positives, negatives, negative_weight, temperatures
    )
    gap = generated / lax.stop_gradient(scale) - lax.stop_gradient(goal)
    return jnp.mean(gap * gap, axis=(-1, -2))


def drifting_goal(
    generated: jax.Array,
    positives: jax.Array,
    negatives: jax.Array | None,
    negative_weight: float | jax.Array,
    temperatures: tuple[float, ...],
) -> tuple[jax.Array, jax.Array]:
    """Where `drifting_loss` wants samples: x / scale + force [L, G, D], and the scale []."""
    (num_generated, width), dtype = generated.shape[1:], generated.dtype
    targets, weights = [generated], [jnp.ones(generated.shape[:2], dtype)]
    if negatives is not None:
        targets.append(negatives)
        weight = jnp.asarray(negative_weight, dtype)
        weights.append(jnp.broadcast_to(weight, negatives.shape[:2]))
    num_repelling = sum(part.shape[1] for part in targets)
    targets = jnp.concatenate([*targets, positives], axis=1)  # [L, N, D]
    weights = jnp.concatenate([*weights, jnp.ones(positives.shape[:2], dtype)], axis=1)[:, None]

    distances = jnp.sqrt(jnp.maximum(squared_distances(generated, targets), LEAST_DISTANCE))
    mean_distance = jnp.mean(distances * weights) / jnp.mean(weights)
    scale = jnp.maximum(mean_distance / width**0.5, LEAST_SCALE)
    distances = distances / jnp.maximum(mean_distance, LEAST_SCALE)
    itself = jnp.eye(num_generated, targets.shape[1], dtype=dtype)
    distances = distances + 100.0 * itself[None]

    force, scaled = jnp.zeros_like(generated), targets / scale
    # One temperature after the other, which a CPU does faster than one product for all.
    for temperature in temperatures:
        # The root of the product of the softmax over rows and that over columns.
        product = jnp.ones((), dtype)
        for axis in (-1, -2):
            product = product * jax.nn.softmax(-distances / temperature, axis=axis)
        affinity = jnp.sqrt(jnp.maximum(product, LEAST_AFFINITY)) * weights
        repelling, pulling = affinity[..., :num_repelling], affinity[..., num_repelling:]
        # Coefficients of each sample add up to zero, so that sum c (y - x) is sum c y.
        coefficients = [
            -repelling * jnp.sum(pulling, -1, keepdims=True),
            pulling * jnp.sum(repelling, -1, keepdims=True),
        ]
        one = jnp.matmul(jnp.concatenate(coefficients, axis=-1), scaled, precision="highest")
        force = force + one / jnp.sqrt(jnp.maximum(jnp.mean(one * one), LEAST_SQUARE))
    return generated / scale + force, scale


def gradient_flow_loss(
    generated: jax.Array,
    data: jax.Array,
    factors: tuple[float, ...],
    divergence: Divergence,
    *,
    sphere: bool = False,
) -> jax.Array:
    """Loss [L] of samples of L labels that flow down a divergence with several bandwidths.

    One bandwidth tells nothing in many dimensions, where all distances are alike, so that
    velocities of several, each divided by its root mean square, are added, as `drifting_loss` does.

    Args:
      generated: [L, G, D]; with `sphere` of unit length.
      data: [L, P, D], likewise.
      factors: bandwidths as multiples of the median distance between samples and data.
      sphere: velocities are tangent to the unit sphere, and their end is put back onto it. The
        Riemannian form of the paper; its details are our reading.
    """
    x, data = lax.stop_gradient((generated, data))
    median = jnp.median(jnp.sqrt(squared_distances(x, data)))
    scale = jnp.maximum(median / x.shape[-1] ** 0.5, LEAST_SCALE)
    velocity = jnp.zeros_like(x)
    for factor in factors:
        bandwidth = factor * jnp.maximum(median, LEAST_SCALE)
        one = gradient_flow_velocity(x, data, x, bandwidth, divergence, own=True)
        if sphere:
            one = one - jnp.sum(one * x, -1, keepdims=True) * x
        square = jnp.mean((one / scale) ** 2)
        velocity = velocity + one / jnp.sqrt(jnp.maximum(square, LEAST_SQUARE))
    goal = x + velocity
    if sphere:
        goal = goal / jnp.linalg.norm(goal, axis=-1, keepdims=True)
    gap = (generated - lax.stop_gradient(goal)) / scale
    return jnp.mean(gap * gap, axis=(-1, -2))
