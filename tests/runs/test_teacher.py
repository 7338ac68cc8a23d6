"""A run of a teacher and its student: each learns every task, and a kill in either phase is mended.

The student is the smallest there can be: a linear probe that also draws its logits towards its
teacher's, where the teacher is a linear probe on a backbone that reads larger images.
"""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qkd_jax
from benchmarks.same_run import files_of
from qkd_jax.engine.verbs import teacher_config, teacher_outputs
from qkd_jax.errors import CheckpointError, ConfigError, QkdError
from qkd_jax.learners import linear_probe, shape
from qkd_jax.learners.prompted import query_of
from qkd_jax.learners.shape import Teacher, class_columns
from qkd_jax.learners.task_heads import head_loss, with_term
from qkd_jax.nn.heads import head_logits
from qkd_jax.reports.run_page import write_report
from qkd_jax.reports.tables import format_number
from qkd_jax.runs.loop import _Loop, run, run_folder
from qkd_jax.settings import methods
from qkd_jax.settings.config import Config, override
from qkd_jax.settings.experiments import load_experiment
from qkd_jax.weights.load import load_backbone, tiny_random_text

pytestmark = pytest.mark.usefixtures("compiled", "pupil")


def teaching(config):
    """The teacher's settings: those that are shared, with larger images."""
    shared = ("experiment", "seed", "shapes", "data", "protocol", "train")
    return dataclasses.replace(
        Config(method="linear_probe"),
        backbone=dataclasses.replace(config.backbone, image_size=48),
        **{name: getattr(config, name) for name in shared},
    )


def outputs(state, inputs):
    teacher = state.teacher
    features = linear_probe.extract(teacher, inputs, 0, None)
    return {"logits": linear_probe.class_logits(teacher, features)}


def loss(trainable, state, inputs, batch, context):
    features, head = query_of(state, inputs, batch), trainable["head"]
    terms = head_loss(head, state, features, batch["label"])
    own = head_logits(features, head["rows"], head["scale"], state.config.head.kind)
    columns = jnp.minimum(class_columns(state), state.config.shapes.num_classes - 1)
    distance = jnp.mean((own - batch["teacher"]["logits"][:, columns]) ** 2, axis=1)
    return with_term(terms, "taught", 0.1, distance)


@pytest.fixture(scope="module")
def pupil():
    """The student's method, known in this file alone."""
    student = linear_probe.LEARNER._replace(
        name="pupil",
        loss=loss,
        teacher=Teacher(teaching, lambda config: config, outputs, rate="pupil.teacher_rate"),
    )
    shape.register(student, head=linear_probe.HeadSettings)
    yield
    del shape._REGISTRY["pupil"], methods._METHODS["pupil"]


@pytest.fixture(scope="module")
def backbones():
    return load_backbone("tiny_random", image_size=32), load_backbone("tiny_random", image_size=48)


def config_of(method="pupil", *settings):
    plain = load_experiment("smoke").get_config("linear_probe")
    own = {"own": plain.own, "method": method}
    return override(
        dataclasses.replace(plain, **own),
        *("train.devices=1", "train.checkpoint_every=4", "data.store_gib=0", *settings),
    )


@pytest.fixture(scope="module")
def finished(pupil, compiled, backbones, tmp_path_factory):
    """The folder of a run that nothing interrupted, and its summary."""
    out = tmp_path_factory.mktemp("runs")
    summary = run(config_of(), backbones[0], out, teacher=backbones[1])
    return run_folder(out, config_of()), summary


def test_the_teacher_learns_as_it_does_alone(finished, backbones, tmp_path):
    """It does not know that it has a student, so its files are those of an ordinary run."""
    folder, summary = finished
    alone = run(
        config_of("linear_probe", "backbone.image_size=48"), backbones[1], tmp_path / "alone"
    )
    other = tmp_path / "alone" / "smoke" / "linear_probe" / "seed1993"
    for name in ("matrix.json", *(f"predictions/after_task_{task}.npz" for task in range(3))):
        assert (folder / "teacher" / name).read_bytes() == (other / name).read_bytes(), name
    for name in ("average_accuracy", "last_accuracy", "forgetting", "parameters", "train_images"):
        assert summary["teacher"][name] == alone[name], name


