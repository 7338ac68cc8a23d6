"""CODA-Prompt against the authors' code: prompts, logits, loss, gradients, start of components.

Reference: GT-RIPL/CODA-Prompt at 6417d4f68754be68b697c7ca2323ee61e791e1a3. Called: models/zoo.py
`CodaPrompt(12, 3, [7, 4, mu], key_dim=12)` (its forward, and `gram_schmidt` through the constructor
and `process_task_count`), `ViTZoo.forward` around models/vit.py `VisionTransformer` (width 12, six
blocks, two heads, MLP 12, patch 4, image 8), and learners/prompt.py `Prompt.update_model`; float64,
mu 0 and 0.1.

golden/make_coda_prompt_golden.py made the arrays: weights and inputs are drawn here and there by
the same frozen NumPy generators, as below. In the second of three tasks (two classes each) one
update gave loss and gradients of the task's components and head rows; evaluation gave the logits of
the first four classes. For the start of components the normal draws were recorded, and the first
task's rows moved by 0.2 times normal numbers, as training would.

Error budget: six blocks in float32 with activations near 1; logits are sums of 12 products near
0.3: 100 eps = 1.2e-5, doubled for the prompts' way through five blocks. Gradients have the same
error relative to their largest entry. Gram-Schmidt of at most four rows: 1e-5.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qkd_jax
from qkd_jax.engine import verbs
from qkd_jax.learners import coda_prompt
from qkd_jax.nn.backbone import Backbone
from qkd_jax.nn.inputs import Raw
from qkd_jax.nn.vit import ViTSpec

BUDGET = 2.4e-5
SPEC = ViTSpec(width=12, depth=6, num_heads=2, mlp_width=12, patch_size=4, image_size=8, grid=2)
LABELS = np.array([2, 3, 3])
NAMES = ("components", "keys", "attention")


@pytest.fixture(scope="module")
def golden():
    return dict(np.load(Path(__file__).parent / "golden" / "coda_prompt.npz"))


@pytest.fixture(scope="module")
def inputs():
    """(weights, pool, rows [6, D], bias [6], images): drawn in this order."""
    random = np.random.RandomState(2023)

    def draw(path, shape):
        values, name = random.standard_normal(shape.shape), path[-1].key
        if name == "kernel":
            values = values * shape.shape[0] ** -0.5
        else:
            values = 1.0 + 0.1 * values if name == "scale" else 0.1 * values
        return values.astype(np.float32)

    params = jax.tree_util.tree_map_with_path(draw, SPEC.param_shapes())
    random = np.random.RandomState(1993)

    def normal(deviation, *shape):
        return (deviation * random.standard_normal(shape)).astype(np.float32)

    # Of seven components in three tasks the last is in no task; the third task's are set as well.
    pool = {"components": normal(0.5, 5, 7, 4, 12)}
    pool |= {name: normal(0.5, 5, 7, 12) for name in ("keys", "attention")}
    pool = {n: jnp.asarray(a[:, :6].reshape(5, 3, 2, *a.shape[2:])) for n, a in pool.items()}
    rows, bias = normal(0.3, 6, 12), normal(0.3, 6)
    return params, pool, rows, bias, random.random_sample((3, 8, 8, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def second_task(tiny, inputs):
    """The state in the second task before any update."""
    params, pool, rows, bias, _ = inputs
    config = tiny.config(
        "method=coda_prompt",
        "num_classes=6",
        "max_tasks=3",
        "coda_prompt.pool=7",
        "coda_prompt.length=4",
        "coda_prompt.blocks=5",
        "coda_prompt.form=published",
        "coda_prompt.penalty=0.1",
    )
    state = qkd_jax.init_state(jax.random.key(0), Backbone(params, SPEC), config)
    for index in range(2):
        state = qkd_jax.begin_task(state, qkd_jax.Task(index, (2 * index, 2 * index + 1)))
    memory = {"prompt": pool, "rows": jnp.zeros((6, 12)), "bias": jnp.zeros(6)}
    memory["rows"] = memory["rows"].at[:2].set(rows[:2])
    memory["bias"] = memory["bias"].at[:2].set(bias[:2])
    head = {"rows": jnp.asarray(rows[2:4]), "bias": jnp.asarray(bias[2:4])}
    prompt = {name: pool[name][:, 1] for name in NAMES}
    return state.replace(trainable={"prompt": prompt, "head": head}, memory=memory)


def assert_near(found, expected):
    np.testing.assert_allclose(found, expected, atol=BUDGET * np.abs(expected).max())


def test_losses_and_gradients(golden, inputs, second_task):
    """Without the penalty, so that the way through the transformer is compared, and with it."""
    state, raw = second_task, Raw({"image": jnp.asarray(inputs[-1])})

    def losses(trainable):
        terms = coda_prompt.LEARNER.loss(
            trainable, state, raw, {"label": jnp.asarray(LABELS)}, None
        )
        both = jnp.stack([jnp.mean(terms["loss_ce"]), jnp.mean(terms["loss"])])
        return both, both

    gradients, (loss, total) = jax.jit(jax.jacrev(losses, has_aux=True))(state.trainable)
    np.testing.assert_allclose(loss, golden["loss"], atol=BUDGET)
    np.testing.assert_allclose(total, golden["loss_with_penalty"], rtol=BUDGET)
    np.testing.assert_allclose(total - loss, golden["penalty"], rtol=BUDGET)
    for name in NAMES:
        alone, with_penalty = gradients["prompt"][name]
        assert_near(alone, golden[f"gradient_{name}"])
        assert_near(with_penalty, golden[f"gradient_{name}_with_penalty"])
    for name in ("rows", "bias"):
        assert_near(gradients["head"][name][0], golden[f"{name}_gradient"])


def test_prompts_and_logits(golden, inputs, second_task):
    # The task's own components and rows come from `freeze` and `finish`.
    older = {name: inputs[1][name].at[:, 1].set(0.0) for name in NAMES}
    state = second_task.replace(memory={**second_task.memory, "prompt": older})
    state = coda_prompt.LEARNER.finish(verbs.one_device().freeze(state), (), None)
    features = verbs.slot_features(state, inputs[-1])
    np.testing.assert_allclose(features[:, 0], golden["query"], atol=BUDGET)
    query = jnp.asarray(golden["query"])
    inserts = jax.jit(lambda q: coda_prompt.inserts_of(state, state.memory["prompt"], q))(query)
    assert [insert is None for insert in inserts.attention] == [False] * 5 + [True]
    np.testing.assert_allclose(inserts.attention[3].prefix_key, golden["prefix_key"], atol=BUDGET)
    np.testing.assert_allclose(
        inserts.attention[3].prefix_value, golden["prefix_value"], atol=BUDGET
    )
    scores = np.asarray(verbs.one_device().score(state, features)[0])
    np.testing.assert_allclose(scores[:, :4], golden["logits"], atol=BUDGET)
    assert (scores[:, 4:] == -np.inf).all()


def test_start_of_components(golden):
    """In the first task the two forms are one; in the second `published` is the reference's, whose
    new rows are not orthogonal to trained ones, and `gram_schmidt` is orthogonal."""
    names = ("components", "keys")
    first = {name: jnp.asarray(golden[f"drawn0_{name}"]) for name in names}
    pool = {name: jnp.zeros((5, 3, *first[name].shape[1:])) for name in names}
    start = jax.jit(coda_prompt.orthogonal_starts, static_argnums=0)
    for form in ("published", "gram_schmidt"):
        found = start(form, pool, first, jnp.int32(0))
        for name in names:
            np.testing.assert_allclose(found[name], golden[f"started0_{name}"], atol=1e-5)
    pool = {name: pool[name].at[:, 0].set(golden[f"trained_{name}"]) for name in names}
    second = {name: jnp.asarray(golden[f"drawn1_{name}"]) for name in names}
    found = start("published", pool, second, jnp.int32(1))
    orthogonal = start("gram_schmidt", pool, second, jnp.int32(1))
    for name in names:
        np.testing.assert_allclose(found[name], golden[f"started1_{name}"], atol=1e-5)
        flat, old, theirs = (
            np.float64(rows).reshape(5, 2, -1)
            for rows in (orthogonal[name], pool[name][:, 0], found[name])
        )
        assert np.abs(np.einsum("kme,kne->kmn", theirs, old)).max() > 0.01
        np.testing.assert_allclose(np.einsum("kme,kne->kmn", flat, old), 0.0, atol=1e-5)
