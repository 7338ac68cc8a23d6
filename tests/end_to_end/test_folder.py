"""A user's own image folder through the command line: kinds of image files, broken folders."""

import hashlib
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from qkd_jax import cli

pytestmark = pytest.mark.usefixtures("compiled")

CLASSES = ("ant", "bée", "cat dog", "d")
EXPERIMENT = '''"""An image folder on the tiny transformer."""

from qkd_jax.settings.config import Config, override


def get_config(method="ease"):
    return override(
        Config(experiment="own", method=method),
        "backbone.name=tiny_random",
        "backbone.image_size=32",
        "data.source=folder",
        "protocol.increment=2",
        "adapter.bottleneck=2",
        "train.epochs=1",
        "train.batch_size=8",
        "train.eval_batch_size=8",
    )
'''


def write_images(root):
    """Five train and two test images a class: grey, colour, RGBA, CMYK, palette; many sizes."""
    rng = np.random.default_rng(0)
    kinds = [("L", "png"), ("RGB", "jpg"), ("RGBA", "png"), ("CMYK", "jpg"), ("P", "png")]
    sizes = [(40, 40), (31, 57), (90, 33), (1, 1), (64, 48)]
    for part, count in (("train", 5), ("test", 2)):
        for label, name in enumerate(CLASSES):
            (root / part / name).mkdir(parents=True)
            for n in range(count):
                (mode, ending), size = kinds[n], sizes[(n + label) % 5]
                pixels = (
                    rng.integers(0, 120, (*size, 3)) + np.array([30, -30, 0]) * label + [0, 90, 20]
                )
                image = Image.fromarray(pixels.astype(np.uint8)).convert(mode)
                image.save(root / part / name / f"{part}{n}.{ending}")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    write_images(root)
    return root


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    path = tmp_path_factory.mktemp("experiment") / "own.py"
    path.write_text(EXPERIMENT)
    return path


def call(capsys, experiment, data, out, *settings):
    chosen = [part for setting in settings for part in ("--set", setting)]
    arguments = ["run", str(experiment), "--method", "ease", "--data", str(data)]
    code = cli.main([*arguments, "--out", str(out), "--no-report", *chosen])
    return code, capsys.readouterr().err


def scores_of(out):
    folder = out / "own/ease/seed1993"
    summary = json.loads((folder / "summary.json").read_text())
    with np.load(folder / "predictions/after_task_1.npz", allow_pickle=False) as saved:
        return summary, dict(saved)


@pytest.mark.slow
@pytest.mark.parametrize("augment", ["false", "true"])
def test_folder_on_one_and_on_eight_devices(capsys, experiment, images, tmp_path, augment):
    """Every test image once, with its path for id; the same curve and predictions on 8 devices."""
    found = []
    for devices in (1, 8):
        out = tmp_path / str(devices)
        settings = (f"data.augment={augment}", f"train.devices={devices}")
        code, error = call(capsys, experiment, images, out, *settings)
        assert code == 0, error
        found.append(scores_of(out))
    (one, saved_one), (eight, saved_eight) = found
    paths = {p.relative_to(images).as_posix() for p in images.glob("test/*/*")}
    assert set(saved_one["id"].tolist()) == paths and len(saved_one["id"]) == 8
    assert one["train_images"] == 20 and one["finished"] is True
    assert (one["devices"], eight["devices"]) == (1, 8)
    assert one["compilations"] == eight["compilations"] == 1
    assert one["accuracy_curve"] == eight["accuracy_curve"]
    np.testing.assert_array_equal(saved_one["predicted"], saved_eight["predicted"])
    # The record of these runs says which images they had, once for both.
    for devices in (1, 8):
        cli.main(["record", str(tmp_path / str(devices) / "own"), str(tmp_path / "kept")])
    (listed,) = tmp_path.glob("kept/own/examples-*.npz")
    with np.load(listed, allow_pickle=False) as kept:
        assert set(kept["test_ids"].tolist()) == paths
        for name, digest in zip(kept["train_ids"], kept["train_digests"], strict=True):
            whole = hashlib.sha256((images / name).read_bytes()).digest()
            assert digest.tobytes() == whole[:16]
    logs = []
    for devices in (1, 8):
        log = tmp_path / str(devices) / "own/ease/seed1993/metrics.jsonl"
        logs.append([json.loads(line)["loss"] for line in log.read_text().splitlines()])
    # 2 tasks of 10 images in batches of 8, the second padded; float32 sums in another order.
    assert len(logs[0]) == 4
    np.testing.assert_allclose(logs[1], logs[0], rtol=1e-4)


def broken(name, root):
    """Spoils a good folder; returns what the message must hold."""
    train = root / "train/ant"
    if name == "no test part":
        shutil.rmtree(root / "test")
        return ["expected train/<class>/* and test/<class>/*"]
    if name == "class in one part only":
        shutil.rmtree(root / "test/ant")
        return ["'ant' is in train/ but not in test/"]
    if name == "class without images":
        shutil.rmtree(train)
        train.mkdir()
        return ["class folder without an image", "ant"]
    if name == "empty file":
        (train / "train0.png").write_bytes(b"")
        return ["train0.png", "0 bytes"]
    if name == "link out of the folder":
        (train / "outside.png").symlink_to("/etc/hostname")
        return ["outside.png", "link"]
    if name == "cut image":
        path = train / "train1.jpg"
        path.write_bytes(path.read_bytes()[:200])
        return ["train1.jpg"]
    (train / "notes.txt").write_text("no image")
    return ["notes.txt"]


@pytest.mark.parametrize(
    "name",
    [
        *("no test part", "class in one part only", "class without images", "empty file"),
        *("link out of the folder", "cut image", "text among images"),
    ],
)
def test_broken_folders_are_one_clear_error(capsys, experiment, images, tmp_path, name):
    root, out = tmp_path / "images", tmp_path / "runs"
    shutil.copytree(images, root)
    expected = broken(name, root)
    code, error = call(capsys, experiment, root, out, "train.devices=1", "data.augment=true")
    assert code == 1
    assert error.startswith("error: ") and "Traceback" not in error
    for part in expected:
        assert part in error
    assert not out.exists()


def test_missing_folder(capsys, experiment, tmp_path):
    code, error = call(capsys, experiment, tmp_path / "none", tmp_path / "runs")
    assert code == 1 and "found nothing of this name" in error and not (tmp_path / "runs").exists()


def test_no_folder_given(capsys, experiment, tmp_path):
    code = cli.main(["run", str(experiment), "--method", "ease", "--out", str(tmp_path / "runs")])
    assert code == 1 and "expected the path of a folder of images" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_images_added_between_two_sessions_are_refused(capsys, experiment, images, tmp_path):
    root, out = tmp_path / "images", tmp_path / "runs"
    shutil.copytree(images, root)
    assert call(capsys, experiment, root, out, "train.devices=1", "data.augment=true")[0] == 0
    shutil.copy(root / "train/ant/train1.jpg", root / "train/ant/more.jpg")
    code, error = call(capsys, experiment, root, out, "train.devices=1", "data.augment=true")
    assert code == 1 and "other data" in error and "--out" in error


def test_data_check_reads_every_image(capsys, images, tmp_path):
    assert cli.main(["data", "check", str(images)]) == 0
    root = tmp_path / "images"
    shutil.copytree(images, root)
    broken("cut image", root)
    capsys.readouterr()
    assert cli.main(["data", "check", str(root)]) == 1
    assert "train1.jpg" in capsys.readouterr().err
