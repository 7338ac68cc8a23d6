"""RanPAC: random projection of the feature, and ridge regression on sums over all images seen.

McDonnell et al., "RanPAC: Random Projections and Pre-trained Models for Continual Learning",
NeurIPS 2023, arXiv 2307.02251. The adapter is tuned in the first task as in APER, then frozen (with
`ranpac.first_session`; else the frozen model is used as it is). With the feature f in R^D, a fixed
W ~ N(0, 1) in R^{D x M} and h = relu(f W), tasks add up G = sum h h^T and C = sum h y^T; class
scores are h^T (G + lambda I)^-1 C. For a given lambda the result does not depend on how images are
split into tasks. Each task chooses lambda anew among 10^-8 ... 10^8: the smallest squared error of
a ridge regression on 80 % of its own images over the other 20 %.

Published (RanPAC.py, args/*.csv): M = 10,000; the first session as in APER on every data set: 20
epochs, rate 0.01, batch 48, weight decay 5e-4, with adapters for CIFAR-100 and CUB, SSF or VPT for
others.

How this differs from the reference, and why:

- The search for lambda is one eigendecomposition of the smaller of H H^T and H^T H (push-through:
  H^T (H H^T + lambda I)^-1 Y = (H^T H + lambda I)^-1 H^T Y), not 17 solves with M x M matrices.
- Float32 knows the spectrum of G to about eps sqrt(M) times its mean diagonal; with fewer images
  than M the rest is rounding, and a lambda below that gives noise in the reference. Here the search
  leaves out directions that float32 cannot tell from zero, and the last solve raises lambda to that
  size, and further while the Cholesky factor is not finite. Larger lambdas are kept.
- The held-out fifth is drawn from the run's key; the reference takes the end of a shuffled loader.
- A task with a single image says nothing about lambda, so the last one is kept.
- LAMDA-PILOT's port scores by the cosine between h and the ridge solution: `ranpac.readout=cosine`.

G [M, M] and W [D, M] live in memory, 400 and 31 MB at M = 10,000 and D = 768; drawing W again for
every batch would cost more than the product with it.
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from qkd_jax.generators.bank import add_to_bank, empty_bank
from qkd_jax.learners import aper
from qkd_jax.learners.finetune import loss
from qkd_jax.learners.shape import Learner, Slots, Sums, class_columns, register
from qkd_jax.learners.state import local_labels
from qkd_jax.learners.task_adapters import encode_with, first_adapter_block, new_tuned
from qkd_jax.learners.task_heads import HeadSettings, mask_unseen, need_task_images
from qkd_jax.nn.adapters import AdapterSpec
from qkd_jax.nn.closed_form import RIDGES
from qkd_jax.nn.heads import unit
from qkd_jax.settings.ranges import setting


@dataclass(frozen=True)
class RanpacSettings:
    """RanPAC (arXiv 2307.02251): the random projection and the ridge regression on it.

    `readout`: how the ridge solution scores. `linear` as published; `cosine` as LAMDA-PILOT's port.
    """

    projection_dim: int = setting(10_000, low=1)  # M; its Gram matrix takes 4 M^2 bytes
    first_session: bool = True  # tune an adapter in the first task, then freeze it
    readout: Literal["linear", "cosine"] = "linear"


EPS = float(jnp.finfo(jnp.float32).eps)


def init(key, backbone, config):
    need_task_images(config, "ranpac")
    width, size = backbone.spec.width, config.ranpac.projection_dim
    memory = {
        "projection": jax.random.normal(jax.random.fold_in(key, 2), (width, size)),
        "gram": jnp.zeros((size, size)),
        "moments": jnp.zeros((size, config.shapes.num_classes)),
        "rows": jnp.zeros((config.shapes.num_classes, size)),
        "ridge": jnp.float32(1.0),
    }
    if not config.ranpac.first_session:
        return {}, memory
    trainable = new_tuned(key, backbone, config)
    return trainable, {**memory, "adapter": jax.tree.map(jnp.zeros_like, trainable["adapter"])}


def freeze(state):
    return aper.freeze(state) if state.config.ranpac.first_session else state


def extract(state, inputs, slot, features):
    return encode_with(state, state.memory.get("adapter"), inputs)


def statistics(config, num_slots, width):
    """Room for the task's features themselves, since the search for lambda holds some out."""
    return empty_bank(config.shapes.max_task_images, width)


def accumulate(state, bank, features, labels, mask):
    return add_to_bank(bank, features[:, 0], local_labels(state, labels), mask)


def project(state, feature):
    """h = relu(f W): [..., M]."""
    return jax.nn.relu(jnp.matmul(feature, state.memory["projection"], precision="highest"))


