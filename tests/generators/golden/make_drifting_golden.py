"""Write `drifting.npz`, the golden arrays of `tests/generators/test_fields.py`: what the authors'
code of drifting models (arXiv 2602.04770) computes on small random samples.

The authors' code is read from a folder and none of it is kept here. Run it in an environment of its
own, never in the tests: `pip install jax einops numpy`, then

    python tests/generators/golden/make_drifting_golden.py FOLDER

FOLDER is a checkout of lambertae/drifting at accd0cf09c33b70892d33941d2a287ca86cb92e1. What is
called is `drift_loss.drift_loss` with its default temperatures, in float32 on the CPU. Nothing is
replaced but the name `a_min` of an argument of `jnp.clip`, which is `min` in today's JAX.

The arrays: generated [3, 6, 5], positives [3, 7, 5], negatives [3, 4, 5], negative_weight [3, 4];
`plain/loss` [3] and `plain/gradient` [3, 6, 5], of the sum over labels, without negatives;
`guided/...` with them.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

clip = jnp.clip
jnp.clip = lambda array, a_min: clip(array, min=a_min)
sys.path.insert(0, sys.argv[1])
from drift_loss import drift_loss  # noqa: E402

draws = np.random.default_rng(2)
shapes = {"generated": (3, 6, 5), "positives": (3, 7, 5), "negatives": (3, 4, 5)}
arrays = {name: draws.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
arrays["positives"] += 0.7
arrays["negative_weight"] = draws.uniform(0.1, 2.0, (3, 4)).astype(np.float32)

calls = {
    "plain": {},
    "guided": {"fixed_neg": arrays["negatives"], "weight_neg": arrays["negative_weight"]},
}
for name, more in calls.items():

    def losses(generated, more=more):
        return drift_loss(generated, arrays["positives"], **more)[0]

    arrays[f"{name}/loss"] = np.asarray(losses(arrays["generated"]))
    gradient = jax.grad(lambda generated: losses(generated).sum())(arrays["generated"])
    arrays[f"{name}/gradient"] = np.asarray(gradient)
np.savez_compressed(Path(__file__).with_name("drifting.npz"), **arrays)
