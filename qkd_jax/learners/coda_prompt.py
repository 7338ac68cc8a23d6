"""CODA-Prompt: a prompt per image, as a weighted sum of components that tasks add to a pool.

Smith et al., "CODA-Prompt: COntinual Decomposed Attention-based Prompting for Rehearsal-Free
Continual Learning", CVPR 2023, arXiv 2211.13218. With q the frozen model's feature, each of the
first five blocks has components P [M, L, D], keys K [M, D] and attention vectors A [M, D]:

    w_m = cos(q * A_m, K_m),    prompt = sum_m w_m P_m       (no softmax)

The first L/2 rows of the prompt go in front of the block's keys, the others in front of its values.
Every task brings n = floor(M / T) of the M components (a remainder is never used); components of
older tasks are used and frozen, those of later tasks are absent. Loss: cross-entropy over
the task's classes plus mu times the distance of K, A and P from orthogonal rows.

Published settings (the authors' scripts; LAMDA-PILOT's are the same): M 100, L 8, mu 0, Adam at
0.001 without decay along a quarter of a cosine by epoch, batch 128, 20 epochs (CIFAR-100), 50
(ImageNet-R), 5 (DomainNet); pixels in [0, 1]. The authors' first code is
`form=paper`, `penalty=1e-7` (its mu of 0.1 multiplies a mean of squares times 1e-6).

Differences from the authors' code:

- Their Gram-Schmidt subtracts a new row's part along each older row by itself. Once training has
  moved the older rows these are no longer orthogonal, and neither is the result. `gram_schmidt`
  projects off what older rows span; `published` is theirs.
- Training drops no incomplete batch, and with several devices mu counts once, not once per device.
"""

import math
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from qkd_jax.errors import ConfigError
from qkd_jax.learners.prompted import PromptHost, prompt_learner, query_width
from qkd_jax.learners.shape import register
from qkd_jax.learners.task_heads import empty_linear_head, new_linear_head
from qkd_jax.nn.heads import unit
from qkd_jax.nn.inserts import Inserts
from qkd_jax.nn.prompts import check_blocks, in_blocks, split_prefix
from qkd_jax.settings.ranges import Conflicts, setting


@dataclass(frozen=True)
class CodaPromptSettings:
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


def check(config, backbone):
    """The number n of components per task.

    Raises:
      ConfigError: too few components for the tasks, too many for the width, or too few blocks.
    """
    coda, tasks = config.coda_prompt, config.shapes.max_tasks
    check_blocks("coda_prompt.blocks", coda.blocks, backbone.spec.depth)
    size = coda.pool // tasks
    if size == 0:
        raise ConfigError(
            f"coda_prompt.pool: expected at least one component for each of {tasks} tasks, found "
            f"{coda.pool}"
        )
    width = min(query_width(config, backbone), coda.length * backbone.spec.width)
    if coda.form != "paper" and size * tasks > width:
        raise ConfigError(
            f"coda_prompt.pool: expected at most {width} keys, since no more are orthogonal "
            f"in that many dimensions, found {size * tasks}; or set coda_prompt.form=paper"
        )
    return size


def new_pool(key, config, backbone, size):
    """The pool before the first task: {"components", "keys", "attention"}, each [K, T, n, ...]."""
    coda, orthogonal = config.coda_prompt, jax.nn.initializers.orthogonal()

    def rows(key, *shape):
        whole = (coda.blocks, config.shapes.max_tasks, size, *shape)
        if coda.form != "paper":
            return jnp.zeros(whole)
        flat = (config.shapes.max_tasks * size, math.prod(shape))
        keys = jax.random.split(key, coda.blocks)
        return jax.vmap(lambda key: orthogonal(key, flat))(keys).reshape(whole)

    key_components, key_keys, key_attention = jax.random.split(key, 3)
    width = query_width(config, backbone)
    return {
        "components": rows(key_components, coda.length, backbone.spec.width),
        "keys": rows(key_keys, width),
        "attention": rows(key_attention, width),
    }


def init(key, backbone, config):
    size = check(config, backbone)
    key_head, key_pool = jax.random.split(key)
    pool = new_pool(key_pool, config, backbone, size)
    prompt = jax.tree.map(lambda a: jnp.zeros_like(a[:, 0]), pool)
    trainable = {"prompt": prompt, "head": new_linear_head(key_head, backbone, config)}
    return trainable, {"prompt": pool, **empty_linear_head(backbone, config)}


def begin(state, key):
    key_head, key_prompt = jax.random.split(key)
    form, pool = state.config.coda_prompt.form, state.memory["prompt"]
    prompt = {name: rows[:, state.task] for name, rows in pool.items()}
    if form != "paper":
        drawn = {
            name: jax.random.normal(jax.random.fold_in(key_prompt, i), prompt[name].shape)
            for i, name in enumerate(sorted(pool))
        }
        prompt = orthogonal_starts(form, pool, drawn, state.task)
    head = new_linear_head(key_head, state.backbone, state.config)
    return {"prompt": prompt, "head": head}, state.memory


