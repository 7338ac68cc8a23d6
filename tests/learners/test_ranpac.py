"""RanPAC against plain solves in NumPy float64, and where float32 ends.

Error budget of a solve: the Gram matrix carries eps of its largest eigenvalue, and its Cholesky
factor as much again; the solution carries that over the smallest eigenvalue: `budget_of`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qkd_jax
from qkd_jax.engine import verbs
from qkd_jax.errors import ConfigError, DataError
from qkd_jax.learners import ranpac
from qkd_jax.learners.task_adapters import encode_with
from qkd_jax.nn.encode import encode
from qkd_jax.nn.inputs import Raw

EPS, SIZE = 1.2e-7, 20
SETTINGS = ("method=ranpac", f"ranpac.projection_dim={SIZE}", "max_task_images=8")


@pytest.fixture(scope="module")
def history(tiny):
    return tiny.run(tiny.backbone, tiny.config(*SETTINGS))


def relu_features(rows, columns, seed=0):
    """Hidden features as they are met: not negative, with one dominant direction."""
    generator = np.random.default_rng(seed)
    return np.maximum(generator.normal(0.5, 1.0, (rows, columns)), 0).astype(np.float32)


def numpy_errors(hidden, targets, fitted, held_out):
    """Mean squared errors by 17 solves, in float64."""
    a, y = np.float64(hidden[fitted]), np.float64(targets[fitted])
    errors = []
    for ridge in ranpac.RIDGES:
        solution = np.linalg.solve(a.T @ a + ridge * np.eye(a.shape[1]), a.T @ y)
        errors.append(np.mean((hidden[held_out] @ solution - targets[held_out]) ** 2))
    return np.array(errors)


@pytest.mark.parametrize("shape", [(15, 40), (60, 12)], ids=["fewer rows", "more rows"])
def test_held_out_errors_are_those_of_seventeen_solves(shape):
    """The smaller Gram matrix has a condition below 1e4 here: 1e4 eps = 1.2e-3 at most, and less
    since errors average over rows. The float64 solve itself is good down to lambda = 1e-8.
    """
    hidden = relu_features(*shape)
    targets = np.eye(3, dtype=np.float32)[np.arange(len(hidden)) % 3]
    fitted = np.arange(len(hidden)) % 5 != 2
    found = jax.jit(ranpac.held_out_errors)(hidden, targets, fitted, ~fitted)
    np.testing.assert_allclose(found, numpy_errors(hidden, targets, fitted, ~fitted), rtol=1e-3)


def test_padding_changes_no_error():
    """Rows that are neither fitted nor held out: more directions of eigenvalue zero."""
    hidden = relu_features(15, 40)
    targets = np.eye(3, dtype=np.float32)[np.arange(15) % 3]
    fitted = np.arange(15) < 12
    expected = numpy_errors(hidden, targets, fitted, ~fitted)
    wide = [np.concatenate([part, np.zeros_like(part)]) for part in (hidden, targets)]
    masks = [np.concatenate([part, np.zeros(15, bool)]) for part in (fitted, ~fitted)]
    found = jax.jit(ranpac.held_out_errors)(*wide, *masks)
    np.testing.assert_allclose(found, expected, rtol=1e-3)


def test_images_given_twice_keep_the_search_exact():
    """The same rows twice are the same regression with lambda / 2: half the rank, no noise."""
    once = relu_features(12, 40)
    hidden = np.concatenate([once, once, relu_features(4, 40, seed=1)])
    targets = np.eye(3, dtype=np.float32)[np.concatenate([np.arange(12) % 3] * 2 + [[0, 1, 2, 0]])]
    fitted = np.arange(28) < 24
    found = np.asarray(jax.jit(ranpac.held_out_errors)(hidden, targets, fitted, ~fitted))
    a, y = np.float64(once), np.float64(targets[:12])
    for error, ridge in zip(found, ranpac.RIDGES, strict=True):
        solution = a.T @ np.linalg.solve(a @ a.T + ridge / 2 * np.eye(12), y)
        expected = np.mean((hidden[24:] @ solution - targets[24:]) ** 2)
        np.testing.assert_allclose(error, expected, rtol=1e-3)


@pytest.mark.parametrize("ridge", [1e-1, 1e2, 1e8])
def test_the_solution_is_the_solve(ridge):
    hidden = np.float64(relu_features(60, SIZE))
    moments = hidden.T @ np.eye(5)[np.arange(60) % 5]
    gram = hidden.T @ hidden
    regular = gram + ridge * np.eye(SIZE)
    expected = np.linalg.solve(regular, moments)
    solve = jax.jit(ranpac.ridge_solution)
    found, taken = solve(jnp.float32(gram), jnp.float32(moments), jnp.float32(ridge))
    budget = 4 * EPS * np.linalg.cond(regular) * np.abs(expected).max()
    assert budget < 0.05 * np.abs(expected).max()
    np.testing.assert_allclose(found, expected, atol=budget)
    np.testing.assert_allclose(taken, ridge, rtol=EPS)


@pytest.mark.parametrize("images", [1, 2, 7])
def test_a_ridge_that_float32_cannot_hold_is_raised(images):
    """Rank far below M and lambda = 1e-8: fitted images still get their own class, nothing is NaN.

    The limit lambda -> 0 reproduces the targets exactly; the raised lambda is a small part of the
    smallest eigenvalue that is not zero, and moves predictions by no more than that part.
    """
    hidden = relu_features(images, 64)
    targets = np.eye(7, dtype=np.float32)[np.arange(images)]
    gram, moments = hidden.T @ hidden, hidden.T @ targets
    rows, taken = jax.jit(ranpac.ridge_solution)(gram, moments, jnp.float32(1e-8))
    assert np.isfinite(rows).all() and 1e-8 < float(taken) < 1e-3
    np.testing.assert_allclose(hidden @ np.asarray(rows), targets, atol=2e-2)


def test_sums_of_nothing_are_solved():
    solve, search = jax.jit(ranpac.ridge_solution), jax.jit(ranpac.held_out_errors)
    rows, taken = solve(jnp.zeros((6, 6)), jnp.zeros((6, 2)), jnp.float32(1e-8))
    np.testing.assert_array_equal(rows, np.zeros((6, 2)))
    errors = search(jnp.zeros((4, 6)), jnp.eye(4, 2), jnp.arange(4) < 3, jnp.arange(4) == 3)
    assert np.isfinite(errors).all() and float(taken) > 0


def test_sums_and_scores_of_a_run(tiny, history):
    """G, C and the scores from all images of all tasks at once, in float64."""
    state = history[-1].ended
    memory, gram, moments = state.memory, np.zeros((SIZE, SIZE)), np.zeros((SIZE, 7))
    projection = np.float64(memory["projection"])

    def hidden_of(images):
        return np.maximum(np.float64(verbs.slot_features(state, images)[:, 0]) @ projection, 0)

    for task in tiny.tasks:
        for batch in (tiny.batch(task, step) for step in range(2)):
            hidden = hidden_of(batch["image"])
            gram += hidden.T @ hidden
            moments += hidden.T @ np.eye(7)[batch["label"]]
    # Features of width 12 carry some 100 eps from encoding in batches of another size.
    scale = np.abs(gram).max()
    np.testing.assert_allclose(memory["gram"], gram, atol=100 * EPS * scale)
    np.testing.assert_allclose(memory["moments"], moments, atol=100 * EPS * scale)
    assert (np.asarray(memory["moments"])[:, [3, 6]] == 0).all()
    queries = tiny.batch(tiny.tasks[2], 9)["image"]
    expected = hidden_of(queries) @ np.float64(memory["rows"]).T
    scores = np.asarray(qkd_jax.predict(state, queries))
    seen = [0, 1, 2, 4, 5]
    budget = 100 * EPS * np.abs(hidden_of(queries)).max() * np.abs(memory["rows"]).sum(1).max()
    np.testing.assert_allclose(scores[:, seen], expected[:, seen], atol=budget)
    assert (scores[:, [3, 6]] == -np.inf).all()


def test_the_adapter_is_tuned_in_the_first_task_only(tiny, history):
    tuned = history[0].trained.trainable["adapter"]
    assert float(jnp.abs(tuned["up"]["kernel"]).max()) > 0
    for stage in history:
        jax.tree.map(np.testing.assert_array_equal, stage.ended.memory["adapter"], tuned)
    with pytest.raises(ConfigError, match="trains nothing in task 1"):
        qkd_jax.train_task(history[1].begun, tiny.batch(tiny.tasks[1]))
    state, images = history[2].ended, tiny.batch(tiny.tasks[0])["image"]
    adapted = jax.jit(lambda x: encode_with(state, tuned, Raw({"image": x})))(images)
    np.testing.assert_allclose(verbs.slot_features(state, images)[:, 0], adapted, atol=100 * EPS)
    jax.tree.map(np.testing.assert_array_equal, tiny.backbone.params, state.backbone.params)


def test_predictions_do_not_depend_on_the_batch(tiny, history):
    state, images = history[2].ended, tiny.batch(tiny.tasks[2])["image"]
    scores, order = np.asarray(qkd_jax.predict(state, images)), np.array([3, 1, 0, 2])
    scale = np.abs(scores[np.isfinite(scores)]).max()
    rows = float(jnp.abs(state.memory["rows"]).sum(1).max())
    np.testing.assert_allclose(
        qkd_jax.predict(state, images[order]), scores[order], atol=100 * EPS * max(scale, rows)
    )


@pytest.fixture(scope="module")
def frozen(tiny):
    return tiny.config(*SETTINGS, "ranpac.first_session=false", "ranpac.readout=cosine")


def ended(tiny, config, batches, tasks=1):
    state = qkd_jax.init_state(jax.random.key(7), tiny.backbone, config)
    for task, given in zip(tiny.tasks[:tasks], batches, strict=True):
        state = qkd_jax.begin_task(state, task)
        state = qkd_jax.end_task(state, given)
    return state


def test_a_task_chooses_its_ridge_on_what_it_holds_out_and_solves_with_it(tiny, frozen):
    """`finish`: of the images of a task in random order the last fifth is held out; the lambda with
    the least error there is the one that solves for all classes. Images of one scene, with
    labels that mean nothing, ask for a large lambda, which float32 can solve with."""
    scene, generator = np.random.default_rng(0).random((8, 8, 3)), np.random.default_rng(1)
    given = []
    for task in tiny.tasks:
        images = np.clip(scene + 0.2 * generator.normal(size=(8, 8, 8, 3)), 0, 1)
        given.append([{"image": np.float32(images), "label": np.resize(task.classes, 8)}])
    chosen = []
    for index in (0, 2):  # those of two classes
        task, (batch,) = tiny.tasks[index], given[index]
        state = ended(tiny, frozen, given[: index + 1], tasks=index + 1)
        memory = jax.device_get(state.memory)
        features = np.float64(verbs.slot_features(state, batch["image"])[:, 0])
        hidden = np.maximum(features @ np.float64(memory["projection"]), 0)
        targets = np.float64(batch["label"][:, None] == np.resize(task.classes, 2)[None])
        key = jax.random.fold_in(jax.random.fold_in(state.key, 3), task.index)
        fitted = np.zeros(8, bool)
        fitted[np.argsort(jax.random.uniform(key, (8,)))[:6]] = True
        errors = numpy_errors(hidden, targets, fitted, ~fitted)
        chosen.append(ranpac.RIDGES[int(np.argmin(errors))])
        np.testing.assert_allclose(memory["ridge"], chosen[-1], rtol=EPS)
        regular = np.float64(memory["gram"]) + float(memory["ridge"]) * np.eye(SIZE)
        solved = np.linalg.solve(regular, np.float64(memory["moments"])).T
        relative = 4 * EPS * np.linalg.cond(regular)
        assert relative < 0.01
        np.testing.assert_allclose(memory["rows"], solved, atol=relative * np.abs(solved).max())
    assert min(chosen) >= 1.0


def test_without_a_first_session_the_model_is_frozen(tiny, frozen):
    task = tiny.tasks[0]
    state = ended(tiny, frozen, [[tiny.batch(task, step) for step in range(2)]])
    assert jax.tree.leaves(state.trainable) == [] and "adapter" not in state.memory
    with pytest.raises(ConfigError, match="trains nothing in task 0"):
        qkd_jax.train_task(state, tiny.batch(task))
    images = tiny.batch(task, 9)["image"]
    feature = jax.jit(lambda x: encode(tiny.backbone, Raw({"image": x}))[:, 0])(images)
    hidden = np.maximum(np.float64(feature) @ np.float64(state.memory["projection"]), 0)
    rows = np.float64(state.memory["rows"])[[4, 1]]
    lengths = np.linalg.norm(hidden, axis=1)[:, None] * np.linalg.norm(rows, axis=1)[None]
    scores = np.asarray(qkd_jax.predict(state, images))[:, [4, 1]]
    np.testing.assert_allclose(scores, hidden @ rows.T / lengths, atol=100 * EPS)


def only(batch, *rows):
    """The batch with padding, of no use and never read, in all but the given rows."""
    mask = np.isin(np.arange(len(batch["label"])), rows)
    return {
        **batch,
        "mask": mask,
        "image": np.where(mask[:, None, None, None], batch["image"], 0.5),
    }


def test_padded_rows_leave_no_trace(tiny, frozen):
    batch = tiny.batch(tiny.tasks[0])
    parts = [only(batch, 0, 1, 2), only(batch, 3)]
    plain, other = (ended(tiny, frozen, [given]).memory for given in ([batch], parts))
    for name in ("gram", "moments"):
        np.testing.assert_array_equal(plain[name], other[name])
    assert float(plain["ridge"]) == float(other["ridge"])


def test_few_and_equal_images(tiny, frozen):
    """One image a class, all of them equal; then a task of one image, which keeps lambda."""
    two, one = only(tiny.batch(tiny.tasks[0]), 0, 1), only(tiny.batch(tiny.tasks[1]), 2)
    two["image"][1] = two["image"][0]
    first = ended(tiny, frozen, [[two]])
    state = ended(tiny, frozen, [[two], [one]], tasks=2)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.memory))
    smallest = EPS * SIZE**0.5 * float(jnp.mean(jnp.diagonal(state.memory["gram"])))
    ratio = float(state.memory["ridge"]) / max(float(first.memory["ridge"]), smallest)
    assert 1 - 1e-5 < ratio < 101
    scores = np.asarray(qkd_jax.predict(state, two["image"]))
    assert np.isfinite(scores[:, [0, 1, 4]]).all()


def test_settings_that_do_not_fit(tiny, frozen):
    config = tiny.config("method=ranpac", "ranpac.projection_dim=20")
    with pytest.raises(ConfigError, match=r"max_task_images: expected at least 1, .* found 0; set"):
        qkd_jax.init_state(jax.random.key(0), tiny.backbone, config)
    with pytest.raises(ConfigError, match="projection_dim: expected at least 1, found 0"):
        tiny.config("method=ranpac", "ranpac.projection_dim=0")
    with pytest.raises(DataError, match=r"at most 8 images \(shapes.max_task_images\), found 12"):
        ended(tiny, frozen, [[tiny.batch(tiny.tasks[0], step) for step in range(3)]])
    state = qkd_jax.init_state(jax.random.key(0), tiny.backbone, frozen)
    state = qkd_jax.begin_task(state, tiny.tasks[0])
    with pytest.raises(DataError, match=r"found none of \[1\]"):
        qkd_jax.end_task(state, [only(tiny.batch(tiny.tasks[0]), 0)])
