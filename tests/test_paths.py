"""Paths that a person gives: home folders that are not there, and names that are not UTF-8."""

import pwd

import pytest

import qkd_jax
from qkd_jax.cli import main
from qkd_jax.errors import CheckpointError, ConfigError, WeightsError
from qkd_jax.paths import expanded, in_utf8
from qkd_jax.runs.folder import run_folder
from qkd_jax.settings.experiments import load_experiment
from qkd_jax.weights.fetch import cache_folder


@pytest.fixture
def homeless(monkeypatch):
    """A process of a user without an entry in the password file, as in many containers."""

    def unknown(_):
        raise KeyError("uid not found")

    for name in ("HOME", "QKD_JAX_CACHE", "QKD_JAX_STORE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)


def test_without_a_home_folder_every_use_of_one_is_one_error(homeless):
    with pytest.raises(WeightsError, match=r"is HOME set\?\). Set QKD_JAX_CACHE to the folder"):
        cache_folder()
    with pytest.raises(ConfigError, match=r"~/x.py: expected a path, .*is HOME set\?"):
        load_experiment("~/x.py")
    with pytest.raises(CheckpointError, match=r"~/run: expected a path"):
        qkd_jax.load_run("~/run")
    assert str(expanded("/a/~b")) == "/a/~b"


@pytest.mark.parametrize("option", [["--out", "~/runs"], ["--weights", "~/w.npz"], []])
def test_the_command_line_says_it_in_one_message(homeless, tmp_path, monkeypatch, capsys, option):
    monkeypatch.chdir(tmp_path)
    experiment = "renditions" if "--weights" in option else "smoke"
    try:
        code = main(["run", experiment, *option])
    except SystemExit as ended:  # a wrong argument, with the usage
        code = ended.code
    told = capsys.readouterr().err.splitlines()[-1]
    assert code in (1, 2) and "error: " in told and "is HOME set?" in told
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", ["runs\udcff", "runs\0"])
def test_a_folder_of_runs_has_a_name_in_utf8(path):
    with pytest.raises(ConfigError, match=r"--out: expected a path in UTF-8, found 'runs.*choose"):
        run_folder(path, qkd_jax.Config(experiment="smoke"))
    with pytest.raises(CheckpointError, match="folder: expected a path in UTF-8"):
        qkd_jax.load_run(path)
    assert str(in_utf8("läufe/鳥", "--out")) == "läufe/鳥"


@pytest.mark.parametrize(
    "variant", ["/../../x", "..", "a/b", "a\\b", "\udcff", "a\0", ".a", "x" * 101]
)
def test_a_variant_is_no_path(variant, tmp_path):
    with pytest.raises(ConfigError, match="--variant: expected a plain folder name"):
        run_folder(tmp_path, qkd_jax.Config(experiment="smoke"), variant)