def test_a_teacher_that_diverges_names_the_setting_of_its_own_rate(backbones, tmp_path):
    config = config_of("pupil", "train.learning_rate=1e30")
    with pytest.raises(QkdError, match=r"of the teacher became NaN.* Lower pupil\.teacher_rate "):
        run(config, backbones[0], tmp_path, teacher=backbones[1])


def test_both_are_reported_and_compiled_once(finished):
    folder, summary = finished
    assert summary["method"] == "pupil" and summary["teacher"]["method"] == "linear_probe"
    assert summary["compilations"] == summary["teacher"]["compilations"] == 1
    assert summary["finished"] and summary["train_images"] == summary["teacher"]["train_images"]
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["teacher_fingerprint"] != environment["weights_fingerprint"]
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*.jsonl")}
    assert names == {"metrics.jsonl", "teacher/metrics.jsonl"}
    assert "loss_taught" in (folder / "metrics.jsonl").read_text()
    page = write_report(folder).read_text()
    assert '<th scope="col">student</th><th scope="col">teacher</th>' in page
    shown = format_number("last_accuracy", summary["teacher"]["last_accuracy"])
    own = format_number("last_accuracy", summary["last_accuracy"])
    assert f"<td>last_accuracy</td><td>{own}</td><td>{shown}</td>" in page


@pytest.mark.parametrize(
    "where", ["teacher", pytest.param("between", marks=pytest.mark.slow), "student"]
)
def test_stopped_in_either_phase_a_run_ends_with_the_same_bytes(
    where, finished, backbones, tmp_path, monkeypatch
):
    save = _Loop._save

    def stops(self, checkpoints, done, told=""):
        save(self, checkpoints, done, told)
        own, teacher = self.own.state, self.own.state.teacher
        place = {
            "teacher": (int(teacher.task), int(teacher.step), int(own.task)) == (1, 4, 0),
            "between": done == 3 and int(own.task) == 0,
            "student": (int(own.task), int(own.step)) == (1, 4),
        }
        if place[where]:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(_Loop, "_save", stops)
        run(config_of(), backbones[0], tmp_path, teacher=backbones[1])
    folder = run_folder(tmp_path, config_of())
    stopped = tmp_path / "stopped"
    shutil.copytree(folder, stopped)
    run(config_of(), backbones[0], tmp_path, teacher=backbones[1])
    assert files_of(folder) == files_of(finished[0])
    with pytest.raises(CheckpointError, match="expected a run at the end of a task"):
        qkd_jax.load_run(stopped)


@pytest.mark.slow
def test_a_teacher_of_the_same_settings_is_taken_from_the_store(
    finished, backbones, tmp_path, monkeypatch
):
    """Another student finds it; what it is given is what it would have learned."""
    monkeypatch.setenv("QKD_JAX_STORE", str(tmp_path / "store"))
    stored = "data.store_gib=1"

    def teacher_of(name, *settings):
        out = tmp_path / name
        summary = run(
            config_of("pupil", stored, *settings), backbones[0], out, teacher=backbones[1]
        )
        return run_folder(out, config_of()), summary["teacher"].get("tasks_taken_from_store", 0)

    first, taken = teacher_of("first")
    assert taken == 0
    second, taken = teacher_of("second")
    assert taken == 3
    # What the student did meanwhile is not counted as the teacher's time.
    summary = json.loads((second / "summary.json").read_text())
    parts = (summary, summary["teacher"])
    spent = sum(part["train_seconds"] + part["eval_seconds"] for part in parts)
    assert spent <= summary["wall_seconds"]
    expected, own = files_of(finished[0]), "teacher/metrics.jsonl"
    for name in (first, second):
        found = files_of(name)
        for part in (found["summary.json"], found["summary.json"]["teacher"]):
            for key in ("extracted_features", "train_images", "tasks_taken_from_store"):
                part.pop(key, None)
        kept = {
            key: content
            for key, content in found.items()
            if key not in (own, "summary.json", "config.json")
        }
        assert kept.items() <= expected.items()
        for key, value in found["summary.json"]["teacher"].items():
            assert value == expected["summary.json"]["teacher"][key], key
    assert teacher_of("longer", "train.epochs=3")[1] == 0
    for path in (tmp_path / "store").rglob("arrays.npz"):
        path.write_bytes(path.read_bytes()[:-100])
    assert teacher_of("damaged")[1] == 0


