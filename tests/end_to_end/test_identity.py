"""What makes a run the same run: its settings that count and the content of its images, not where
they lie or how they are called; and what is known to be wrong is told before the first step.
"""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from qkd_jax import cli
from qkd_jax.reports.ledger import Ledger
from qkd_jax.runs.lock import exclusive

pytestmark = pytest.mark.usefixtures("compiled")

CLASSES, TRAIN, TEST = 4, 5, 2
OPTIONS = (
    *("data.source=folder", "data.num_classes=0", "protocol.increment=2", "train.devices=1"),
    *("train.epochs=1", "train.checkpoint_every=1", "train.batch_size=4"),
)


def picture(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def data(tmp_path):
    root = tmp_path / "data"
    for label in range(CLASSES):
        for n in range(TRAIN):
            picture(root / f"train/c{label}/{n}.png", 100 * label + n)
        for n in range(TEST):
            picture(root / f"test/c{label}/{n}.png", 100 * label + 50 + n)
    return root


class Runs:
    """The same command again and again, in one `out`."""

    def __init__(self, out, capsys):
        self.out, self.capsys = out, capsys

    def __call__(self, data, *more, method="finetune", settings=()):
        chosen = [part for s in (*OPTIONS, *settings) for part in ("--set", s)]
        arguments = ["run", "smoke", "--method", method, "--bare", *chosen, "--data", str(data)]
        code = cli.main([*arguments, "--out", str(self.out), *more])
        told = self.capsys.readouterr()
        assert "Traceback" not in told.err
        return code, told.out, told.err

    def folder(self, method="finetune"):
        return self.out / f"smoke/{method}/seed1993"

    def summary(self, method="finetune"):
        return json.loads((self.folder(method) / "summary.json").read_text())

    def losses(self):
        lines = (self.folder() / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["loss"] for line in lines]

    def reopen(self, method="finetune"):
        """As a kill before the last checkpoint would leave it."""
        folder = self.folder(method)
        kept = (folder / "checkpoints").glob("[0-9]*")
        shutil.rmtree(max(kept, key=lambda path: int(path.name)))
        summary = json.loads((folder / "summary.json").read_text()) | {"finished": False}
        Ledger(folder).read().write({"summary.json": json.dumps(summary).encode()})


@pytest.fixture
def runs(tmp_path, capsys):
    return Runs(tmp_path / "runs", capsys)


# Of the scores themselves, so float32 sums in another order move them.
CALIBRATION = ("nll", "ece", "nll_tempered", "ece_tempered", "temperatures")


def results(summary, but=()):
    others = ("peak_memory_mb", "compilations", "devices", *but)
    return {k: v for k, v in summary.items() if "second" not in k and k not in others}


def stop_in_the_middle(runs, data, monkeypatch):
    """Leaves the run in its second task, after its second step of three."""
    from qkd_jax.runs.loop import _Loop

    save = _Loop._save

    def stops(self, checkpoints, done, told=""):
        save(self, checkpoints, done, told)
        state = self.own.state
        if int(state.task) == 1 and int(state.step) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(_Loop, "_save", stops)
        assert runs(data)[0] == 130
    return runs


def test_moved_renamed_and_reordered_files_are_the_same_data(runs, data, tmp_path, monkeypatch):
    """The run goes on in the order it began with, to the same numbers as without a stop."""
    assert runs(data)[0] == 0
    straight = results(runs.summary())
    shutil.rmtree(runs.out)
    stop_in_the_middle(runs, data, monkeypatch)
    moved = tmp_path / "elsewhere/of other name"
    shutil.copytree(data, moved)
    shutil.rmtree(data)
    for number, path in enumerate(sorted(moved.glob("*/*/*.png"), reverse=True)):
        path.rename(path.with_name(f"{number:03d} new.png"))  # the names sort the other way round
    code, out, error = runs(f"{moved}/")
    assert code == 0, error
    assert "continuing after task 1, step 2" in out
    assert results(runs.summary()) == straight
    assert str(moved) in json.loads((runs.folder() / "config.json").read_text())["data"]["path"]
    assert runs(moved)[0] == 0  # finished


def test_other_pixels_under_the_same_names_are_other_data(runs, data):
    assert runs(data, method="simplecil")[0] == 0
    for a, b in (("c0", "t"), ("c1", "c0"), ("t", "c1")):  # two classes change places
        (data / "train" / a).rename(data / "train" / b)
    code, _, error = runs(data, method="simplecil")
    assert code == 1 and "begun with other data" in error and "10 differences" in error
    assert "train/c0/0.png: other content" in error and "--variant" in error


@pytest.mark.parametrize("change", ["changed", "added", "gone", "class renamed"])
def test_what_changed_is_named(runs, data, change):
    assert runs(data, method="simplecil")[0] == 0
    if change == "changed":
        picture(data / "test/c2/1.png", 9)
        expected = ["test/c2/1.png: other content"]
    elif change == "added":
        picture(data / "train/c2/more.png", 9)
        expected = ["train/c2/more.png: new"]
    elif change == "gone":
        (data / "train/c2/3.png").unlink()
        expected = ["train/c2/3.png: gone", "--allow-removed"]
    else:
        for part in ("train", "test"):
            (data / part / "c2").rename(data / part / "c2b")
        expected = ["names of the classes differ: c2, c2b"]
    for _ in range(2):  # a refusal changes nothing
        code, _, error = runs(data, method="simplecil")
        assert code == 1 and "other data" in error
        for part in expected:
            assert part in error
        assert ("--allow-removed" in error) == (change == "gone")


def test_images_may_be_removed_if_the_user_says_so(runs, data, monkeypatch):
    """From the past, the present and the future of a run, and from its test images."""
    stop_in_the_middle(runs, data, monkeypatch)
    order = json.loads((runs.folder() / "class_order.json").read_text())["order"]
    gone = [f"train/c{order[0]}/0.png", f"train/c{order[2]}/1.png", f"test/c{order[0]}/0.png"]
    gone += [f"train/c{order[3]}/{n}.png" for n in range(3)]
    for name in gone:
        (data / name).unlink()
    code, _, error = runs(data)
    assert code == 1 and "6 differences" in error
    code, out, error = runs(data, "--allow-removed")
    assert code == 0, error
    assert "continuing after task 1, step 2" in out
    environment = json.loads((runs.folder() / "environment.json").read_text())
    assert sorted(environment["removed_images"]) == sorted(gone)
    matrix = json.loads((runs.folder() / "matrix.json").read_text())
    assert matrix["total"] == [[4, 0], [3, 4]]
    assert runs.summary()["finished"] is True
    # From now on the images that are left are those of the run.
    assert runs(data)[0] == 0
    picture(data / gone[0], 9)
    assert runs(data)[0] == 1


@pytest.mark.slow
def test_removed_images_are_counted_once_and_may_come_back(runs, data, tmp_path):
    def told():
        return json.loads((runs.folder() / "environment.json").read_text())["removed_images"]

    assert runs(data)[0] == 0
    kept = tmp_path / "kept.png"
    shutil.copy(data / "train/c0/0.png", kept)
    for name in ("0.png", "1.png"):
        runs.reopen()
        (data / f"train/c0/{name}").unlink()
        assert runs(data)[0] == 1
        assert runs(data, "--allow-removed")[0] == 0
    assert told() == ["train/c0/0.png", "train/c0/1.png"]
    runs.reopen()
    shutil.copy(kept, data / "train/c0/0.png")
    assert runs(data)[0] == 1  # one of them is still gone
    assert runs(data, "--allow-removed")[0] == 0
    assert told() == ["train/c0/0.png", "train/c0/1.png"]  # the run once went on without both


@pytest.mark.parametrize("change", ["gone", pytest.param("renamed", marks=pytest.mark.slow)])
def test_images_keep_their_side_where_the_split_follows_from_names(runs, data, change):
    """`data.validation` holds out the last names of each class; other names hold out others."""
    settings = ("data.validation=0.4",)
    assert runs(data, settings=settings)[0] == 0
    straight, more = results(runs.summary()), []
    runs.reopen()
    if change == "gone":
        (data / "train/c1/4.png").unlink()  # held out: now c1/2.png would be
        code, _, error = runs(data, settings=settings)
        assert code == 1 and "1 difference:" in error and "train/c1/4.png: gone" in error
        more = ["--allow-removed"]
    else:
        for path in sorted(data.glob("train/*/*.png")):
            path.rename(path.with_name(f"new {9 - int(path.stem)}.png"))
    code, _, error = runs(data, *more, settings=settings)
    assert code == 0, error
    if change == "renamed":
        assert results(runs.summary()) == straight
        environment = json.loads((runs.folder() / "environment.json").read_text())
        assert "removed_images" not in environment
    else:
        matrix = json.loads((runs.folder() / "matrix.json").read_text())
        assert sum(matrix["total"][1]) == 7  # of the eight that were held out


def test_a_lost_list_of_images_is_made_anew_and_a_damaged_one_is_told(runs, data):
    assert runs(data, method="simplecil")[0] == 0
    path = runs.folder("simplecil") / "images.npz"
    whole = path.read_bytes()
    path.unlink()
    assert runs(data, method="simplecil")[0] == 0  # finished: its tables need no list
    runs.reopen(method="simplecil")
    picture(data / "train/c0/0.png", 99)
    code, _, error = runs(data, method="simplecil")
    assert code == 1 and "1 difference:\n  train/c0/0.png: other content" in error
    picture(data / "train/c0/0.png", 0)
    assert runs(data, method="simplecil")[0] == 0 and path.read_bytes() == whole
    runs.reopen(method="simplecil")
    for content in (b"", whole[:200], b"\0" * 300, whole[:90] + b"\xff" * 9 + whole[99:]):
        path.write_bytes(content)
        code, _, error = runs(data, method="simplecil")
        assert code == 1 and "images.npz: expected what the run wrote" in error
    path.write_bytes(whole)
    assert runs(data, method="simplecil")[0] == 0
    runs.reopen(method="simplecil")
    settings = runs.folder("simplecil") / "config.json"
    whole = settings.read_bytes()
    settings.unlink()
    code, _, error = runs(data, method="simplecil", settings=("protocol.order_seed=7",))
    assert code == 1 and "config.json" in error and not settings.exists()
    assert runs(data, method="simplecil")[0] == 0 and settings.read_bytes() == whole


def test_a_run_from_before_contents_were_compared_is_checked(runs, data):
    assert runs(data, method="simplecil")[0] == 0
    runs.reopen(method="simplecil")
    path = runs.folder("simplecil") / "environment.json"
    old = json.loads(path.read_text())
    for name in ("data_content", "files"):
        old.pop(name)
    path.write_text(json.dumps(old))
    for name in ("images.npz", "files.json"):
        (runs.folder("simplecil") / name).unlink()
    (data / "test/c0/0.png").write_text("junk")
    code, out, error = runs(data, method="simplecil")
    assert code == 1 and "1 image cannot be read" in error and "continuing" not in out
    picture(data / "test/c0/0.png", 50)
    assert runs(data, method="simplecil")[0] == 0


@pytest.mark.slow
def test_settings_that_cannot_change_a_result_may_change(runs, data):
    assert runs(data)[0] == 0
    straight = results(runs.summary())
    free = ("train.eval_batch_size=3", "train.checkpoint_every=50", "train.devices=2")
    assert runs(data, settings=free)[0] == 0  # finished: just told
    runs.reopen()
    code, out, error = runs(data, settings=free)
    assert code == 0, error
    assert "continuing after task 1" in out
    # Predictions of float32 sums in another order; this far from a tie they are the same.
    again = runs.summary()
    assert results(again, CALIBRATION) == results(straight, CALIBRATION)
    # Scores are the same to 1e-5; of temperatures of a model that is always wrong nothing is said.
    for name in ("nll", "nll_tempered"):
        np.testing.assert_allclose(again[name], straight[name], rtol=1e-5)
    stored = json.loads((runs.folder() / "config.json").read_text())
    assert stored["train"]["devices"] == 2 and stored["train"]["eval_batch_size"] == 3
    code, _, error = runs(data, settings=(*free, "train.learning_rate=0.5"))
    assert code == 1 and error.count("->") == 1 and "train.learning_rate" in error


def test_every_broken_image_is_listed_before_the_first_step(runs, data):
    (data / "train/c3/9.jpg").write_text("no image")
    (data / "test/c2/9.png").write_bytes(b"\x89PNG\r\n\x1a\ncut")
    code, out, error = runs(data)
    assert code == 1 and "2 images cannot be read" in error
    assert "c3/9.jpg" in error and "c2/9.png" in error
    assert "task" not in out and not runs.out.exists()
    for name in ("train/c3/9.jpg", "test/c2/9.png"):
        (data / name).unlink()
    assert runs(data)[0] == 0


@pytest.mark.slow
def test_an_image_that_breaks_later_may_be_removed(runs, data, monkeypatch):
    """The bytes of a file rot while the run stands: the refusal names it and the way to go on."""
    stop_in_the_middle(runs, data, monkeypatch)
    broken = data / "train/c0/2.png"
    broken.write_bytes(broken.read_bytes()[:-40])
    code, _, error = runs(data)
    assert code == 1 and "train/c0/2.png: other content" in error
    broken.unlink()
    assert runs(data, "--allow-removed")[0] == 0


def test_classes_without_test_images_are_named_before_anything_is_made(runs, data, tmp_path):
    whole = tmp_path / "whole"
    for part in ("train", "test"):
        for path in (data / part).glob("*/*"):
            target = whole / path.parent.name / f"{part}{path.name}"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    files = sorted(whole.glob("*/*"))
    for missing, role in (("test", "a test image"), ("train", "a training image")):
        lines = []
        for file in files:
            side = "test" if file.name.startswith("test") else "train"
            if file.parent.name in ("c1", "c2") and side == missing:
                side = "train" if missing == "test" else "test"
            lines.append(f"{file.relative_to(whole).as_posix()}\t{side}")
        split = tmp_path / "split.tsv"
        split.write_text("\n".join(lines))
        code, _, error = runs(whole, settings=(f"data.split_file={split}",))
        assert code == 1 and f"expected {role} of every class" in error, error
        assert "'c1', 'c2'" in error and not runs.out.exists()


def test_test_images_that_are_trained_on_are_told(runs, data):
    """The same pixels under another name and in another format."""
    with Image.open(data / "train/c1/0.png") as image:
        image.save(data / "test/c1/leak.bmp")
    code, out, _ = runs(data, method="simplecil")
    assert code == 0
    assert "warning: 1 image is both trained and tested on" in out
    assert "train/c1/0.png" in out and "test/c1/leak.bmp" in out
    environment = json.loads((runs.folder("simplecil") / "environment.json").read_text())
    assert len(environment["leaked_test_images"]) == 1


@pytest.mark.slow
@pytest.mark.parametrize("devices", [3, 5, 8])
def test_batches_need_not_divide_over_the_devices(runs, data, devices):
    """Padded and masked: the losses of one device, whatever the number."""
    assert runs(data)[0] == 0
    one = runs.losses()
    shutil.rmtree(runs.out)
    assert runs(data, settings=(f"train.devices={devices}",))[0] == 0
    many = runs.losses()
    # Float32 sums of 4 rows in another order, over 3 steps per task.
    np.testing.assert_allclose(many, one, rtol=1e-4)


@pytest.mark.parametrize(
    "variant", ["lr/0.1", "../up", "..", ".hidden", "a\\b", "a\nb", " ", "x" * 101, "字" * 40]
)
def test_a_variant_is_a_plain_folder_name(runs, data, variant):
    code, _, error = runs(data, "--variant", variant, method="simplecil")
    assert code == 1 and "--variant: expected a plain folder name" in error
    assert not runs.out.exists()


def test_an_experiment_is_a_plain_folder_name(tmp_path, capsys):
    path = tmp_path / "mine.py"
    path.write_text(
        "from qkd_jax.settings.config import Config\n"
        "def get_config(method):\n"
        "    return Config(experiment='../x', method=method)\n"
    )
    code = cli.main(["run", str(path), "--out", str(tmp_path / "runs")])
    assert code == 1 and "experiment: expected a plain folder name" in capsys.readouterr().err
    code = cli.main(["run", "smoke", "--set", "experiment=", "--out", str(tmp_path / "runs")])
    assert code == 1 and "experiment: expected a plain folder name" in capsys.readouterr().err


def test_a_home_folder_is_expanded(runs, data, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert runs("~/data", "--out", "~/runs", method="simplecil")[0] == 0
    assert runs.summary("simplecil")["finished"] is True


def test_a_run_being_read_or_run_is_told(runs, data):
    assert runs(data, method="simplecil")[0] == 0
    runs.reopen(method="simplecil")
    with exclusive(runs.folder("simplecil")):
        code, _, error = runs(data, method="simplecil")
    assert code == 1 and "another process is running in or reading" in error