def finish(state, bank, key):
    memory, count = state.memory, bank.count
    size, num_classes = len(bank.features), state.config.shapes.max_task_classes
    real = (jnp.arange(size) < count).astype(jnp.float32)[:, None]
    hidden = project(state, bank.features) * real
    targets = jax.nn.one_hot(bank.position, num_classes) * real

    gram = memory["gram"] + jnp.matmul(hidden.T, hidden, precision="highest")
    added = jnp.matmul(hidden.T, targets, precision="highest")
    moments = memory["moments"].at[:, class_columns(state)].add(added, mode="drop")

    # The first 80 % of a random order of the real images are fitted, the rest held out.
    order = jnp.where(real[:, 0] > 0, jax.random.uniform(key, (size,)), 2.0)
    rank = jnp.argsort(jnp.argsort(order))
    fitted, held_out = rank < 4 * count // 5, (rank >= 4 * count // 5) & (rank < count)
    errors = held_out_errors(hidden, targets, fitted, held_out)
    chosen = jnp.asarray(RIDGES, jnp.float32)[jnp.argmin(errors)]
    ridge = jnp.where(count > 1, chosen, memory["ridge"])

    solution, ridge = ridge_solution(gram, moments, ridge)
    memory = {**memory, "gram": gram, "moments": moments, "ridge": ridge}
    return state.replace(memory={**memory, "rows": solution.T})


def held_out_errors(hidden, targets, fitted, held_out):
    """Mean squared error [17], per lambda, of a ridge regression on held-out images.

    With eigenpairs S, U of A A^T (or of A^T A if there are fewer columns than rows), where A are
    the fitted rows of H, predictions are H A^T U (S + lambda)^-1 U^T Y (or H U (S + lambda)^-1 U^T
    A^T Y).

    Args:
      hidden: H [N, M].
      targets: Y [N, K].
      fitted, held_out: bool [N].
    """

    def multiply(a, b):
        return jnp.matmul(a, b, precision="highest")

    fit, answers = jnp.where(fitted[:, None], hidden, 0.0), jnp.where(fitted[:, None], targets, 0.0)
    if hidden.shape[0] <= hidden.shape[1]:
        inputs = multiply(hidden, fit.T)
        values, vectors = jnp.linalg.eigh(multiply(fit, fit.T))
    else:
        inputs, answers = hidden, multiply(fit.T, answers)
        values, vectors = jnp.linalg.eigh(multiply(fit.T, fit))
    inputs, answers = multiply(inputs, vectors), multiply(vectors.T, answers)
    known = values > 10 * EPS * jnp.max(values)

    def error(ridge):
        inverse = jnp.where(known, 1.0 / (jnp.where(known, values, 1.0) + ridge), 0.0)
        gap = multiply(inputs, inverse[:, None] * answers) - targets
        total = jnp.sum(jnp.where(held_out[:, None], gap * gap, 0.0))
        return total / jnp.maximum(held_out.sum() * targets.shape[1], 1).astype(jnp.float32)

    return lax.map(error, jnp.asarray(RIDGES, jnp.float32))


def ridge_solution(gram, moments, ridge):
    """((G + lambda I)^-1 C [M, C], lambda), with lambda raised until float32 can solve for it."""
    size = len(gram)
    diagonal = jnp.diagonal(gram)
    smallest = EPS * size**0.5 * jnp.maximum(jnp.mean(diagonal), EPS)

    def factor(ridge):
        regular = gram.at[jnp.arange(size), jnp.arange(size)].set(diagonal + ridge)
        return lax.linalg.cholesky(regular, symmetrize_input=False)

    def failed(carry):
        ridge, lower = carry
        # Sums that are not finite themselves are beyond any ridge.
        return ~jnp.isfinite(lower[-1, -1]) & (ridge < jnp.sum(diagonal))

    def retry(carry):
        larger = jnp.maximum(10.0 * carry[0], EPS * jnp.sum(diagonal))
        return larger, factor(larger)

    ridge = jnp.maximum(ridge, smallest)
    ridge, lower = lax.while_loop(failed, retry, (ridge, factor(ridge)))
    return jax.scipy.linalg.cho_solve((lower, True), moments), ridge


def score(state, features):
    hidden, rows = project(state, features[:, 0]), state.memory["rows"]
    if state.config.ranpac.readout == "cosine":
        hidden, rows = unit(hidden), unit(rows)
    return mask_unseen(state, jnp.matmul(hidden, rows.T, precision="highest")), None


# The one slot is the model after the first session, or the frozen model.
LEARNER = register(
    Learner(
        name="ranpac",
        init=init,
        begin=aper.begin,
        loss=loss,
        freeze=freeze,
        finish=finish,
        extract=extract,
        score=score,
        slots=Slots(score=lambda task: (0,)),
        sums=Sums(statistics, accumulate),
        first_block=first_adapter_block,
        trains=lambda config, task: config.ranpac.first_session and task == 0,
    ),
    adapter=AdapterSpec,
    head=HeadSettings,
    ranpac=RanpacSettings,
)
