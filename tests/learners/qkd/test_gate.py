"""The gate: relevance, angles, task states and calibration against NumPy, PennyLane, closed forms.

Error budgets, eps = 1.2e-7: a projection of D = 12 products of numbers below 4 is off by 50 eps,
tanh and pi keep that below 200 eps, and a fidelity of Q = 3 such angles below 2000 eps = 2e-4.
Softmax and log-sum-exp add a few eps. `EXACT` is for formulas without a circuit.
"""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkd_jax import quantum
from qkd_jax.errors import ConfigError
from qkd_jax.learners.qkd import gate
from qkd_jax.learners.qkd.gate import GateSettings
from qkd_jax.settings.config import Config, override

BUDGET, EXACT = 2e-4, 2e-5
WIDTH, TASKS, QUBITS = 12, 4, 3
KINDS = ("quantum", "pqk", "cosine", "rbf", "mlp", "attention", "uniform")


def settings(**changes):
    """Nothing that a test asserts is left to a default."""
    fixed = dict(
        kind="quantum",
        num_qubits=QUBITS,
        num_layers=2,
        reupload=True,
        theta_scale=0.5,
        theta_side="both",
        last_axis="y",
        encoding="angle",
        angle_map="linear",
        angle_range=float(np.pi),
        states="weights",
        stack="weights",
        rank=12,
        score="fidelity",
        temperature=1.0,
        calibration_steps=0,
        calibration_batch=16,
        calibration_rate=0.05,
    )
    return GateSettings(**(fixed | changes))


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
        "shrinkage": 0.6,
    }


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def params_of(config, seed=0):
    return gate.init_gate(jax.random.key(seed), config, WIDTH, TASKS)


def relevance_of(config, query, anchors, owner, open_tasks, params=None):
    params = params_of(config) if params is None else params
    run = jax.jit(gate.relevance, static_argnums=1)
    return run(params, config, query, anchors, jnp.asarray(owner), jnp.asarray(open_tasks))


similarity = jax.jit(gate.similarity, static_argnums=1)
feature_states = jax.jit(jax.vmap(quantum.feature_state, in_axes=(None, 0, None)), static_argnums=0)
QUERY, ANCHORS, OWNER = draw(5, WIDTH), draw(6, WIDTH, seed=1), [0, 1, 1, 2, -1, 0]
OPEN = [True, True, False, False]


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


def numpy_angles(params, vectors, name="map"):
    unit = np.float64(vectors) / np.linalg.norm(np.float64(vectors), axis=1, keepdims=True)
    return np.pi * np.tanh(np.sqrt(WIDTH) * unit @ np.float64(params[name]))


@pytest.mark.parametrize(
    "changes", [{}, {"num_layers": 1}, {"reupload": False}, {"angle_map": "separate"}]
)
def test_fidelities_equal_pennylane(changes):
    """The whole chain: features -> angles in float64 NumPy -> states by PennyLane -> |<.|.>|^2."""
    config = settings(**changes)
    params, query, anchors = params_of(config), draw(2, WIDTH), draw(2, WIDTH, seed=1)
    _, p = similarity(params, config, query, anchors)
    circuit = quantum.feature_circuit(gate.feature_map(config))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = quantum.to_pennylane(circuit)
        theta = np.float64(params["theta"]).ravel()
        states = [
            [np.asarray(run(np.concatenate([a, theta]))) for a in numpy_angles(params, v, name)]
            for v, name in (
                (query, "map"),
                (anchors, "anchor_map" if "angle_map" in changes else "map"),
            )
        ]
    expected = [[abs(np.vdot(a, b)) ** 2 for b in states[1]] for a in states[0]]
    np.testing.assert_allclose(p, expected, atol=BUDGET)


def test_theta_on_the_query_side_only():
    config = settings(theta_side="query")
    params = params_of(config)
    _, p = similarity(params, config, QUERY, ANCHORS)
    a, b = numpy_angles(params, QUERY), numpy_angles(params, ANCHORS)
    psi = feature_states(gate.feature_map(config), jnp.asarray(a, jnp.float32), params["theta"])
    phi = feature_states(gate.feature_map(config), jnp.asarray(b, jnp.float32), 0 * params["theta"])
    expected = np.abs(np.float64(psi) @ np.float64(phi).T) ** 2
    np.testing.assert_allclose(p, expected, atol=BUDGET)


def test_log_fidelity_is_the_log_of_the_fidelity():
    params = params_of(settings())
    raw, p = similarity(params, settings(score="log_fidelity"), QUERY, ANCHORS)
    np.testing.assert_allclose(raw, np.log(np.float64(p) + 1e-6), atol=EXACT)


def test_angles_lie_in_their_range_and_spread():
    """Without the factor sqrt(D) all angles would be near 0 and every fidelity near 1."""
    config = settings(angle_range=1.5)
    width, params = 768, gate.init_gate(jax.random.key(0), config, 768, TASKS)
    vectors = draw(64, width)
    found = np.asarray(gate.angles(params, config, vectors, "query"))
    assert found.shape == (64, QUBITS) and np.abs(found).max() <= 1.5
    # Each input of tanh has about unit variance: tanh of it has a standard deviation of 0.63.
    assert 0.8 < found.std() < 1.1
    np.testing.assert_allclose(
        found, gate.angles(params, config, 1000.0 * vectors, "query"), atol=EXACT
    )
    fidelities = np.asarray(similarity(params, config, vectors, vectors)[1])
    assert fidelities[~np.eye(64, dtype=bool)].mean() < 0.9


