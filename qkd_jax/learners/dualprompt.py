"""DualPrompt: prefixes of all tasks in the first blocks, prefixes per task in the next ones.

Wang et al., "DualPrompt: Complementary Prompting for Rehearsal-free Continual Learning", ECCV 2022,
arXiv 2204.04799. G-prompts (blocks 0-1) continue to learn in every task; of E-prompts (blocks 2-4)
each task has its own set, with a key. All are put before the keys and values of attention. Task t
trains its own E-prompts and pulls its key to the frozen queries of its images: cross-entropy over
the task's classes + lambda (1 - cos(q, k_t)). A test image gets the E-prompts of the learned task
whose key is nearest in cosine; the class token gives the feature.

`dualprompt.form=gtripl` is the version of the CODA-Prompt code (arXiv 2211.13218): every E-block
has its own keys and makes its own choice, and a length counts key and value rows together.

The relevance of task i is the share of choices that fell on it: 0 or 1 with one set of keys,
multiples of a third with three.

Published settings on ViT-B/16 with Adam, no decay: public configuration G 5, E 5 (CIFAR) or 20
(ImageNet-R), pool 10, lambda 1, U(0, 0.01), E-prompts from the previous task's, head from zero,
clip 1, constant rate 0.03 (CIFAR, 5 epochs) or 0.005 (ImageNet-R, 50), each * batch / 256 with
batch 24 per device; PILOT G 5, E 5, pool 10, lambda 0.1, U(-1, 1), rate 0.001, batch 24, 5 epochs
(CIFAR) or 10 (ImageNet-R); GT-RIPL G 6, E 20, a pool of one per task, lambda 1, key loss `sum`,
U(0, 1), E-prompts at random, rate 0.001 with cosine, batch 128, 20 or 50 epochs.

Where we differ: no majority vote over a batch (`batchwise_prompt`), and no reshape that mixes its
images (PILOT's port gives the first half of a batch key rows as values and the second half value
rows as keys). Keys of tasks that are not learned yet are never chosen; in all three public codes
their random start can be.
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from qkd_jax.errors import ConfigError
from qkd_jax.learners.prompted import PromptHost, prompt_learner, query_width
from qkd_jax.learners.shape import register
from qkd_jax.learners.task_heads import empty_linear_head, new_linear_head
from qkd_jax.nn.inserts import Inserts
from qkd_jax.nn.layers import AttentionInsert
from qkd_jax.nn.prompts import check_blocks, cosines, in_blocks, key_loss, nearest, new_rows
from qkd_jax.settings.ranges import Conflicts, setting


@dataclass(frozen=True)
class DualPromptSettings:
    """DualPrompt (arXiv 2204.04799): prefixes of all tasks, and a set of prefixes per task.

    `form`: `official` has one key per task, and `*_length` key rows and as many value rows;
    `gtripl` has a key for each (block, task), and `*_length` is both together. `start`: U(0, 0.01),
    U(0, 1) or U(-1, 1).
    """

    form: Literal["official", "gtripl"] = "official"
    general_blocks: int = setting(2, low=0)  # the first blocks: G-prompts
    expert_blocks: int = setting(3, low=1)  # the blocks after them: E-prompts
    general_length: int = setting(5, low=1)
    expert_length: int = setting(5, low=1)
    # E-prompts: at least one per task (checked, but no more are made); 0 = one per task.
    pool: int = setting(0, low=0, zero="one per task")
    start: Literal["small", "unit", "signed"] = "small"
    expert_start: Literal["previous", "random"] = "previous"  # where E-prompts start
    key_weight: float = setting(1.0, low=0)  # lambda
    key_loss: Literal["mean", "sum"] = "mean"

    def conflicts(self) -> Conflicts:
        for name in ("general_length", "expert_length"):
            if self.form == "gtripl" and getattr(self, name) % 2:
                yield name, "an even number: half for keys, half for values"


def _shapes(config, backbone):
    """Shapes of G-prompts and E-prompts [blocks, key or value, length, D], and of a task's keys."""
    settings, width = config.dualprompt, backbone.spec.width
    halves = 1 if settings.form == "official" else 2
    key_sets = 1 if settings.form == "official" else settings.expert_blocks
    general = (settings.general_blocks, 2, settings.general_length // halves, width)
    expert = (settings.expert_blocks, 2, settings.expert_length // halves, width)
    return general, expert, (key_sets, query_width(config, backbone))


def _new_task(key, backbone, config):
    """Newly drawn E-prompts, keys and head of a task."""
    _, expert, keys = _shapes(config, backbone)
    key_expert, key_keys, key_head = jax.random.split(key, 3)
    start = config.dualprompt.start
    return {
        "expert": new_rows(key_expert, expert, start),
        "keys": new_rows(key_keys, keys, start),
        "head": new_head(key_head, backbone, config),
    }


def new_head(key, backbone, config):
    start = "zeros" if config.dualprompt.form == "official" else "uniform"
    return new_linear_head(key, backbone, config, start)


def init(key, backbone, config):
    settings, tasks = config.dualprompt, config.shapes.max_tasks
    blocks = settings.general_blocks + settings.expert_blocks
    name = "dualprompt.general_blocks + dualprompt.expert_blocks"
    check_blocks(name, blocks, backbone.spec.depth)
    if 0 < settings.pool < tasks:
        raise ConfigError(
            f"dualprompt.pool: expected 0 (one per task) or at least {tasks}, since each of "
            f"{tasks} tasks needs its own E-prompts, found {settings.pool}"
        )
    key_general, key_task = jax.random.split(key)
    general, expert, keys = _shapes(config, backbone)
    trainable = {
        "general": new_rows(key_general, general, settings.start),
        **_new_task(key_task, backbone, config),
    }
    memory = {"experts": jnp.zeros((tasks, *expert)), "keys": jnp.zeros((tasks, *keys))}
    return trainable, {**empty_linear_head(backbone, config), **memory}


def begin(state, key):
    fresh = _new_task(key, state.backbone, state.config)
    if state.config.dualprompt.expert_start == "previous":
        before = state.trainable["expert"]
        fresh["expert"] = jnp.where(state.task == 0, fresh["expert"], before)
    return {"general": state.trainable["general"], **fresh}, state.memory


def inserts(state, general, experts):
    """The prefixes: G-prompts [G, 2, R, D], then for each E-block a pair of key and value rows,
    [R, D] for all images or [B, R, D] per image.
    """
    pairs = [(block[0], block[1]) for block in general] + list(experts)
    prefixes = {i: AttentionInsert(prefix_key=k, prefix_value=v) for i, (k, v) in enumerate(pairs)}
    return Inserts(attention=in_blocks(state.backbone.spec.depth, prefixes))


def trained(trainable, state, query, context):
    settings = state.config.dualprompt
    experts = [(block[0], block[1]) for block in trainable["expert"]]
    only = jnp.zeros((query.shape[0], 1), jnp.int32)
    pulls = [
        key_loss(cosines(query, k[None]), only, settings.key_loss, context.mask, context.gather)
        for k in trainable["keys"]
    ]
    insert = inserts(state, trainable["general"], experts)
    return insert, {"key": (settings.key_weight, sum(pulls))}


def freeze(state):
    task, learned = state.task, state.trainable
    memory = {
        "experts": state.memory["experts"].at[task].set(learned["expert"]),
        "keys": state.memory["keys"].at[task].set(learned["keys"]),
    }
    return state.replace(memory={**state.memory, **memory})


def chosen_tasks(state, query):
    """int [B, K]: the learned task whose key is nearest, for each set of keys."""
    keys = state.memory["keys"]
    learned = jnp.arange(keys.shape[0]) <= state.task
    sets = [nearest(cosines(query, keys[:, i]), 1, learned) for i in range(keys.shape[1])]
    return jnp.concatenate(sets, axis=1)


def learned(state, query):
    return chosen_inserts(state, chosen_tasks(state, query))


def learned_with_task(state, tasks):
    return chosen_inserts(state, tasks[:, None])


def chosen_inserts(state, chosen):
    """G-prompts and the E-prompts of the tasks `chosen` int [B, K], for each set of keys or 1."""
    experts = state.memory["experts"]
    chosen = jnp.broadcast_to(chosen, (chosen.shape[0], experts.shape[1]))
    own = [experts[chosen[:, i], i] for i in range(experts.shape[1])]  # each [B, 2, R, D]
    pairs = [(rows[:, 0], rows[:, 1]) for rows in own]
    return inserts(state, state.trainable["general"], pairs)


def relevance(state, query):
    chosen = chosen_tasks(state, query)
    return jnp.mean(jax.nn.one_hot(chosen, state.config.shapes.max_tasks), axis=1)


HOST = PromptHost(
    name="dualprompt",
    init=init,
    begin=begin,
    trained=trained,
    learned=learned,
    new_head=new_head,
    prefix_blocks=lambda config: config.dualprompt.general_blocks + config.dualprompt.expert_blocks,
    freeze=freeze,
    relevance=relevance,
    learned_with_task=learned_with_task,
)
LEARNER = register(prompt_learner(HOST), dualprompt=DualPromptSettings)
