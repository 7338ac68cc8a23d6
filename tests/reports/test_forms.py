"""Files of a run that are valid JSON and not what they should be: one error, and no traceback."""

import json

import numpy as np
import pytest

from qkd_jax.errors import CheckpointError, DataError
from qkd_jax.reports.files import read_json, read_records, read_run
from qkd_jax.reports.forms import FORMS, problem, problem_of_line
from qkd_jax.reports.ledger import _sealed, missing_files
from qkd_jax.reports.predictions import read_predictions
from qkd_jax.runs import folder as run_folder
from qkd_jax.runs.manifest import FILE, NAME, damage_of

TEACHER = {"accuracy_curve": [50.0], "average_accuracy": 50, "last_accuracy": 50}
GOOD = {
    "summary.json": {
        "experiment": "e",
        "seed": 1,
        "finished": True,
        "accuracy_curve": [90.0, 80],
        "routing_accuracy": None,
        "routing_accuracy_per_task": [100.0, None],
        "average_accuracy": 85.0,
        "last_accuracy": 80,
        "own": {"a": [1, "b", None]},
        "nll": 1.5,
        "temperatures": [0.5, 0.6],
        "student": "x",
        "teacher": TEACHER,
    },
    "matrix.json": {"correct": [[1, 0], [1, 2]], "total": [[2, 0], [2, 2]]},
    "environment.json": {"weights_fingerprint": "a", "leaked_test_images": [["a", "b"]]},
    "class_order.json": {"order": [1, 0], "class_names": ["a", "b"], "tasks": [[1], [0]]},
    "examples.json": {"test": [{"id": "a", "class": "b", "predicted": "c", "task": 1}]},
    "config.json": {"anything": 1.5},
}

# file, field, its value, what is told
BAD = [
    ("summary.json", "accuracy_curve", 3, "accuracy_curve: expected a list, found 3"),
    ("summary.json", "accuracy_curve", [1, "x"], "accuracy_curve[1]: expected a finite number"),
    ("summary.json", "accuracy_curve", [True], "accuracy_curve[0]: expected a finite number"),
    ("summary.json", "average_accuracy", float("nan"), "average_accuracy: expected a finite"),
    ("summary.json", "average_accuracy", 10**400, "average_accuracy: expected a finite"),
    ("summary.json", "finished", "yes", "finished: expected true or false, found 'yes'"),
    ("summary.json", "seed", -1, "seed: expected a whole number of 0 or more, found -1"),
    ("summary.json", "seed", 1.5, "seed: expected a whole number"),
    ("summary.json", "experiment", ["e"], "experiment: expected a text, found a list"),
    ("summary.json", "experiment", "\udcff", "experiment: expected a text"),
    ("summary.json", "teacher", [], "teacher: expected an object, found a list"),
    ("summary.json", "teacher", {}, "teacher.accuracy_curve: expected it, found none"),
    ("summary.json", "teacher", TEACHER | {"last_accuracy": None}, "teacher.last_accuracy: expec"),
    ("summary.json", "temperatures", [1.0], "temperatures: expected 2 values, found 1"),
    ("summary.json", "student", None, "student: expected a text, found null"),
    ("summary.json", "own", {"a": [float("inf")]}, "own.a[0]: expected a finite number, found inf"),
    ("matrix.json", "correct", [[1, 0], [1]], "correct: expected 2 rows of 2 counts"),
    ("matrix.json", "correct", [1, 2], "correct[0]: expected a list, found 1"),
    ("matrix.json", "total", [[-1]], "total[0][0]: expected a whole number of 0 or more"),
    ("matrix.json", "total", [[1.5]], "total[0][0]: expected a whole number"),
    ("environment.json", "weights_fingerprint", {}, "weights_fingerprint: expected a text"),
    ("environment.json", "leaked_test_images", [[]], "leaked_test_images[0]: expected 1 or more"),
    ("environment.json", "cut_texts", [1], "cut_texts: expected 2 values, found 1"),
    ("class_order.json", "class_names", "ab", "class_names: expected a list, found 'ab'"),
    ("class_order.json", "order", [None], "order[0]: expected a whole number"),
    ("examples.json", "test", [{"id": "a", "class": "b"}], "test[0].predicted: expected it"),
    (
        "examples.json",
        "test",
        [{"id": "a", "class": "b", "predicted": "c", "most_relevant_task": 1}],
        "test[0].task: expected it, found none",
    ),
    ("examples.json", "test", [7], "test[0]: expected an object, found 7"),
    ("config.json", "anything", float("-inf"), "anything: expected a finite number, found -inf"),
]


@pytest.mark.parametrize("name", GOOD)
def test_what_runs_write_is_accepted(name):
    assert FORMS.keys() < GOOD.keys()
    assert problem(name, GOOD[name]) == ""


@pytest.mark.parametrize("name, field, value, told", BAD)
def test_a_field_of_another_form_is_named(tmp_path, name, field, value, told):
    path = tmp_path / name
    path.write_text(json.dumps(GOOD[name] | {field: value}))
    for read, error in ((read_json, DataError), (run_folder.read_json, CheckpointError)):
        with pytest.raises(error) as caught:
            read(path)
        assert str(path) in str(caught.value) and told in str(caught.value)


