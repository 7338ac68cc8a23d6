"""The feature circuit against the generic simulator, PennyLane, closed forms and an MPS oracle.

Error budget: a state is built from L Q rotations whose angle, sine and cosine are each rounded a
few times, and a fidelity doubles the error of the overlap: below 8 L Q eps, eps = 1.2e-7 or
2.2e-16.
"""

import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkd_jax.errors import ConfigError
from qkd_jax.quantum import (
    FeatureMap,
    apply,
    feature_circuit,
    feature_state,
    fidelity,
    fidelity_matrix,
    init_theta,
    parameter_shift,
    separate_parameters,
    to_pennylane,
)

# Most of a test's time is XLA's optimiser, which these small problems do not repay.
quick_jit = functools.partial(
    jax.jit, static_argnums=0, compiler_options={"xla_backend_optimization_level": 0}
)
fidelities = quick_jit(fidelity_matrix)
state_of = quick_jit(feature_state)


def budget(feature_map, eps=2.2e-16):
    return 8 * feature_map.num_layers * feature_map.num_qubits * eps


def problem(feature_map, batch=3, tasks=2, dtype=np.float64, seed=0):
    """angles_a [B, Q], angles_b [T, Q], theta [L, Q], another theta [L, Q]."""
    generator = np.random.default_rng(seed)
    qubits, layers = feature_map.num_qubits, feature_map.num_layers
    shapes = [(batch, qubits), (tasks, qubits), (layers, qubits), (layers, qubits)]
    return [jnp.asarray(generator.uniform(-1.5, 1.5, shape).astype(dtype)) for shape in shapes]


def rotation_matrix(name, angle):
    c, s = np.cos(angle / 2), np.sin(angle / 2)
    return {
        "RX": np.array([[c, -1j * s], [-1j * s, c]]),
        "RY": np.array([[c, -s], [s, c]]),
        "RZ": np.array([[c - 1j * s, 0], [0, c + 1j * s]]),
    }[name]


def dense_states(feature_map, angles, theta):
    """Gate by gate in NumPy, each gate the middle of a Kronecker product: [n, 2**Q]."""
    states = []
    for row in np.asarray(angles):
        parameters = np.concatenate([row, np.asarray(theta).reshape(-1)])
        state = np.eye(1, 2**feature_map.num_qubits)[0]
        for gate in feature_circuit(feature_map).gates:
            parts = state.reshape(2 ** gate.wires[0], 2 * (len(gate.wires) == 1) or 4, -1)
            if gate.name == "CNOT":
                state = parts[:, [0, 1, 3, 2]].reshape(-1)
            else:
                matrix = rotation_matrix(gate.name, parameters[gate.parameter])
                state = np.einsum("zx,lxr->lzr", matrix, parts).reshape(-1)
        states.append(state)
    return np.stack(states)