def test_killed_before_a_task_is_saved_the_store_has_nothing_of_it(
    finished, backbones, tmp_path, monkeypatch
):
    """Else the run itself would take it from there, and its log would never have these steps."""
    monkeypatch.setenv("QKD_JAX_STORE", str(tmp_path / "store"))
    config, save = config_of("pupil", "data.store_gib=1"), _Loop._save

    def stops(loop, checkpoints, done, told=""):
        if done == 3:  # teacher and student of the first task, and the teacher of the second
            raise KeyboardInterrupt
        return save(loop, checkpoints, done, told)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(_Loop, "_save", stops)
        run(config, backbones[0], tmp_path, teacher=backbones[1])
    run(config, backbones[0], tmp_path, teacher=backbones[1])
    found, expected = files_of(run_folder(tmp_path, config)), files_of(finished[0])
    for files in (found, expected):
        del files["config.json"]
        for part in (files["summary.json"], files["summary.json"]["teacher"]):
            part.pop("extracted_features")  # what the frozen model computes is in the store too
    assert found == expected


def test_a_loaded_student_predicts_what_the_run_predicted(finished, monkeypatch):
    folder, _ = finished
    state, _, config = qkd_jax.load_run(folder)
    assert teacher_config(config).backbone.image_size == 48
    assert int(state.teacher.task) == int(state.task) == 2
    images = np.random.default_rng(0).random((2, 48, 48, 3), np.float32)
    assert qkd_jax.predict(state, images).shape == (2, 6)
    with pytest.raises(qkd_jax.DataError, match=r"expected \[B, 48, 48, 3\]"):
        qkd_jax.predict(state, images[:, :32, :32])


def test_outputs_that_were_kept_train_as_those_of_the_step(finished, backbones):
    """The same numbers up to one rounding of float32 in the teacher's pass, which has other batch
    neighbours; the step's gradient is of order 1 and the rate 0.05 (budget 1e-6).
    """
    state, _, config = qkd_jax.load_run(finished[0])
    fresh = qkd_jax.init_state(jax.random.key(0), backbones[0], config, teacher=backbones[1])
    teacher = fresh.teacher
    task = qkd_jax.Task(0, tuple(int(c) for c in np.flatnonzero(state.task_of_class == 0)))
    batch = {
        "image": np.random.default_rng(1).random((4, 48, 48, 3), np.float32),
        "label": np.resize(task.classes, 4),
    }
    teacher = qkd_jax.begin_task(teacher, task)
    teacher, _ = qkd_jax.train_task(teacher, batch)
    teacher = qkd_jax.end_task(teacher, [batch])
    ended = []
    for kept in (False, True):
        student = qkd_jax.begin_task(fresh.taught_by(teacher), task)
        more = {"teacher": teacher_outputs(student, batch["image"])} if kept else {}
        student, metrics = qkd_jax.train_task(student, batch | more)
        assert float(metrics["loss_taught"]) > 0
        ended.append(student.trainable["head"]["rows"])
    np.testing.assert_allclose(ended[0], ended[1], rtol=0, atol=1e-6)


def test_what_does_not_fit_is_refused(backbones):
    config, key = config_of(), jax.random.key(0)
    config = dataclasses.replace(config, shapes=qkd_jax.Shapes(6, 3, 2))
    with pytest.raises(ConfigError, match=r"teacher: expected a backbone, .* found None"):
        qkd_jax.init_state(key, backbones[0], config)
    with pytest.raises(ConfigError, match="teacher: expected a backbone that reads image"):
        qkd_jax.init_state(key, backbones[0], config, teacher=tiny_random_text())
    with pytest.raises(ConfigError, match="tokenizer and 8 tokens, found tiny_random_text with 16"):
        qkd_jax.init_state(key, tiny_random_text(8), config, teacher=tiny_random_text())
    alone = config_of("linear_probe")
    state = qkd_jax.init_state(key, backbones[0], alone)
    with pytest.raises(ConfigError, match="expected a student, found linear_probe"):
        teacher_outputs(state, np.zeros((1, 32, 32, 3), np.float32))
