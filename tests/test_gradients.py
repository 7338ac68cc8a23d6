"""Gradients of the public differentiable functions against central differences, in float64.

Each function is contracted with fixed random numbers, and its gradient with a random direction u.
Error budget of (g(x + h u) - g(x - h u)) / 2h with h = 1e-5 where values and derivatives are near
1: h^2 / 6 of a third derivative, 1e-10, and 1e-16 / h of rounding, 1e-11; for third derivatives of
up to 1e3 (a kernel's, a logarithm of small fidelities') BUDGET of the length of the gradient.
"""

import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from qkd_jax import quantum
from qkd_jax.generators import fields
from qkd_jax.generators.learned import deviations
from qkd_jax.learners.q_tuning.retention import mutual_information
from qkd_jax.learners.qkd import gate
from qkd_jax.nn import heads, layers, losses, prompts, whitening
from qkd_jax.nn.adapters import AdapterSpec, apply_adapter, mixed_adapter

BUDGET, STEP = 1e-6, 1e-5
QUBITS, WIDTH = 3, 6


def draw(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape)


def positive(*shape, seed=0):
    weights = np.exp(draw(*shape, seed=seed))
    return weights / weights.sum(-1, keepdims=True)


def dense(fan_in, fan_out, seed=0):
    kernel = draw(fan_in, fan_out, seed=seed) * fan_in**-0.5
    return {"kernel": kernel, "bias": draw(fan_out, seed=seed + 1)}


def norm(width):
    return {"scale": 1 + 0.1 * draw(width), "bias": draw(width)}


def adapters(num_tasks):
    shape = (num_tasks, 1)
    return {
        "down": {"kernel": draw(*shape, 6, 2), "bias": draw(*shape, 2)},
        "up": {"kernel": draw(*shape, 2, 6), "bias": draw(*shape, 6)},
    }


def attend(params, x, insert):
    insert = layers.AttentionInsert(**insert)
    return layers.attention(params, x[:, :2], x, 2, jnp.float64, insert)


def adapt_mixed(adapters, weights, x):
    mixed, factors = mixed_adapter(adapters, weights)
    one = jax.tree.map(lambda a: a[0], mixed)
    return apply_adapter(one, x, AdapterSpec(), factors[:, None, :])


def whitened(scatter, vectors):
    factor = whitening.shrunk_factor(scatter @ scatter.T, jnp.float64(7), 0.3)
    return whitening.whiten(whitening.Metric(vectors[0], jnp.linalg.inv(factor)), vectors)


