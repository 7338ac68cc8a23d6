"""What was learned, used again: exported, loaded, evaluated, and asked about files of one's own."""

import io
import json
import shutil

import numpy as np
import pytest
import yaml
from PIL import Image

import qkd_jax
from qkd_jax import cli
from qkd_jax.data.sources import load_split
from qkd_jax.errors import CheckpointError, ConfigError
from qkd_jax.runs import answers
from qkd_jax.runs.exported import export_run


def call(capsys, *arguments):
    """(exit code, stdout, stderr)."""
    code = cli.main([str(part) for part in arguments])
    told = capsys.readouterr()
    assert "Traceback" not in told.out + told.err
    return code, told.out, told.err


@pytest.fixture(scope="module")
def test_set():
    return load_split("synthetic", num_classes=6).test


def test_an_export_predicts_the_same_bits(learned, exported, test_set):
    run, loaded = qkd_jax.load_run(learned), qkd_jax.load_learner(exported)
    assert loaded.class_names == run.class_names and loaded.config == run.config
    images = test_set.load(range(10), run.state.backbone)["image"]
    expected, found = (qkd_jax.predict(each.state, images) for each in (run, loaded))
    assert np.asarray(found).tobytes() == np.asarray(expected).tobytes()


def test_an_export_is_three_files_and_names_no_place(learned, exported):
    assert {file.name for file in exported.iterdir()} == {
        *("README.md", "learner.json", "model.safetensors")
    }
    assert (exported / "model.safetensors").stat().st_size < sum(
        file.stat().st_size for file in learned.glob("checkpoints/2*/arrays/**/*") if file.is_file()
    )
    assert str(learned.parents[2]) not in (exported / "learner.json").read_text()


def test_the_card_is_what_hubs_read(learned, exported):
    start, front, text = (exported / "README.md").read_text().split("---\n", 2)
    fields = yaml.safe_load(front)
    assert start == ""
    assert fields["license"] == "apache-2.0" and fields["library_name"] == "qkd_jax"
    assert fields["pipeline_tag"] == "image-classification"
    [result] = fields["model-index"][0]["results"]
    summary = json.loads((learned / "summary.json").read_text())
    assert result["metrics"][1]["value"] == pytest.approx(summary["last_accuracy"], abs=1e-4)
    for heading in ("Method", "Data", "Metrics", "How to use", "Limits", "Licence"):
        assert f"\n## {heading}\n" in text
    assert "Pre-training overlap" in text and "`tiny_random`" in text
    assert text.count("| wave ") + text.count(", wave ") == 4  # classes in their tasks' rows


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda folder: (folder / "learner.json").unlink(), "found no learner.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors: No such file"),
        (lambda folder: flip_a_byte(folder / "model.safetensors"), "SHA-256"),
        (lambda folder: edit(folder, format=2), "expected format 1, found 2"),
        (lambda folder: edit(folder, class_names=3), "class_names missing or of another type"),
        (lambda folder: edit(folder, config={"train": {"epoch": 1}}), "epoch"),
        (lambda folder: edit(folder, weights_fingerprint="0" * 16), "another backbone"),
    ],
)
def test_a_damaged_export_is_refused_by_name(exported, tmp_path, damage, told):
    folder = shutil.copytree(exported, tmp_path / "copy")
    damage(folder)
    with pytest.raises(CheckpointError, match=told):
        qkd_jax.load_learner(folder)


def edit(folder, **changes):
    meaning = json.loads((folder / "learner.json").read_text())
    (folder / "learner.json").write_text(json.dumps(meaning | changes))


