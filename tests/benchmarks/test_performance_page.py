"""docs/performance.md quotes `benchmarks/results/latest.json` and nothing else."""

from pathlib import Path

from benchmarks.__main__ import SUBJECTS
from benchmarks.pairs import RESULTS, read, table

ROOT = Path(__file__).parents[2]


def test_every_row_stands_on_the_page_word_for_word_and_no_other():
    subjects = read(RESULTS / "latest.json")
    page = (ROOT / "docs" / "performance.md").read_text()
    assert set(subjects) == set(SUBJECTS)
    quoted = "\n".join(table(timed.rows) for timed in subjects.values())
    for timed in subjects.values():
        assert table(timed.rows) in page
    front = (ROOT / "README.md").read_text().split("## Speed")[1].split("\n## ")[0]
    lines = [line for line in front.splitlines() if line.startswith("| ")][2:]
    rows = [row for timed in subjects.values() for row in timed.rows]
    known = {f"| {row.name} | {row.peer_name} | {row.ratio:.2f} |" for row in rows}
    assert len(lines) > 5 and set(lines) <= known
    shown = [line for line in page.splitlines() if line.startswith("| ") and " ms | " in line]
    assert all(line in quoted for line in shown)


def test_the_page_says_where_each_subject_was_timed():
    """A paragraph for each machine with its processor, the versions and the subjects."""
    paragraphs = (ROOT / "docs" / "performance.md").read_text().split("\n\n")
    paragraphs = [paragraph.replace("\n", " ") for paragraph in paragraphs]
    for subject, timed in read(RESULTS / "latest.json").items():
        (place,) = [p for p in paragraphs if f"`{subject}`" in p and "Timed on" in p]
        assert f"{timed.machine['cores']} cores of an {timed.machine['processor']}" in place
        assert all(f"{name} {version}" in place for name, version in timed.versions.items())
