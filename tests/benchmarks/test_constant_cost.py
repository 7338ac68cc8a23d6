"""The rows about many tasks, tiny, with few tasks; no test looks at times."""

import jax
import pytest

from benchmarks import constant_cost
from benchmarks.accelerator import SMOKE


@pytest.mark.slow  # compiles a dozen programs
def test_every_row_is_there_and_a_stream_is_compiled_once():
    # Timing code adds Python numbers to arrays, as users do.
    with jax.numpy_rank_promotion("allow"):
        found = list(constant_cost.rows((3, 4, 6), 1, SMOKE.spec))
    starts = ["memory for each task", "of that on the device", "gate", "gate", "answer"]
    starts += ["step, augmented"] * 3
    starts += ["a step on augmented", "an answer, routed", *["stream: "] * 4]
    assert len(found) == len(starts)
    for row, start in zip(found, starts, strict=True):
        assert row.name.startswith(start) and row.ratio > 0
    # 6 tasks are learned end to end; the other steps are of other sizes.
    assert all("compiled 1 times" in row.note for row in found[-4:])
