"""Rows of a benchmark: which way a ratio goes, what is marked and written. Nothing is timed."""

import json

import pytest

from benchmarks import pairs
from benchmarks.pairs import Row, check, compare, read, table, write


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
    write({"one": rows[:2], "two": rows[2:]}, path)
    written = json.loads(path.read_text())
    assert [row["ratio"] for row in written["rows"]] == [2.0, 0.5, 0.5]
    assert {"jax", "numpy"} <= written["versions"].keys() and written["machine"]["cores"] >= 1
    assert read(path) == {"one": rows[:2], "two": rows[2:]}


def test_rows_of_another_machine_or_version_are_not_kept(tmp_path):
    path = tmp_path / "latest.json"
    for part, name in (("machine", "processor"), ("versions", "jax")):
        write({"one": [Row("a", 1.0, 2.0, "peer", "ms", 2.0, 1.5)]}, path)
        written = json.loads(path.read_text())
        written[part][name] = "another"
        path.write_text(json.dumps(written))
        assert read(path) == {}
