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
    shown = [line for line in page.splitlines() if line.startswith("| ") and " ms | " in line]
    assert all(line in quoted for line in shown)


def test_the_page_says_where_each_subject_was_timed():
    """A paragraph for each machine with its processor, the versions and the subjects."""
    paragraphs = (ROOT / "docs" / "performance.md").read_text().split("\n\n")
    paragraphs = [paragraph.replace("\n", " ") for paragraph in paragraphs]
    for subject, timed in read(RESULTS / "latest.json").items():
        (place,) = [p for p in paragraphs if f"`{subject}`" in p and "Timed on" in p]
        cores = {1: "1 core"}.get(timed.machine["cores"], f"{timed.machine['cores']} cores")
        assert f"{cores} of an {timed.machine['processor']}" in place
        assert all(f"{name} {version}" in place for name, version in timed.versions.items())
