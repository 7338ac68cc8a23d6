"""Rows beside `torch.compile`, with stand-ins for PyTorch: it is no dependency of the tests."""

import math
import sys
import types

import pytest

from benchmarks import transformer
from benchmarks.pairs import table


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    torch = types.SimpleNamespace(_dynamo=types.SimpleNamespace(reset=lambda: None))
    monkeypatch.setitem(sys.modules, "torch", torch)


def counting(*values):
    left = list(values)
    return lambda: left.pop(0) if len(left) > 1 else left[0]


def test_what_torch_compile_gives_is_compared_before_it_is_timed():
    row = transformer.beside_compiled("step", counting(3.0, 2.0, 1.0), counting(3.0, 2.0, 1.0), 2)
    assert row.ratio > 0 and row.peer_name.endswith("torch.compile") and row.goal == 1.0
    assert "which compiles, took 0 s and is not counted" in row.note
    with pytest.raises(AssertionError, match="step: ours and the peer's differ"):
        transformer.beside_compiled("step", counting(3.0, 2.0, 1.0), counting(3.0, 2.0, 1.1), 2)


def test_a_peer_that_cannot_compile_stays_as_a_row_that_says_why():
    def theirs():
        raise RuntimeError("no C++ compiler\nfound")

    row = transformer.beside_compiled("step", counting(1.0), theirs, 2)
    assert math.isnan(row.ratio) and row.ours >= 0
    (line,) = table([row]).splitlines()[2:]
    assert "could not compile: RuntimeError: no C++ compiler" in line
    assert "**not measured**" in line and "missed" not in line
