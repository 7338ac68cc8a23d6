"""The quantum gate as a device would measure it: with finitely many shots and with errors.

Every fidelity is an experiment of its own: prepare the image's state, undo an anchor's, and count
how often all qubits are zero. Amplitude states are prepared by `quantum.amplitude_circuit`, angle
states by the gate's feature map.
"""

from functools import cache, partial

import jax
import jax.numpy as jnp

from qkd_jax import quantum
from qkd_jax.errors import ConfigError
from qkd_jax.learners.qkd import fusion, gate
from qkd_jax.quantum import Noise


def noisy_fidelities(
    key: jax.Array, state, features: jax.Array, noise: Noise, trajectories: int
) -> jax.Array:
    """The probability p [B, A] that a device with errors finds zeros, for each image and anchor.

    Args:
      key: a random key.
      state: of a trained learner with a quantum gate.
      features: [B, S, D] of which the first slot is read.
      noise: how probable errors are; without errors p is the fidelity.
      trajectories: how many times the errors of each state are drawn.

    Raises:
      ConfigError: the gate is another one, which measures no fidelities.
    """
    config, params = state.config.gate, state.trainable["gate"]
    if config.kind != "quantum":
        raise ConfigError(f"gate.kind: expected quantum, whose shots count, found {config.kind}")
    anchors, _ = gate.anchor_states(params, *fusion.anchors(state))
    query = fusion.gate_inputs(state, features[:, 0])
    if noise == Noise():
        return gate.similarity(params, config, query, anchors)[1]
    if config.encoding == "amplitude":
        prepared = _amplitude_circuits(config, query, anchors)
    else:
        prepared = _feature_circuits(params, config, query, anchors)
    circuit, parameters_a, parameters_b, state_of = prepared
    return quantum.noisy_fidelities(
        key, circuit, parameters_a, parameters_b, noise, trajectories, state_of
    )


def scores_of(state, features: jax.Array, p: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(scores [B, C], relevance [B, T]) from measured fidelities p [B, A]; all else is exact.

    Raises:
      ConfigError: a fusion that decides by relevance what to compute.
    """
    config = state.config
    if config.fusion.kind != "logits":
        raise ConfigError(f"fusion.kind: expected logits, found {config.fusion.kind}")
    _, owner = gate.anchor_states(state.trainable["gate"], *fusion.anchors(state))
    evidence = gate.evidence_of(config.gate, p)
    relevance = gate.relevance_of(config.gate, evidence, p, owner, fusion.learned(state)).weights
    return fusion.fused_scores(state, features, relevance), relevance


def _amplitude_circuits(config, query, anchors):
    """The circuit, its parameters for queries and for anchors, and a fast form of its state."""
    qubits = config.num_qubits
    angles = jax.vmap(partial(quantum.amplitude_parameters, num_qubits=qubits))
    circuit = quantum.amplitude_circuit(qubits)
    return (
        circuit,
        angles(query),
        angles(anchors),
        _prepared_state(qubits),
    )


@cache
def _prepared_state(num_qubits):
    """One function for each size, so that what is compiled for it is found again."""
    return partial(quantum.prepared_state, num_qubits=num_qubits)


def _feature_circuits(params, config, query, anchors):
    """The same for angle states."""
    theta = params["theta"].reshape(-1)
    thetas = {"query": theta, "anchor": theta}
    if config.theta_side == "query":
        thetas["anchor"] = jnp.zeros_like(theta)

    def parameters(vectors, side):
        data = gate.angles(params, config, vectors, side)
        repeated = jnp.broadcast_to(thetas[side], (len(data), theta.size))
        return jnp.concatenate([data, repeated], axis=1)

    circuit = quantum.feature_circuit(gate.feature_map(config))
    return circuit, parameters(query, "query"), parameters(anchors, "anchor"), None