MAP = quantum.FeatureMap(QUBITS, 3, reupload=False, last_axis="x")
CIRCUIT = quantum.feature_circuit(quantum.FeatureMap(QUBITS, 2, last_axis="z"))
COLUMNS = np.array([True, True, False, True])
LABELS = np.array([0, 3, 1])
LOGITS = draw(3, 4)
# Name -> (function of what is differentiated, its arguments). The gradient stops at the teachers of
# the distillation losses and at the goals of generators, which are therefore not differentiated.
TABLE = {
    "gelu": (layers.gelu, 2 * draw(9)),
    "quick_gelu": (layers.quick_gelu, 2 * draw(9)),
    "standardize": (lambda x: layers.standardize(x, 1e-2), draw(3, 6)),
    "layer_norm": (lambda p, x: layers.layer_norm(p, x, 1e-2), norm(6), draw(3, 6)),
    "linear": (lambda p, x: layers.linear(p, x, jnp.float64), dense(6, 4), draw(3, 6)),
    "matmul_trainable": (layers.matmul_trainable, draw(2, 3, 6), draw(6, 4)),
    "attention": (
        attend,
        {name: dense(6, 6, i) for i, name in enumerate(("query", "key", "value", "out"))},
        draw(2, 4, 6),
        {
            "prefix_key": draw(2, 6),
            "prefix_value": draw(2, 3, 6)[:, :2],
            "class_key": draw(6),
            "class_value": draw(6, seed=1),
            "lora_key": {"down": draw(6, 2), "up": draw(2, 6)},
            "lora_value": {"down": draw(6, 2, seed=1), "up": draw(2, 6, seed=1)},
        },
    ),
    "apply_adapter": (
        lambda a, x: apply_adapter(jax.tree.map(lambda leaf: leaf[0, 0], a), x, AdapterSpec()),
        adapters(1),
        draw(2, 3, 6),
    ),
    "mixed_adapter": (adapt_mixed, adapters(3), positive(2, 3), draw(2, 3, 6)),
    "unit": (heads.unit, draw(3, 6)),
    "head_logits-cosine": (partial(heads.head_logits, kind="cosine"), draw(3, 6), draw(4, 6), 2.0),
    "head_logits-linear": (
        lambda f, rows: heads.head_logits(f, rows, 1.0, "linear"),
        *(draw(3, 6), draw(4, 6)),
    ),
    "linear_logits": (heads.linear_logits, draw(3, 6), draw(4, 6), draw(4)),
    "shrunk_factor, whiten": (whitened, draw(6, 7), draw(3, 6)),
    "cosines": (prompts.cosines, draw(3, 6), draw(4, 6)),
    **{
        f"key_loss-{reduction}": (
            lambda cosine, reduction=reduction: prompts.key_loss(
                cosine,
                jnp.array([[0, 1], [1, 3], [2, 0]]),
                reduction,
                jnp.ones(3, bool),
                lambda x: x,
            ),
            draw(3, 4),
        )
        for reduction in ("mean", "sum", "gtripl_sum")
    },
    "cross_entropy": (lambda z: losses.cross_entropy(z, LABELS, COLUMNS), LOGITS),
    "masked_kl": (lambda z: losses.masked_kl(LOGITS, z, COLUMNS), draw(3, 4, seed=1)),
    "softened_kl": (lambda z: losses.softened_kl(LOGITS, z, COLUMNS, 2.0), draw(3, 4, seed=1)),
    "decoupled_kl": (
        lambda z: losses.decoupled_kl(LOGITS, z, jnp.array(LABELS), jnp.array(COLUMNS), 2.0, 3.0),
        draw(3, 4, seed=1),
    ),
    "mean_square": (lambda z: losses.mean_square(LOGITS, z), draw(3, 4, seed=1)),
    "jensen_shannon": (lambda z: losses.jensen_shannon(LOGITS, z, COLUMNS), draw(3, 4, seed=1)),
    "distillation": (
        lambda z, alpha: losses.distillation(
            draw(3, 2, 4), z, jnp.array([[COLUMNS, ~COLUMNS]]), alpha, 2.0
        ),
        *(draw(3, 4), positive(3, 2)),
    ),
    "feature_distillation": (
        lambda f, alpha: losses.feature_distillation(draw(3, 2, 4), f, alpha),
        *(draw(3, 4), positive(3, 2)),
    ),
    "entropy": (losses.entropy, positive(3, 4)),
    **{
        f"sparsity-{kind}": (partial(losses.sparsity, kind), positive(3, 4), positive(3, 4, seed=1))
        for kind in ("l1_softmax", "l1_scores", "entropy")
    },
    "mutual_information": (
        lambda c, own, other: mutual_information(c, own, other, jnp.ones(4, bool), lambda x: x),
        {f"layer{i}": dense(*size, i) for i, size in enumerate(((4, 5), (5, 5), (5, 1)))},
        *(draw(4, 2), draw(4, 2, seed=1)),
    ),
    "deviations": (
        lambda p, noise: deviations(p, jnp.array([0, 1, 1]), noise),
        {"embedding": draw(2, 3), "layers": [dense(6, 5), dense(5, 4)]},
        draw(3, 3),
    ),
    "drifting_velocity": (
        lambda x, y, z: fields.drifting_velocity(x, y, z, 1.5),
        *(draw(3, 4), draw(5, 4), draw(4, 4, seed=1)),
    ),
    **{
        f"gradient_flow_velocity-{kind}": (
            lambda x, y, z, kind=kind: fields.gradient_flow_velocity(x, y, z, 2.0, kind),
            *(draw(3, 4), draw(5, 4), draw(4, 4, seed=1)),
        )
        for kind in (*fields.WEIGHTS, "mmd")
    },
    "amplitude_state": (lambda v: quantum.amplitude_state(v, QUBITS), draw(2, 6)),
    "fidelity": (quantum.fidelity, draw(8), draw(8, seed=1)),
    "expectation_z": (quantum.expectation_z, draw(8)),
    "bloch_vectors": (quantum.bloch_vectors, draw(8)),
    "projected_kernel": (
        lambda a, b: quantum.projected_kernel(a, b, 0.3),
        *(draw(2, 3, 3), draw(4, 3, 3)),
    ),
    "after_readout": (lambda z: quantum.after_readout(z, 0.1), draw(3)),
    "apply": (lambda p: quantum.expectation_z(quantum.apply(CIRCUIT, p)), draw(9)),
    "classifier_expectations": (
        quantum.classifier_expectations,
        draw(2, 5),
        {name: draw(*shape) for name, shape in quantum.angle_shapes(5).items()},
    ),
    "feature_state": (
        lambda a, t: quantum.bloch_vectors(quantum.feature_state(MAP, a, t)),
        *(draw(3), draw(3, 3)),
    ),
    **{
        f"fidelity_matrix-{form}": (
            lambda a, b, t, form=form: quantum.fidelity_matrix(quantum.FeatureMap(*form), a, b, t),
            *(draw(2, form[0]), draw(3, form[0]), draw(form[1], form[0])),
        )
        for form in ((4, 2, True, "y"), (3, 3, True, "z"))
    },
}
GATES = ("quantum", "pqk", "cosine", "rbf", "mlp", "attention")


