"""The features of one task, kept until it ends, for what cannot be computed from sums."""

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class FeatureBank:
    """Features of one task in the order in which they came.

    Attributes:
      features: [N, D], with room for the images of the largest task.
      position: int [N], the class of each among the task's classes.
      count: int [], how many there are; the rows from there on are empty.
    """

    features: jax.Array
    position: jax.Array
    count: jax.Array


def empty_bank(size: int, width: int) -> FeatureBank:
    """A bank with room for `size` features."""
    return FeatureBank(jnp.zeros((size, width)), jnp.zeros(size, jnp.int32), jnp.int32(0))


def add_to_bank(
    bank: FeatureBank, features: jax.Array, positions: jax.Array, mask: jax.Array
) -> FeatureBank:
    """`bank` with the rows of features [B, D] where `mask` [B] holds; what does not fit is dropped.

    Args:
      positions: int [B], among the task's classes.
    """
    place = jnp.where(mask, bank.count + jnp.cumsum(mask) - 1, len(bank.features))
    return FeatureBank(
        bank.features.at[place].set(features, mode="drop"),
        bank.position.at[place].set(positions.astype(jnp.int32), mode="drop"),
        bank.count + jnp.sum(mask),
    )


@flax.struct.dataclass
class RowsByClass:
    """Where the features of each class stand in a bank.

    Attributes:
      bank: the bank.
      rows: int [N], its rows ordered by class.
      first: int [M], of each class, the place of its first row in that order.
      count: int [M], of each class.
    """

    bank: FeatureBank
    rows: jax.Array
    first: jax.Array
    count: jax.Array


def rows_by_class(bank: FeatureBank, num_classes: int) -> RowsByClass:
    """`bank` with the places of the features of M classes."""
    filled = jnp.arange(len(bank.features)) < bank.count
    position = jnp.where(filled, bank.position, num_classes)
    count = jnp.zeros(num_classes, jnp.int32).at[position].add(1, mode="drop")
    rows = jnp.argsort(position, stable=True)
    return RowsByClass(bank, rows, jnp.cumsum(count) - count, count)


def pick(places: RowsByClass, key: jax.Array, positions: jax.Array) -> jax.Array:
    """For each of positions [...] a random feature of that class: [..., D]; a class without one, or
    none of the task, gives any row.
    """
    chosen = jax.random.randint(key, positions.shape, 0, jnp.maximum(places.count[positions], 1))
    return places.bank.features[places.rows[places.first[positions] + chosen]]
