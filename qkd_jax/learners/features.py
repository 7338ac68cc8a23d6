"""Features of the frozen transformer with a method's inserts, one vector per input."""

from typing import Any

import jax
import jax.numpy as jnp

from qkd_jax.learners.state import LearnerState
from qkd_jax.nn.backbone import Backbone
from qkd_jax.nn.encode import encode, encode_pooled_observed
from qkd_jax.nn.inputs import Raw, Stem
from qkd_jax.nn.inserts import Inserts


def pooled_feature(
    state: LearnerState,
    inputs: Raw | Stem,
    inserts: Inserts | None = None,
    dropout_keys: jax.Array | None = None,
    *,
    backbone: Backbone | None = None,
) -> jax.Array:
    """[B, D] float32: the output of the class token, or the mean over tokens, by `spec.pooling`;
    without inserts, that of the frozen model. `backbone`: None = that of the state.
    """
    return observed_feature(state, inputs, inserts, dropout_keys, backbone=backbone)[0]


def observed_feature(
    state: LearnerState,
    inputs: Raw | Stem,
    inserts: Inserts | None = None,
    dropout_keys: jax.Array | None = None,
    *,
    backbone: Backbone | None = None,
) -> tuple[jax.Array, Any]:
    """(`pooled_feature`, what the adapters observed as from `encode.encode_observed`)."""
    feature, observed = encode_pooled_observed(
        backbone or state.backbone,
        inputs,
        inserts,
        dropout_key=dropout_keys,
        compute_dtype=jnp.dtype(state.config.backbone.compute_dtype),
    )
    return feature.astype(jnp.float32), observed


def added_feature(state: LearnerState, inputs: Raw, inserts: Inserts) -> jax.Array:
    """[B, D] float32: the mean output of the tokens that were added (`Inserts.tokens`)."""
    rows = encode(
        state.backbone,
        inputs,
        inserts,
        rows=range(-inserts.tokens.shape[-2], 0),
        compute_dtype=jnp.dtype(state.config.backbone.compute_dtype),
    )
    return jnp.mean(rows, axis=1).astype(jnp.float32)