def mps_fidelity(angles_a, angles_b, theta_a, theta_b):
    """|<psi|phi>|^2 of the literal re-uploading circuit as matrix-product states, linear in Q."""

    def rotation(angle):
        c, s = np.cos(angle / 2), np.sin(angle / 2)
        return np.array([[c, -s], [s, c]])

    def sites(angles, theta):
        chain = np.zeros((2, 2, 2, 2))  # [bit before, in, out, bit after]
        for before, x in itertools.product((0, 1), repeat=2):
            chain[before, x, x ^ before, x ^ before] = 1
        result = [np.array([1.0, 0.0]).reshape(1, 2, 1) for _ in angles]
        for row in theta:
            for j, site in enumerate(result):
                site = np.einsum("zx,lxr->lzr", rotation(angles[j] + row[j]), site)
                site = np.einsum("pxyn,lxr->plynr", chain, site)
                left, bond, _, after, right = site.shape
                result[j] = site.reshape(left * bond, 2, after * right)
            result[0] = result[0][: result[0].shape[0] // 2]  # nothing before qubit 0: bit 0
            last = result[-1]
            result[-1] = last.reshape(last.shape[0], 2, 2, -1).sum(2)  # nobody reads the last bit
        return result

    environment = np.ones((1, 1))
    for a, b in zip(sites(angles_a, theta_a), sites(angles_b, theta_b), strict=True):
        environment = np.einsum("lm,lxr,mxs->rs", environment, a, b, optimize=True)
    return environment.item() ** 2


FORMS = {
    1: [(1,), (3,), (2, True, "z")],
    2: [(1,), (2,), (3,), (2, False), (2, True, "x")],
    3: [(1,), (2,), (3,), (3, False), (1, True, "x"), (3, False, "z")],
    5: [(1,), (2,), (3,), (4,), (2, False), (2, True, "z"), (3, False, "x")],
    9: [(2,), (3, True, "z")],
    12: [(2,), (3,)],
}


@quick_jit
def every_form(feature_map, a, b, theta, other):
    """States of a, and fidelities with shared, separate and uncut theta."""
    literal = dataclasses.replace(feature_map, cut_tail=False)
    return (
        jax.vmap(lambda angles: feature_state(feature_map, angles, theta))(a),
        fidelity_matrix(feature_map, a, b, theta),
        fidelity_matrix(feature_map, a, b, theta, other),
        fidelity_matrix(literal, a, b, theta),
    )


@pytest.mark.parametrize("num_qubits", FORMS)
def test_fast_forms_equal_dense_states(num_qubits):
    for form in FORMS[num_qubits]:
        feature_map = FeatureMap(num_qubits, *form)
        with jax.enable_x64(True):
            a, b, theta, other = problem(feature_map)
            found = every_form(feature_map, a, b, theta, other)
        assert jnp.iscomplexobj(found[0]) == (feature_map.last_axis != "y")
        psi, phi, phi_other = (
            dense_states(feature_map, *x) for x in ((a, theta), (b, theta), (b, other))
        )
        same, changed = (np.abs(psi.conj() @ states.T) ** 2 for states in (phi, phi_other))
        for array, expected in zip(found, (psi, same, changed, same), strict=True):
            assert np.finfo(array.dtype).eps < 1e-15
            np.testing.assert_allclose(
                array, expected, rtol=0, atol=budget(feature_map), err_msg=str(feature_map)
            )


@pytest.mark.parametrize("form", [(9, 2), (4, 3, True, "x")])
def test_fast_forms_equal_the_general_simulator(form):
    feature_map = FeatureMap(*form)
    (angles, *_), _, theta, _ = problem(feature_map, 1, 1, np.float32)
    circuit = feature_circuit(feature_map)
    parameters = jnp.concatenate([angles, theta.reshape(-1)])
    expected = jax.jit(apply, static_argnums=0)(circuit, parameters)
    found = state_of(feature_map, angles, theta)
    assert found.dtype == expected.dtype
    np.testing.assert_allclose(found, expected, rtol=0, atol=budget(feature_map, 1.2e-7))


@pytest.mark.parametrize("form", [(9, 2), (12, 3), (4, 4), (9, 1), (5, 2, True, "z")])
def test_single_precision_within_the_error_budget(form):
    feature_map = FeatureMap(*form)
    a, b, theta, _ = problem(feature_map, dtype=np.float32)
    single = fidelities(feature_map, a, b, theta)
    assert single.dtype == jnp.float32
    psi, phi = dense_states(feature_map, a, theta), dense_states(feature_map, b, theta)
    tolerance = budget(feature_map, 1.2e-7)
    np.testing.assert_allclose(single, np.abs(psi.conj() @ phi.T) ** 2, rtol=0, atol=tolerance)
    state = state_of(feature_map, a[0], theta)
    np.testing.assert_allclose(state, psi[0], rtol=0, atol=tolerance)
    assert abs(np.linalg.norm(state) - 1) < tolerance


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_twenty_qubits_equal_matrix_product_states(num_layers):
    feature_map = FeatureMap(20, num_layers)
    with jax.enable_x64(True):
        a, b, theta, other = problem(feature_map, batch=2, tasks=1)
        a = b + 0.2 * a  # close angles: fidelities that are not all near zero
        for theta_b, used in ((None, theta), (other, other)):
            found = np.asarray(fidelities(feature_map, a, b, theta, theta_b))
            expected = [[mps_fidelity(x, y, theta, used) for y in b] for x in a]
            np.testing.assert_allclose(found, expected, rtol=0, atol=budget(feature_map))
            if theta_b is None:
                assert found.min() > 1e-3


@pytest.mark.filterwarnings("ignore")  # PennyLane's own deprecations
@pytest.mark.parametrize("form", [(3, 2), (4, 3), (3, 2, True, "z"), (3, 2, True, "x")])
def test_fidelity_and_gradients_equal_pennylane(form):
    import pennylane as qml

    feature_map = FeatureMap(*form)
    node = to_pennylane(feature_circuit(feature_map), diff_method="backprop")
    with jax.enable_x64(True):
        a, b, theta, _ = (np.asarray(x) for x in problem(feature_map, 1, 1))

        def fast(a, b, theta):
            return fidelity_matrix(feature_map, a[None], b[None], theta)[0, 0]

        value, gradients = jax.jit(jax.value_and_grad(fast, argnums=(0, 1, 2)))(
            jnp.asarray(a[0]), jnp.asarray(b[0]), jnp.asarray(theta)
        )

    def textbook(a, b, theta):
        psi = node(qml.numpy.concatenate([a, theta.reshape(-1)]))
        phi = node(qml.numpy.concatenate([b, theta.reshape(-1)]))
        return qml.numpy.abs(qml.numpy.sum(qml.numpy.conj(psi) * phi)) ** 2

    arguments = [qml.numpy.array(x, requires_grad=True) for x in (a[0], b[0], theta)]
    np.testing.assert_allclose(value, textbook(*arguments), rtol=0, atol=1e-13)
    for found, expected in zip(gradients, qml.grad(textbook)(*arguments), strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def test_fidelity_is_symmetric_bounded_and_one_on_the_diagonal():
    feature_map = FeatureMap()
    a, b, theta, _ = problem(feature_map, 16, 16, np.float32)
    tolerance = budget(feature_map, 1.2e-7)
    p = np.asarray(fidelities(feature_map, a, b, theta))
    assert p.min() >= 0 and p.max() <= 1 + tolerance
    transposed = np.asarray(fidelities(feature_map, b, a, theta)).T
    np.testing.assert_allclose(p, transposed, rtol=0, atol=tolerance)
    own = np.diag(np.asarray(fidelities(feature_map, a, a, theta)))
    np.testing.assert_allclose(own, 1, rtol=0, atol=tolerance)


@functools.partial(quick_jit, static_argnums=(0, 1))
def theta_gradient(feature_map, one_sided, a, b, theta):
    """d (weighted sum of fidelities) / d theta: [L, Q]."""
    weights = jnp.linspace(0.5, 1.5, a.shape[0] * b.shape[0]).reshape(a.shape[0], -1)

    def loss(t):
        theta_b = jnp.zeros_like(t) if one_sided else None
        return jnp.sum(weights * fidelity_matrix(feature_map, a, b, t, theta_b))

    return jax.grad(loss)(theta)


# Rounding alone leaves gradients of size budget / weights; a live theta gives more than 1e-4.
@pytest.mark.parametrize("cut_tail", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_which_thetas_can_learn(cut_tail):
    def gradient(num_layers, reupload=True, axis="y", one_sided=False):
        feature_map = FeatureMap(5, num_layers, reupload, axis, cut_tail)
        a, b, theta, _ = problem(feature_map, 4, 3)
        found = theta_gradient(feature_map, one_sided, 0.5 * a, b, theta)
        return np.abs(found).max(axis=1)

    with jax.enable_x64(True):
        dead, alive = 1e-13, 1e-4
        assert gradient(1).max() < dead
        two = gradient(2)
        assert two[0] > alive and two[1] < dead
        three = gradient(3)
        assert three[:2].min() > alive and three[2] < dead
        for num_layers in (1, 3):
            assert gradient(num_layers, reupload=False).max() < dead
            assert gradient(num_layers, one_sided=True).min() > alive
            assert gradient(num_layers, axis="x").min() > alive
        assert gradient(1, axis="z").max() < dead
        assert gradient(2, axis="z").min() > alive
        if cut_tail:
            assert gradient(1).max() == gradient(2)[1] == gradient(3, reupload=False).max() == 0


def test_one_layer_has_a_closed_form():
    """p = prod_j cos^2((a_j - b_j) / 2) with one layer, or at any depth without re-uploading."""
    with jax.enable_x64(True):
        for form in ((7, 1), (7, 1, False), (7, 3, False)):
            feature_map = FeatureMap(*form)
            a, b, theta, _ = problem(feature_map)
            expected = np.prod(np.cos((a[:, None] - b[None]) / 2) ** 2, axis=-1)
            found = fidelities(feature_map, a, b, theta)
            np.testing.assert_allclose(found, expected, rtol=0, atol=budget(feature_map))


def test_parameter_shift_equals_autodiff():
    """Through shared data angles too: the copies' shifts add up."""
    feature_map = FeatureMap(3, 2)
    circuit, index = separate_parameters(feature_circuit(feature_map))
    with jax.enable_x64(True):
        a, b, theta, _ = problem(feature_map, 1, 1)
        phi = state_of(feature_map, b[0], theta)
        parameters = jnp.concatenate([a[0], theta.reshape(-1)])
        by_gate = parameter_shift(
            lambda p: fidelity(apply(circuit, p), phi), parameters[jnp.array(index)]
        )
        shifted = jnp.zeros_like(parameters).at[jnp.array(index)].add(by_gate)

        def loss(a, theta):
            return fidelity(feature_state(feature_map, a, theta), phi)

        by_angle, by_theta = jax.jit(jax.grad(loss, (0, 1)))(a[0], theta)
    expected = np.concatenate([by_angle, by_theta.reshape(-1)])
    np.testing.assert_allclose(shifted, expected, rtol=0, atol=1e-13)
    assert np.abs(expected).min() > 1e-6


def intermediate_sizes(jaxpr):
    for equation in jaxpr.eqns:
        yield from (variable.aval.size for variable in equation.outvars)
        for value in equation.params.values():
            if hasattr(value, "jaxpr"):
                yield from intermediate_sizes(value.jaxpr)


@pytest.mark.parametrize("num_layers", [1, 2, 3])
@pytest.mark.parametrize("separate_theta", [False, True])
def test_a_batch_prepares_b_plus_t_states(num_layers, separate_theta):
    """No array anywhere is as large as B T states, and two layers need no whole state at all."""
    feature_map = FeatureMap(10, num_layers)
    a, b, theta, other = problem(feature_map, 16, 16, np.float32)
    theta_b = other if separate_theta else None
    jaxpr = jax.make_jaxpr(lambda *x: fidelity_matrix(feature_map, *x, theta_b))(a, b, theta)
    largest = max(intermediate_sizes(jaxpr.jaxpr))
    if num_layers == 3:  # at most each state beside its reversed copy
        assert largest <= 2 * (16 + 16) * 2**10
    else:
        assert largest <= 4 * (16 + 16) * 2**5


def test_jit_and_vmap_equal_the_plain_call():
    feature_map = FeatureMap(3, 3)
    a, b, theta, _ = problem(feature_map, 4, 3, np.float32)
    tolerance = budget(feature_map, 1.2e-7)
    plain = fidelity_matrix(feature_map, a, b, theta)  # eager
    jitted = jax.jit(fidelity_matrix, static_argnums=0)(feature_map, a, b, theta)
    np.testing.assert_allclose(jitted, plain, rtol=0, atol=tolerance)
    one_by_one = jax.vmap(lambda x: fidelity_matrix(feature_map, x[None], b, theta)[0])(a)
    np.testing.assert_allclose(one_by_one, plain, rtol=0, atol=tolerance)


def test_a_feature_map_of_numpy_values_equals_its_plain_twin():
    plain = FeatureMap(3, 2, False, "z", True)
    found = FeatureMap(np.uint8(3), np.array(2), np.False_, np.str_("z"), np.True_)
    assert found == plain and hash(found) == hash(plain) and repr(found) == repr(plain)
    assert found.axis(np.int64(1)) == "z" and not found.encodes_data(np.int64(1))
    assert feature_circuit(found) == feature_circuit(plain)


def test_angles_of_unlike_low_precision_meet_in_single_precision():
    angles, theta = jnp.ones((1, 2), jnp.bfloat16), jnp.ones((2, 2), jnp.float16)
    assert fidelity_matrix(FeatureMap(2), angles, angles, theta).dtype == jnp.float32


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: FeatureMap(num_qubits=0),
            "FeatureMap.num_qubits: expected an integer from 1 to 30, found 0",
        ),
        (lambda: FeatureMap(num_qubits=True), "found True"),
        (lambda: FeatureMap(num_layers=1.5), "num_layers: expected an integer >= 1, found 1.5"),
        (lambda: FeatureMap(num_layers=np.float64(2)), "found np.float64(2.0)"),
        (lambda: FeatureMap(last_axis="Y"), "last_axis: expected 'x', 'y' or 'z', found 'Y'"),
        (lambda: FeatureMap(last_axis=np.zeros(2)), "last_axis: expected 'x', 'y' or 'z', found"),
        (lambda: FeatureMap(reupload=1), "reupload: expected True or False, found 1"),
        (lambda: FeatureMap().axis(2), "layer: expected an integer from 0 to 1, found 2"),
        (lambda: FeatureMap().encodes_data(-1), "layer: expected an integer from 0 to 1, found -1"),
        (
            lambda: feature_state(FeatureMap(3), jnp.zeros((2, 3)), jnp.zeros((2, 3))),
            "angles: expected shape [3], found [2, 3]; batch with jax.vmap",
        ),
        (
            lambda: feature_state(FeatureMap(3), jnp.zeros(3), jnp.zeros((1, 3))),
            "theta: expected shape [2, 3], found [1, 3]",
        ),
        (
            lambda: fidelity_matrix(
                FeatureMap(3), jnp.zeros((4, 3)), jnp.zeros((5, 2)), jnp.zeros((2, 3))
            ),
            "angles_b: expected shape [batch, 3], found [5, 2]",
        ),
        (
            lambda: fidelity_matrix(
                FeatureMap(3), jnp.zeros((4, 3), int), jnp.zeros((5, 3)), jnp.zeros((2, 3))
            ),
            "angles_a: expected real angles in radians, found int32",
        ),
    ],
)
def test_errors_say_what_is_wrong(make, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        make()


def test_init_theta(key):
    theta = init_theta(key, FeatureMap(9, 50), scale=0.2)
    assert theta.shape == (50, 9) and theta.dtype == jnp.float32
    # 450 normal values: the standard deviation of their mean square root is 0.2 / sqrt(900).
    assert abs(float(jnp.std(theta)) - 0.2) < 5 * 0.2 / 30