def orthogonal_starts(form, pool, drawn, task):
    """The drawn rows of each kind [K, n, ...], made orthonormal and orthogonal to the rows of tasks
    before `task` in the pool [K, T, n, ...], in each of K blocks separately.

    The kinds are padded to one width and orthogonalised in one call, since decompositions that run
    at the same time can deadlock on a machine with few cores (jaxlib 0.10).
    """
    blocks, tasks, size = pool["keys"].shape[:3]
    widths = {name: rows[0, 0, 0].size for name, rows in pool.items()}

    def flat(rows):  # [K, R, ...] -> [K, R, E], E the largest width
        rows = rows.reshape(*rows.shape[:2], -1)
        return jnp.pad(rows, ((0, 0), (0, 0), (0, max(widths.values()) - rows.shape[2])))

    names, first = sorted(pool), task * size
    rows = jnp.concatenate([flat(pool[n].reshape(blocks, tasks * size, -1)) for n in names])
    drawn_rows = jnp.concatenate([flat(drawn[n]) for n in names])
    rows = jnp.where((jnp.arange(tasks * size) < first)[None, :, None], rows, 0.0)
    if form == "gram_schmidt":
        rows = lax.dynamic_update_slice_in_dim(rows, drawn_rows, first, axis=1)
        basis, upper = jnp.linalg.qr(rows.swapaxes(1, 2))
        # Gram-Schmidt gives the decomposition with a positive diagonal.
        signs = jnp.sign(jnp.diagonal(upper, axis1=1, axis2=2))
        rows = (basis * signs[:, None, :]).swapaxes(1, 2)
    else:
        rows = jax.vmap(_published_rows, in_axes=(0, 0, None))(rows, drawn_rows, first)
    starts = lax.dynamic_slice_in_dim(rows, first, size, axis=1)
    parts = jnp.split(starts, len(names))
    return {
        name: part[..., : widths[name]].reshape(drawn[name].shape)
        for name, part in zip(names, parts, strict=True)
    }


def _published_rows(rows, drawn, first):
    """rows [R, E] with u_k = v_k - sum_{j<k} (v_k . u_j / |u_j|^2) u_j from row `first` on."""

    def place(i, rows):
        square = jnp.sum(rows * rows, axis=1)
        share = jnp.matmul(rows, drawn[i], precision="highest") / jnp.where(square > 0, square, 1.0)
        left = drawn[i] - jnp.matmul(share, rows, precision="highest")
        return lax.dynamic_update_index_in_dim(rows, left, first + i, axis=0)

    return unit(lax.fori_loop(0, len(drawn), place, rows))


def component_weights(query, attention, keys):
    """[B, M]: cos(q * A_m, K_m) of query [B, D], attention and keys [M, D]; zero rows weigh 0.

    Both sums over D are matrix products, so that no array [B, M, D] is needed.
    """
    along = jnp.matmul(query, (attention * unit(keys)).T, precision="highest")
    square = jnp.matmul(query * query, (attention * attention).T, precision="highest")
    return along * lax.rsqrt(jnp.maximum(square, 1e-24))


def used_rows(state, pool):
    """bool [T n]: the components of tasks up to the current one."""
    tasks, size = pool["keys"].shape[1:3]
    return jnp.repeat(jnp.arange(tasks) <= state.task, size)


def flat_pool(pool):
    """The pool with its components in one axis: [K, T n, ...]."""
    return jax.tree.map(lambda a: a.reshape(a.shape[0], -1, *a.shape[3:]), pool)


def inserts_of(state, pool, query):
    """The prompts of images with `query` [B, D], from the components of learned tasks."""
    used, rows, inserts = used_rows(state, pool), flat_pool(pool), {}
    for block in range(state.config.coda_prompt.blocks):
        weights = component_weights(query, rows["attention"][block], rows["keys"][block])
        weights = jnp.where(used[None, :], weights, 0.0)
        prompt = jnp.einsum("bm,mld->bld", weights, rows["components"][block], precision="highest")
        inserts[block] = split_prefix(prompt)
    return Inserts(attention=in_blocks(state.backbone.spec.depth, inserts))


def with_trained(state, prompt):
    """The pool, with the components of the current task replaced by `prompt`."""
    return jax.tree.map(
        lambda pool, mine: pool.at[:, state.task].set(mine), state.memory["prompt"], prompt
    )


def penalty(state, pool):
    """Sum over blocks and P, K, A of the mean square of R R^T - I, for the rows R in use."""
    used = used_rows(state, pool)
    pairs = used[:, None] & used[None, :]

    def distance(rows):
        rows = rows.reshape(*rows.shape[:2], -1)
        gap = jnp.einsum("kme,kne->kmn", rows, rows, precision="highest") - jnp.eye(len(used))[None]
        return jnp.sum(jnp.where(pairs, gap * gap, 0.0)) / jnp.sum(pairs.astype(gap.dtype))

    return sum(map(distance, flat_pool(pool).values()))


def trained(trainable, state, query, context):
    pool, weight = with_trained(state, trainable["prompt"]), state.config.coda_prompt.penalty
    extra = {"orthogonality": (weight, penalty(state, pool))} if weight else {}
    return inserts_of(state, pool, query), extra


def freeze(state):
    pool = with_trained(state, state.trainable["prompt"])
    return state.replace(memory={**state.memory, "prompt": pool})


HOST = PromptHost(
    name="coda_prompt",
    init=init,
    begin=begin,
    trained=trained,
    learned=lambda state, query: inserts_of(state, state.memory["prompt"], query),
    new_head=new_linear_head,
    prefix_blocks=lambda config: config.coda_prompt.blocks,
    freeze=freeze,
)
LEARNER = register(prompt_learner(HOST), coda_prompt=CodaPromptSettings)
