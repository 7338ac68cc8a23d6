"""The share of the gap that a teacher closes, by hand."""

from qkd_jax.reports.taught import taught_lines, taught_rows


def summary(average, last, student="abc", teacher=None):
    found = {"average_accuracy": average, "last_accuracy": last, "student": student}
    if teacher is not None:
        found["teacher"] = dict(zip(("average_accuracy", "last_accuracy"), teacher, strict=True))
    return found


ROWS = {
    "cdl-kdp": {
        1: summary(70, 60, teacher=(80, 70)),
        2: summary(74, 62, teacher=(84, 74)),
        3: summary(99, 99, teacher=(99, 99)),  # no run alone with this seed
    },
    "cdl-none": {1: summary(60, 50), 2: summary(64, 54)},
    "cdl-wide": {1: summary(90, 80, student="other", teacher=(95, 85))},
    "mos": {1: {"average_accuracy": 1.0, "last_accuracy": 1.0}},
}


def test_the_share_is_of_the_seeds_that_have_all_three():
    rows = taught_rows(ROWS)
    assert rows.keys() == {"cdl-kdp", "cdl-wide"}
    average = rows["cdl-kdp"]["average_accuracy"]
    assert average["teacher"] == (80 + 84 + 99) / 3 and average["alone"] == 62
    assert average["closed"] == 100 * (72 - 62) / (82 - 62)
    assert rows["cdl-kdp"]["last_accuracy"]["closed"] == 100 * (61 - 52) / (72 - 52)
    assert rows["cdl-wide"]["average_accuracy"] == {"teacher": 95, "alone": None, "taught": 90}


def test_there_is_no_share_of_a_gap_that_is_none():
    worse = {
        "a": {1: summary(70, 60, teacher=(50, 70))},
        "b": {1: summary(60, 60)},
    }
    row = taught_rows(worse)["a"]
    assert "closed" not in row["average_accuracy"] and row["last_accuracy"]["closed"] == 0


def test_the_table_says_so():
    first = next(line for line in taught_lines(taught_rows(ROWS)) if "cdl-kdp" in line)
    assert first == "| cdl-kdp | 3 | 87.67 | 62.00 | 81.00 | 50 % | 81.00 | 52.00 | 73.67 | 45 % |"
    assert "| cdl-wide | 1 | 95.00 | – | 90.00 | – |" in "\n".join(taught_lines(taught_rows(ROWS)))
