"""RanPAC against the authors' code: sums, search for lambda, ridge solutions, scores.

Reference: RanPAC/RanPAC (McDonnell et al.) at 012927f86e8d95dc9e7c6015a5e1048e6604c8b6. Called:
RanPAC.py `Learner.setup_RP`, `Learner.replace_fc` (the sums G and Q and the new head) and in it
`Learner.optimise_ridge_parameter`, and inc_net.py `SimpleVitNet.update_fc` and its forward pass
through `CosineLinear` with `use_RP`. M = 40, float64, on the CPU.

How `golden/make_ranpac_golden.py` made the arrays: W, five class centres and features around them
were drawn with NumPy; the backbone was the identity, so that the given features are what the method
sees. Two tasks: 25 images of two classes (fewer than M, searched in the dual here) and 60 of three
(more). The head was made anew for the second task, as their training loop does. Their mean squared
errors were noted as their search computed them: 17 for each task; it fits the first 80 % of the
given order.

Error budget: sums of at most 85 products of float32 numbers, 100 eps of the largest. A mean squared
error follows the fitted solution, whose condition is that of the smaller Gram matrix plus lambda,
at most 2e4: eps times it, 2.4e-3 for the smallest lambdas (one processor took 0.07 of it), and 100
eps for the largest. Solutions and scores: 4 eps times the condition.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qkd_jax
from qkd_jax.engine import verbs
from qkd_jax.learners import ranpac
from qkd_jax.nn.backbone import Backbone
from qkd_jax.nn.parameters import init_random
from qkd_jax.nn.vit import ViTSpec

EPS = 1.2e-7
CLASSES = ((0, 1), (2, 3, 4))
LABELS = (np.array([0, 1] * 12 + [0], np.int32), np.array([2, 3, 4] * 20, np.int32))


@pytest.fixture(scope="module")
def golden():
    return np.load(Path(__file__).parent / "golden" / "ranpac.npz")


@pytest.fixture(scope="module")
def states(tiny, golden):
    """The ended state of each task, on the given features and W."""
    spec = ViTSpec(width=12, depth=1, num_heads=2, mlp_width=4, patch_size=8, image_size=8, grid=1)
    config = tiny.config(
        "method=ranpac",
        "ranpac.projection_dim=40",
        "ranpac.first_session=false",
        "num_classes=5",
        "max_tasks=2",
        "max_task_classes=3",
        "max_task_images=60",
    )
    backbone = Backbone(init_random(jax.random.key(0), spec), spec)
    state = qkd_jax.init_state(jax.random.key(0), backbone, config)
    projection = jnp.asarray(golden["projection"])
    state, found = state.replace(memory={**state.memory, "projection": projection}), []
    for index, classes in enumerate(CLASSES):
        state = qkd_jax.begin_task(state, qkd_jax.Task(index, classes))
        features = golden[f"features_{index}"][:, None]
        # 16 a batch, the last one padded with rows that must not count.
        padding = -len(features) % 16
        features = np.pad(features, ((0, padding), (0, 0), (0, 0)), constant_values=9.0)
        labels = np.pad(LABELS[index], (0, padding), constant_values=classes[0])
        mask = np.arange(len(labels)) < len(LABELS[index])
        state = verbs.one_device().finish(
            state,
            [
                {
                    "features": features[i : i + 16],
                    "label": labels[i : i + 16],
                    "mask": mask[i : i + 16],
                }
                for i in range(0, len(labels), 16)
            ],
        )
        found.append(state)
    return found


@pytest.mark.parametrize("index", [0, 1])
def test_search_for_lambda(golden, index):
    hidden = jnp.asarray(np.maximum(golden[f"features_{index}"] @ golden["projection"], 0))
    targets = jax.nn.one_hot(LABELS[index], 5)
    fitted = np.arange(len(hidden)) < int(0.8 * len(hidden))
    errors = np.asarray(jax.jit(ranpac.held_out_errors)(hidden, targets, fitted, ~fitted))
    spectrum = np.linalg.svd(np.float64(hidden)[fitted], compute_uv=False) ** 2
    ridges = np.asarray(ranpac.RIDGES)
    condition = (spectrum.max() + ridges) / (spectrum.min() + ridges)
    gap = np.abs(errors / golden["losses"][index] - 1)
    assert (gap <= EPS * np.maximum(condition, 100)).all(), gap / (EPS * condition)
    assert ranpac.RIDGES[errors.argmin()] == golden["ridges"][index]


def test_sums(golden, states):
    memory = states[-1].memory
    scale = 100 * EPS * np.abs(memory["gram"]).max()
    np.testing.assert_allclose(memory["gram"][3], golden["gram_row"], atol=scale)
    np.testing.assert_allclose(jnp.trace(memory["gram"]), golden["gram_trace"], rtol=100 * EPS)
    np.testing.assert_allclose(memory["moments"], golden["moments"], atol=scale)


@pytest.mark.parametrize("index", [0, 1])
def test_solution_and_scores(golden, states, index):
    state = states[index]
    ridge, gram = golden["ridges"][index], np.float64(state.memory["gram"])
    solution, taken = jax.jit(ranpac.ridge_solution)(
        state.memory["gram"], state.memory["moments"], jnp.float32(ridge)
    )
    np.testing.assert_allclose(taken, ridge, rtol=EPS)
    rows, expected = np.asarray(solution).T, golden[f"rows_{index}"]
    budget = 4 * EPS * np.linalg.cond(gram + ridge * np.eye(40))
    assert budget < 1e-4
    scale = np.abs(expected).max()
    np.testing.assert_allclose(rows[: len(expected)], expected, atol=budget * scale)
    if index == 1:
        memory = {**state.memory, "rows": jnp.asarray(rows)}
        queries = jnp.asarray(golden["queries"])[:, None]
        scores, _ = verbs.one_device().score(state.replace(memory=memory), queries)
        scale = np.abs(golden["scores"]).max()
        np.testing.assert_allclose(scores, golden["scores"], atol=budget * scale)
