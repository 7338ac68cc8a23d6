"""CLARE against loops in NumPy float64.

The loops take the gradient of the cross-entropy from JAX and do all else themselves. Error budget:
six steps at rate 0.5 on numbers up to 1, each wrong by some roundings of 6e-8: below 1e-5.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qkd_jax
from qkd_jax.errors import ConfigError
from qkd_jax.learners import clare
from qkd_jax.learners.task_adapters import encode_with
from qkd_jax.learners.task_heads import head_loss
from qkd_jax.nn.inputs import Raw
from qkd_jax.runs.checkpoint import named_arrays, with_named_arrays

BUDGET = 1e-5
RATE, MOMENTUM, DECAY, STEPS, SEARCH = 0.5, 0.9, 0.01, 6, 3
SETTINGS = (
    "method=clare",
    "adapter.dropout=0.0",
    "clare.search=0.4",  # of 6 steps: 2.4, so 2; see `SEARCHED`
    "clare.keep=0.1",
    "clare.sparsity=0.05",
    f"train.learning_rate={RATE}",
    f"train.weight_decay={DECAY}",
)
SEARCHED = 2


@pytest.fixture(scope="module")
def learn(tiny):
    """(settings) -> for each task, the trainable of its start, and after each step, with memory."""

    def learned(*changes, num_steps=STEPS):
        config = tiny.config(*SETTINGS, *changes)
        state, history = qkd_jax.init_state(jax.random.key(7), tiny.backbone, config), []
        for task in tiny.tasks:
            state = qkd_jax.begin_task(state, task, num_steps=num_steps)
            states = [tiny.copy(state)]
            for step in range(STEPS):
                state, _ = qkd_jax.train_task(state, tiny.batch(task, step))
                states.append(tiny.copy(state))
            state = qkd_jax.end_task(state, [tiny.batch(task, 0)])
            history.append((states, tiny.copy(state)))
        return history

    return learned


@pytest.fixture(scope="module")
def history(learn):
    return learn()


@jax.jit
def gradients(trained, state, images, labels):
    def cost(trained):
        features = encode_with(state, trained["adapter"], Raw({"image": images}))
        return head_loss(trained["head"], state, features, labels)["loss"].mean()

    return jax.grad(cost)(trained)


def flat(tree):
    """Float64 numbers of a tree, in the order of its leaves."""
    return np.concatenate([np.ravel(np.float64(leaf)) for leaf in jax.tree.leaves(tree)])


def like(values, tree):
    """The inverse of `flat`, in float32."""
    leaves, form = jax.tree.flatten(tree)
    parts = np.split(values, np.cumsum([leaf.size for leaf in leaves])[:-1])
    pairs = zip(parts, leaves, strict=True)
    return form.unflatten([jnp.asarray(np.float32(p).reshape(leaf.shape)) for p, leaf in pairs])


def decayed(tree):
    """Which numbers of a tree decay: those of kernels and rows."""
    names = jax.tree_util.tree_map_with_path(
        lambda path, leaf: np.full(leaf.shape, path[-1].key in ("kernel", "rows")), tree
    )
    return flat(names)


def optimisation(state, batches, trained, active, start, penalty):
    """Trained parts after SGD with momentum on half a cosine, of which the adapter's coordinates
    that are not `active` stay at `start`; a penalty * sum |change| on the active ones.
    """
    count = active.size
    values, momentum = flat(trained), 0.0
    for step, batch in enumerate(batches):
        gradient = flat(gradients(like(values, trained), state, batch["image"], batch["label"]))
        gradient[:count] += penalty * np.sign(values[:count] - start) * active
        momentum = MOMENTUM * momentum + gradient + DECAY * decayed(trained) * values
        rate = RATE * (1 + np.cos(np.pi * step / len(batches))) / 2
        values = values - rate * momentum
        values[:count] = np.where(active, values[:count], start)
    return values


@pytest.mark.parametrize("index", [0, 2])  # the second task has one class, and no gradient
@pytest.mark.parametrize("changes", [(), ("clare.reset_head=false",)])
def test_two_optimisations_against_numpy(tiny, learn, history, changes, index):
    """Search on all free coordinates, the top tenth by |change|, then these from the start."""
    states, _ = (learn(*changes) if changes else history)[index]
    begun = states[0]
    parts = {name: begun.trainable[name] for name in ("adapter", "head")}
    batches = [tiny.batch(tiny.tasks[index], step) for step in range(STEPS)]
    free = flat(begun.memory["free"]).astype(bool)
    start = flat(parts["adapter"])
    found = optimisation(begun, batches[:SEARCHED], parts, free, start, 0.05)
    change = np.where(free, np.abs(found[: len(start)] - start), -1.0)
    mask = np.zeros(len(start), bool)
    mask[np.argsort(-change)[: round(0.1 * free.sum())]] = True
    np.testing.assert_array_equal(flat(states[SEARCHED].trainable["mask"]).astype(bool), mask)
    np.testing.assert_array_equal(flat(states[SEARCHED].trainable["adapter"]), start)
    assert np.abs(change).max() > 100 * BUDGET
    if changes:  # the head goes on from where the search left it
        parts["head"] = like(found[len(start) :], parts["head"])
    expected = optimisation(begun, batches[SEARCHED:], parts, mask, start, 0.0)
    trained = {name: states[STEPS].trainable[name] for name in parts}
    np.testing.assert_allclose(flat(trained), expected, atol=BUDGET)


@pytest.mark.parametrize("step", range(STEPS))
def test_from_any_step_a_task_goes_on_as_if_never_stopped(tiny, history, step):
    """With what a checkpoint keeps, mask and all, to the last bit."""
    states, _ = history[0]
    fresh = qkd_jax.init_state(jax.random.key(7), tiny.backbone, states[0].config)
    state = with_named_arrays(fresh, named_arrays(states[step]))
    state, _ = qkd_jax.train_task(state, tiny.batch(tiny.tasks[0], step))
    found, expected = (named_arrays(s) for s in (state, states[step + 1]))
    assert found.keys() == expected.keys()
    for name in found:
        assert found[name].tobytes() == expected[name].tobytes(), name


def test_what_a_task_owns_never_changes_again(history):
    owned = []
    for states, ended in history:
        mask = flat(states[-1].trainable["mask"]).astype(bool)
        moved = flat(ended.trainable["adapter"]) != flat(states[0].trainable["adapter"])
        assert not (moved & ~mask).any()
        free = flat(states[0].memory["free"]).astype(bool)
        np.testing.assert_array_equal(flat(ended.memory["free"]).astype(bool), free & ~mask)
        assert mask.sum() == round(0.1 * free.sum())
        owned.append((mask, flat(ended.trainable["adapter"])))
    assert moved.any()
    for (first, _), (second, _) in itertools.combinations(owned, 2):
        assert not (first & second).any()
    for (mask, then), (_, later) in itertools.pairwise(owned):
        np.testing.assert_array_equal(then[mask], later[mask])


def test_the_search_moves_all_free_coordinates_and_no_other(history):
    (states, _), free = history[2], flat(history[2][0][0].memory["free"]).astype(bool)
    moved = flat(states[1].trainable["adapter"]) != flat(states[0].trainable["adapter"])
    assert not (moved & ~free).any()
    assert moved[free].mean() > 0.5  # units of a ReLU that are off have no gradient


@pytest.mark.parametrize("changes, num_steps", [(("clare.choice=random",), STEPS), ((), 0)])
def test_a_mask_that_no_search_found_is_random_and_stays(learn, changes, num_steps):
    """Without a number of steps there is no search: all steps train what was drawn."""
    (states, _), *_ = learn(*changes, num_steps=num_steps)
    drawn = flat(states[0].trainable["mask"])
    assert drawn.sum() == round(0.1 * drawn.size)
    for state in states:
        np.testing.assert_array_equal(flat(state.trainable["mask"]), drawn)
    moved = flat(states[-1].trainable["adapter"]) != flat(states[0].trainable["adapter"])
    assert moved.any() and not (moved & ~drawn.astype(bool)).any()


@pytest.mark.parametrize("of", ["change", "value"])
def test_the_penalty_is_the_l1_norm_of_free_coordinates_while_searching(tiny, history, of):
    """Budget: sums of 174 numbers below 1."""
    states, _ = history[2]
    config = qkd_jax.override(states[0].config, f"clare.sparsity_of={of}")
    batch = tiny.batch(tiny.tasks[2], 0)
    start, now = (flat(s.trainable["adapter"]) for s in states[:2])
    free = flat(states[1].memory["free"])
    expected = np.sum(np.abs(now - start if of == "change" else now) * free)
    for step in (1, SEARCHED):
        state = tiny.copy(states[1].replace(config=config, step=jnp.int32(step)))
        _, metrics = qkd_jax.train_task(state, batch)
        np.testing.assert_allclose(metrics["loss_sparsity"], expected, rtol=100 * BUDGET)
        added = metrics["loss"] - metrics["loss_ce"]
        np.testing.assert_allclose(added, 0.05 * expected * (step < SEARCHED), atol=BUDGET)


def test_largest_takes_a_share_of_what_is_free():
    """Ties go to the first; at least one is taken; what is not free never is."""
    free = {"a": jnp.array([[True, False], [True, True]]), "b": jnp.array([True, True])}
    scores = jnp.array([1.0, 9.0, 2.0, 2.0, 0.0, 2.0])
    for share, taken in ((0.6, {2, 3, 5}), (0.4, {2, 3}), (0.01, {2}), (1.0, {0, 2, 3, 4, 5})):
        mask = clare.largest(scores, free, share)
        assert set(np.flatnonzero(flat(mask))) == taken
    assert mask["a"].shape == (2, 2) and mask["a"].dtype == bool
    nothing = jax.tree.map(jnp.zeros_like, free)
    assert not flat(clare.largest(scores, nothing, 1.0)).any()


@pytest.mark.parametrize("num_steps, searching", [(0, 0), (1, 0), (2, 1), (10, 9)])
def test_a_long_search_leaves_a_step_to_train(tiny, history, num_steps, searching):
    state = history[0][1]
    state = state.replace(
        config=qkd_jax.override(state.config, "clare.search=0.9"), num_steps=jnp.int32(num_steps)
    )
    assert int(clare.search_steps(state)) == searching


def test_a_mask_is_not_counted_as_trained(tiny, history):
    state = history[0][1]
    learner = qkd_jax.learners.shape.learner_of(state.config)
    assert set(learner.optimised(state.trainable)) == {"adapter", "head"}
    counted = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state))
    assert counted == flat(learner.optimised(state.trainable)).size


@pytest.mark.parametrize("setting", ["search=1.0", "keep=0.0", "keep=1.1", "sparsity=-0.1"])
def test_settings_out_of_range_are_named(tiny, setting):
    with pytest.raises(ConfigError, match=f"clare.{setting.split('=')[0]}: expected (0|above)"):
        tiny.config("method=clare", "clare." + setting)
