"""What the tests of the gate share: settings, parameters, queries and anchors.

Error budgets, eps = 1.2e-7: a projection of D = 12 products of numbers below 4 is off by 50 eps,
tanh and pi keep that below 200 eps, and a fidelity of Q = 3 such angles below 2000 eps = 2e-4.
Softmax and log-sum-exp add a few eps. `EXACT` is for formulas without a circuit.
"""

import jax
import jax.numpy as jnp
import numpy as np

from qkd_jax.learners.qkd import gate
from qkd_jax.learners.qkd.gate import GateSettings

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


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def params_of(config, seed=0):
    return gate.init_gate(jax.random.key(seed), config, WIDTH, TASKS)


def relevance_of(config, query, anchors, owner, open_tasks, params=None):
    params = params_of(config) if params is None else params
    run = jax.jit(gate.relevance, static_argnums=1)
    return run(params, config, query, anchors, jnp.asarray(owner), jnp.asarray(open_tasks))


similarity = jax.jit(gate.similarity, static_argnums=1)
QUERY, ANCHORS, OWNER = draw(5, WIDTH), draw(6, WIDTH, seed=1), [0, 1, 1, 2, -1, 0]
OPEN = [True, True, False, False]
