"""The pretty good measurement of class means: a gate that is a measurement, without a temperature.

Every class seen has the pure state |phi_c>, its whitened mean, and an image is the state |psi>; k
copies of each are compared. With S = sum_c |phi_c><phi_c| over the copies, the outcome c of the
measurement S^(-1/2) |phi_c><phi_c| S^(-1/2) has the probability

    p_c = |<psi| S^(-1/2) |phi_c>|^2 = [(G^(-1/2) kappa)_c]^2,
    G_cd = <phi_c|phi_d>^k,  kappa_c = <psi|phi_c>^k

(Hausladen and Wootters, 1994; as a classifier arXiv 2303.15353). A task's relevance is the sum over
its classes. Nothing is trained, and every image of an old class may be gone: means are enough.
"""

import jax
import jax.numpy as jnp

from qkd_jax.learners.qkd.gate import FIDELITY_FLOOR, GateSettings, Relevance
from qkd_jax.nn.heads import unit
from qkd_jax.nn.losses import MASKED


def overlaps(left: jax.Array, right: jax.Array, copies: int) -> jax.Array:
    """<a|b>^k of k copies of real states along vectors [A, D] and [B, D]: [A, B]."""
    return jnp.matmul(unit(left), unit(right).T, precision="highest") ** copies


def root(anchors: jax.Array, members: jax.Array, copies: int, ridge: float) -> jax.Array:
    """(G + ridge I)^(-1/2) [C, C] of the classes where `members` [C] holds, zero elsewhere.

    Args:
      anchors: [C, D], the vector of each class.
      members: bool [C], the classes that the measurement tells apart.
      copies: k, of each state.
      ridge: keeps classes with nearly the same state from being divided by their tiny difference.
    """
    both = members[:, None] & members[None, :]
    gram = jnp.where(both, overlaps(anchors, anchors, copies), 0.0)
    # Other classes get the eigenvalue 1, so that they cannot mix with the members.
    values, vectors = jnp.linalg.eigh(gram + jnp.diag(jnp.where(members, ridge, 1.0)))
    scaled = vectors * jnp.maximum(values, ridge)[None, :] ** -0.5
    return jnp.where(both, jnp.matmul(scaled, vectors.T, precision="highest"), 0.0)


def outcomes(root: jax.Array, query: jax.Array, anchors: jax.Array, copies: int) -> jax.Array:
    """p [B, C]: the probability of each class for images with vectors `query` [B, D].

    They add up to one minus what no class explains.
    """
    kappa = overlaps(query, anchors, copies)
    return jnp.matmul(kappa, root, precision="highest") ** 2  # `root` is symmetric


def relevance(
    root: jax.Array,
    config: GateSettings,
    query: jax.Array,
    anchors: jax.Array,
    owner: jax.Array,
    open_tasks: jax.Array,
) -> Relevance:
    """alpha_t = the sum of p_c over the classes of task t, in shares of the open tasks.

    Args:
      root: [C, C], as `root` made it for all classes seen.
      query: [B, D]; anchors: [C, D]; owner: int [C], the task of each class, -1 = not seen.
      open_tasks: bool [T], the tasks that may be chosen.
    """
    tasks = jnp.arange(len(open_tasks))
    member = (owner[:, None] == tasks[None, :]) & open_tasks[None, :]  # [C, T]
    of_class = outcomes(root, query, anchors, config.copies)
    of_task = jnp.matmul(of_class, member.astype(root.dtype), precision="highest")
    log_shares = jnp.where(open_tasks[None, :], jnp.log(of_task + FIDELITY_FLOOR), MASKED)
    log_weights = jax.nn.log_softmax(log_shares, axis=-1)
    weights = jnp.where(open_tasks[None, :], jnp.exp(log_weights), 0.0)
    return Relevance(weights, log_weights, of_task)