@pytest.mark.parametrize("content", [b"\xff", b"[" * 100_000, b"1" * 5000, b"{", b"[]", b"NaN"])
def test_what_is_no_json_object_is_one_error(tmp_path, content):
    path = tmp_path / "summary.json"
    path.write_bytes(content)
    for read, error in ((read_json, DataError), (run_folder.read_json, CheckpointError)):
        with pytest.raises(error, match=r"summary\.json"):
            read(path)
    path.unlink()
    path.mkdir()
    for read, error in ((read_json, DataError), (run_folder.read_json, CheckpointError)):
        with pytest.raises(error, match="cannot be read"):
            read(path)


LINE = b'{"task": 0, "step": 1, "images_seen": 8}\n'


@pytest.mark.parametrize(
    "line, told",
    [
        (b"3", "the file: expected an object, found 3"),
        (b'{"step": [1], "images_seen": 8}', r"step: expected a whole number"),
        (b'{"images_seen": "8"}', r"images_seen: expected a finite number, found '8'"),
        (b'{"images_seen": NaN}', r"images_seen: expected a finite number, found nan"),
        (b'{"task": null, "images_seen": 8}', r"task: expected a whole number"),
        (b"\xff", "expected valid JSON"),
        (b"[" * 100_000, "expected valid JSON"),
    ],
)
def test_a_line_of_the_log_of_another_form_is_named(tmp_path, line, told):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(LINE + line + b"\n" + LINE)
    with pytest.raises(DataError, match=rf"metrics\.jsonl, line 2: .*{told}"):
        read_records(path)
    path.write_bytes(LINE + LINE[:-20])  # cut off by a crash
    assert len(read_records(path)) == 1
    assert problem_of_line(json.loads(LINE)) == ""


def test_more_right_answers_than_images_are_refused(tmp_path):
    (tmp_path / "matrix.json").write_text('{"correct": [[3]], "total": [[2]]}')
    with pytest.raises(DataError, match=r"at most total\[0\]\[0\] = 2 correct, found 3"):
        read_run(tmp_path)


STAGE = {
    "id": np.array(["a", "b"]),
    "label": np.array([0, 1]),
    "task": np.array([0, 1]),
    "predicted": np.array([0, 1]),
    "relevance": np.array([[1.0, 0.0], [0.5, 0.5]]),
}


@pytest.mark.parametrize(
    "change, told",
    [
        ({"label": None}, "expected 'label' with 1 axes"),
        ({"label": np.array([0.0, 1.0])}, "expected 'label' with 1 axes of type iu"),
        ({"label": np.array([0])}, "expected arrays of the same images"),
        ({"task": np.array([0, 2])}, "expected images of tasks 0 to 1, found 0 to 2"),
        ({"task": np.array([0, -1])}, "found -1 to 0"),
        ({"relevance": np.ones((2, 1))}, "expected finite relevance"),
        ({"relevance": np.full((2, 2), np.nan)}, "expected finite relevance"),
        (None, "damage"),
    ],
)
def test_predictions_of_another_form_are_refused(tmp_path, change, told):
    path = tmp_path / "predictions" / "after_task_1.npz"
    path.parent.mkdir()
    arrays = {k: v for k, v in (STAGE | (change or {})).items() if v is not None}
    np.savez(path.with_name("after_task_0.npz"), **STAGE | {"task": np.zeros(2, int)})
    np.savez(path, **arrays)
    if change is None:
        path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(DataError, match=rf"after_task_1\.npz: .*{told}"):
        read_run(tmp_path)
    if change is None or "label" in change:  # all that it computes with
        with pytest.raises(DataError, match=r"after_task_1\.npz: expected"):
            read_predictions(tmp_path)
    np.savez(path, **STAGE)
    assert read_run(tmp_path).predictions["after_task"] == 1
    assert read_predictions(tmp_path).predicted.shape == (2, 2)


@pytest.mark.parametrize("name", ["../../secret", "/dev/zero"])
def test_a_ledger_names_no_file_outside_its_folder(tmp_path, name):
    files = {name: [(1, "0" * 64)]}
    ledger = {"files": files, "sha256": _sealed(files)}
    (tmp_path / "files.json").write_text(json.dumps(ledger))
    with pytest.raises(DataError, match=r"files\.json is damaged"):
        missing_files(tmp_path)


@pytest.mark.parametrize("content", ["[]", "3", "[" * 100_000, '{"../x": "0"}'])
def test_a_manifest_of_another_form_is_damage(tmp_path, content):
    (tmp_path / "_CHECKPOINT_METADATA").write_text(json.dumps({"item_handlers": {NAME: 1}}))
    (tmp_path / FILE).parent.mkdir()
    (tmp_path / FILE).write_text(content)
    assert damage_of(tmp_path) in (f"{FILE} is no JSON", f"{FILE} is no manifest")
    (tmp_path / "_CHECKPOINT_METADATA").write_text('{"item_handlers": [3]}')
    damage_of(tmp_path)
