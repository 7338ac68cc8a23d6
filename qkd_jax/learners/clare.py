"""CLARE: every task trains a few coordinates of one shared adapter, which then never change.

"CLARE: Scalable Class-Incremental Continual Learning via a Sparsity-Based Framework", arXiv
2609.17026. The steps of a task are two optimisations. The *search* trains all coordinates that no
older task owns, with an L1 penalty; of these it keeps the share that changed most. Then everything
goes back to the start of the task, and only the coordinates kept are trained; when the task ends,
the task owns them. Later tasks leave them as they are, bit for bit. All classes have rows in one
cosine head over the one feature: nothing is routed, and an image needs one pass.

Slot t is the model after task t. Known from the text: one adapter of bottleneck 64; a search of 5
epochs with an L1 penalty of 1e-4 on the coordinates still free; the top 5 % of them by |change|; 20
epochs on these; cosine head, rate 0.02, batch 32; that a random choice costs half a point over 10
tasks (`clare.choice=random`).

No code was published. Chosen here:
- `train.epochs` counts both optimisations, so that all methods have the same number of steps;
  `clare.search` is the first one's share, 5 of 25 epochs. Each has a new optimiser and a schedule
  of its own: SGD along half a cosine, as in the methods it compares itself with.
- The penalty is on how far a coordinate moved from the start of the task, which is what the choice
  goes by, summed over coordinates (`clare.sparsity_of=value`: on its value). No weight decay, which
  would move every coordinate.
- The choice is made over the whole adapter, biases included, not within each block.
- The head goes back to its start together with the adapter (`clare.reset_head=false`: it goes on).
- Cross-entropy is over the task's own classes, as in every method here; the scale of the cosines is
  trained on from task to task.
- An earlier version (submission 5799 to ICLR 2026, withdrawn) also resets a tiny part of what older
  tasks own after each task. How it is chosen is not public, so it is left out.
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree

from qkd_jax.learners.finetune import extract, score
from qkd_jax.learners.shape import Learner, Slots, register
from qkd_jax.learners.task_adapters import encode_with, first_adapter_block, new_tuned
from qkd_jax.learners.task_heads import (
    HeadSettings,
    finish_with_head,
    head_loss,
    next_head,
    with_term,
)
from qkd_jax.nn.adapters import AdapterSpec
from qkd_jax.settings.ranges import setting


@dataclass(frozen=True)
class ClareSettings:
    """CLARE (arXiv 2609.17026): the search for the coordinates that a task may change."""

    # Share of a task's steps that search; the others train what was found.
    search: float = setting(0.2, low=0, below=1)
    # Share of the free coordinates that a task takes.
    keep: float = setting(0.05, above=0, high=1)
    choice: Literal["change", "random"] = "change"  # those that the search changed most, or any
    # Weight of the L1 penalty in the search, and on what of the free coordinates.
    sparsity: float = setting(1e-4, low=0)
    sparsity_of: Literal["change", "value"] = "change"
    reset_head: bool = True  # train the head anew after the search


def init(key, backbone, config):
    trainable = new_tuned(key, backbone, config)
    free = jax.tree.map(lambda a: jnp.ones(a.shape, bool), trainable["adapter"])
    memory = {
        "rows": jnp.zeros((config.shapes.num_classes, backbone.spec.width)),
        "free": free,  # the coordinates that no task owns
        "start": trainable,  # what was trained, at the start of the task
    }
    return {**trainable, "mask": jax.tree.map(jnp.zeros_like, free)}, memory


def begin(state, key):
    """The adapter is trained on, with a random mask until the search has found one; the head is
    new.
    """
    start = {"adapter": state.trainable["adapter"], "head": next_head(state, key)}
    drawn = jax.random.uniform(jax.random.fold_in(key, 1), (num_coordinates(start["adapter"]),))
    mask = largest(drawn, state.memory["free"], state.config.clare.keep)
    return {**start, "mask": mask}, {**state.memory, "start": start}


def num_coordinates(adapter):
    return sum(leaf.size for leaf in jax.tree.leaves(adapter))


def largest(scores, free, share):
    """A tree of bool like `free`: the `share` of its True coordinates with the largest `scores`
    [N], to the nearest integer but at least one while any is left. Of equal scores the first in the
    tree wins.
    """
    open_to_choice, as_tree = ravel_pytree(free)
    count = jnp.round(share * jnp.sum(open_to_choice).astype(jnp.float32))
    order = jnp.argsort(jnp.where(open_to_choice, -scores, jnp.inf), stable=True)
    ranks = jnp.arange(len(order))
    chosen = jnp.zeros(len(order), bool).at[order].set(ranks < jnp.maximum(count, 1).astype(int))
    return as_tree(chosen & open_to_choice)


def search_steps(state):
    """int32 []: the steps of a task that search. At least one step trains what was found; without
    a known number of steps, none searches.
    """
    share = state.config.clare.search * state.num_steps.astype(jnp.float32)
    return jnp.clip(jnp.round(share).astype(jnp.int32), 0, jnp.maximum(state.num_steps - 1, 0))


def stage(state):
    """(steps done, steps in all) of the optimisation that a step belongs to."""
    first = search_steps(state)
    searching = state.step < first
    return (
        jnp.where(searching, state.step, state.step - first),
        jnp.where(searching, first, state.num_steps - first),
    )


def loss(trainable, state, inputs, batch, context):
    """Cross-entropy and, while searching, the L1 norm of the free coordinates or their change."""
    settings, start = state.config.clare, state.memory["start"]["adapter"]
    features = encode_with(state, trainable["adapter"], inputs, context.keys)
    terms = head_loss(trainable["head"], state, features, batch["label"])

    def norm(now, before, free):
        value = now - before if settings.sparsity_of == "change" else now
        # |value| with gradient 0 at 0, where every search starts; that of `jnp.abs` is 1 there.
        return jnp.sum(jnp.where(free, value * lax.stop_gradient(jnp.sign(value)), 0.0))

    norms = jax.tree.map(norm, trainable["adapter"], start, state.memory["free"])
    weight = jnp.where(state.step < search_steps(state), settings.sparsity, 0.0)
    return with_term(terms, "sparsity", weight, sum(jax.tree.leaves(norms)))


def project(trainable, state):
    """Coordinates that a step may not change are as at the start of the task. The last step of the
    search ends in the choice of a mask, and back at the start.
    """
    start, first = state.memory["start"], search_steps(state)

    def held(now, before, free, masked):
        return jnp.where(jnp.where(state.step < first, free, masked), now, before)

    adapter = jax.tree.map(
        held,
        trainable["adapter"],
        start["adapter"],
        state.memory["free"],
        trainable["mask"],
    )
    trainable = {**trainable, "adapter": adapter}
    is_last = state.step + 1 == first
    return lax.cond(is_last, lambda found: restarted(found, state), lambda found: found, trainable)


def restarted(trainable, state):
    """The trained parts as at the start of the task, with the mask that the search found."""
    settings, start, mask = state.config.clare, state.memory["start"], trainable["mask"]
    if settings.choice == "change":
        change = jax.tree.map(jnp.subtract, trainable["adapter"], start["adapter"])
        mask = largest(jnp.abs(ravel_pytree(change)[0]), state.memory["free"], settings.keep)
    head = start["head"] if settings.reset_head else trainable["head"]
    return {"adapter": start["adapter"], "head": head, "mask": mask}


def freeze(state):
    """The task owns what it trained."""
    free = jax.tree.map(lambda f, m: f & ~m, state.memory["free"], state.trainable["mask"])
    return state.replace(memory={**state.memory, "free": free})


LEARNER = register(
    Learner(
        name="clare",
        init=init,
        begin=begin,
        loss=loss,
        freeze=freeze,
        finish=finish_with_head,
        extract=extract,
        score=score,
        slots=Slots(score=lambda task: (task,), finish=lambda task: ()),
        first_block=first_adapter_block,
        project=project,
        carried=("mask",),
        stage=stage,
    ),
    adapter=AdapterSpec,
    clare=ClareSettings,
    head=HeadSettings,
)
