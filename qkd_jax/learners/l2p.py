"""L2P: a pool of prompts shared by all tasks, from which every image chooses by keys.

Wang et al., "Learning to Prompt for Continual Learning", CVPR 2022, arXiv 2112.08654. A prompt P_j
of the pool has a key k_j; an image's query q(x) is the frozen model's feature. The N prompts with
the keys nearest in cosine are added to the tokens, without positions; the feature is the mean of
the N L_p prompt outputs. Loss: cross-entropy over the task's classes
+ lambda sum_chosen (1 - cos(q, k)). Pool and head are trained on task after task.

`l2p.form=gtripl` is the "L2P++" of the CODA-Prompt code (arXiv 2211.13218): the chosen prompts are
prefixes in block 0 (in blocks 0-4 with `blocks=5`, "Deep"; each block has its own pool and keys),
and the class token gives the feature.

`l2p.diversify` spreads tasks over the pool, in training only: `frequency` multiplies the distance
1 - cos by how often the prompt was chosen in earlier tasks (paper, Sec. 4.2; a prompt that was
never chosen wins, the nearest first); `task` gives task t the prompts t N .. (t + 1) N - 1 (public
code, 5-datasets) and lets a test image choose among those of learned tasks.

Published settings, M pool, N top_k, L length, on ViT-B/16 with Adam, constant rate, no decay:
paper M 10, N 5, L 5, lambda 0.5, rate 0.03, batch 128, 5 epochs; public configuration M 10, N 4,
L 10, lambda 1, clip 1, rate 0.03 * batch / 256, heads from zero, U(0, 0.01); 5-datasets M 20, N 4,
L 5, lambda 0.5; PILOT M 10, N 5, L 5, lambda 0.1, U(-1, 1), rate 0.001875, batch 16 and 5 epochs
(CIFAR) or 32 and 10 (ImageNet-R); L2P++ M 30, N 5, L 20, lambda 1, U(0, 1), key loss `gtripl_sum`,
rate 0.001 with cosine, batch 128, 20 epochs (CIFAR) or 50 (ImageNet-R).

Where we differ: the public code can replace every image's choice by the majority of its batch, at
test too (`batchwise_prompt`), which reveals the task of a test batch from one task; here images are
independent of their batch. With `task`, prompts that no task has trained are never chosen; in the
public code their random keys can be. How often a prompt was chosen is counted in one pass when a
task ends, since the paper does not say when in training.
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from qkd_jax.errors import ConfigError
from qkd_jax.learners.prompted import PromptHost, known_query, prompt_learner, query_width
from qkd_jax.learners.shape import Sums, register
from qkd_jax.learners.task_heads import empty_linear_head, new_linear_head, stored_head
from qkd_jax.nn.inserts import Inserts
from qkd_jax.nn.prompts import (
    check_blocks,
    chosen_rows,
    cosines,
    in_blocks,
    key_loss,
    nearest,
    new_rows,
    split_prefix,
)
from qkd_jax.settings.ranges import Conflicts, setting


@dataclass(frozen=True)
class L2pSettings:
    """L2P (arXiv 2112.08654): the pool, how images choose from it, and where prompts go.

    `form`: `official` adds prompts to the tokens and classifies the mean of their outputs;
    `gtripl` is "L2P++": prefixes in the first `blocks` blocks, class token. `diversify`: how
    training spreads tasks over the pool (see `learners.l2p`). `start`: U(0, 0.01), U(0, 1) or
    U(-1, 1).
    """

    form: Literal["official", "gtripl"] = "official"
    pool: int = setting(10, low=1)  # M prompts
    # L_p, rows of a prompt; in `gtripl` half for keys and half for values.
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


# Share given to a prompt that was never chosen: it wins over all chosen ones, and among several
# such prompts the nearest key wins.
NEVER = 1e-6


def _pools(config):
    """The number of blocks with a pool of their own."""
    return 1 if config.l2p.form == "official" else config.l2p.blocks


def init(key, backbone, config):
    settings, width = config.l2p, backbone.spec.width
    check_blocks("l2p.blocks", _pools(config), backbone.spec.depth)
    if settings.diversify == "task" and settings.pool < settings.top_k * config.shapes.max_tasks:
        raise ConfigError(
            f"l2p.pool: expected at least {settings.top_k * config.shapes.max_tasks}, since "
            f"l2p.diversify=task gives each of {config.shapes.max_tasks} tasks {settings.top_k} "
            f"prompts (l2p.top_k), found {settings.pool}"
        )
    key_prompts, key_keys, key_head = jax.random.split(key, 3)
    shape = (_pools(config), settings.pool)
    trainable = {
        "prompts": new_rows(key_prompts, (*shape, settings.length, width), settings.start),
        "keys": new_rows(key_keys, (*shape, query_width(config, backbone)), settings.start),
        "head": new_head(key_head, backbone, config),
    }
    return trainable, {**empty_linear_head(backbone, config), "chosen": jnp.zeros(shape)}


def new_head(key, backbone, config):
    return new_linear_head(
        key, backbone, config, "zeros" if config.l2p.form == "official" else "uniform"
    )


def begin(state, key):
    return {**state.trainable, "head": new_head(key, state.backbone, state.config)}, state.memory


def choose(state, keys, query, *, training):
    """For each pool, (cosines [B, M] of queries to keys, positions [B, N] of chosen prompts)."""
    settings, choices = state.config.l2p, []
    size = settings.top_k
    for own_keys, counts in zip(keys, state.memory["chosen"], strict=True):
        cosine = cosines(query, own_keys)
        if settings.diversify == "task" and training:
            own = state.task * size + jnp.arange(size)
            chosen = jnp.broadcast_to(own[None, :], (cosine.shape[0], size))
        elif settings.diversify == "task":
            chosen = nearest(cosine, size, jnp.arange(settings.pool) < (state.task + 1) * size)
        elif settings.diversify == "frequency" and training:
            share = counts / jnp.maximum(jnp.sum(counts), 1.0)  # h_j
            chosen = nearest((cosine - 1.0) * jnp.maximum(share, NEVER)[None, :], size)
        else:
            chosen = nearest(cosine, size)
        choices.append((cosine, chosen))
    return choices


def inserts(state, prompts, chosen):
    """The chosen prompts as inserts: tokens, or prefixes in the first blocks."""
    if state.config.l2p.form == "official":
        return Inserts(tokens=chosen_rows(prompts[0], chosen[0]))
    prefixes = {i: split_prefix(prompts[i][rows]) for i, rows in enumerate(chosen)}
    return Inserts(attention=in_blocks(state.backbone.spec.depth, prefixes))


def trained(trainable, state, query, context):
    settings = state.config.l2p
    choices = choose(state, trainable["keys"], query, training=True)
    insert = inserts(state, trainable["prompts"], [chosen for _, chosen in choices])
    pulls = [
        key_loss(cosine, chosen, settings.key_loss, context.mask, context.gather)
        for cosine, chosen in choices
    ]
    return insert, {"key": (settings.key_weight, sum(pulls))}


def learned(state, query):
    choices = choose(state, state.trainable["keys"], query, training=False)
    return inserts(state, state.trainable["prompts"], [chosen for _, chosen in choices])


def empty_counts(config, num_slots, width):
    return jnp.zeros((_pools(config), config.l2p.pool))


def count_choices(state, counts, features, labels, mask):
    """`counts` plus how often a batch of the task that ends chooses each prompt, as in training."""
    query = known_query(state, features)
    choices = choose(state, state.trainable["keys"], query, training=True)
    weight = mask.astype(counts.dtype)[:, None, None]
    votes = [jax.nn.one_hot(chosen, counts.shape[1]) * weight for _, chosen in choices]
    return counts + jnp.stack([vote.sum((0, 1)) for vote in votes])


def finish(state, counts, key):
    memory = stored_head(state, state.memory)
    return state.replace(memory={**memory, "chosen": memory["chosen"] + counts})


HOST = PromptHost(
    name="l2p",
    init=init,
    begin=begin,
    trained=trained,
    learned=learned,
    new_head=new_head,
    prefix_blocks=lambda config: 0 if config.l2p.form == "official" else config.l2p.blocks,
    reads_added=lambda config: config.l2p.form == "official",
    finish=finish,
    sums=Sums(empty_counts, count_choices),
    at_end=(0,),
)
LEARNER = register(prompt_learner(HOST), l2p=L2pSettings)
