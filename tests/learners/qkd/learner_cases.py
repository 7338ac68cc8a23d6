"""What the tests of QKD's learner share: the method that they run, and how arrays are compared."""

import jax
import jax.numpy as jnp
import numpy as np

BUDGET = 2e-4
METHOD = (
    "method=qkd",
    "gate.kind=quantum",
    "gate.states=class",
    "gate.whiten=true",
    "gate.shrinkage=0.6",
    "head.whiten=true",
    "head.covariance=all",
    "gate.score=log_fidelity",
    "gate.temperature=0.5",
    "head.prototypes=all",
    "distillation.columns=seen",
    "distillation.target=logits",
    "sparsity.kind=entropy",
    "fusion.kind=logits",
    "fusion.frozen_weight=0",
    "adapter.start=random",
)
TOP = "distillation.top_k={}".format


def assert_same_bytes(a, b):
    a, b = np.asarray(a), np.asarray(b)
    assert a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def assert_close(a, b, atol=BUDGET):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol, rtol=0), a, b)


def distance(a, b):
    return max(
        float(jnp.abs(x - y).max())
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )
