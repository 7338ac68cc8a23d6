"""MIN against the authors' code: three tasks of its noise, weights, ridge regression and losses.

`golden/make_min_golden.py` made the arrays and says how; its weights of the noise are those of
`min.weights=previous`.

Error budget: float32 through 3 blocks on a stream of order 1 leaves 1e-5 in a feature and 2e-5 in
h. The ridge regression divides by eigenvalues from 0.5 on: sums of 96 rows of order 1 are right to
1e-5, so 2e-4 in its solution and its logits, and in a loss on them. A gradient: 2e-4 of its largest
entry.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qkd_jax
from qkd_jax.learners import min_noise
from qkd_jax.learners.shape import Context
from qkd_jax.nn.inputs import Raw
from qkd_jax.protocol.tasks import Task

BUDGET = 2e-4
SETTINGS = """
    method=min backbone.image_size=8 data.augment=false num_classes=6 max_tasks=3
    max_task_classes=2 min.bottleneck=3 min.projection_dim=24 min.ridge=0.5 min.weights=previous
""".split()


@pytest.fixture(scope="module")
def stored(golden):
    return golden("min")


def linear_of(arrays, prefix):
    """torch keeps weights as [out, in]."""
    weight, bias = arrays[f"{prefix}.weight"], arrays[f"{prefix}.bias"]
    return {"kernel": jnp.asarray(weight.swapaxes(-1, -2)), "bias": jnp.asarray(bias)}


def norms_of(arrays, prefix):
    def norm(name):
        return {
            "scale": jnp.asarray(arrays[f"{prefix}{name}.weight"]),
            "bias": jnp.asarray(arrays[f"{prefix}{name}.bias"]),
        }

    return {"blocks": {n: norm(n) for n in ("norm1", "norm2")}, "norm": norm("norm")}


@pytest.fixture(scope="module")
def learned(stored):
    """The state in each task before its end, and after it, with what the reference "trained"."""
    arrays, states = stored.arrays, []
    state = qkd_jax.init_state(jax.random.key(0), stored.backbone, stored.config(*SETTINGS))
    drawn = {"down": "noise/w_down", "up": "noise/w_up", "projection": "projection"}
    drawn = {name: jnp.asarray(arrays[theirs]) for name, theirs in drawn.items()}
    state = state.replace(memory={**state.memory, **drawn})
    generators = [linear_of(arrays, f"noise/{name}") for name in ("mu", "sigmma")]
    for task in range(3):
        mine = slice(8 * task, 8 * task + 8)
        batch = {"image": arrays["images"][mine], "label": arrays["labels"][mine]}
        state = qkd_jax.begin_task(state, Task(task, (2 * task, 2 * task + 1)), 0, [batch])
        mean, spread = (jax.tree.map(lambda a, t=task: a[:, t], g) for g in generators)
        trained = {
            "noise": {"mean": mean, "spread": spread},
            "dense": linear_of(arrays, "noise/MLP"),
            "norms": norms_of(arrays, "norms/"),
        }
        if f"rows/{task}" in arrays:  # of all classes; those not seen have no part in the loss
            rows = jnp.asarray(arrays[f"rows/{task}"])
            bias = jnp.asarray(arrays.get(f"bias/{task}", np.ones(len(rows), np.float32)))
            head = state.trainable["head"]
            trained["head"] = {
                "rows": head["rows"].at[: len(rows)].set(rows),
                "bias": head["bias"].at[: len(rows)].set(bias),
            }
        state = state.replace(trainable={**state.trainable, **trained})
        open_state, state = state, qkd_jax.end_task(state, [batch])
        states.append((open_state, state))
    return states


@pytest.mark.parametrize("task", range(3))
def test_weights_ridge_regression_and_logits(stored, learned, task):
    state, arrays = learned[task][1], stored.arrays
    expected = np.zeros(3)
    expected[: task + 1] = arrays[f"weights/{task}"]
    np.testing.assert_allclose(state.memory["weights"], expected, atol=1e-5)
    seen = 2 * task + 2
    rows = state.memory["rows"]
    np.testing.assert_allclose(rows[:seen], arrays[f"solution/{task}"].T, atol=BUDGET)
    assert not np.asarray(rows[seen:]).any()
    scores = qkd_jax.predict(state, arrays["images"])
    np.testing.assert_allclose(scores[:, :seen], arrays[f"logits/{task}"], atol=BUDGET)


@pytest.mark.parametrize("task", [0, 2])
def test_loss_and_gradients(stored, learned, task):
    """In the first task without noise, dense layers and LayerNorms; then the new noise alone."""
    state, arrays, mine = learned[task][0], stored.arrays, slice(8 * task, 8 * task + 8)
    images = Raw({"image": jnp.asarray(arrays["images"][mine])})
    batch = {"label": jnp.asarray(arrays["labels"][mine])}
    context = Context(None, jnp.ones(8, bool), lambda x: x)

    @jax.jit
    @jax.value_and_grad
    def objective(trainable):
        return jnp.mean(min_noise.loss(trainable, state, images, batch, context)["loss"])

    loss, gradient = objective(state.trainable)
    np.testing.assert_allclose(loss, arrays[f"loss/{task}"], atol=BUDGET)
    prefix, seen = f"gradient/{task}/", 2 * task + 2
    expected = {
        "mean": linear_of(arrays, f"{prefix}mu.{task}"),
        "spread": linear_of(arrays, f"{prefix}sigmma.{task}"),
        "rows": arrays[f"{prefix}rows"],
    }
    found = {**gradient["noise"], "rows": gradient["head"]["rows"][:seen]}
    if task == 0:
        expected["dense"] = linear_of(arrays, f"{prefix}MLP")
        expected["norms"] = norms_of(arrays, prefix)
        expected["bias"] = arrays[f"{prefix}bias"]
        found |= {name: gradient[name] for name in ("dense", "norms")}
        found["bias"] = gradient["head"]["bias"][:seen]
    else:
        assert not np.asarray(gradient["head"]["bias"]).any()
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=BUDGET * np.abs(b).max()),
        found,
        expected,
    )
    assert not np.asarray(gradient["head"]["rows"][seen:]).any()
