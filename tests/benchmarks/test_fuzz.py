"""A small campaign over every kind of file, and what counts as a crash."""

import json

import numpy as np
import pytest

from benchmarks import fuzz as campaign
from benchmarks.fuzz_kinds import KINDS, Kind
from benchmarks.mutations import mutated, mutated_json
from qkd_jax.errors import DataError


@pytest.fixture(autouse=True)
def unlimited(monkeypatch):
    """This process goes on with other tests."""
    monkeypatch.setattr(campaign, "_limit_memory", lambda: None)


@pytest.mark.parametrize("name", KINDS)
def test_no_changed_file_gives_another_error_than_the_packages_own(name):
    found = campaign.fuzz(name, inputs=60, seed=7)
    assert found["crashes"] == {}
    assert found["accepted"] + found["answered"] == 60 and found["answered"] > 20


def test_what_is_neither_accepted_nor_answered_is_a_crash_that_can_be_repeated(monkeypatch):
    def read(_, data, __):
        if data[:1] == b"\0":
            raise DataError("answered")
        if data[:1] == b"\1":
            raise KeyError("crashed")

    def change(_, rng):
        return bytes([rng.integers(3)])

    monkeypatch.setitem(KINDS, "npz", lambda: Kind({"a": b"\2"}, change, read))
    found = campaign.fuzz("npz", inputs=50, seed=0)
    assert min(found["accepted"], found["answered"], found["crashed"]) > 5
    ((place, told),) = found["crashes"].items()
    assert place.startswith("KeyError in test_fuzz.py")
    number = int(told.split()[1].rstrip(","))
    rng = np.random.default_rng([0, number])
    rng.integers(1)  # which example
    assert change(b"", rng) == b"\1"


def test_changes_follow_from_the_seed_alone_and_change_something():
    data = json.dumps({"a": [1, {"b": "c"}], "d": None}).encode()
    for change in (mutated, mutated_json):
        one, two = ([change(data, np.random.default_rng(k)) for k in range(50)] for _ in range(2))
        assert one == two and sum(found != data for found in one) > 40
    assert json.loads(data) == {"a": [1, {"b": "c"}], "d": None}


def test_a_campaign_can_be_recorded_kind_by_kind(tmp_path):
    path = tmp_path / "fuzz.json"
    each = 3
    arguments = [f"--inputs={each * len(KINDS)}", "--seed=5", f"--record={path}"]
    for kind in ("text", "npz"):
        assert campaign.main([kind, *arguments]) == 0
    found = json.loads(path.read_text())
    assert list(found["kinds"]) == ["npz", "text"]
    assert all(row["accepted"] + row["answered"] == each for row in found["kinds"].values())
    assert campaign.main(["text", *arguments, "--seed=6"]) == 0  # another campaign
    assert list(json.loads(path.read_text())["kinds"]) == ["text"]
