"""What methods with one adapter per task share: slots of frozen adapters, and class means in them.

`memory["adapters"]` is one adapter pytree with a leading task axis [T, L, ...]; slot i holds the
adapter of task i. `memory["rows"]` [S, C, D] holds the head row of every class for features of each
slot, or for features of all slots (S = 1).

With `adapter.memory=host`, which QKD has, the stack stands in the host's memory. Nothing there is
computed with: a pass fetches the adapters that it needs, one slice of the stack after the other.
"""

import jax
import jax.numpy as jnp
from jax import lax

from qkd_jax.errors import ConfigError
from qkd_jax.learners.features import pooled_feature
from qkd_jax.learners.state import LearnerState
from qkd_jax.learners.task_heads import new_head
from qkd_jax.nn.adapters import init_adapter
from qkd_jax.nn.backbone import Backbone
from qkd_jax.nn.heads import unit
from qkd_jax.nn.inputs import Raw, Stem
from qkd_jax.nn.inserts import Inserts
from qkd_jax.nn.losses import MASKED
from qkd_jax.settings.config import Config


def empty_adapters(backbone: Backbone, config: Config) -> dict:
    """Slots of zeros for `max_tasks` adapters."""
    one = jax.eval_shape(lambda: new_adapter(jax.random.key(0), backbone, config))
    slots = jax.tree.map(lambda a: jnp.zeros((config.shapes.max_tasks, *a.shape), a.dtype), one)
    return jax.device_put(slots, jax.memory.Space.Host) if on_host(config) else slots


def on_host(config: Config) -> bool:
    """Whether the adapters of finished tasks stand in the host's memory."""
    return getattr(dict(config.own).get("adapter"), "memory", "device") == "host"


def new_adapter(key: jax.Array, backbone: Backbone, config: Config) -> dict:
    """A fresh adapter for every block.

    Raises:
      ConfigError: the bottleneck is wider than the backbone.
    """
    check_bottleneck(backbone, config)
    return init_adapter(key, config.adapter, backbone.spec.width, backbone.spec.depth)


def check_bottleneck(backbone: Backbone, config: Config) -> None:
    """Raises ConfigError if the bottleneck is wider than the backbone."""
    width = backbone.spec.width
    if config.adapter.bottleneck > width:
        raise ConfigError(
            f"adapter.bottleneck: expected at most the backbone's width {width}, found "
            f"{config.adapter.bottleneck}"
        )


def new_tuned(key: jax.Array, backbone: Backbone, config: Config) -> dict:
    """What a task trains: a fresh adapter and a head of `task_heads.new_head`."""
    return {
        "adapter": new_adapter(jax.random.fold_in(key, 0), backbone, config),
        "head": new_head(jax.random.fold_in(key, 1), backbone, config),
    }


def encode_with(
    state: LearnerState,
    adapter: dict | None,
    inputs: Raw | Stem,
    dropout_keys: jax.Array | None = None,
    hidden_factors: jax.Array | None = None,
) -> jax.Array:
    """Features [B, D] of the class token under an adapter; None = the frozen model."""
    config = state.config
    inserts = keys = None
    if adapter is not None:
        inserts = Inserts(adapter, config.adapter, hidden_factors)
        keys = dropout_keys if config.adapter.dropout > 0 else None
    return pooled_feature(state, inputs, inserts, keys)


def first_adapter_block(config: Config) -> int:
    """`Learner.first_block` of methods that insert only adapters."""
    return config.adapter.first_block


def adapter_of(state: LearnerState, slot: jax.Array) -> dict:
    """The frozen adapter of a slot."""
    if not on_host(state.config):
        return jax.tree.map(lambda a: a[slot], state.memory["adapters"])

    def fetched(stack):
        one = lax.dynamic_index_in_dim(stack, slot, keepdims=False)
        return jax.device_put(one, jax.memory.Space.Device)

    return jax.tree.map(fetched, state.memory["adapters"])


def chosen_adapters(state: LearnerState, slots: jax.Array) -> dict:
    """The adapters of `slots` int [B], one for each image of a batch: leaves [L, B, ...]."""
    if on_host(state.config):
        adapters = lax.map(lambda slot: adapter_of(state, slot), slots)
    else:
        adapters = jax.tree.map(lambda a: a[slots], state.memory["adapters"])
    return jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1), adapters)


