"""The page says what the committed run found."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from projects.nanoparticles.evaluate import table
from projects.nanoparticles.training import Training

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "projects" / "nanoparticles" / "results"


@pytest.fixture(scope="module")
def recorded():
    return json.loads((FOLDER / "results.json").read_text())


def test_the_tables_on_the_page_are_those_of_the_committed_numbers(recorded):
    text = table(recorded["results"], recorded["decoders_under_noise"])
    assert (FOLDER / "table.md").read_text() == text
    page = (ROOT / "docs" / "nanoparticles.md").read_text()
    assert all(part.strip() in page for part in text.split("\n\n"))


def test_the_committed_run_has_three_seeds_and_the_default_settings(recorded):
    assert [result["seed"] for result in recorded["results"]] == [0, 1, 2]
    assert recorded["settings"]["training"] == asdict(Training())


def test_the_pictures_on_the_page_are_committed():
    page = (ROOT / "docs" / "nanoparticles.md").read_text()
    shown = [line.split("](")[1].split(")")[0] for line in page.splitlines() if line[:2] == "!["]
    assert len(shown) == 3
    assert all((ROOT / "docs" / path).stat().st_size > 10_000 for path in shown)
