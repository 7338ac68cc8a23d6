"""Rows of a benchmark: which way a ratio goes, what is marked and written. Nothing is timed."""

import json

import pytest

from benchmarks import pairs
from benchmarks.pairs import Row, check, compare, read, table, timed_here, write


@pytest.fixture
def clock(monkeypatch):
    """A clock that only the calls under test move."""
    now = [0.0]
    monkeypatch.setattr(pairs.time, "perf_counter", lambda: now[0])

    def call(taking):
        def advance():
            now[0] += taking

        return advance

    return call


def test_a_ratio_above_one_means_that_ours_is_faster(clock):
    row = compare("sum", clock(0.002), clock(0.006), "peer, jit", 2.0)
    assert row.ours == pytest.approx(2.0) and row.peer == pytest.approx(6.0)  # milliseconds
    assert row.ratio == pytest.approx(3.0) and row.unit == "ms"
    slower = compare("sum", clock(0.004), clock(0.001), "peer, jit", 1.0)
    assert slower.ratio == pytest.approx(0.25)


def test_a_peer_that_does_a_part_is_counted_whole(clock):
    row = compare("sum", clock(0.001), clock(0.002), "peer", 0.0, peer_share=0.1)
    assert row.peer == pytest.approx(20.0) and row.ratio == pytest.approx(20.0)


def test_a_peer_that_differs_or_is_not_a_number_is_no_peer():
    check("same", {"a": [1.0, 2.0]}, {"a": [1.0, 2.001]})
    for other in (2.1, float("nan"), float("inf")):
        with pytest.raises(AssertionError, match="other: ours and the peer's differ"):
            check("other", {"a": [1.0, other]}, {"a": [1.0, 2.0]})


def test_a_missed_goal_is_marked_and_stays(tmp_path):
    rows = [
        Row("a", 1.0, 2.0, "peer, jit", "ms", 2.0, 1.5),
        Row("b", 2.0, 1.0, "peer, eager", "ms", 0.5, 1.0, "half counted"),
        Row("c", 2.0, 1.0, "peer", "ms", 0.5, 0.0),
    ]
    lines = table(rows).splitlines()[2:]
    assert ["missed" in line for line in lines] == [False, True, False]
    assert "(half counted)" in lines[1] and "| – |" in lines[2]
    path = tmp_path / "results" / "latest.json"
    assert read(path) == {}
    subjects = {"one": timed_here(rows[:2]), "two": timed_here(rows[2:])}
    write(subjects, path)
    written = json.loads(path.read_text())
    assert [row["ratio"] for row in written["one"]["rows"]] == [2.0, 0.5]
    assert {"jax", "numpy"} <= written["two"]["versions"].keys()
    assert written["two"]["machine"]["cores"] >= 1
    assert read(path) == subjects


def test_a_subject_keeps_the_machine_that_it_was_timed_on(tmp_path, monkeypatch):
    path, row = tmp_path / "latest.json", Row("a", 1.0, 2.0, "peer", "ms", 2.0, 1.5)
    write({"one": timed_here([row])}, path)
    monkeypatch.setattr(pairs, "machine", lambda: {"processor": "another"})
    write(read(path) | {"two": timed_here([row])}, path)
    found = read(path)
    assert found["two"].machine == {"processor": "another"} != found["one"].machine
    assert found["one"].rows == found["two"].rows == [row]
