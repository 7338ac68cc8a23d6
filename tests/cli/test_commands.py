"""Every command: what it prints, its exit code, and one clear line for a mistake."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qkd_jax import cli
from qkd_jax.cli import arguments as cli_arguments
from qkd_jax.cli import compare
from qkd_jax.learners.shape import learner_names
from qkd_jax.reports.ledger import Ledger
from qkd_jax.reports.predictions import read_predictions

# The cheapest run there is: nothing is trained.
QUICK = ["--method", "simplecil", "--set", "train.devices=1"]


def call(capsys, *arguments):
    """(exit code, stdout, stderr)."""
    try:
        code = cli.main([str(part) for part in arguments])
    except SystemExit as stopped:  # argparse
        code = stopped.code
    told = capsys.readouterr()
    assert "Traceback" not in told.out + told.err
    return code, told.out, told.err


def refused(capsys, *arguments):
    """The message of a command that must fail with one error."""
    code, _, error = call(capsys, *arguments)
    assert code == 1, error
    assert error.startswith("error: ")
    return error


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """`out` with two seeds of one method."""
    out = tmp_path_factory.mktemp("runs")
    arguments = ["run", "smoke", *QUICK, "--seed", "1 2", "--out", str(out)]
    assert cli.main(arguments) == 0
    return out


def test_run_leaves_reports_and_tables(finished):
    for seed in (1, 2):
        folder = finished / f"smoke/simplecil/seed{seed}"
        assert json.loads((folder / "summary.json").read_text())["finished"] is True
        assert (folder / "report.html").stat().st_size > 0
    row = json.loads((finished / "smoke/results.json").read_text())["methods"]["simplecil"]
    assert row["average_accuracy"]["sd"] is not None


def test_run_again_shows_the_table_and_computes_nothing(finished, capsys):
    code, out, _ = call(capsys, "run", "smoke", *QUICK, "--seed", "1,2", "--out", finished)
    assert code == 0
    assert out.count("on each task") == 2 and "results.md" in out
    assert "epoch" not in out and "continuing" not in out


def test_record_keeps_what_makes_the_tables_again(finished, tmp_path, capsys, monkeypatch):
    code, out, _ = call(capsys, "record", finished / "smoke", tmp_path)
    assert code == 0 and out.startswith("2 runs: ")
    kept = {p.relative_to(tmp_path / "smoke").as_posix() for p in tmp_path.rglob("seed1/*")}
    names = ("config.json", "environment.json", "matrix.json", "summary.json", "predictions.npz")
    names += ("files.json",)
    assert kept == {f"simplecil/seed1/{name}" for name in names}
    own, copied = (read_predictions(f / "smoke/simplecil/seed1") for f in (finished, tmp_path))
    assert own.images == copied.images and (own.predicted == copied.predicted).all()
    whole, again = (
        json.loads((folder / "smoke/results.json").read_text()) for folder in (finished, tmp_path)
    )
    assert whole == again
    # A comparison counts them as done.
    more = ["--methods", "simplecil", "--seeds", "1 2", "--set", "train.devices=1"]
    code, out, _ = call(capsys, "compare", "smoke", *more, "--no-report", "--out", tmp_path)
    assert code == 0 and out.count("finished before") == 2
    assert "expected at least one finished run" in refused(
        capsys, "record", finished / "smoke/simplecil", tmp_path
    )


def test_a_run_whose_numbers_do_not_follow_from_its_predictions_is_not_recorded(
    finished, tmp_path, capsys
):
    shutil.copytree(finished / "smoke", tmp_path / "runs/smoke")
    run = tmp_path / "runs/smoke/simplecil/seed2"
    better = json.loads((run / "summary.json").read_text()) | {"last_accuracy": 99.5}
    Ledger(run).read().write({"summary.json": json.dumps(better).encode()})
    told = refused(capsys, "record", tmp_path / "runs/smoke", tmp_path / "kept")
    assert "seed2: summary.json: expected last_accuracy" in told and "found 99.5" in told


@pytest.mark.parametrize("command", ["record", "report"])
@pytest.mark.parametrize("name", ["matrix.json", "summary.json", "class_order.json"])
def test_an_edited_run_is_told_by_name_and_not_used(finished, tmp_path, capsys, command, name):
    shutil.copytree(finished / "smoke", tmp_path / "runs/smoke")
    path = tmp_path / "runs/smoke/simplecil/seed2" / name
    path.write_text(path.read_text().replace("1", "2", 1))
    target = [tmp_path / "kept"] * (command == "record")
    told = refused(capsys, command, tmp_path / "runs/smoke", *target)
    assert f"seed2/{name}" in told and "expected what the run wrote" in told
    if command == "report":  # of the others
        results = json.loads((tmp_path / "runs/smoke/results.json").read_text())
        assert results["methods"]["simplecil"]["seeds"] == [1]
        assert list(results["damaged"]) == ["simplecil/seed2"]


def test_a_run_that_lost_predictions_is_not_recorded(finished, tmp_path, capsys):
    shutil.copytree(finished / "smoke", tmp_path / "runs/smoke")
    run = tmp_path / "runs/smoke/simplecil/seed2"
    shutil.rmtree(run / "predictions")
    told = refused(capsys, "record", tmp_path / "runs/smoke", tmp_path / "kept")
    assert "seed2/predictions/after_task_0.npz is gone" in told
    Ledger(run).read().lose(*(f"predictions/after_task_{task}.npz" for task in range(3)))
    assert "is gone" in refused(capsys, "record", tmp_path / "runs/smoke", tmp_path / "kept")


def test_a_record_does_not_say_where_on_this_machine_a_run_was(finished, tmp_path, capsys):
    runs = tmp_path / "runs"
    shutil.copytree(finished / "smoke", runs / "smoke")
    file = "smoke/simplecil/seed1/environment.json"
    environment = json.loads((runs / file).read_text())
    run = (runs / file).parent
    command = ["python", "--data", "/home/me/birds", "--set", "data.path=../birds", "--out", "runs"]
    content = json.dumps(environment | {"command": command})
    Ledger(run).read().write({"environment.json": content.encode()})
    assert call(capsys, "record", runs / "smoke", tmp_path / "kept")[0] == 0
    kept = json.loads((tmp_path / "kept" / file).read_text())
    told = ["python", "--data", "birds", "--set", "data.path=birds", "--out", "runs"]
    assert kept == environment | {"command": told}


def test_variant_names_a_folder_of_its_own(tmp_path, capsys):
    more = [
        "--variant",
        "whitened",
        "--no-report",
        "--out",
        tmp_path,
        "--set",
        "classifier.kind=whitened",
    ]
    assert call(capsys, "run", "smoke", *QUICK, *more)[0] == 0
    folder = tmp_path / "smoke/simplecil-whitened/seed1993"
    assert json.loads((folder / "config.json").read_text())["classifier"]["kind"] == "whitened"
    assert not (folder / "report.html").exists()


def test_report_of_a_run_and_of_an_experiment(finished, capsys):
    folder = finished / "smoke/simplecil/seed1"
    (folder / "report.html").unlink()
    code, out, _ = call(capsys, "report", folder)
    assert code == 0 and "report.html" in out and (folder / "report.html").exists()
    code, out, _ = call(capsys, "report", finished / "smoke")
    assert code == 0 and "results.md" in out
    assert "expected an experiment's folder" in refused(capsys, "report", finished / "nowhere")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["smok"], ["experiment: expected one of", "smoke", "found 'smok'"]),
        (["smoke", "--method", "qdk"], ["method: expected one of", "qkd", "found 'qdk'"]),
        (["smoke", "--preset", "papper"], ["preset: expected one of", "paper", "found 'papper'"]),
        (["smoke", "--set", "train.epoch=1"], ["train.epoch", "train.epochs"]),
        (["smoke", "--set", "train.epochs"], ["expected key=value"]),
        (["smoke", "--method", "ease", "--set", "gate.kind=mlp"], ["that ease reads", "of qkd"]),
        (["smoke", "--method", "ease", "--preset", "paper"], ["expected method qkd, found ease"]),
        (["smoke", "--set", "train.epochs=many"], ["train.epochs", "whole number", "many"]),
        (["smoke", "--set", "backbone.name=tiny_randm"], ["tiny_randm", "clip_vit_b16"]),
        (
            ["smoke", "--set", "data.source=sythetic"],
            ["synthetic", "found 'sythetic'"],
        ),
        (["smoke", "--seed", "one"], ["--seed: expected whole numbers", "found 'one'"]),
        (["smoke", "--seed", " "], ["--seed: expected whole numbers", "found none"]),
        (["smoke", "--seed", "-1"], ["seed", "0 to 4294967295"]),
        (["smoke", "--data", "/tmp"], ["synthetic", "no path"]),
        (["smoke", "--set", "train.devices=99"], ["train.devices: expected at most 8", "found 99"]),
        (["none.py"], ["experiment: expected one of", "found 'none.py'"]),
    ],
)
def test_mistakes_are_named_and_leave_nothing(capsys, tmp_path, arguments, expected):
    if "train.devices=99" in arguments:
        arguments = [*arguments, "--set", "train.batch_size=99"]
    error = refused(capsys, "run", *arguments, "--out", tmp_path)
    for part in expected:
        assert part in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments", [[], ["rnu"], ["run"], ["run", "smoke", "--nosuch"], ["data"]]
)
def test_wrong_usage_exits_2(capsys, arguments):
    code, _, error = call(capsys, *arguments)
    assert code == 2 and "usage:" in error


def test_help_exits_0(capsys):
    code, out, _ = call(capsys, "--help")
    assert code == 0
    for command in ("run", "report", "list", "doctor", "weights", "data"):
        assert command in out


def test_list_names_all_there_is(capsys):
    code, out, _ = call(capsys, "list")
    assert code == 0
    for name in ("smoke", "renditions", *learner_names(), "paper", "tiny_random", "clip_vit_b16"):
        assert name in out


def test_list_settings_gives_each_key_that_set_takes(capsys):
    code, out, _ = call(capsys, "list", "--settings")
    assert code == 0
    lines = out.splitlines()
    assert any(line.startswith("train.epochs = ") and "whole number" in line for line in lines)
    assert any(line.startswith("gate.kind = 'quantum'") and "cosine" in line for line in lines)
    assert "train.clip_norm = 0.0   (a number, 0 (never) or more)" in lines
    assert "adapter.scale = 0.1   (a number)" in lines  # anything
    assert len(lines) == len({line.split(" = ")[0] for line in lines}) > 40
    assert not any(line.startswith("ease.") for line in lines)
    code, out, _ = call(capsys, "list", "--settings", "--method", "ease")
    assert code == 0 and "\nease.alpha = 0.1" in out and "\ngate." not in out
    code, out, _ = call(capsys, "list", "--settings", "--method", "simplecil")  # trains nothing
    assert code == 0 and "\ntrain.devices = 0" in out and "\ntrain.epochs" not in out
    assert "found 'eas'" in refused(capsys, "list", "--settings", "--method", "eas")


def test_doctor_tells_versions_and_devices(capsys):
    code, out, _ = call(capsys, "doctor")
    assert code == 0
    assert "jax" in out and "8 x cpu" in out and "No accelerator is in use" in out


def test_weights_of_an_unknown_backbone(capsys):
    assert "clip_vit_b16" in refused(capsys, "weights", "clip_vit_b61")


def test_data_check_of_no_folder(capsys, tmp_path):
    assert "found nothing of this name" in refused(capsys, "data", "check", tmp_path / "none")
    assert "found 'cifar10'" in refused(capsys, "data", "check", "cifar10")


def picture(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng([seed, *path.as_posix().encode()]).integers(0, 256, (9, 9, 3))
    Image.fromarray(pixels.astype(np.uint8)).save(path)


def test_data_split_writes_what_a_run_reads(capsys, tmp_path):
    """A fifth of every class to test on; a file that is there is not written over."""
    for name in (f"{label}/{number} (copy).png" for label in ("a b", "ü") for number in range(10)):
        picture(tmp_path / "whole" / name)
    file, command = tmp_path / "my split.tsv", ("data", "split", tmp_path / "whole")
    assert "a new file to write, found none" in refused(capsys, *command)
    code, out, _ = call(capsys, *command, "--split-file", file)
    assert code == 0 and "16 train and 4 test images of 2 classes" in out
    assert f"--set data.split_file='{file}'" in out
    lines = [line.split("\t") for line in file.read_text().splitlines()]
    assert sorted(lines)[0] == ["a b/0 (copy).png", "train"]
    assert [name[0] for name, side in lines if side == "test"] == ["a", "a", "ü", "ü"]
    code, again, _ = call(capsys, "data", "check", tmp_path / "whole", "--split-file", file)
    assert code == 0 and out.splitlines()[0] == again.splitlines()[0]
    assert "which exists" in refused(capsys, *command, "--split-file", file)
    (tmp_path / "parts/train/a").mkdir(parents=True)
    (tmp_path / "parts/test/a").mkdir(parents=True)
    command = ("data", "split", tmp_path / "parts", "--split-file", tmp_path / "other.tsv")
    assert "already split" in refused(capsys, *command)
    broken = tmp_path / "whole/ü/broken.png"
    broken.write_bytes(b"no image")
    command = ("data", "split", tmp_path / "whole", "--split-file", tmp_path / "other.tsv")
    assert "ü/broken.png" in refused(capsys, *command)
    broken.unlink()
    picture(tmp_path / "whole/a b/two\nlines.png")
    command = ("data", "split", tmp_path / "whole", "--split-file", tmp_path / "other.tsv")
    assert "expected a name of one line" in refused(capsys, *command)
    assert not (tmp_path / "other.tsv").exists()
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.txt").write_text("one\ntwo\n")
    told = refused(capsys, "data", "check", "texts", "--path", texts)
    assert "data split texts --path FOLDER" in told


def test_data_check_tells_what_it_found_in_words(capsys, tmp_path):
    """Every layout that a run takes, and what a reader of its numbers should know."""
    whole = tmp_path / "whole"
    for name in ("a/0.png", "a/1.png", "b/0.png", "b/1.png"):
        picture(whole / name)
    split = tmp_path / "split.tsv"
    split.write_text("a/0.png\ttrain\na/1.png\ttest\nb/0.png\ttest\nb/1.png\ttrain\n")
    code, out, _ = call(capsys, "data", "check", whole, "--split-file", split)
    assert code == 0 and "2 train and 2 test images of 2 classes" in out
    assert "every image can be read" in out and "[]" not in out and "warning" not in out
    parts = tmp_path / "parts"
    assert "data split FOLDER" in refused(capsys, "data", "check", whole)
    for part in ("Train", "val"):
        for name in ("a/0.png", "b/0.png"):
            picture(parts / part / name)
    outside = tmp_path / "outside"
    picture(outside / "c.png")
    (parts / "Train/c").symlink_to(outside)
    (parts / "val/c").symlink_to(outside)
    assert "follow_links=true" in refused(capsys, "data", "check", parts)
    code, out, _ = call(capsys, "data", "check", parts, "--follow-links")
    assert code == 0 and "3 train and 3 test images of 3 classes" in out
    assert "warning: 1 image is both trained and tested on" in out
    assert out.count("train/c/c.png = ") == 1 and "test/c/c.png" in out
    code, out, _ = call(capsys, "data", "check", "renditions")
    assert code == 0 and "600 train and 300 test images of 100 classes" in out


def test_data_check_of_texts_uses_their_words(capsys, tmp_path):
    (tmp_path / "train.csv").write_text("review,stars\nfine,5\nbad,1\nbad,1\n")
    (tmp_path / "test.csv").write_text("review,stars\n fine ,1\nso so,5\n")
    columns = ["--text-column", "review", "--label-column", "stars"]
    code, out, _ = call(capsys, "data", "check", "texts", "--path", tmp_path, *columns)
    assert code == 0 and "3 train and 2 test texts of 2 classes" in out
    assert "every text can be read, and every class has texts to train and to test on" in out
    assert "the same words: " in out and "train.csv: train/row 4" in out
    assert "warning: 1 text is both trained and tested on" in out


def test_interrupt_exits_130(capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli_arguments, "load_experiment", interrupt)
    code, _, error = call(capsys, "run", "smoke")
    assert code == 130 and error == "interrupted\n"


def test_experiment_file_without_get_config(capsys, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("x = 1\n")
    assert "expected get_config(method)" in refused(capsys, "run", path, "--out", tmp_path / "runs")


def test_out_that_is_a_file(capsys, tmp_path):
    path = tmp_path / "file"
    path.write_text("")
    error = refused(capsys, "run", "smoke", *QUICK, "--out", path)
    assert str(path) in error and error.count("\n") == 1


def test_unwritable_out(capsys, tmp_path):
    """Root may write anywhere but into the kernel's own tree."""
    place = "/sys/qkd_jax_runs"
    if os.geteuid():
        tmp_path.chmod(0o500)
        place = tmp_path / "runs"
    elif not os.path.isdir("/sys"):
        pytest.skip("no place that root cannot write to")
    error = refused(capsys, "run", "smoke", *QUICK, "--out", place)
    assert str(place) in error and error.count("\n") == 1


