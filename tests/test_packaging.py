"""What the package says of itself, what is in it, and that its files of versions agree."""

import json
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import qkd_jax
from qkd_jax import cli
from qkd_jax.errors import ConfigError, check_system

pytestmark = pytest.mark.floor

ROOT = Path(__file__).parent.parent


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PYTHONS = ("3.11", "3.12", "3.13")
NEEDED = {found.name: found for found in map(Requirement, PROJECT["dependencies"])}


def pinned(name):
    """The requirements of a file of versions; a package may have one version for each Python."""
    texts = [line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    return [Requirement(text) for text in texts if text]


def lower_bound(requirement):
    return next(Version(s.version) for s in requirement.specifier if s.operator in (">=", "=="))


def test_the_tested_floor_is_the_promised_one():
    """Lower bounds and tested oldest versions are one; a floor above the bound tests too little."""
    floor = {found.name: found for found in pinned("requirements-floor.txt")}
    assert {"jax", "flax", "optax", "orbax-checkpoint", "chex", "numpy"} <= floor.keys()
    for name in floor.keys() - {"jaxlib"}:
        assert lower_bound(NEEDED[name]) == lower_bound(floor[name]), name
    assert lower_bound(floor["jax"]) == lower_bound(floor["jaxlib"])


def test_the_locked_versions_are_some_that_the_package_and_its_developers_ask_for():
    asked = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]
    locked = {}
    for found in pinned("requirements-lock.txt"):
        locked.setdefault(canonicalize_name(found.name), []).append(lower_bound(found))
    for requirement in map(Requirement, asked):
        if requirement.name == PROJECT["name"]:  # one of its own extras
            continue
        versions = locked[canonicalize_name(requirement.name)]
        assert all(version in requirement.specifier for version in versions), requirement


def test_the_requirements_are_this_checkout_and_what_it_asks_for():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert [line for line in lines if not line.startswith("#")] == ["-e ."]


def test_each_extra_that_the_makefile_installs_exists():
    extras = PROJECT["optional-dependencies"].keys()
    installed = re.findall(r"\.installed-(\w+)", (ROOT / "Makefile").read_text())
    assert {"tfds", "dev", "bench"} <= set(installed) <= extras
    assert {"tfds", "notebook", "bench", "docs", "dev", "nanoparticles"} <= extras


def test_the_workflow_has_the_commands_of_ci():
    here = re.findall(r"^make .*$", (ROOT / ".ci/run").read_text(), re.MULTILINE)
    workflow = (ROOT / ".github/workflows/ci.yml").read_text()
    assert here and here == re.findall(r"^ +- run: (.*)$", workflow, re.MULTILINE)
    oldest = PROJECT["requires-python"].removeprefix(">=")
    assert re.findall(r"^ +(3\.\d+)$", workflow, re.MULTILINE) == [PYTHONS[-1], oldest]


def test_the_citation_and_the_changelog_are_of_this_version():
    citation = (ROOT / "CITATION.cff").read_text()
    assert re.search(r"^version: (.*)$", citation, re.MULTILINE)[1] == PROJECT["version"]
    changes = (ROOT / "CHANGELOG.md").read_text()
    assert re.search(r"^## ([\d.]+)", changes, re.MULTILINE)[1] == PROJECT["version"]


def test_the_notebook_checks_for_the_same_floor():
    notebook = json.loads((ROOT / "notebooks/01_quickstart_colab_tpu.ipynb").read_text())
    code = "".join(line for cell in notebook["cells"] for line in cell["source"])
    [python, jax] = re.findall(r"^PYTHON, JAX = \(([\d, ]+)\), \(([\d, ]+)\)", code, re.M)[0]
    assert Version(jax.replace(", ", ".")) == lower_bound(NEEDED["jax"])
    assert Version(python.replace(", ", ".")) == Version(PROJECT["requires-python"][2:])


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder with wheel and source archive."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def tracked(*folders):
    """What git has of some folders, as paths from the root."""
    found = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *folders],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if found.returncode:
        pytest.skip("not a git checkout")
    return {name for name in found.stdout.splitlines() if (ROOT / name).is_file()}


def test_the_wheel_has_the_package_and_its_experiments_and_nothing_else(built):
    [path] = built.glob("*.whl")
    assert path.stat().st_size < 10_000_000
    with zipfile.ZipFile(path) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    experiments = {f"qkd_jax/{name}" for name in tracked("experiments")}
    assert {"qkd_jax/experiments/renditions.py", "qkd_jax/experiments/smoke.py"} <= experiments
    assert names == tracked("qkd_jax") | experiments


def test_the_source_archive_is_small_and_has_no_recorded_runs(built):
    [path] = built.glob("*.tar.gz")
    assert path.stat().st_size < 10_000_000
    with tarfile.open(path) as archive:
        rooms = {name.split("/")[1] for name in archive.getnames()}
    assert {"qkd_jax", "experiments", "pyproject.toml", "LICENSE"} <= rooms
    assert not rooms & {"results", "tests", "projects", "benchmarks", "docs"}


def test_the_wheel_is_typed_and_names_its_systems(built):
    [path] = built.glob("*.whl")
    with zipfile.ZipFile(path) as wheel:
        names = set(wheel.namelist())
        [metadata] = [name for name in names if name.endswith(".dist-info/METADATA")]
        told = Parser().parsestr(wheel.read(metadata).decode())
    assert {"qkd_jax/py.typed", "qkd_jax/data/renditions.npz"} <= names
    assert {"qkd_jax/data/glosses.tsv", "qkd_jax/data/GLOSSES_LICENCE.txt"} <= names
    classifiers = set(told.get_all("Classifier"))
    for version in PYTHONS:
        assert f"Programming Language :: Python :: {version}" in classifiers
    assert {"Operating System :: MacOS", "Operating System :: POSIX :: Linux"} <= classifiers
    assert not any("Windows" in name for name in classifiers)
    assert told["Requires-Python"] == ">=3.11"
    assert {"jax>=0.7.2"} <= set(told.get_all("Requires-Dist"))


@pytest.mark.parametrize("platform", ["win32", "cygwin"])
def test_other_systems_are_told_where_it_runs(monkeypatch, capsys, platform, tmp_path):
    monkeypatch.setattr(sys, "platform", platform)
    with pytest.raises(ConfigError, match=f"expected Linux or macOS, found {platform}"):
        check_system()
    assert cli.main(["list"]) == 1
    assert "use WSL" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="use WSL"):
        qkd_jax.load_run(tmp_path)
