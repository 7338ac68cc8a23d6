"""Makes each notebook from its source: NAME.py, in jupytext's percent format, becomes NAME.ipynb.

    python notebooks/build.py                    all of them, with the outputs that they have
    python notebooks/build.py --execute 03       those whose name begins so, run from top to bottom

A notebook is its badge, the cells of opening.py, and its own. A run takes minutes; the outputs that
are committed are those of a real run, and tests run every notebook in smoke form. If code has
changed, only a new run gives outputs.
"""

import argparse
import tempfile
from pathlib import Path

import jupytext
import nbformat

# The one place with the repository's address: fill in yours, and make the notebooks again.
REPOSITORY = "https://github.com/OWNER/qkd_jax"

FOLDER = Path(__file__).parent
BADGE = "https://colab.research.google.com/assets/colab-badge.svg"


def sources() -> list[Path]:
    """The sources of all notebooks, in order."""
    return sorted(FOLDER.glob("[0-9][0-9]_*.py"))


def made_from(source: Path) -> nbformat.NotebookNode:
    """The notebook of a source, without outputs."""
    opening = jupytext.reads((FOLDER / "opening.py").read_text(), fmt="py:percent").cells
    own = jupytext.reads(source.read_text(), fmt="py:percent").cells
    colab = REPOSITORY.replace("https://github.com", "https://colab.research.google.com/github")
    link = f"[![Open in Colab]({BADGE})]({colab}/blob/main/notebooks/{source.stem}.ipynb)"
    own[0].source = f"{link}\n\n{own[0].source}"
    opening[0].source = opening[0].source.replace("ADDRESS", REPOSITORY)
    notebook = nbformat.v4.new_notebook(cells=[own[0], *opening, *own[1:]])
    for number, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"{source.stem[:2]}-{number}", {}
    notebook.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    return notebook


def with_outputs(notebook: nbformat.NotebookNode, path: Path) -> nbformat.NotebookNode:
    """The notebook with the outputs of the one at `path`, if its code is the same."""
    if not path.is_file():
        return notebook
    old, new = (
        [cell for cell in book.cells if cell.cell_type == "code"]
        for book in (nbformat.read(path, as_version=4), notebook)
    )
    if [cell.source for cell in old] == [cell.source for cell in new]:
        for before, cell in zip(old, new, strict=True):
            cell.outputs, cell.execution_count = before.outputs, before.execution_count
    return notebook


def executed(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook with outputs, run in an empty folder."""
    from nbclient import NotebookClient

    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(notebook, timeout=None, record_timing=False, kernel_name="python3")
        client.resources = {"metadata": {"path": folder}}
        client.execute()
        for cell in notebook.cells:
            for output in cell.get("outputs", ()):
                if "text" in output:  # of paths on this machine only what lies in the folder stays
                    output.text = output.text.replace(f"{folder}/", "")
    return notebook


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="how names begin; none: all")
    parser.add_argument("--execute", action="store_true")
    chosen = parser.parse_args()
    for source in sources():
        if chosen.names and not source.stem.startswith(tuple(chosen.names)):
            continue
        notebook, path = made_from(source), source.with_suffix(".ipynb")
        notebook = executed(notebook) if chosen.execute else with_outputs(notebook, path)
        nbformat.write(notebook, path)
        print(path)


if __name__ == "__main__":
    main()
