"""Every notebook runs from top to bottom in smoke mode, offline, and is committed with outputs."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

pytestmark = pytest.mark.floor

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
FIRST = "01_quickstart_colab_tpu"
# The others take a minute each.
RUN = [p if p.stem == FIRST else pytest.param(p, marks=pytest.mark.slow) for p in NOTEBOOKS]
PICTURES = ("accuracy_curve", "accuracy_matrix", "relevance", "routing", "loss")

# In a process of its own: Jupyter's threads and sockets would meet pytest's warnings-as-errors.
EXECUTE = """
import sys
import nbformat
from jupyter_client import AsyncKernelManager
from nbclient import NotebookClient

notebook = nbformat.read(sys.argv[1], as_version=4)
kernel = AsyncKernelManager(kernel_name="python3")
kernel.kernel_spec.argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
client = NotebookClient(notebook, km=kernel, timeout=300, record_timing=False)
client.resources = {"metadata": {"path": "."}}
client.execute()
nbformat.write(notebook, "executed.ipynb")
"""


@pytest.fixture(scope="module", params=RUN, ids=lambda path: path.stem)
def executed(request, tmp_path_factory):
    """(name, folder it ran in, the notebook with outputs)."""
    folder = tmp_path_factory.mktemp(request.param.stem)
    private = {name: str(folder / ".jupyter") for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR")}
    environment = os.environ | private
    environment |= {
        "QKD_JAX_SMOKE": "1",
        "PYTHONPATH": str(ROOT),
        # Two devices, so that the run is divided among them as on a TPU.
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # compiles faster, same meaning
        # Nothing may be fetched.
        "QKD_JAX_CACHE": str(folder / "cache"),
        **{name: "http://127.0.0.1:9" for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")},
        "PIP_NO_INDEX": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", EXECUTE, str(request.param)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    notebook = nbformat.read(folder / "executed.ipynb", as_version=4)
    return request.param.stem, folder, notebook


def outputs(notebook):
    return [out for cell in notebook.cells for out in cell.get("outputs", ())]


@pytest.fixture(scope="module")
def build():
    path = ROOT / "notebooks" / "build.py"
    spec = importlib.util.spec_from_file_location("notebooks_build", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_source_has_its_notebook(build):
    assert [source.stem for source in build.sources()] == [path.stem for path in NOTEBOOKS]
    assert [path.stem[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04", "05"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_is_what_its_source_says(path, build):
    """Edit the source, then `python notebooks/build.py --execute NAME`."""
    made, committed = build.made_from(path.with_suffix(".py")), nbformat.read(path, as_version=4)
    assert [(cell.id, cell.cell_type, cell.source) for cell in committed.cells] == [
        (cell.id, cell.cell_type, cell.source) for cell in made.cells
    ]


def test_the_address_stands_in_one_place(build):
    """Badge and first cell of every notebook have it from build.py."""
    for source in [*build.sources(), ROOT / "notebooks" / "opening.py"]:
        assert "github.com" not in source.read_text()
    first = build.made_from(build.sources()[0])
    badge = build.REPOSITORY.removeprefix("https://github.com")
    link = f"research.google.com/github{badge}/blob/main/notebooks/{FIRST}.ipynb"
    assert link in first.cells[0].source
    assert f'REPOSITORY = "{build.REPOSITORY}"' in first.cells[1].source


def test_runs_without_an_error(executed):
    _, _, notebook = executed
    assert not [out for out in outputs(notebook) if out.output_type == "error"]
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))


def test_leaves_a_finished_run_with_figures(executed):
    name, folder, notebook = executed
    if name != FIRST:
        pytest.skip("makes no run folder of this form")
    run = folder / "runs" / "smoke" / "qkd" / "seed1993"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["finished"] is True
    assert summary["devices"] == 2
    for picture in PICTURES:
        content = (run / "figures" / f"{picture}.png").read_bytes()
        assert content.startswith(b"\x89PNG") and len(content) > 5000, picture
    shown = [out for out in outputs(notebook) if "image/png" in out.get("data", {})]
    assert len(shown) == len(PICTURES) + 1  # and the predictions
    assert (folder / "runs" / "smoke" / "results.md").is_file()
    text = "".join(out.get("text", "") for out in outputs(notebook))
    assert "nothing was recomputed" in text


def test_metrics_page_defines_every_number_of_a_run(executed):
    name, folder, _ = executed
    if name != FIRST:
        pytest.skip("makes no run folder of this form")
    summary = json.loads((folder / "runs/smoke/qkd/seed1993/summary.json").read_text())
    page = (ROOT / "docs" / "metrics.md").read_text()
    assert [key for key in summary if f"`{key}`" not in page] == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_is_committed_with_its_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    ids = [cell.id for cell in notebook.cells]
    assert len(set(ids)) == len(ids)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    found = outputs(notebook)
    assert any("image/png" in out.get("data", {}) for out in found)
    assert not [out for out in found if out.output_type == "error"]
    text = json.dumps(found)
    assert "/home/" not in text and str(ROOT) not in text and "/tmp/" not in text
    assert path.stat().st_size < 2_000_000
