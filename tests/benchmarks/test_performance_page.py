"""docs/performance.md quotes `benchmarks/results/latest.json` and nothing else."""

import json
from pathlib import Path

from benchmarks.pairs import RESULTS, Row, table

ROOT = Path(__file__).parents[2]


def test_every_row_stands_on_the_page_word_for_word_and_no_other():
    value = json.loads((RESULTS / "latest.json").read_text())
    page = (ROOT / "docs" / "performance.md").read_text()
    subjects = {}
    for entry in value["rows"]:
        subjects.setdefault(entry.pop("subject"), []).append(Row(**entry))
    assert set(subjects) == {
        *("gate", "transformer", "qkd_step", "compile_time"),
        *("inference", "whole_run", "many_tasks", "pipeline"),
    }
    for rows in subjects.values():
        assert table(rows) in page
    front = (ROOT / "README.md").read_text().split("## Speed")[1].split("\n## ")[0]
    lines = [line for line in front.splitlines() if line.startswith("| ")][2:]
    known = {
        f"| {row.name} | {row.peer_name} | {row.ratio:.2f} |"
        for rows in subjects.values()
        for row in rows
    }
    assert len(lines) > 5 and set(lines) <= known
    timed = [line for line in page.splitlines() if line.startswith("| ") and " ms | " in line]
    quoted = "\n".join(table(rows) for rows in subjects.values())
    assert all(line in quoted for line in timed)
    assert value["machine"]["processor"] in page
    for name, version in value["versions"].items():
        assert f"{name} {version}" in page
