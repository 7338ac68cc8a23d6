"""What is written into a run folder, and what is dropped from it; whole runs are in end_to_end."""

import json

import pytest

from qkd_jax.data.contents import read_contents
from qkd_jax.learners.shape import learner_of
from qkd_jax.runs import folder
from qkd_jax.runs.folder import begin_folder, begun_run, continue_folder
from qkd_jax.runs.plan import plan
from qkd_jax.runs.provenance import provenance
from qkd_jax.settings.config import Config, override
from qkd_jax.weights.load import load_backbone


@pytest.mark.parametrize("method, told", [("qkd", {"circuit.txt"}), ("mos", set())])
def test_what_a_method_describes_lies_beside_its_settings(tmp_path, method, told):
    """The rim asks the method; of the two only one has a circuit, whatever the settings say."""
    changes = ("data.source=synthetic", "protocol.increment=2", "gate.encoding=angle")
    planned = plan(override(Config(method=method), *changes, where_read=True))
    backbone = load_backbone("tiny_random", image_size=32)
    begin_folder(tmp_path, planned, read_contents(planned.data), backbone, None, [], (0, 0))
    always = {"class_order.json", "images.npz", "environment.json", "config.json", "files.json"}
    assert {path.name for path in tmp_path.iterdir()} == always | told
    for name, text in learner_of(planned.config).describe(planned.config).items():
        assert (tmp_path / name).read_text(encoding="utf-8") == text != ""


def test_other_code_or_another_machine_that_continues_is_recorded_once(tmp_path, monkeypatch):
    planned = plan(override(Config(method="simplecil"), "data.source=synthetic"))
    contents, backbone = read_contents(planned.data), load_backbone("tiny_random", image_size=32)
    begin_folder(tmp_path, planned, contents, backbone, None, [], (0, 0))
    (tmp_path / "checkpoints/3").mkdir(parents=True)
    begun = begun_run(tmp_path, planned, contents)
    first, *others = [{**provenance(), "code": code} for code in (provenance()["code"], "b", "c")]

    def environment(here):
        monkeypatch.setattr(folder, "provenance", lambda: here)
        continue_folder(tmp_path, begun, contents)
        return json.loads((tmp_path / "environment.json").read_text())

    assert "continued_by" not in environment(first)
    assert environment(others[0])["continued_by"] == others[:1]
    environment(others[1])
    now = environment(others[0])
    assert now["continued_by"] == others and now["code"] == first["code"]


def test_a_circuit_that_is_not_there_is_no_file():
    classical = override(Config(method="qkd"), "gate.kind=cosine")
    assert learner_of(classical).describe(classical) == {}
