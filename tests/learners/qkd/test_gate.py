"""The gate: relevance as a distribution over tasks, its work, and settings that are refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkd_jax.errors import ConfigError
from qkd_jax.learners.qkd import gate
from qkd_jax.learners.qkd.gate import GateSettings
from qkd_jax.settings.config import Config, override
from tests.learners.qkd.gate_cases import (
    ANCHORS,
    EXACT,
    KINDS,
    OPEN,
    OWNER,
    QUERY,
    TASKS,
    WIDTH,
    draw,
    params_of,
    relevance_of,
    settings,
    similarity,
)


def test_the_defaults_are_those_of_the_recorded_runs():
    """Every setting of the gate, as docs/gate.md has them; a changed one changes what runs do."""
    assert dataclasses.asdict(GateSettings()) == {
        "kind": "quantum",
        "num_qubits": 10,
        "num_layers": 2,
        "reupload": True,
        "theta_scale": 0.1,
        "theta_side": "both",
        "last_axis": "y",
        "encoding": "amplitude",
        "angle_map": "linear",
        "angle_range": float(np.pi),
        "states": "class",
        "stack": "weights",
        "rank": 12,
        "score": "log_fidelity",
        "temperature": 1.0,
        "kernel_width": 1.0,
        "copies": 3,
        "ridge": 1e-3,
        "calibration_steps": 200,
        "calibration_batch": 128,
        "calibration_rate": 0.01,
        "calibration_noise": 2.0,
        "whiten": True,
        "freeze_after": -1,
        "shrinkage": 0.0,
        "prior": 0.5,
    }


@pytest.mark.parametrize("kind", KINDS)
def test_relevance_is_a_distribution_over_open_tasks(kind):
    found = relevance_of(settings(kind=kind), QUERY, ANCHORS, OWNER, OPEN)
    weights = np.asarray(found.weights)
    np.testing.assert_allclose(weights.sum(1), 1, atol=1e-6)
    assert (weights[:, 2:] == 0).all() and (weights[:, :2] > 0).all()
    np.testing.assert_allclose(np.exp(found.log_weights[:, :2]), weights[:, :2], rtol=1e-6)
    scores = np.asarray(found.scores)
    assert scores.min() >= (-1 if kind == "cosine" else 0) - 1e-6 and scores.max() <= 1 + 1e-6
    assert (scores[:, 2:] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_without_an_open_task_all_is_zero_and_no_gradient_is_nan(kind):
    config, closed = settings(kind=kind, score="log_fidelity"), jnp.zeros(TASKS, bool)
    params, owner = params_of(config), jnp.asarray(OWNER)

    @jax.jit
    def slope(params, query):
        def value(params, query):
            found = gate.relevance(params, config, query, ANCHORS, owner, closed)
            return (found.weights**2).sum() + found.scores.sum(), found

        return jax.grad(value, argnums=(0, 1), has_aux=True)(params, query)

    gradients, found = slope(params, QUERY)
    assert (np.asarray(found.weights) == 0).all() and (np.asarray(found.scores) == 0).all()
    assert all((np.asarray(g) == 0).all() for g in jax.tree.leaves(gradients))


@pytest.mark.parametrize("kind", KINDS)
def test_relevance_of_a_row_does_not_depend_on_the_batch(kind):
    config, order = settings(kind=kind), np.array([3, 0, 4, 1, 2])
    whole = relevance_of(config, QUERY, ANCHORS, OWNER, OPEN).weights
    moved = relevance_of(config, QUERY[order], ANCHORS, OWNER, OPEN).weights
    repeated = relevance_of(config, QUERY[np.full(5, 2)], ANCHORS, OWNER, OPEN).weights
    np.testing.assert_allclose(moved, whole[order], atol=EXACT)
    np.testing.assert_allclose(repeated, whole[np.full(5, 2)], atol=EXACT)


def test_uniform_gate_has_no_parameters_and_equal_weights():
    config = settings(kind="uniform")
    assert params_of(config) == {}
    found = relevance_of(config, QUERY, ANCHORS, OWNER, OPEN)
    np.testing.assert_allclose(found.weights, [[0.5, 0.5, 0, 0]] * 5, atol=1e-7)


@pytest.mark.parametrize("num_tasks", [2, 10])
def test_the_papers_score_cannot_route(num_tasks):
    """softmax of fidelities in [0, 1] at temperature 1: alpha_max <= e / (e + T - 1)."""
    config = settings(score="fidelity", temperature=1.0)
    params = gate.init_gate(jax.random.key(0), config, WIDTH, num_tasks)
    # The first anchor is the query itself (fidelity 1), the most favourable case there is.
    query = draw(1, WIDTH)
    anchors = jnp.concatenate([query, draw(num_tasks - 1, WIDTH, seed=2)])
    owner, every = np.arange(num_tasks), np.ones(num_tasks, bool)
    alpha = np.asarray(relevance_of(config, query, anchors, owner, every, params).weights)[0]
    bound = np.e / (np.e + num_tasks - 1)
    assert alpha.argmax() == 0 and 1 / num_tasks < alpha.max() <= bound + EXACT


@pytest.mark.parametrize("kind", ["quantum", "cosine", "mlp"])
def test_class_anchors_add_up_by_logsumexp(kind):
    config = settings(kind=kind, temperature=0.3)
    params = params_of(config)
    raw, p = similarity(params, config, QUERY, ANCHORS)
    evidence = np.full((5, TASKS), -np.inf)
    for task in (0, 1):
        mine = [a for a, t in enumerate(OWNER) if t == task]
        evidence[:, task] = np.log(np.exp(np.float64(raw)[:, mine] / 0.3).sum(1))
    expected = np.exp(evidence) / np.exp(evidence).sum(1, keepdims=True)
    found = relevance_of(config, QUERY, ANCHORS, OWNER, OPEN, params)
    np.testing.assert_allclose(found.weights, expected, atol=EXACT)
    mean_of_two = np.float64(p)[:, [1, 2]].mean(1)
    np.testing.assert_allclose(found.scores[:, 1], mean_of_two, atol=EXACT)


def test_sums_over_each_tasks_own_anchors_are_those_over_every_pair():
    """Far apart, so that only a sum relative to each task's own largest is exact: a task whose
    evidence is 200 below another's is not lost. A task without anchors, an anchor without a task.
    """
    owner = jnp.array([3, 0, 0, -1, 3, 1])
    raw = 10 * draw(5, 6) - jnp.where(owner == 0, 200.0, 0.0)[None, :]

    def dense(raw):
        pairs = (owner[:, None] == jnp.arange(TASKS)[None])[None]
        return jax.nn.logsumexp(jnp.where(pairs, raw[:, :, None], -1e9), axis=1)

    def value(function, raw):
        found = jnp.where(jnp.array([True, True, False, True])[None], function(raw), 0.0)
        return (jnp.sin(found)).sum(), found

    found, expected = (
        jax.grad(lambda raw, f=f: value(f, raw), has_aux=True)(raw)
        for f in (lambda raw: gate._by_task(raw, raw, owner, TASKS)[0], dense)
    )
    # Of numbers up to 230, and slopes up to 1 at a phase that is as exact.
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-6)
    np.testing.assert_allclose(found[0], expected[0], atol=1e-4)
    assert (np.abs(expected[0]).max(0)[[0, 1, 2, 4, 5]] > 1e-3).all()


def test_work_grows_with_the_classes_and_not_with_classes_times_tasks():
    """No array, and so no operation, is as large as the anchors times the tasks."""
    size, many = 300, 100
    owner, every = jnp.arange(size) % many, jnp.ones(many, bool)
    config = settings(kind="cosine", encoding="amplitude")
    arguments = draw(2, WIDTH), draw(size, WIDTH, seed=1), owner, every
    traced = jax.make_jaxpr(lambda *a: gate.relevance({}, config, *a))(*arguments)

    def sizes(jaxpr):
        for equation in jaxpr.eqns:
            yield from (variable.aval.size for variable in equation.outvars)
            for value in equation.params.values():
                if hasattr(value, "jaxpr"):  # of a jitted function or a loop
                    yield from sizes(value.jaxpr)

    assert max(sizes(traced.jaxpr)) < size * many / 4


def test_parameter_counts_are_matched():
    """At D = 768 and 9 qubits: one map of 768 x 9, plus 18 angles or 9 output weights.

    Attention has two maps; 9 columns do not halve, so it gets 2 x 4 of them: 11 % fewer numbers.
    """
    counts = {
        kind: sum(
            leaf.size
            for leaf in jax.tree.leaves(
                gate.init_gate(jax.random.key(0), settings(kind=kind, num_qubits=9), 768, 10)
            )
        )
        for kind in KINDS
    }
    print(counts)
    assert counts["quantum"] == counts["pqk"] == 768 * 9 + 18
    assert counts["cosine"] == counts["rbf"] == 768 * 9 and counts["mlp"] == 768 * 9 + 9
    assert counts["attention"] == 768 * 8 and counts["uniform"] == 0
    for kind in ("cosine", "mlp"):
        assert abs(counts[kind] / counts["quantum"] - 1) < 0.1


def test_theta_starts_uniform_in_its_range():
    config = settings(theta_scale=float(2 * np.pi), num_qubits=9, num_layers=40)
    theta = np.asarray(gate.init_gate(jax.random.key(0), config, WIDTH, TASKS)["theta"])
    assert theta.shape == (40, 9) and theta.min() >= 0 and theta.max() < 2 * np.pi
    # 360 draws: the mean is off by at most 4 sigma = 4 * 1.81 / 19.
    assert abs(theta.mean() - np.pi) < 0.39 and abs(theta.std() - 2 * np.pi / 12**0.5) < 0.25


@pytest.mark.parametrize(
    "name, taken, refused",
    [
        ("num_qubits", (1, 20), (0, 21)),
        ("num_layers", (1,), (0,)),
        ("theta_scale", (0,), (-0.1,)),
        ("angle_range", (0.1,), (0,)),
        ("rank", (1,), (0,)),
        ("temperature", (0.1,), (0,)),
        ("kernel_width", (0.1,), (0,)),
        ("copies", (1,), (0,)),
        ("ridge", (1e-9,), (0,)),
        ("calibration_steps", (0,), (-1,)),
        ("calibration_batch", (1,), (0,)),
        ("calibration_rate", (0,), (-0.1,)),
        ("calibration_noise", (0,), (-0.1,)),
        ("freeze_after", (-1,), (-2,)),
        ("shrinkage", (0, 1), (-0.1, 1.1)),
        ("prior", (0.1,), (0,)),
    ],
)
def test_settings_have_the_values_that_make_sense(name, taken, refused):
    for value in taken:
        assert getattr(override(Config(), f"gate.{name}={value}").gate, name) == value
    for value in refused:
        with pytest.raises(ConfigError, match=f"gate.{name}: expected"):
            override(Config(), f"gate.{name}={value}")


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"encoding": "amplitude"}, "gate.num_qubits: expected at least 4"),
        ({"encoding": "amplitude", "kind": "pqk"}, "gate.num_qubits: expected at least 4"),
        ({"angle_map": "first_q", "num_qubits": 13}, "at most 12"),
        ({"angle_map": "pool", "num_qubits": 13}, "at most 12"),
    ],
)
def test_qubits_that_do_not_fit_the_width_are_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        params_of(settings(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"kind": "pqk"},
        {"last_axis": "x"},
        {"last_axis": "z", "theta_side": "query"},
        {"encoding": "amplitude", "num_qubits": 4},
        {"kind": "attention"},
    ],
)
def test_gradients_are_finite_also_for_zero_and_equal_vectors(changes):
    config = settings(score="log_fidelity", **changes)
    params, owner, every = params_of(config), jnp.arange(4), jnp.ones(TASKS, bool)
    query = jnp.stack([QUERY[0], jnp.zeros(WIDTH), QUERY[1]])
    anchors = jnp.stack([QUERY[0], QUERY[2], jnp.zeros(WIDTH), ANCHORS[0]])

    @jax.jit
    def slope(params, query, anchors):
        def value(params, query, anchors):
            found = gate.relevance(params, config, query, anchors, owner, every)
            return (found.weights * jnp.arange(4.0)[None]).sum()

        return jax.grad(value, argnums=(0, 1, 2))(params, query, anchors)

    for leaf in jax.tree.leaves(slope(params, query, anchors)):
        assert np.isfinite(leaf).all()
