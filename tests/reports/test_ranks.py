"""The table over streams, from records on disk."""

import numpy as np
import pytest

from qkd_jax.cli import main
from qkd_jax.errors import DataError
from qkd_jax.reports.predictions import PACKED, Predictions, packed
from qkd_jax.reports.ranks import ranking, ranking_table


def record(folder, accuracy, num_images=60, images="same"):
    """A record of two tasks; the first `accuracy` of the images are right, after both tasks."""
    label = np.arange(num_images, dtype=np.int16) % 6
    right = np.arange(num_images) < accuracy * num_images
    predicted = np.stack([np.where(right, label, (label + 1) % 6)] * 2).astype(np.int16)
    none = dict.fromkeys(("within_task", "routed", "log_probability", "predicted_log_probability"))
    folder.mkdir(parents=True)
    task = np.zeros(num_images, np.int16)
    (folder / PACKED).write_bytes(packed(Predictions(images, label, task, predicted, **none)))


@pytest.fixture
def streams(tmp_path):
    """`ours` is best on both streams by a wide margin, `base` and `other` by turns worst."""
    for stream, accuracies in (
        ("one", {"base": 0.5, "ours": 0.9, "other": 0.4}),
        ("two", {"base": 0.3, "ours": 0.8, "other": 0.6}),
    ):
        for method, accuracy in accuracies.items():
            for seed in (1, 2):
                record(tmp_path / stream / method / f"seed{seed}", accuracy)
    return tmp_path / "one", tmp_path / "two"


def test_the_best_method_is_first_and_the_others_are_behind_it(streams):
    found = ranking(streams, ["base", "ours", "other"])
    assert found["methods"] == ["ours", "base", "other"]
    assert found["rank"]["ours"] == (1.0, 1.0, 1.0)
    assert found["rank"]["base"].value == found["rank"]["other"].value == 2.5
    assert [round(i.value, 6) for i in found["accuracy"]["base"]] == [50.0, 30.0]
    for gap, expected in zip(found["behind"]["base"], (40.0, 50.0), strict=True):
        assert gap.value == pytest.approx(expected) and 0 < gap.low < expected < gap.high
    assert found["behind"]["ours"] == [(0.0, 0.0, 0.0)] * 2
    assert found["critical_difference"] == pytest.approx(2.343 * np.sqrt(12 / 12), rel=1e-3)
    assert ranking(streams, ["base", "ours", "other"]) == found  # the same bytes every time


def test_the_command_prints_the_table(streams, capsys):
    assert main(["rank", *map(str, streams), "--methods", "ours base", "--measure", "last"]) == 0
    said = capsys.readouterr().out
    assert ranking_table(ranking(streams, ["ours", "base"], "last")) in said
    rows = said.split("\n\n")[1].splitlines()
    assert rows[0] == "| method | mean rank | one | two |" and rows[2].startswith("| ours | 1.00 [")
    assert len({line.count("|") for line in rows}) == 1
    assert said.endswith(f"Critical difference of mean ranks: {1.96 / np.sqrt(2):.2f}.\n")


def test_one_stream_has_no_critical_difference(streams):
    found = ranking(streams[:1], ["ours", "base"])
    assert found["critical_difference"] is None
    assert "Critical" not in ranking_table(found)


def test_only_the_seeds_that_are_asked_for_count(streams, capsys):
    record(streams[0] / "ours" / "seed3", 0.1)
    record(streams[0] / "more" / "seed1", 0.7)
    record(streams[0] / "more" / "seed2", 0.7)
    found = ranking(streams[:1], ["ours", "more"], seeds=(1, 2))
    assert [found["accuracy"][m][0].value for m in ("ours", "more")] == pytest.approx([90, 70])
    command = ["rank", str(streams[0]), "--methods", "ours more", "--seeds", "2 1"]
    assert main(command) == 0
    assert ranking_table(found) in capsys.readouterr().out


def test_what_cannot_be_compared_is_refused(streams, tmp_path):
    with pytest.raises(DataError, match="nothing: expected runs, seed<k>, found none"):
        ranking(streams, ["ours", "nothing"])
    with pytest.raises(DataError, match="expected two different ones or more, found ours"):
        ranking(streams, ["ours"])
    record(tmp_path / "one" / "more" / "seed1", 0.5)
    with pytest.raises(DataError, match=r"same seeds .* ours with 1, 2 and more with 1;"):
        ranking(streams[:1], ["ours", "more"])
    with pytest.raises(DataError, match="more: expected seeds 1, 2, found no 2"):
        ranking(streams[:1], ["ours", "more"], seeds=(1, 2))
    record(tmp_path / "one" / "more" / "seed2", 0.5, images="others")
    with pytest.raises(DataError, match="expected the same test images in all runs"):
        ranking(streams[:1], ["ours", "more"])
    (tmp_path / "one" / "old" / "seed1").mkdir(parents=True)
    with pytest.raises(DataError, match="found a record of an older version; run it again"):
        ranking(streams[:1], ["old", "ours"])
