"""A run on one's own texts, from files to the report, and the trained run afterwards."""

import csv

import jax
import numpy as np
import pytest

import qkd_jax
from qkd_jax.cli import main
from qkd_jax.data.sources import load_split
from qkd_jax.engine.engine import Engine
from qkd_jax.reports.files import read_run
from qkd_jax.reports.run_page import write_report
from qkd_jax.runs.loop import run, run_folder
from qkd_jax.settings.config import override
from qkd_jax.settings.experiments import load_experiment
from qkd_jax.weights.load import backbone_of

pytestmark = pytest.mark.usefixtures("compiled")

SPOKEN = {
    "birds": "the {0} sings & flies <fast>",
    "Größe": "wie groß ist {0}?",
    "数字": "这是 {0} 12345",
    "tools": "a {0}-like thing to cut, saw or bore with, longer than the encoder reads",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Lines per class to train on, a table with other columns to test on would be another form."""
    folder = tmp_path_factory.mktemp("texts")
    for part, count in (("train", 9), ("test", 4)):
        (folder / part).mkdir()
        for name, text in SPOKEN.items():
            lines = [text.format("abcdefghi"[n] * (n + 1) + part[1]) for n in range(count)]
            (folder / part / f"{name}.txt").write_text("\n".join(lines), "utf-8")
    return folder


def settings(folder, *changes, method="qkd"):
    config = load_experiment("smoke").get_config(method)
    return override(
        config,
        *("backbone.name=tiny_random_text", "backbone.num_tokens=20", "data.source=texts"),
        *(f"data.path={folder}", "data.num_classes=0", "train.epochs=1", *changes),
    )


OWN = {"qd_llm": ("protocol.kind=incremental", "qd_llm.qubits=5")}


@pytest.mark.floor
@pytest.mark.slow
@pytest.mark.parametrize("method", ["q_tuning", "qkd", "qd_llm"])
def test_killed_on_two_devices_it_ends_as_on_one(folder, tmp_path, monkeypatch, method):
    own = OWN.get(method, ())
    one, two = (settings(folder, f"train.devices={n}", *own, method=method) for n in (1, 2))
    backbone = backbone_of(one.backbone)
    teacher = backbone if method == "qd_llm" else None
    whole = run(one, backbone, tmp_path / "whole", teacher=teacher)
    finish, ended = Engine.finish, []

    def stops_once(*arguments):
        ended.append(1)
        if len(ended) == 2:
            raise KeyboardInterrupt
        return finish(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Engine, "finish", stops_once)
        run(two, backbone, tmp_path / "parts", teacher=teacher)
    parts = run(two, backbone, tmp_path / "parts", teacher=teacher)
    assert (whole["devices"], parts["devices"], whole["num_tasks"]) == (1, 2, 2)
    files = {name: read_run(run_folder(tmp_path / name, one)) for name in ("whole", "parts")}
    np.testing.assert_array_equal(files["parts"].correct, files["whole"].correct)
    assert parts["extracted_features"] == whole["extracted_features"]

    # The trained run answers as it did in the run.
    trained = qkd_jax.load_run(files["whole"].folder)
    test = load_split("texts", path=folder).test
    fields = qkd_jax.tokenize(trained.state.backbone, test.texts)
    scores = np.asarray(qkd_jax.predict(trained.state, jax.device_put(fields)))
    predicted = dict(zip(test.ids.tolist(), scores.argmax(axis=1).tolist(), strict=True))
    recorded = files["whole"].predictions
    for name, label in zip(recorded["id"].tolist(), recorded["predicted"].tolist(), strict=True):
        assert predicted[name] == label


def test_the_report_shows_texts(folder, tmp_path):
    """As they are and escaped, and how many were cut."""
    config = settings(folder, "train.devices=1", method="linear_probe")
    run(config, backbone_of(config.backbone), tmp_path)
    files = read_run(run_folder(tmp_path, config))
    page, shown = write_report(files.folder).read_text("utf-8"), files.examples
    assert len(shown) == 12 and {entry["class"] for entry in shown} == set(SPOKEN)
    for entry in shown:
        assert entry["text"] in (folder / "test" / f"{entry['class']}.txt").read_text("utf-8")
    assert "sings &amp; flies &lt;fast&gt;" in page and "<fast>" not in page
    assert files.environment["examples"] == "texts" and files.environment["cut_texts"][0] >= 9
    assert f"were cut: {files.environment['cut_texts'][0]} to train on" in page
    assert "test texts" in page


@pytest.mark.floor
def test_a_table_runs_from_the_command_line(folder, tmp_path, capsys):
    for part in ("train", "test"):
        with open(tmp_path / f"{part}.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["kind", "note", "words"])
            for name in SPOKEN:
                lines = (folder / part / f"{name}.txt").read_text("utf-8").splitlines()
                writer.writerows([name, "x", f'{line}, "quoted"\nand more'] for line in lines)
    chosen = [
        *("backbone.name=tiny_random_text", "data.text_column=words", "data.label_column=kind"),
        *("train.epochs=1", "protocol.increment=2", "train.devices=1"),
    ]
    command = ["run", "texts", "--method", "simplecil", "--data", str(tmp_path)]
    command += ["--out", str(tmp_path / "runs"), "--bare"]
    read = [s for s in chosen if not s.startswith("train.epochs")]
    command += [part for setting in read for part in ("--set", setting)]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "tiny_random_text at 64 tokens" in out and "are longer than 64 tokens" in out


@pytest.mark.parametrize(
    "changes, words",
    [
        (("backbone.name=tiny_random", "backbone.num_tokens=0"), "a backbone that reads texts"),
        (("data.source=synthetic", "data.path="), "a backbone that reads images"),
        (("data.augment=true",), "data.augment: expected false, since texts"),
    ],
)
def test_what_does_not_fit_is_refused_before_a_folder_is_made(folder, tmp_path, changes, words):
    with pytest.raises(qkd_jax.QkdError, match=words):
        config = settings(folder, *changes)
        run(config, backbone_of(config.backbone), tmp_path)
    assert list(tmp_path.iterdir()) == []