def test_full_disk(capsys, tmp_path, monkeypatch):
    """The first file of the run cannot be written to its end; later there is room."""

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        error = refused(capsys, "run", "smoke", *QUICK, "--out", tmp_path)
    assert "files.json: No space left on device" in error and error.count("\n") == 1
    assert list((tmp_path / "smoke/simplecil/seed1993").iterdir()) == [
        tmp_path / "smoke/simplecil/seed1993/.lock"
    ]
    assert call(capsys, "run", "smoke", *QUICK, "--no-report", "--out", tmp_path)[0] == 0


@pytest.mark.parametrize("command", ["run", "compare"])
def test_a_report_that_cannot_be_drawn_stops_no_other_run(capsys, tmp_path, monkeypatch, command):
    """The first one fails in a way that nobody thought of."""
    asked = []

    def broken_once(folder):
        asked.append(folder.name)
        if len(asked) == 1:
            raise ZeroDivisionError("of a picture")

    def all_at_once(runs, left, jobs, *, show, finished):
        for run in runs:
            finished(run)
        return compare.Outcome([], False)

    monkeypatch.setattr("qkd_jax.reports.run_page.write_report", broken_once)
    monkeypatch.setattr(compare, "run_all", all_at_once)
    if command == "run":
        arguments = [*QUICK, "--seed", "1 2"]
    else:
        (tmp_path / "smoke").mkdir()
        arguments = ["--methods", "simplecil", "--seeds", "1 2"]
    code, _, error = call(capsys, command, "smoke", *arguments, "--out", tmp_path)
    assert code == 1 and asked == ["seed1", "seed2"]
    assert "report" in error and "of a picture" in error


