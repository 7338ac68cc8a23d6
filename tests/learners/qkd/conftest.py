"""One run of QKD that several modules look at."""

import pytest

from qkd_jax.engine import verbs
from tests.learners.qkd.learner_cases import METHOD


@pytest.fixture(scope="session")
def history(tiny):
    before = verbs.one_device().compilations
    stages = tiny.run(tiny.backbone, tiny.config(*METHOD))
    # Three tasks of different sizes: the step was compiled once.
    assert verbs.one_device().compilations - before == 1
    return stages