def test_angle_maps_without_parameters():
    vectors = draw(2, 14)
    scaled = np.sqrt(14) * np.float64(vectors)
    scaled /= np.linalg.norm(np.float64(vectors), axis=1, keepdims=True)
    first = gate.angles({}, settings(angle_map="first_q"), vectors, "query")
    np.testing.assert_allclose(first, np.pi * np.tanh(scaled[:, :3]), atol=EXACT)
    pool = gate.angles({}, settings(angle_map="pool"), vectors, "query")
    means = scaled[:, :12].reshape(2, 3, 4).mean(2) * 2  # sqrt(4) keeps the variance
    np.testing.assert_allclose(pool, np.pi * np.tanh(means), atol=EXACT)
    for angle_map in ("first_q", "pool"):
        assert "map" not in params_of(settings(angle_map=angle_map))


def test_separate_maps_tell_the_sides_apart():
    config = settings(angle_map="separate")
    params = params_of(config)
    for side, name in (("query", "map"), ("anchor", "anchor_map")):
        found = gate.angles(params, config, QUERY, side)
        np.testing.assert_allclose(found, numpy_angles(params, QUERY, name), atol=EXACT)


def numpy_cosine(a, b):
    a, b = np.float64(a), np.float64(b)
    return a @ b.T / np.linalg.norm(a, axis=1)[:, None] / np.linalg.norm(b, axis=1)


def test_amplitude_fidelity_is_the_squared_cosine():
    config = settings(encoding="amplitude", num_qubits=4)
    _, p = similarity({}, config, QUERY, ANCHORS)
    np.testing.assert_allclose(p, numpy_cosine(QUERY, ANCHORS) ** 2, atol=EXACT)


def test_cosine_gate():
    raw, p = similarity({}, settings(kind="cosine", encoding="amplitude"), QUERY, ANCHORS)
    np.testing.assert_allclose(raw, numpy_cosine(QUERY, ANCHORS), atol=EXACT)
    np.testing.assert_allclose(p, (1 + numpy_cosine(QUERY, ANCHORS)) / 2, atol=EXACT)
    params = params_of(settings(kind="cosine"))
    raw, _ = similarity(params, settings(kind="cosine"), QUERY, ANCHORS)
    expected = numpy_cosine(numpy_angles(params, QUERY), numpy_angles(params, ANCHORS))
    np.testing.assert_allclose(raw, expected, atol=BUDGET)


def test_gaussian_kernel_gate():
    """exp(-gamma |a - b|^2), of the angles or of unit vectors."""
    config = settings(kind="rbf", kernel_width=0.7, score="log_fidelity")
    params = params_of(config)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(
        jnp.shape, params_of(settings(kind="cosine"))
    )

    def kernel(a, b):
        return np.exp(-0.7 * ((a[:, None] - b[None]) ** 2).sum(-1))

    evidence, p = similarity(params, config, QUERY, ANCHORS)
    expected = kernel(numpy_angles(params, QUERY), numpy_angles(params, ANCHORS))
    np.testing.assert_allclose(p, expected, atol=BUDGET)
    np.testing.assert_allclose(evidence, np.log(expected + gate.FIDELITY_FLOOR), rtol=1e-4)
    _, p = similarity(
        {}, settings(kind="rbf", encoding="amplitude", kernel_width=0.7), QUERY, ANCHORS
    )
    expected = np.exp(-1.4 * (1 - numpy_cosine(QUERY, ANCHORS)))
    np.testing.assert_allclose(p, expected, atol=EXACT)


def test_projected_kernel_gate_against_reduced_density_matrices():
    """exp(-gamma sum_j |rho_j(a) - rho_j(b)|_F^2) with rho_j the 2 x 2 state of qubit j."""
    config = settings(kind="pqk", kernel_width=0.7)
    params = params_of(config)
    _, p = similarity(params, config, QUERY, ANCHORS)

    def reduced(vectors):
        states = feature_states(
            gate.feature_map(config),
            jnp.asarray(numpy_angles(params, vectors), jnp.float32),
            params["theta"],
        )
        states = np.complex128(states).reshape(-1, *[2] * QUBITS)
        return np.stack(
            [
                np.einsum("niab,njab->nij", moved, moved.conj())
                for moved in (np.moveaxis(states, 1 + j, 1) for j in range(QUBITS))
            ],
            axis=1,
        )

    a, b = reduced(QUERY), reduced(ANCHORS)
    distance = (np.abs(a[:, None] - b[None]) ** 2).sum((2, 3, 4))
    np.testing.assert_allclose(p, np.exp(-0.7 * distance), atol=BUDGET)


def test_mlp_and_attention_against_numpy():
    scaled = [
        np.sqrt(WIDTH) * np.float64(v) / np.linalg.norm(np.float64(v), axis=1, keepdims=True)
        for v in (QUERY, ANCHORS)
    ]
    params = params_of(settings(kind="mlp"))
    a, b = (np.tanh(v @ np.float64(params["map"])) for v in scaled)
    raw, p = similarity(params, settings(kind="mlp"), QUERY, ANCHORS)
    np.testing.assert_allclose(raw, (a * np.float64(params["out"])) @ b.T, atol=BUDGET)
    np.testing.assert_allclose(p, 1 / (1 + np.exp(-np.float64(raw))), atol=EXACT)
    config = settings(kind="attention", num_qubits=8)
    params = params_of(config)
    a, b = scaled[0] @ np.float64(params["map"]), scaled[1] @ np.float64(params["anchor_map"])
    raw, _ = similarity(params, config, QUERY, ANCHORS)
    assert params["map"].shape == (WIDTH, 4)
    np.testing.assert_allclose(raw, a @ b.T / 2, atol=BUDGET)


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
