"""The command for an accelerator, tiny and on CPUs, without PyTorch; no test looks at times."""

import math
import time

import jax
import pytest

from benchmarks import accelerator, pairs
from benchmarks.accelerator import SMOKE, TorchPeer, main, rows


@pytest.fixture(autouse=True)
def once_and_without_torch(monkeypatch):
    monkeypatch.setattr(pairs, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(accelerator, "torch_peer", lambda: TorchPeer("", "no torch today"))


@pytest.mark.slow  # compiles a dozen programs
def test_every_subject_has_its_row():
    found = {row.name.split(", bfloat16")[0]: row for row in rows(SMOKE, ("bfloat16",))}
    assert all(row.ours > 0 for row in found.values() if row.unit == "ms")
    alone = ("ViT forward", "step of adapters and head", "memory of that step")
    for name in alone:
        row = found.pop(name)
        assert math.isnan(row.peer) and "no torch today" in row.note
    # Beside ourselves: always measured, and several devices where there are several.
    names = ["QKD step, T = 10", "QKD step, augmented, two teachers, T = 100"]
    names += ["gate of that step", "routed answer, k = 2, T = 10"]
    names.append(f"step on {jax.local_device_count()} devices")
    assert all(found.pop(name).ratio > 0 for name in names)
    (last,) = found.values()
    assert last.name.startswith("largest memory")


def test_when_the_time_is_over_the_rest_is_named_and_left_out(capsys):
    (only,) = rows(SMOKE, ("float32",), until=time.monotonic() - 1)
    assert only.name.startswith("largest memory")
    told = capsys.readouterr().out.splitlines()
    assert "left out, since the time is over: forward, float32" in told
    assert len(told) == 4 + (jax.local_device_count() > 1)


def test_a_cpu_is_no_accelerator(capsys):
    with pytest.raises(SystemExit):
        main([])
    assert "--smoke tries the command on a CPU" in capsys.readouterr().err
