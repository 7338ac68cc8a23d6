"""Logs of a run that goes on."""

import json

from qkd_jax.runs.writer import trimmed_log


def test_trimming_the_log_drops_what_will_be_written_again():
    lines = [json.dumps({"task": t, "step": s}) for t in (0, 1) for s in (1, 2, 3)]
    torn = "\n".join([*lines, '{"task": 1, "st'])
    assert trimmed_log(torn, 1, 2).splitlines() == lines[:5]
    assert trimmed_log("\n".join([*lines[:2], "\0\0\0"]), 1, 2).splitlines() == lines[:2]
    assert trimmed_log(torn, -1, 0) == ""
