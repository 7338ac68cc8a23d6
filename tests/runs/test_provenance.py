"""The version of the code and the machine that a run records."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from qkd_jax.runs import provenance
from qkd_jax.runs.provenance import code_version, machine


def git(folder, *arguments):
    names = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    command = ["git", "-C", str(folder), *names, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A package in a repository of its own, in the place of this one."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    (tmp_path / "package/runs").mkdir(parents=True)
    for name in ("__init__.py", "runs/provenance.py"):
        (tmp_path / "package" / name).write_text("")
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "package/runs/provenance.py"))
    return tmp_path


def test_the_commit_and_whether_the_package_differs_from_it(repository):
    git(repository, "init", "-q")
    assert code_version()["commit"] is code_version()["dirty"] is None  # not of this repository
    git(repository, "add", ".")
    git(repository, "commit", "-q", "-m", "first")
    head = git(repository, "rev-parse", "HEAD")
    (repository / "notes.txt").write_text("beside the package")
    found = code_version()
    assert (found["commit"], found["dirty"]) == (head, False) and len(found["code"]) == 16
    (repository / "package/new.py").write_text("")
    assert code_version()["dirty"] is True


def test_without_a_repository_or_git_there_is_still_the_hash(repository, monkeypatch):
    assert code_version()["commit"] is None and len(code_version()["code"]) == 16
    monkeypatch.setenv("PATH", "")
    assert code_version()["commit"] is None


def test_processor_and_cores_of_this_process():
    found = machine()
    assert found["cores"] <= os.cpu_count() and isinstance(found["processor"], str)
    facts = Path("/proc/cpuinfo")
    if facts.exists() and "model name" in facts.read_text():
        assert found["processor"]
