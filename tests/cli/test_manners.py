"""What a person meets on the command line: help that is true, resume, doctor, completion."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from qkd_jax import cli
from qkd_jax.cli import doctor
from qkd_jax.cli.main import new_parser
from qkd_jax.runs import loop
from qkd_jax.weights.registry import ENTRIES, lookup

PAGE = Path(__file__).parents[2] / "docs/command-line.md"
COMMANDS = next(a for a in new_parser()._actions if a.dest == "command" or a.choices).choices


def call(capsys, *arguments):
    """(exit code, stdout, stderr)."""
    code = cli.main([str(part) for part in arguments])
    told = capsys.readouterr()
    assert "Traceback" not in told.out + told.err and "\x1b" not in told.out
    return code, told.out, told.err


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_examples_that_parse(name):
    lines = COMMANDS[name].format_help().partition("examples:\n")[2].splitlines()
    assert lines
    for line in lines:
        words = shlex.split(re.split(" [<>] ", line)[0])
        assert words[:2] == ["qkd-jax", name]
        new_parser().parse_args(words[1:])


def test_the_page_has_every_command_and_no_other():
    rows = re.findall(r"^\| (`[^|]*) \|", PAGE.read_text(), re.M)
    assert {name for row in rows for name in re.findall("`(.*?)`", row)} == set(COMMANDS)


def test_help_and_page_tell_the_exit_codes(capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(["--help"])
    out = capsys.readouterr().out
    assert left.value.code == 0 and re.findall(r"^  (\d+) ", out, re.M) == ["0", "1", "2", "130"]
    assert re.findall(r"^\| (\d+) \|", PAGE.read_text(), re.M) == ["0", "1", "2", "130"]


@pytest.fixture
def stopped(tmp_path, monkeypatch, capsys):
    """The folder of a run that was interrupted after its first task."""
    with monkeypatch.context() as patch:
        patch.setattr(loop.hosts, "any_of", lambda asked: True)
        settings = ["--set", "train.devices=1", "--set", "classifier.kind=whitened"]
        run = ["run", "smoke", "--method", "simplecil", *settings, "--variant", "whitened"]
        code, _, error = call(capsys, *run, "--out", tmp_path / "runs")
    assert code == 130 and "saved in" in error
    return tmp_path / "runs/smoke/simplecil-whitened/seed1993"


def test_resume_needs_nothing_but_the_folder(stopped, capsys, monkeypatch):
    monkeypatch.chdir(stopped.parent)
    code, out, _ = call(capsys, "resume", "seed1993", "--no-report", "--set", "train.task_chunk=2")
    assert code == 0 and "continuing after task 1" in out
    summary = json.loads((stopped / "summary.json").read_text())
    assert summary["finished"] and summary["variant"] == "whitened"
    config = json.loads((stopped / "config.json").read_text())
    assert config["classifier"]["kind"] == "whitened" and config["train"]["task_chunk"] == 2


def test_resume_refuses_what_is_no_run_or_another_one(stopped, capsys, tmp_path):
    code, _, error = call(capsys, "resume", tmp_path)
    assert code == 1 and "expected a run folder" in error and "no config.json" in error
    code, _, error = call(capsys, "resume", stopped, "--set", "classifier.kind=rls")
    assert code == 1 and "classifier.kind: 'whitened' -> 'rls'" in error
    moved = shutil.move(stopped, stopped.with_name("seed7"))
    code, _, error = call(capsys, "resume", moved)
    assert code == 1 and "expected a folder smoke/simplecil[-variant]/seed1993" in error


def test_doctor_tells_what_is_missing_and_the_command_that_gets_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("QKD_JAX_CACHE", str(tmp_path))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    (tmp_path / lookup("minilm_l6").file).write_bytes(bytes(3 * 2**20))
    (tmp_path / "compiled/cpu").mkdir(parents=True)
    (tmp_path / "compiled/cpu/a").write_bytes(bytes(2**21))
    (tmp_path / "cifar100/3.0.2").mkdir(parents=True)
    (tmp_path / "cifar100/3.0.2/dataset_info.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "shtab", None)
    code, out, _ = call(capsys, "doctor")
    assert code == 0
    told = {line.split()[0]: line.split(maxsplit=1)[1] for line in out.splitlines() if " " in line}
    assert told["minilm_l6"] == "in the cache, 3 MiB" and told["cifar100"] == "prepared"
    assert told["compiled"] == "programs          1 files, 2 MiB"
    for entry in ENTRIES:
        assert (f"    qkd-jax weights {entry.name}\n" in out) == (entry.name != "minilm_l6")
    for command in re.findall(r"^    qkd-jax (.*)$", out, re.M):
        new_parser().parse_args(shlex.split(command))
    shown = out.replace(str(tmp_path), "/home/ada/.cache")  # as long as a user's, wherever this is
    assert max(map(len, shown.splitlines())) <= 80


def test_doctor_tells_the_room_where_the_cache_will_be(tmp_path, monkeypatch):
    monkeypatch.setenv("QKD_JAX_CACHE", str(tmp_path / "not/yet"))
    asked = []
    monkeypatch.setattr(
        shutil, "disk_usage", lambda place: asked.append(place) or SimpleNamespace(free=2**40)
    )
    assert "  room on the disk           1024.0 GiB" in doctor.report()
    assert asked == [tmp_path]


def test_a_shell_is_given_commands_methods_and_experiments(capsys):
    code, out, _ = call(capsys, "completion", "bash")
    assert code == 0
    done = subprocess.run(["bash", "-n"], input=out, text=True, capture_output=True)
    assert (done.returncode, done.stderr) == (0, "")
    for word in ("resume", "doctor", "simplecil", "renditions", "--plugin"):
        assert re.search(rf"[( ]{word}[ )]", out) or f"'{word}'" in out, word


def test_completion_without_its_package_is_told_with_the_extra(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "shtab", None)
    code, _, error = call(capsys, "completion", "zsh")
    assert code == 1 and 'pip install "qkd_jax[completion]"' in error
