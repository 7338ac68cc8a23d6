"""The states that stand for tasks in the gate, and how it is taught to tell them apart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkd_jax.learners.qkd import gate
from tests.learners.qkd.gate_cases import (
    ANCHORS,
    OWNER,
    TASKS,
    WIDTH,
    draw,
    params_of,
    relevance_of,
    settings,
)


def adapter(seed, blocks=2, bottleneck=3):
    generator = np.random.default_rng(seed)
    down = generator.normal(size=(blocks, WIDTH, bottleneck)).astype(np.float32)
    up = generator.normal(size=(blocks, bottleneck, WIDTH)).astype(np.float32)
    return jax.tree.map(jnp.asarray, {"down": {"kernel": down}, "up": {"kernel": up}})


def numpy_embedding(trained, start, stack, rank, signs=None):
    down, up = (np.float64(trained[side]["kernel"]) for side in ("down", "up"))
    if stack == "delta":
        down = down - np.float64(start["down"]["kernel"])
        up = up - np.float64(start["up"]["kernel"])
    if stack == "product":
        matrix = np.concatenate([(down[b] @ up[b]).T for b in range(len(down))], axis=1)
    else:
        matrix = np.concatenate([*down, *(u.T for u in up)], axis=1)
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    flip = np.ones(len(s)) if signs is None else signs[: len(s)]
    u, v = u * flip, v * flip[:, None]
    row = (u[:, :rank] * s[:rank]) @ v[:rank] @ np.ones(matrix.shape[1])
    return row / np.linalg.norm(row)


@pytest.mark.parametrize("stack", ["weights", "delta", "product"])
@pytest.mark.parametrize("rank", [1, 4, 12])
def test_task_embedding_against_float64_svd(stack, rank):
    """The Gram matrix squares the condition: singular values s_r, s_r+1 that differ by a part g are
    told apart with an error of eps (s_1 / s_r)^2 / g, below 2e-4 for these matrices."""
    trained, start = adapter(1), adapter(2)
    config = settings(stack=stack, rank=rank)
    found = jax.jit(gate.task_embedding, static_argnums=2)(trained, start, config)
    expected = numpy_embedding(trained, start, stack, rank)
    np.testing.assert_allclose(found, expected, atol=2e-4)
    flipped = numpy_embedding(trained, start, stack, rank, signs=np.resize([1, -1, -1], 12))
    np.testing.assert_allclose(expected, flipped, atol=1e-12)  # signs of an SVD cancel
    assert abs(float(jnp.linalg.norm(found)) - 1) < 1e-6


def toy(seed=0):
    """Six well separated class means in three tasks, little noise."""
    means = 3 * draw(6, WIDTH, seed=seed)
    return means, jnp.array([0, 0, 1, 1, 2, 2]), 0.3 * jnp.eye(WIDTH)


def routing_loss(params, config, seed=5):
    means, owner, factor = toy()
    labels = np.resize(np.arange(6), 60)
    query = means[labels] + draw(60, WIDTH, seed=seed) @ factor.T
    states, owners = gate.anchor_states(params, means, owner)
    found = relevance_of(config, query, states, owners, [True, True, True, False], params)
    return -np.asarray(found.log_weights)[np.arange(60), np.asarray(owner)[labels]].mean()


def calibrated(config, params, key=0):
    means, owner, factor = toy()
    run = jax.jit(gate.calibrate, static_argnums=(2, 8))
    return run(jax.random.key(key), params, config, means, owner, factor, means, owner, TASKS)


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "quantum", "score": "log_fidelity", "temperature": 0.5},
        {"kind": "cosine", "temperature": 0.3},
        {"kind": "mlp"},
        {"kind": "quantum", "score": "log_fidelity", "states": "learned"},
    ],
)
def test_calibration_learns_to_route(changes):
    config = settings(calibration_steps=60, calibration_noise=1.0, **changes)
    params = params_of(config)
    taught, again = calibrated(config, params), calibrated(config, params)
    before, after = routing_loss(params, config), routing_loss(taught, config)
    assert after < 0.8 * before, (before, after)
    jax.tree.map(np.testing.assert_array_equal, taught, again)
    assert any(
        (np.asarray(a) != np.asarray(b)).any()
        for a, b in zip(
            jax.tree.leaves(taught), jax.tree.leaves(calibrated(config, params, 1)), strict=True
        )
    )


def test_calibration_without_steps_touches_nothing():
    config = settings(calibration_steps=0)
    params = params_of(config)
    assert calibrated(config, params) is not None
    jax.tree.map(np.testing.assert_array_equal, calibrated(config, params), params)


def test_learned_states_stand_for_the_tasks():
    config = settings(states="learned")
    params = params_of(config)
    states, owner = gate.anchor_states(params, ANCHORS, jnp.asarray(OWNER))
    assert states.shape == (TASKS, WIDTH) and owner.tolist() == [0, 1, 2, 3]
    given, _ = gate.anchor_states(params_of(settings()), ANCHORS, jnp.asarray(OWNER))
    assert given is ANCHORS