def route(params, query, anchors, config):
    """Relevance and scores of every kind of gate, six anchors of three tasks, two of them open."""
    owner, open_tasks = jnp.array([0, 1, 1, 2, -1, 0]), jnp.array([True, True, False])
    found = gate.relevance(params, config, query, anchors, owner, open_tasks)
    return jnp.stack([found.weights, found.scores])


def parameters_of(config):
    shapes = jax.eval_shape(lambda: gate.init_gate(jax.random.key(0), config, WIDTH, 3))
    return {name: draw(*leaf.shape) for name, leaf in shapes.items()}


for config in (
    *(gate.GateSettings(kind=kind, encoding="angle", num_qubits=QUBITS) for kind in GATES),
    *(gate.GateSettings(kind=kind, num_qubits=QUBITS) for kind in ("quantum", "pqk", "cosine")),
):
    TABLE[f"relevance-{config.kind}-{config.encoding}"] = (
        partial(route, config=config),
        parameters_of(config),
        *(draw(4, WIDTH), draw(6, WIDTH, seed=1)),
    )


@pytest.mark.parametrize("name", TABLE)
def test_gradient_is_that_of_central_differences(name):
    function, *arguments = TABLE[name]
    # The gate's constants are float32, which strict promotion would refuse beside float64.
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        arguments = jax.tree.map(jnp.float64, arguments)
        out = jax.eval_shape(function, *arguments)
        weights = draw(*out.shape, seed=9)

        @jax.jit
        def value_and_gradient(arguments):
            return jax.value_and_grad(lambda a: jnp.sum(weights * function(*a)))(arguments)

        _, gradient = value_and_gradient(arguments)
        flat, rebuild = ravel_pytree(arguments)
        slope = np.asarray(ravel_pytree(gradient)[0])
        assert np.isfinite(slope).all()
        for seed in range(3):
            direction = draw(flat.size, seed=seed)
            direction /= np.linalg.norm(direction)
            ends = [value_and_gradient(rebuild(flat + s * STEP * direction))[0] for s in (1, -1)]
            quotient = (float(ends[0]) - float(ends[1])) / (2 * STEP)
            assert abs(quotient - slope @ direction) < BUDGET * max(np.linalg.norm(slope), 1e-3)


@pytest.mark.parametrize("module", [losses, fields])
def test_no_function_of_the_module_is_left_out(module):
    public = {
        name
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if function.__module__ == module.__name__ and not name.startswith("_")
    }
    # Parts of the velocities, and losses whose gradient stops at the goal (test_fields.py).
    public -= {"squared_distances", "mean_shift"}
    public -= {"drifting_loss", "drifting_goal", "gradient_flow_loss"}
    assert public <= {name.split("-")[0] for name in TABLE}