def encode_with_chosen(state: LearnerState, slots: jax.Array, inputs: Raw | Stem) -> jax.Array:
    """Features [B, K, D] of each image under the adapters of its own slots int [B, K]: K passes."""

    def one(slots):
        return encode_with(state, chosen_adapters(state, slots), inputs)

    return jnp.moveaxis(lax.map(one, slots.T), 0, 1)


def store_adapter(state: LearnerState) -> dict:
    """`memory["adapters"]` with the trained adapter in the current task's slot."""

    def store(stack, one):
        if not on_host(state.config):
            return stack.at[state.task].set(one)
        one = jax.device_put(one, jax.memory.Space.Host)
        return lax.dynamic_update_index_in_dim(stack, one, state.task, 0)

    return jax.tree.map(store, state.memory["adapters"], state.trainable["adapter"])


def store_rows(rows: jax.Array, columns: jax.Array, values: jax.Array) -> jax.Array:
    """`rows` [S, C, D] with `values` [S, M, D] (or [M, D] for all slots) at `columns` [M].

    Padding is dropped.
    """
    if values.ndim == 2:
        values = jnp.broadcast_to(values, (rows.shape[0], *values.shape))
    return rows.at[:, columns].set(values, mode="drop")


def means_in_slots(means: jax.Array, task: jax.Array) -> jax.Array:
    """Rows [S, M, D] of a finished task's classes in every slot.

    Slots up to the task's own hold the class mean under their adapter. Later adapters never see
    these classes, so their slots start with the row of the task's own slot.
    """
    known = jnp.arange(means.shape[0]) <= task
    return jnp.where(known[:, None, None], means, means[task][None])


def complemented(
    rows: jax.Array, state: LearnerState, *, sharpness: float = 1.0, drift: bool = False
) -> jax.Array:
    """`rows` with those of old classes in later slots, which never saw them, estimated.

    For class c of task i, a later slot d, and all classes k of task d and later tasks, with weights
    w_k = softmax_k( sharpness cos(rows[i, c], rows[i, k]) ):

    - EASE's semantic-guided complement (arXiv 2403.12030, Eq. 8-9, in the form of the authors'
      published settings, which recompute every slot after each task):
      rows[d, c] = sum_k w_k rows[d, k].
    - with `drift`, semantic drift compensation (Yu et al., CVPR 2020, arXiv 2004.00440, between
      slots instead of training steps):
      rows[d, c] = rows[i, c] + sum_k w_k (rows[d, k] - rows[i, k]).

    Args:
      rows: [T, C, D], the class means of the finished task already stored.
    """
    owner, slots = state.task_of_class, jnp.arange(rows.shape[0])
    num_classes = len(owner)

    def of_own_slot(function, width):
        """[C, width]: function(slot, classes [M]) -> [M, width] for every class in its own slot,
        so that all classes together cost as much as one slot.
        """

        def place(total, slot):
            (mine,) = jnp.nonzero(
                owner == slot, size=state.config.shapes.max_task_classes, fill_value=num_classes
            )
            values = function(slot, jnp.minimum(mine, num_classes - 1))
            return total.at[mine].set(values, mode="drop"), None

        return lax.scan(place, jnp.zeros((num_classes, width)), slots)[0]

    def cosine_in(slot, classes):
        directions = unit(rows[slot])
        return jnp.matmul(directions[classes], directions.T, precision="highest")

    cosine = of_own_slot(cosine_in, num_classes)
    own = of_own_slot(lambda slot, classes: rows[slot, classes], rows.shape[2])

    def guess(slot):
        later = owner >= slot
        weights = jax.nn.softmax(jnp.where(later[None, :], sharpness * cosine, MASKED), axis=1)
        guessed = jnp.matmul(weights, rows[slot], precision="highest")
        if drift:
            before = of_own_slot(
                lambda i, classes: jnp.matmul(weights[classes], rows[i], precision="highest"),
                rows.shape[2],
            )
            guessed = own + guessed - before
        missing = (owner >= 0) & (owner < slot)
        return jnp.where(missing[:, None], guessed, rows[slot])

    def guess_if_learned(slot):
        return lax.cond(slot <= state.task, guess, lambda slot: rows[slot], slot)

    return lax.map(guess_if_learned, slots)
