"""Measured fidelities: without errors they are the gate's own, and relevance follows from them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkd_jax.engine import verbs
from qkd_jax.errors import ConfigError
from qkd_jax.learners.qkd import fusion, gate, noisy
from qkd_jax.quantum import Noise
from qkd_jax.settings.config import override

# Nothing ever happens, but everything is computed as if it could.
NO_ERRORS = Noise(readout=1e-12)
# Every gate forgets its wires: Pauli operators, the identity among them, equally likely.
FORGETS = Noise(one_qubit=3 / 4, two_qubit=15 / 16)
GATES = {
    "angle": (),
    "query alone": ("gate.theta_side=query",),
    "last axis": ("gate.last_axis=x",),
    "amplitude": ("gate.encoding=amplitude", "gate.num_qubits=4"),
}
fidelities_of = jax.jit(noisy.noisy_fidelities, static_argnums=(3, 4))


@pytest.fixture(scope="module")
def ended(tiny):
    """Three learned tasks of four, with angle states of 3 qubits."""
    return tiny.run(tiny.backbone, tiny.config("method=qkd"))[-1].ended


@pytest.fixture(scope="module")
def features(ended, tiny):
    images = np.concatenate([tiny.batch(task, seed=5)["image"] for task in tiny.tasks])
    return verbs.slot_features(ended, images)


def with_gate(state, *settings):
    return state.replace(config=override(state.config, *settings))


@pytest.mark.parametrize("settings", GATES.values(), ids=GATES)
def test_the_circuits_measure_the_gate_s_fidelities(key, ended, features, settings):
    state = with_gate(ended, *settings)
    exact = fidelities_of(key, state, features, Noise(), 1)
    found = fidelities_of(key, state, features, NO_ERRORS, 1)
    seen = np.asarray(state.task_of_class) >= 0
    assert np.ptp(np.asarray(exact)[:, seen]) > 0.1
    # Rounding of 4 qubits' some 30 gates on both sides.
    np.testing.assert_allclose(found[:, seen], exact[:, seen], rtol=0, atol=120 * 1.2e-7)


def test_a_device_that_forgets_finds_every_outcome_equally_often(key, ended, features):
    state = with_gate(ended, *GATES["amplitude"])
    found = fidelities_of(key, state, features[:2], FORGETS, 64)
    # 64 x 64 pairs of real states: deviations of sqrt(2) / 16 over sqrt(64) at most.
    np.testing.assert_allclose(found, 1 / 16, rtol=0, atol=5 * 2**0.5 / 16 / 8)


def test_scores_of_exact_fidelities_are_the_learner_s(key, ended, features):
    scores, relevance = verbs.one_device().score(ended, features)
    p = fidelities_of(key, ended, features, Noise(), 1)
    found, alpha = jax.jit(noisy.scores_of)(ended, features, p)
    np.testing.assert_allclose(alpha, relevance, rtol=0, atol=1e-5)
    np.testing.assert_allclose(found, scores, rtol=0, atol=1e-4)
    lost = noisy.scores_of(ended, features, jnp.full_like(p, 1 / 16))[1]
    evidence = gate.evidence_of(ended.config.gate, jnp.float32(1 / 16))
    assert np.isfinite(evidence) and np.ptp(np.asarray(lost), axis=0).max() < 1e-6


def test_gates_and_fusions_without_shots_are_refused(key, ended, features):
    uniform, routed = (with_gate(ended, s) for s in ("gate.kind=uniform", "fusion.kind=routed"))
    with pytest.raises(ConfigError, match=r"gate\.kind: expected quantum, .* found uniform"):
        noisy.noisy_fidelities(key, uniform, features, Noise(), 1)
    with pytest.raises(ConfigError, match=r"fusion\.kind: expected logits, found routed"):
        noisy.scores_of(routed, features, jnp.ones((len(features), 7)))
    assert fusion.learned(ended).tolist() == [True, True, True, False]
