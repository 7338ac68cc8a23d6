"""The row beside `debyecalculator`, with a stand-in for it: it is no dependency of the tests."""

import math

import numpy as np
import pytest

from benchmarks import debye
from benchmarks.pairs import table
from projects.nanoparticles.scattering import pair_distribution

SMALL = ["--clusters", "2", "--atoms", "5", "--pairs", "1"]


def same(positions, settings, factor=1.0):
    count = np.full(len(positions), positions.shape[1], np.int32)
    ones = np.ones((len(positions), len(settings.q())), np.float32)
    return lambda: factor * np.asarray(pair_distribution(positions, count, ones, settings))


def test_without_the_peer_the_row_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(debye.importlib.util, "find_spec", lambda name: None)
    [row] = debye.main(SMALL)
    assert math.isnan(row.ratio) and row.note == "debyecalculator, torch not installed"
    assert "**not measured**" in table([row])


def test_the_peer_is_compared_before_it_is_timed(monkeypatch):
    monkeypatch.setattr(debye, "missing", lambda: "")
    monkeypatch.setattr(debye, "peer_of", same)
    [row] = debye.main(SMALL)
    assert row.ratio > 0 and row.name == "G(r) of 2 clusters of 5 atoms"
    monkeypatch.setattr(debye, "peer_of", lambda *arguments: same(*arguments, factor=0.5))
    with pytest.raises(AssertionError, match="debyecalculator: ours and the peer's differ"):
        debye.main(SMALL)