@pytest.mark.parametrize(
    "display",
    ["unread", *(pytest.param(name, marks=pytest.mark.slow) for name in ("full", "closed"))],
)
def test_a_run_goes_on_without_a_display(tmp_path, compiled, display):
    """Standard output is a full device, a pipe that nobody reads, or closed; the path has
    characters that it does not know.
    """
    if display == "full" and not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    out = tmp_path / "läufe"
    command = [sys.executable, "-m", "qkd_jax", "run", "smoke", *QUICK, "--out", str(out)]
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "JAX_COMPILATION_CACHE_DIR": compiled}
    reads, writes = os.pipe()
    os.close(reads)
    with open("/dev/full" if display == "full" else os.devnull, "w") as device:
        done = subprocess.run(
            command if display != "closed" else ["sh", "-c", 'exec "$@" >&-', "sh", *command],
            stdout=writes if display == "unread" else device,
            stderr=subprocess.PIPE,
            env=environment,
            cwd=Path(cli.__file__).parents[2],
        )
    os.close(writes)
    assert (done.returncode, done.stderr) == (0, b"")
    folder = out / "smoke/simplecil/seed1993"
    assert json.loads((folder / "summary.json").read_text())["finished"] is True
    assert (folder / "report.html").is_file()


def test_a_list_into_a_pipe_that_is_not_read_ends_quietly():
    reads, writes = os.pipe()
    os.close(reads)
    command = [sys.executable, "-m", "qkd_jax", "list"]
    root = Path(cli.__file__).parents[2]
    done = subprocess.run(command, stdout=writes, stderr=subprocess.PIPE, cwd=root)
    os.close(writes)
    assert (done.returncode, done.stderr) == (1, b"")
