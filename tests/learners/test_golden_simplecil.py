"""SimpleCIL against LAMDA-PILOT: features, class means, cosines.

Repository LAMDA-CL/LAMDA-PILOT, commit 5240714d3d6071aca824f8aed4a92a46ac6f883c. The arrays come
from `golden/make_simplecil_golden.py`, which runs models/simplecil.py `Learner.incremental_train`,
and in it `replace_fc`, on utils/inc_net.py `SimpleVitNet`, whose transformer is timm's
`VisionTransformer` (12 wide, 2 blocks, 2 heads, MLP 24, patches of 4 pixels of 8 x 8 images; their
`out_dim` of 768 set to 12), in float64 on weights rounded to float32: tasks of three and of two
classes, two to five images a class, and the logits of `SimpleVitNet.forward` on eight images after
each. The scale of their head, backbone/linears.py `CosineLinear`, stays at its start of 1, for
nothing is trained: logits are cosines. The best leads by more than 0.11. They differ from ours in
nothing that is pinned here.

Error budget, eps = 1.2e-7. A feature: two blocks of six products and norms in a row, each rounding
sums of 12 to 48 numbers by about 5 eps, in all 60 eps of the largest entry. Its mean over a class
is as good, and so is a cosine, which averages over 12 numbers.
"""

import jax
import numpy as np
import pytest

import qkd_jax
from qkd_jax.engine import verbs

BUDGET = 60 * 1.2e-7
TASKS = (qkd_jax.Task(0, (0, 1, 2)), qkd_jax.Task(1, (3, 4)))


@pytest.fixture(scope="module")
def stored(golden):
    return golden("simplecil")


def test_prototypes_and_cosines_of_two_tasks(stored):
    arrays = stored.arrays
    settings = "method=simplecil backbone.image_size=8 data.augment=false num_classes=6"
    settings += " max_tasks=3 max_task_classes=3"
    config = stored.config(*settings.split())
    state = qkd_jax.init_state(jax.random.key(0), stored.backbone, config)
    scale = np.abs(arrays["features"]).max()
    for task in TASKS:
        mine = np.isin(arrays["labels"], task.classes)
        batch = {"image": arrays["images"][mine], "label": arrays["labels"][mine]}
        state = qkd_jax.end_task(qkd_jax.begin_task(state, task), [batch])
        expected = arrays[f"fc/{task.index}"]
        rows = state.memory["rows"][: len(expected)]
        np.testing.assert_allclose(rows, expected, atol=BUDGET * scale)
        features = verbs.slot_features(state, arrays["queries"])
        np.testing.assert_allclose(features[:, 0], arrays["features"], atol=BUDGET * scale)
        scores, expected = qkd_jax.predict(state, arrays["queries"]), arrays[f"logits/{task.index}"]
        classes = expected.shape[1]
        np.testing.assert_allclose(scores[:, :classes], expected, atol=BUDGET)
        assert (np.asarray(scores[:, classes:]) == -np.inf).all()
        np.testing.assert_array_equal(scores.argmax(1), expected.argmax(1))
