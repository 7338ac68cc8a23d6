"""CODA-Prompt: weights, prompts, penalty and the start of components against NumPy float64.

Error budget: cosines of 12 numbers and sums of at most 8 components near 1: below 100 eps = 1.2e-5.
Orthonormal rows come from a Householder decomposition of 12 numbers: 1e-5.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qkd_jax
from qkd_jax.errors import ConfigError
from qkd_jax.learners import coda_prompt
from qkd_jax.nn.backbone import Backbone
from qkd_jax.nn.vit import ViTSpec

BUDGET = 2e-5
# Nine components in four tasks: two each, one is never used.
SETTINGS = (
    "method=coda_prompt",
    "coda_prompt.pool=9",
    "coda_prompt.length=4",
    "coda_prompt.blocks=1",
    "coda_prompt.penalty=0.1",
)
NAMES = ("components", "keys", "attention")


@pytest.fixture(scope="module")
def history(tiny):
    return tiny.run(tiny.backbone, tiny.config(*SETTINGS))


def cosine_weights(query, attention, keys):
    """w_m = cos(q * A_m, K_m), one image and one component at a time."""
    weights = np.zeros((len(query), len(keys)))
    for b, q in enumerate(np.float64(query)):
        for m in range(len(keys)):
            seen = q * np.float64(attention[m])
            length = np.linalg.norm(seen) * np.linalg.norm(np.float64(keys[m]))
            weights[b, m] = seen @ np.float64(keys[m]) / length if length > 0 else 0.0
    return weights


def test_weights_against_loops():
    random = np.random.default_rng(0)
    query, attention, keys = (
        random.normal(size=shape).astype(np.float32) for shape in ((3, 12), (5, 12), (5, 12))
    )
    attention[1], keys[3] = 0.0, 0.0
    found = coda_prompt.component_weights(query, jnp.asarray(attention), jnp.asarray(keys))
    np.testing.assert_allclose(found, cosine_weights(query, attention, keys), atol=BUDGET)
    # A zero row has weight 0 and a finite gradient.
    assert (np.asarray(found)[:, [1, 3]] == 0).all()
    gradient = jax.grad(
        lambda a, k: coda_prompt.component_weights(query, a, k).sum(), argnums=(0, 1)
    )(jnp.asarray(attention), jnp.asarray(keys))
    assert all(np.isfinite(g).all() for g in gradient)


def test_prompts_are_sums_over_components_of_learned_tasks(tiny, history):
    """After the second of four tasks: four components, half of each prompt keys, half values."""
    state = history[1].ended
    query = np.random.default_rng(1).normal(size=(3, 12)).astype(np.float32)
    insert_of = jax.jit(lambda pool: coda_prompt.inserts_of(state, pool, jnp.asarray(query)))
    pool = state.memory["prompt"]
    inserts = insert_of(pool).attention
    rows = {name: np.float64(pool[name])[0, :2].reshape(4, *pool[name].shape[3:]) for name in NAMES}
    weights = cosine_weights(query, rows["attention"], rows["keys"])
    expected = np.einsum("bm,mld->bld", weights, rows["components"])
    np.testing.assert_allclose(inserts[0].prefix_key, expected[:, :2], atol=BUDGET)
    np.testing.assert_allclose(inserts[0].prefix_value, expected[:, 2:], atol=BUDGET)
    assert inserts[1] is None
    # Whatever stands in the rows of later tasks is absent.
    other = jax.tree.map(lambda a: a.at[:, 2:].set(7.0), pool)
    jax.tree.map(np.testing.assert_array_equal, insert_of(other), insert_of(pool))


def test_a_task_trains_its_own_components_and_no_others(tiny, history):
    for index, stage in enumerate(history):
        pool, trained = stage.ended.memory["prompt"], stage.trained.trainable["prompt"]
        start = stage.begun.trainable["prompt"]
        for name in NAMES:
            assert trained[name].shape[:2] == (1, 2)
            np.testing.assert_array_equal(pool[name][:, index], trained[name])
            if len(tiny.tasks[index].classes) > 1:
                assert (np.asarray(start[name]) != np.asarray(trained[name])).any()
            # Components of finished tasks never change again; later ones have not come.
            for later in history[index + 1 :]:
                kept = later.ended.memory["prompt"][name][:, index]
                np.testing.assert_array_equal(kept, trained[name])
            assert not np.asarray(pool[name][:, index + 1 :]).any()
    jax.tree.map(
        np.testing.assert_array_equal, tiny.backbone.params, history[-1].ended.backbone.params
    )


def test_components_that_do_not_divide_over_the_tasks_are_not_used(history):
    assert history[0].ended.memory["prompt"]["keys"].shape == (1, 4, 2, 12)  # 8 of 9


def test_new_components_are_orthonormal_to_all_before(history):
    for index, stage in enumerate(history):
        for name in NAMES:
            rows = np.float64(stage.begun.trainable["prompt"][name])[0].reshape(2, -1)
            np.testing.assert_allclose(rows @ rows.T, np.eye(2), atol=1e-5)
            old = np.float64(stage.begun.memory["prompt"][name])[0, :index]
            old = old.reshape(2 * index, rows.shape[1])
            np.testing.assert_allclose(rows @ old.T, 0.0, atol=1e-5)


def test_gram_schmidt_against_numpy_after_training_has_moved_old_rows():
    """Project the draws off the span of six rows that are far from orthogonal, one of them twice
    there; rows of another kind and width are none of theirs."""
    random = np.random.default_rng(2)
    pool = random.normal(size=(2, 4, 3, 12)).astype(np.float32)
    pool[0, 1, 2] = pool[0, 0, 0]
    drawn = random.normal(size=(2, 3, 12)).astype(np.float32)
    wide, drawn_wide = random.normal(size=(2, 4, 3, 5, 4)), random.normal(size=(2, 3, 5, 4))
    found = jax.jit(coda_prompt.orthogonal_starts, static_argnums=0)(
        "gram_schmidt",
        {"keys": jnp.asarray(pool), "components": jnp.asarray(np.float32(wide))},
        {"keys": jnp.asarray(drawn), "components": jnp.asarray(np.float32(drawn_wide))},
        jnp.int32(2),
    )
    assert found["components"].shape == drawn_wide.shape
    found = found["keys"]
    for block in range(2):
        basis = [*np.linalg.svd(np.float64(pool[block, :2]).reshape(6, 12), full_matrices=False)[2]]
        if block == 0:
            basis = basis[:5]  # rank 5
        expected = []
        for row in np.float64(drawn[block]):
            left = row - sum((row @ b) * b for b in basis)
            expected.append(left / np.linalg.norm(left))
            basis.append(expected[-1])
        if block == 1:
            np.testing.assert_allclose(found[block], expected, atol=1e-5)
        rows = np.float64(found[block])
        np.testing.assert_allclose(rows @ rows.T, np.eye(3), atol=1e-5)
        old = np.float64(pool[block, :2]).reshape(6, 12)
        np.testing.assert_allclose(rows @ old.T, 0.0, atol=5e-5)


def test_the_papers_form_draws_one_orthogonal_pool_first(tiny):
    config = tiny.config(*SETTINGS, "coda_prompt.form=paper", "coda_prompt.blocks=2")
    _, memory = coda_prompt.init(jax.random.key(3), tiny.backbone, config)
    for name in NAMES:
        for block in range(2):
            rows = np.float64(memory["prompt"][name][block]).reshape(8, -1)
            np.testing.assert_allclose(rows @ rows.T, np.eye(8), atol=1e-5)
        assert np.abs(np.subtract(*np.asarray(memory["prompt"][name]))).max() > 0.1
    state = qkd_jax.init_state(jax.random.key(3), tiny.backbone, config)
    begun = qkd_jax.begin_task(state, tiny.tasks[0])
    for name in NAMES:
        pool = state.memory["prompt"][name]
        np.testing.assert_array_equal(begun.trainable["prompt"][name], pool[:, 0])


def test_penalty_against_loops(history):
    """mean of (R R^T - I)^2 over components in use, summed over blocks and K, A, P."""
    state = history[1].trained
    random = np.random.default_rng(3)
    pool = {n: random.normal(size=a.shape) for n, a in state.memory["prompt"].items()}
    expected = 0.0
    for rows in pool.values():
        for block in rows:
            used = block[:2].reshape(4, -1)
            expected += ((used @ used.T - np.eye(4)) ** 2).mean()
    pool = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), pool)
    np.testing.assert_allclose(coda_prompt.penalty(state, pool), expected, rtol=BUDGET)


def test_loss_of_a_task_with_one_class(tiny, history):
    """Its cross-entropy is zero; what is left is mu times the distance."""
    state = history[1].begun
    pool = coda_prompt.with_trained(state, state.trainable["prompt"])
    _, metrics = qkd_jax.train_task(tiny.copy(state), tiny.batch(tiny.tasks[1]))
    assert float(metrics["loss_ce"]) == 0.0 and float(metrics["train_accuracy"]) == 100.0
    distance = float(coda_prompt.penalty(state, pool))
    np.testing.assert_allclose(metrics["loss_orthogonality"], distance, rtol=BUDGET)
    np.testing.assert_allclose(metrics["loss"], 0.1 * distance, rtol=BUDGET)


def test_predictions_do_not_depend_on_the_batch(tiny, history):
    state, images = history[2].ended, tiny.batch(tiny.tasks[2])["image"]
    scores = np.asarray(qkd_jax.predict(state, images))
    order = np.array([3, 1, 0, 2])
    np.testing.assert_allclose(qkd_jax.predict(state, images[order]), scores[order], atol=BUDGET)
    assert (scores[:, [3, 6]] == -np.inf).all() and np.isfinite(scores[:, [0, 1, 2, 4, 5]]).all()


def test_settings_that_do_not_fit_are_refused(tiny):
    def begin(*changes):
        config = tiny.config(*SETTINGS, *changes)
        return qkd_jax.init_state(jax.random.key(0), tiny.backbone, config)

    with pytest.raises(ConfigError, match=r"expected at least 4, .* found 3"):
        begin("coda_prompt.pool=3")
    with pytest.raises(ConfigError, match=r"at most 12, since more keys .* found 16"):
        begin("coda_prompt.pool=16")
    with pytest.raises(
        ConfigError, match="expected at most 2, the blocks of the backbone, found 5"
    ):
        begin("coda_prompt.blocks=5")
    for change, message in {
        "coda_prompt.length=5": "an even number",
        "coda_prompt.pool=0": "at least 1",
        "coda_prompt.penalty=-1": "0 or more",
    }.items():
        with pytest.raises(ConfigError, match=message):
            tiny.config("method=coda_prompt", change)


def test_size_of_the_published_pool():
    """100 components of 8 rows with a key and an attention vector each, in five blocks."""
    spec = ViTSpec(
        width=768, depth=12, num_heads=12, mlp_width=3072, patch_size=16, image_size=224, grid=14
    )
    config = qkd_jax.Config(method="coda_prompt")
    init = jax.eval_shape(
        lambda k: coda_prompt.init(k, Backbone(None, spec), config), jax.random.key(0)
    )
    trained, pool = (sum(a.size for a in jax.tree.leaves(part["prompt"])) for part in init)
    assert pool == 5 * 100 * (8 + 1 + 1) * 768 and trained == pool // 10
