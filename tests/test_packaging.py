"""What the package says of itself: where it runs, its oldest versions, and that it is typed."""

import json
import re
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import qkd_jax
from qkd_jax import cli
from qkd_jax.errors import ConfigError, check_system

pytestmark = pytest.mark.floor

ROOT = Path(__file__).parent.parent


def requirements_of(name):
    lines = (ROOT / name).read_text().splitlines()
    texts = [line.partition("#")[0].strip() for line in lines]
    return {found.name: found for found in map(Requirement, filter(None, texts))}


def lower_bound(requirement):
    return next(Version(s.version) for s in requirement.specifier if s.operator in (">=", "=="))


def test_the_tested_floor_is_the_promised_one():
    """Lower bounds and tested oldest versions are one; a floor above the bound tests too little."""
    needed, floor = requirements_of("requirements.txt"), requirements_of("requirements-floor.txt")
    assert {"jax", "flax", "optax", "orbax-checkpoint", "chex", "numpy"} <= floor.keys()
    for name in floor.keys() - {"jaxlib"}:
        assert lower_bound(needed[name]) == lower_bound(floor[name]), name
    assert lower_bound(floor["jax"]) == lower_bound(floor["jaxlib"])


def test_the_notebook_checks_for_the_same_floor():
    notebook = json.loads((ROOT / "notebooks/quickstart.ipynb").read_text())
    code = "".join(line for cell in notebook["cells"] for line in cell["source"])
    [python, jax] = re.findall(r"^PYTHON, JAX = \(([\d, ]+)\), \(([\d, ]+)\)", code, re.M)[0]
    assert Version(jax.replace(", ", ".")) == lower_bound(
        requirements_of("requirements.txt")["jax"]
    )
    needs = re.search(r'requires-python = ">=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert Version(python.replace(", ", ".")) == Version(needs[1])


def test_the_wheel_is_typed_and_names_its_systems(tmp_path):
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    [path] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(path) as wheel:
        names = set(wheel.namelist())
        [metadata] = [name for name in names if name.endswith(".dist-info/METADATA")]
        told = Parser().parsestr(wheel.read(metadata).decode())
    assert {"qkd_jax/py.typed", "qkd_jax/data/renditions.npz"} <= names
    assert {"qkd_jax/data/glosses.tsv", "qkd_jax/data/GLOSSES_LICENCE.txt"} <= names
    assert "qkd_jax/experiments/renditions.py" in names
    classifiers = set(told.get_all("Classifier"))
    for minor in (11, 12, 13):
        assert f"Programming Language :: Python :: 3.{minor}" in classifiers
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