def flip_a_byte(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_an_export_never_goes_into_a_run(learned):
    with pytest.raises(ConfigError, match="found a run in it"):
        export_run(learned, learned)


def test_eval_measures_what_the_run_did(learned, exported, capsys, tmp_path):
    summary = json.loads((learned / "summary.json").read_text())
    out = tmp_path / "new folder/predicted.npz"
    code, told, _ = call(capsys, "eval", exported, "--out", out)
    assert code == 0 and "20 images, 4 classes" in told
    lines = {line[:28].strip(): line[28:].split()[0] for line in told.splitlines()[1:-1]}
    assert lines["accuracy"] == f"{summary['last_accuracy']:.2f}"
    assert lines["most relevant task is right"] == f"{summary['routing_accuracy']:.2f}"
    per_task = [float(lines[f"accuracy of task {task}"]) for task in (1, 2)]
    assert per_task == pytest.approx(summary["last_accuracy_per_task"], abs=0.01)
    with np.load(out) as saved, np.load(learned / "predictions/after_task_1.npz") as recorded:
        assert saved["id"].tolist() == recorded["id"].tolist()


def test_eval_of_an_export_is_told_the_split_file(capsys, tmp_path):
    """An export has no place of the machine that made it; data that one file divides need both."""
    lines = []
    for index, name in enumerate("abcd"):
        for number in range(8):
            file = tmp_path / "data" / name / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            noise = np.random.default_rng([index, number]).integers(0, 60, (8, 8, 3))
            pixels = (60 * index + noise).astype(np.uint8)
            Image.fromarray(pixels).save(file)
            lines.append(f"{name}/{number}.png\t{'test' if number < 3 else 'train'}")
    split, runs = tmp_path / "split.tsv", tmp_path / "runs"
    split.write_text("\n".join(lines))
    settings = ("data.source=folder", f"data.path={tmp_path / 'data'}", f"data.split_file={split}")
    settings += ("data.num_classes=4", "train.devices=1", "train.eval_batch_size=4")
    chosen = [part for setting in settings for part in ("--set", setting)]
    words = ["run", "smoke", "--method", "simplecil", *chosen, "--no-report", "--out", runs]
    assert call(capsys, *words)[0] == 0
    run, mine = runs / "smoke/simplecil/seed1993", tmp_path / "mine"
    assert call(capsys, "export", run, mine)[0] == 0
    data = ["--data", tmp_path / "data"]
    code, _, error = call(capsys, "eval", mine, *data)
    assert code == 1 and "split file" in error
    code, told, _ = call(capsys, "eval", mine, *data, "--split-file", split)
    assert code == 0 and "12 images, 4 classes" in told
    summary = json.loads((run / "summary.json").read_text())
    assert f"{summary['last_accuracy']:.2f} %" in told.splitlines()[1]


def test_predict_answers_for_every_file_that_is_an_image(exported, test_set, tmp_path, capsys):
    """As in a folder from a phone: spaces, litter, another format, one file that is broken."""
    folder = tmp_path / "my pictures"
    folder.mkdir()
    names = test_set.class_names
    known = answers.best_classes  # of the classes that were learned
    loaded = qkd_jax.load_learner(exported)
    row = int(
        np.flatnonzero(
            np.isin(test_set.labels, np.flatnonzero(np.asarray(loaded.state.task_of_class) == 1))
        )[0]
    )
    [pixels] = test_set.fetch([row])
    Image.fromarray(pixels).save(folder / "beach photo.tiff")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    (folder / ".DS_Store").write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    asked = ("~nobody-of-this-name/a.png", tmp_path / "empty", folder)
    code, out, error = call(capsys, "predict", exported, *asked, "--top", "2", "--json")
    assert code == 1  # since some could not be read
    told = ("home folder of an unknown user", "found none in this folder", "broken.jpg")
    assert error.count("error: ") == 3 and all(part in error for part in told)
    [answer] = [json.loads(line) for line in out.splitlines()]
    assert answer["input"] == str(folder / "beach photo.tiff") and answer["milliseconds"] > 0
    expected = known(loaded, test_set.load([row], loaded.state.backbone), 2)
    assert answer["answers"] == [
        {"task": a.task, "score": a.score, "probability": a.probability, "class": a.name}
        for a in expected
    ]
    assert expected[0].name == names[test_set.labels[row]] and expected[0].task == 2
    code, out, _ = call(capsys, "predict", exported, folder / "beach photo.tiff")
    lines = out.splitlines()
    assert code == 0 and lines[0].startswith(f"{folder / 'beach photo.tiff'}  (")
    assert len(lines) == 5  # the four classes that were learned, though five were asked for
    assert max(map(len, lines[1:])) <= 60


def test_texts_are_answered_as_they_are_given(learned_texts, capsys, monkeypatch):
    texts = ["a bird that sings", "the act of selling; at a profit"]
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{text}\n" for text in texts)))
    code, out, _ = call(capsys, "predict", learned_texts, "-", texts[0], "--json")
    assert code == 0
    found = [json.loads(line) for line in out.splitlines()]
    assert [answer["input"] for answer in found] == [*texts, texts[0]]
    assert found[0]["answers"] == found[2]["answers"] != found[1]["answers"]
    trained = qkd_jax.load_run(learned_texts)
    fields = qkd_jax.tokenize(trained.state.backbone, texts[:1])
    scores = np.asarray(qkd_jax.predict(trained.state, fields))[0]
    best = found[0]["answers"][0]
    assert best["class"] == trained.class_names[scores.argmax()]
    assert best["score"] == pytest.approx(scores.max())


def test_inputs_come_from_standard_input_too(exported, tmp_path, capsys, monkeypatch):
    Image.new("RGB", (9, 9)).save(tmp_path / "a b.png")
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{tmp_path / 'a b.png'}\n\n"))
    code, out, _ = call(capsys, "predict", exported, "-", "--top", "1")
    assert code == 0 and out.count("\n") == 2
    monkeypatch.setattr("sys.stdin", io.StringIO("a.png\0b.png\0"))  # of `find -print0`
    code, _, error = call(capsys, "predict", exported, "-")
    assert code == 1 and "expected one path per line, found a NUL character" in error


def test_probabilities_are_of_all_classes_learned(exported, test_set):
    loaded = qkd_jax.load_learner(exported)
    found = answers.best_classes(loaded, test_set.load([0], loaded.state.backbone), 99)
    assert len(found) == 4 and sum(a.probability for a in found) == pytest.approx(1.0)
    assert [a.score for a in found] == sorted((a.score for a in found), reverse=True)


def test_the_wrong_kind_of_input_is_told(exported):
    loaded = qkd_jax.load_learner(exported)
    with pytest.raises(ConfigError, match="expected an image"):
        answers.text_fields(loaded, "a text")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["predict", "nowhere", "a.png"], "found neither config.json nor learner.json"),
        (["predict", "EXPORT", "no such.png"], "no such.png"),
        (["predict", "EXPORT", "~nobody-of-this-name/a.png"], "home folder of an unknown user"),
        (["predict", "EXPORT", "a.png", "--top", "0"], "--top: expected 1 or more, found 0"),
        (["eval", "EXPORT", "--data", "/nowhere"], "synthetic"),
    ],
)
def test_mistakes_are_named(exported, capsys, arguments, told):
    given = [exported if part == "EXPORT" else part for part in arguments]
    code, _, error = call(capsys, *given)
    assert code == 1 and error.startswith("error: ") and told in error
