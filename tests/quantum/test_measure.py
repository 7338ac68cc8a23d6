"""Measurements against dense Pauli operators in NumPy, and shots against their own variance."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkd_jax.errors import ConfigError
from qkd_jax.quantum import (
    Circuit,
    amplitude_state,
    apply,
    bloch_vectors,
    expectation_z,
    fidelity,
    parameter_shift,
    projected_kernel,
    sample,
    sample_expectation_z,
    sample_fidelity,
)

pytestmark = pytest.mark.floor

PAULI = np.array([[[0, 1], [1, 0]], [[0, -1j], [1j, 0]], [[1, 0], [0, -1]]])

# Sums of at most 2**5 rounded squares of a unit vector: 32 eps.
TOLERANCE = 32 * 1.2e-7


def random_state(num_qubits, is_complex, seed=0):
    generator = np.random.default_rng(seed)
    state = generator.normal(size=2**num_qubits)
    if is_complex:
        state = state + 1j * generator.normal(size=state.shape)
    return (state / np.linalg.norm(state)).astype(np.complex64 if is_complex else np.float32)


@pytest.mark.parametrize("is_complex", [False, True])
@pytest.mark.parametrize("num_qubits", [1, 2, 5])
def test_bloch_vectors_equal_dense_expectations(num_qubits, is_complex):
    state = random_state(num_qubits, is_complex)
    wide = state.astype(np.complex128)
    expected = np.zeros((num_qubits, 3))
    for j, axis in np.ndindex(num_qubits, 3):
        operator = np.kron(np.eye(2**j), np.kron(PAULI[axis], np.eye(2 ** (num_qubits - j - 1))))
        expected[j, axis] = (wide.conj() @ operator @ wide).real
    found = jax.jit(bloch_vectors)(jnp.asarray(state))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(expectation_z(jnp.asarray(state)), expected[:, 2], atol=TOLERANCE)
    assert is_complex or not found[:, 1].any()


def test_fidelity_of_real_and_complex_states():
    psi, phi = random_state(4, False), random_state(4, True, 1)
    expected = np.abs(np.vdot(psi, phi)) ** 2
    found = fidelity(jnp.asarray(psi), jnp.asarray(phi))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(fidelity(jnp.asarray(phi), jnp.asarray(phi)), 1, atol=TOLERANCE)
    gradient = jax.grad(lambda p: fidelity(p, jnp.array([0.0, 1.0])))(jnp.array([1.0, 0.0]))
    np.testing.assert_array_equal(gradient, 0)  # finite at fidelity 0


def test_projected_kernel_is_a_gaussian_of_reduced_density_matrices():
    states_a = [random_state(3, True, seed) for seed in range(4)]
    states_b = [random_state(3, True, seed) for seed in range(3, 6)]

    def reduced(state):  # [Q, 2, 2] by partial traces
        t = state.astype(np.complex128).reshape(2, 2, 2)
        traces = ("aij,bij->ab", "iaj,ibj->ab", "ija,ijb->ab")
        return np.stack([np.einsum(trace, t, t.conj()) for trace in traces])

    expected = [
        [np.exp(-0.7 * np.sum(np.abs(reduced(a) - reduced(b)) ** 2)) for b in states_b]
        for a in states_a
    ]
    bloch_a, bloch_b = (
        jnp.stack([bloch_vectors(jnp.asarray(s)) for s in x]) for x in (states_a, states_b)
    )
    found = projected_kernel(bloch_a, bloch_b, 0.7)
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)
    assert float(found[3, 0]) == 1.0  # the state that is in both


@pytest.mark.parametrize("size", [3, 8, 11])
def test_amplitude_state_cuts_or_pads_and_normalises(size):
    vectors = np.random.default_rng(0).normal(size=(2, 4, size)).astype(np.float32)
    expected = np.zeros((2, 4, 8))
    expected[..., : min(size, 8)] = vectors[..., :8]
    expected /= np.linalg.norm(expected, axis=-1, keepdims=True)
    found = amplitude_state(jnp.asarray(vectors), 3)
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_amplitude_state_of_extreme_vectors(scale):
    found = amplitude_state(jnp.array([3.0, 4.0], jnp.float32) * scale, 1)
    np.testing.assert_allclose(found, [0.6, 0.8], rtol=0, atol=1e-6)


# Of small vectors: 4 squares and 3 sums, each off by eps / 2 and all halved by the root, then the
# root, its reciprocal and the product: (4 / 2 + 3) eps / 2. Powers of two add nothing.
ULPS = 2.5


@pytest.mark.parametrize("program", ["eager", "argument", "constant", "vmap"])
@pytest.mark.parametrize("is_complex", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, jnp.bfloat16])
def test_amplitude_state_is_right_for_every_finite_vector(dtype, is_complex, program):
    """From near the largest number down to vectors whose smaller entries are just normal."""
    if is_complex and dtype not in (np.float32, np.float64):
        return
    info = jnp.finfo(dtype)
    top, one, bottom = float(info.max), 1.0, float(info.tiny) * 8
    with jax.enable_x64(dtype == np.float64):
        for scale in (top, top / 2, top**0.6, one, bottom**0.6, bottom):
            vectors = (np.array([1, 0.3, -0.75, 1]) * scale).astype(dtype)
            if is_complex:  # |v| overflows although neither component does
                vectors = vectors + 1j * vectors[::-1]
            wide = vectors.astype(np.clongdouble if is_complex else np.longdouble)
            wide = wide / np.abs(wide).max()
            expected = wide / np.sqrt(np.sum(np.abs(wide) ** 2))
            found = {
                "eager": lambda v: amplitude_state(v, 2),
                "argument": jax.jit(lambda v: amplitude_state(v, 2)),
                "constant": lambda v: jax.jit(lambda: amplitude_state(v, 2))(),
                "vmap": lambda v: jax.vmap(lambda row: amplitude_state(row, 2))(v[None])[0],
            }[program](jnp.asarray(vectors))
            assert found.dtype == vectors.dtype
            # A complex vector has twice as many squares: (8 / 2 + 3) eps / 2. Low precision is
            # computed in float32 and rounds once, eps / 2.
            ulps = (3.5 if is_complex else ULPS) if info.bits >= 32 else 1
            error = np.abs(np.asarray(found).astype(wide.dtype) - expected)
            assert np.all(error <= ulps * float(info.eps) * np.abs(expected)), (scale, found)


def test_amplitude_state_of_numbers_below_the_smallest_normal():
    """The CPU flushes them: alone they are the zero state, beside normal ones they are zeros."""
    tiny = float(jnp.finfo(jnp.float32).tiny)
    for value in (1e-45, 1e-40, tiny / 2):
        denormal = jnp.full(4, np.float32(value))
        np.testing.assert_array_equal(amplitude_state(denormal, 2), 0)
        np.testing.assert_array_equal(jax.jit(amplitude_state, static_argnums=1)(denormal, 2), 0)
    found = amplitude_state(jnp.array([2 * tiny, tiny / 2], jnp.float32), 1)
    np.testing.assert_allclose(found, [1, 0], rtol=0, atol=1e-7)
    # float16 is widened first, so its own smallest number is normal by then.
    smallest = jnp.full(4, jnp.finfo(jnp.float16).smallest_subnormal, jnp.float16)
    np.testing.assert_array_equal(amplitude_state(smallest, 2), 0.5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, complex(0, np.inf), complex(1, np.nan)])
def test_amplitude_state_of_what_is_not_finite_is_nan(bad):
    assert np.isnan(amplitude_state(jnp.array([1.0, bad]), 2)).all()
    np.testing.assert_array_equal(amplitude_state(jnp.array([3.0, 0.0, bad]), 1), [1, 0])  # is cut


# At 1e37 and beyond the gradient itself, of size 1 / |v|, is below the smallest normal number.
@pytest.mark.parametrize("scale", [1e-37, 1e-20, 1.0, 1e20, 1e36])
def test_amplitude_state_gradient_at_every_scale(scale):
    vector = (np.array([3, -1, 2, 0.5]) * scale).astype(np.float32)
    weights = np.array([0.3, -1, 0.5, 2], np.float32)
    wide = vector.astype(np.float64)
    norm = np.linalg.norm(wide)
    expected = (weights - wide * (wide @ weights) / norm**2) / norm
    for batch in (vector, np.stack([vector, vector])):
        found = jax.jit(jax.grad(lambda v: jnp.sum(amplitude_state(v, 2) @ weights)))(batch)
        # About 12 rounded steps of terms as large as |weights| / |v|.
        np.testing.assert_allclose(
            np.asarray(found, np.float64).reshape(-1, 4)[0] * norm,
            expected * norm,
            rtol=0,
            atol=12 * 1.2e-7 * np.linalg.norm(weights),
        )


def test_amplitude_state_gradients():
    def entry(v):
        return amplitude_state(v, 2)[0]

    # d (v_0 / |v|) / dv = e_0 / |v| - v_0 v / |v|^3
    gradient = jax.grad(entry)(jnp.array([3.0, 4.0, 0.0, 0.0]))
    np.testing.assert_allclose(gradient, [16 / 125, -12 / 125, 0, 0], rtol=0, atol=1e-6)
    zero = jnp.zeros(4)
    np.testing.assert_array_equal(amplitude_state(zero, 2), 0)
    assert bool(jnp.all(jnp.isfinite(jax.grad(entry)(zero))))


def test_samples_follow_the_probabilities(key):
    """Every count within five standard deviations; outcomes of probability zero never occur."""
    shots = 20_000
    state = np.array(random_state(3, True))
    state[[0, 3, 7]] = 0
    state /= np.linalg.norm(state)
    probability = np.abs(state) ** 2
    outcomes = jax.jit(sample, static_argnums=2)(key, jnp.asarray(state), shots)
    assert outcomes.shape == (shots,) and jnp.issubdtype(outcomes.dtype, jnp.integer)
    counts = np.bincount(np.asarray(outcomes), minlength=8)
    deviation = np.sqrt(shots * probability * (1 - probability))
    assert np.all(np.abs(counts - shots * probability) <= 5 * deviation)
    assert counts[[0, 3, 7]].sum() == 0
    np.testing.assert_array_equal(outcomes, sample(key, jnp.asarray(state), shots))


STATE_READERS = {
    "expectation_z": expectation_z,
    "bloch_vectors": bloch_vectors,
    "fidelity, left": lambda state: fidelity(state, jnp.ones(2)),
    "fidelity, right": lambda state: fidelity(jnp.ones(2), state),
    "fidelity, both": lambda state: fidelity(state, state),
    "sample": lambda state: sample(jax.random.key(0), state, 2),
    "sample_expectation_z": lambda state: sample_expectation_z(jax.random.key(0), state, 2),
    "apply": lambda state: apply(Circuit(1, ()), jnp.zeros(0), state),
}
SHAPE = "state: expected shape [2**Q], found {}; batch with jax.vmap"


@pytest.mark.parametrize("read", STATE_READERS.values(), ids=STATE_READERS)
def test_what_is_no_state_is_refused_in_the_same_words(read):
    shapes = [(), (0,), (1,), (3,), (6,), (3, 4), (1, 2), (4, 1), (0, 4)]
    for state, message in [
        *((jnp.ones(shape), SHAPE.format(list(shape))) for shape in shapes),
        (np.ones((3, 4)), SHAPE.format([3, 4])),
        ([[1.0, 0.0]], SHAPE.format([1, 2])),
        ([1, 0], "state: expected floating or complex amplitudes, found int32"),
        (np.array([True, False]), "state: expected floating or complex amplitudes, found bool"),
        ([[1.0], [1.0, 0.0]], "state: expected an array of numbers, found [[1.0], [1.0, 0.0]]"),
        ("ab", "state: expected an array of numbers, found 'ab'"),
        (np.array([1.0, None]), "state: expected an array of numbers, found array("),
    ]:
        with pytest.raises(ConfigError, match=re.escape(message)):
            read(state)
    with pytest.raises(ConfigError, match=re.escape(SHAPE.format([3, 4]))):
        jax.jit(lambda state: read(state))(jnp.ones((3, 4)))
    with pytest.raises(ConfigError, match=re.escape(SHAPE.format([4, 2]))):
        jax.vmap(read)(jnp.ones((3, 4, 2)))


@pytest.mark.parametrize("read", STATE_READERS.values(), ids=STATE_READERS)
def test_states_may_be_lists_batched_and_of_any_precision(read):
    expected = read(jnp.array([0.6, 0.8]))
    np.testing.assert_array_equal(read([0.6, 0.8]), expected)
    batched = jax.jit(jax.vmap(lambda state: read(state)))(jnp.array([[0.6, 0.8]] * 3))
    np.testing.assert_allclose(batched, jnp.stack([expected] * 3), rtol=0, atol=TOLERANCE)
    for dtype in (jnp.bfloat16, jnp.float16):
        assert read(jnp.array([0.6, 0.8], dtype)).dtype == expected.dtype


def test_fidelity_of_unlike_precisions():
    psi, phi = jnp.array([0.6, 0.8], jnp.bfloat16), jnp.array([0.6, 0.8], jnp.float16)
    exact = np.dot(np.float64(psi), np.float64(phi)) ** 2
    np.testing.assert_allclose(fidelity(psi, phi), exact, rtol=0, atol=TOLERANCE)


NO_PROBABILITIES = [
    [0.0] * 4,
    [np.nan] * 4,
    [1.0, np.nan, 0, 0],
    [1e30] * 4,
    [1e-30] * 4,
    [np.inf, 0],
]


@pytest.mark.parametrize("state", NO_PROBABILITIES)
def test_a_state_without_probabilities_is_refused_where_its_values_are_known(key, state):
    """Inside `jit` they are not: indices stay in range, and estimates become NaN."""
    state = jnp.array(state)
    for read in (sample, sample_expectation_z):
        with pytest.raises(ConfigError, match="state: expected norm 1, found a squared norm of"):
            read(key, state, 3)
    outcomes = jax.jit(sample, static_argnums=2)(key, state, 100)
    assert outcomes.min() >= 0 and outcomes.max() < state.size
    assert np.isnan(jax.jit(sample_expectation_z, static_argnums=2)(key, state, 5)).all()


def test_an_index_is_in_range_even_if_the_random_number_rounds_to_one(key, monkeypatch):
    """Then it lies beyond every boundary of the search."""
    monkeypatch.setattr(jax.random, "uniform", lambda key, shape, dtype: jnp.ones(shape, dtype))
    np.testing.assert_array_equal(sample(key, jnp.array([0.5, 0.5, 0.5, 0.5]), 3), 3)


def test_low_precision_states_are_sampled_in_single_precision(key):
    """256 equal outcomes: sums in bfloat16 stop at 1 - 2**-8 and miss some of them for good."""
    outcomes = sample(key, jnp.full(256, 1 / 16, jnp.bfloat16), 20_000)
    assert len(np.unique(outcomes)) == 256  # each is missed with probability exp(-78)


@pytest.mark.parametrize("shots", [0, -1, True, np.True_, 2.0, np.float64(2), "2", None, 2**31])
def test_shots_are_an_integer_in_range(key, shots):
    message = f"shots: expected an integer from 1 to 2147483647, found {shots!r}"
    for draw in (sample, sample_expectation_z):
        with pytest.raises(ConfigError, match=re.escape(message)):
            draw(key, jnp.array([0.6, 0.8]), shots)
    with pytest.raises(ConfigError, match=re.escape(message)):
        sample_fidelity(key, jnp.array(0.5), shots)


@pytest.mark.parametrize("integer", [np.int64, np.uint8, np.array, jnp.array])
def test_shots_of_any_integer_type(key, integer):
    state, p = jnp.array([0.6, 0.8]), jnp.array([0.2, 0.7])
    for draw, subject in ((sample, state), (sample_expectation_z, state), (sample_fidelity, p)):
        found = draw(key, subject, integer(7))
        np.testing.assert_array_equal(found, draw(key, subject, 7))


def test_sampled_expectation_is_unbiased(key):
    shots, repeats = 50, 400
    state = jnp.asarray(random_state(3, False))
    keys = jax.random.split(key, repeats)
    estimates = jax.jit(jax.vmap(lambda k: sample_expectation_z(k, state, shots)))(keys)
    expected = expectation_z(state)
    deviation = np.sqrt((1 - np.square(expected)) / shots)
    assert np.all(np.abs(estimates.mean(0) - expected) < 5 * deviation / np.sqrt(repeats))
    # The relative deviation of a variance from n samples is about sqrt(2 / n).
    np.testing.assert_allclose(estimates.std(0), deviation, rtol=5 * np.sqrt(0.5 / repeats))


def test_sampled_fidelity_is_unbiased(key):
    shots, repeats = 40, 500
    p = jnp.array([[0.0, 0.02, 0.5], [0.9, 1.0, 1.0 + 1e-6]])
    draw = jax.jit(jax.vmap(lambda k: sample_fidelity(k, p, shots)))
    estimates = np.asarray(draw(jax.random.split(key, repeats)))
    exact = np.clip(p, 0, 1)
    deviation = np.sqrt(exact * (1 - exact) / shots)
    assert np.all(np.abs(estimates.mean(0) - exact) <= 5 * deviation / np.sqrt(repeats) + 1e-6)
    np.testing.assert_allclose(
        estimates.std(0), deviation, rtol=5 * np.sqrt(1 / repeats), atol=1e-6
    )
    assert np.all(estimates[:, 0, 0] == 0) and np.all(estimates[:, 1, 1:] == 1)


def test_sampled_fidelity_outside_of_its_range(key):
    p = jnp.array([-1e-6, 1 + 1e-6, 1 + 0.009, np.nan, 1.5, -0.5, np.inf, -np.inf])
    for draw in (sample_fidelity, jax.jit(sample_fidelity, static_argnums=2)):
        np.testing.assert_array_equal(draw(key, p, 9), [0, 1, 1] + [np.nan] * 5)
    low = sample_fidelity(key, jnp.array([0.5, 1.0], jnp.bfloat16), 1001)
    # In bfloat16 1001 shots would be 1000, and the fraction one of 256.
    assert float(low[0]) * 1001 == pytest.approx(round(float(low[0]) * 1001), abs=1e-3)
    assert low.dtype == jnp.float32 and float(low[1]) == 1
    for bad, found in (([0, 1], "int32"), ([True], "bool"), ([0.5j], "complex64")):
        with pytest.raises(ConfigError, match=f"fidelities: expected real .*, found {found}"):
            sample_fidelity(key, bad, 9)
    assert sample_fidelity(key, [0.5], 2**31 - 1).shape == (1,)


@pytest.mark.parametrize(
    "gamma", [-1.0, 0, 0.0, np.nan, np.inf, 1e300, True, 1j, [1.0], jnp.float32(-1), np.float64(-1)]
)
def test_a_gamma_that_is_no_width_is_refused(gamma):
    bloch = jnp.ones((2, 1, 3))
    message = f"gamma: expected one finite number above 0, found {gamma!r}"
    with pytest.raises(ConfigError, match=re.escape(message)):
        projected_kernel(bloch, bloch, gamma)
    with pytest.raises(ConfigError, match=re.escape(message)):  # known inside `jit` too
        jax.jit(lambda b: projected_kernel(b, b, gamma))(bloch)


def test_gamma_may_be_any_real_scalar_and_traced():
    a, b = jnp.zeros((1, 1, 3)), jnp.ones((1, 1, 3))
    for gamma in (2, np.int64(2), np.float64(2), jnp.array(2.0), jnp.array(2, jnp.bfloat16)):
        np.testing.assert_allclose(projected_kernel(a, b, gamma), np.exp(-3), rtol=1e-6)
    slope = jax.grad(lambda gamma: projected_kernel(a, b, gamma).sum())(2.0)
    np.testing.assert_allclose(slope, -1.5 * np.exp(-3), rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: fidelity(jnp.ones(2), jnp.ones(4)),
            "fidelity: expected two states of one size, found [2] and [4]",
        ),
        (
            lambda: amplitude_state(jnp.ones(2), 0),
            "num_qubits: expected an integer from 1 to 30, found 0",
        ),
        (lambda: amplitude_state(jnp.ones(2), True), "found True"),
        (lambda: amplitude_state(jnp.ones(2), 2.0), "found 2.0"),
        (lambda: amplitude_state(jnp.array([3, 4]), 1), "vectors: expected floating or complex"),
        (lambda: amplitude_state([True, False], 1), "found bool of shape [2]"),
        (lambda: amplitude_state(1.0, 1), "found float32 of shape []"),
        (lambda: amplitude_state(jnp.ones((2, 0)), 1), "found float32 of shape [2, 0]"),
        (lambda: amplitude_state(None, 1), "vectors: expected an array of numbers, found None"),
        (lambda: parameter_shift(jnp.sum, [1, 2]), "real angles in radians, found int32"),
        (lambda: parameter_shift(jnp.sum, 1.0), "parameters: expected shape [P], found []"),
        (
            lambda: projected_kernel(jnp.ones((2, 3)), jnp.ones((2, 3)), 1.0),
            "Bloch vectors [B, Q, 3] and [T, Q, 3], found [2, 3] and [2, 3]",
        ),
        (
            lambda: projected_kernel(jnp.ones((1, 2, 4)), jnp.ones((1, 2, 4)), 1.0),
            "found [1, 2, 4] and [1, 2, 4]",
        ),
        (
            lambda: projected_kernel(jnp.ones((1, 1, 3), int), jnp.ones((1, 1, 3)), 1.0),
            "bloch_a: expected real Bloch vectors, found int32",
        ),
    ],
)
def test_errors_say_what_is_wrong(make, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        make()
