"""The run folder: its files, its numbers recomputed from what it left behind, and its refusals.

All runs here have one config, so that they share what is compiled; it is the experiment `smoke`.
"""

import json
import re
import time

import jax
import numpy as np
import pytest

from qkd_jax import predict_with_relevance
from qkd_jax.data.examples import Split
from qkd_jax.engine import verbs
from qkd_jax.errors import CheckpointError, ConfigError, QkdError
from qkd_jax.learners import passes
from qkd_jax.protocol.calibration import calibration
from qkd_jax.protocol.tasks import task_of_class
from qkd_jax.reports.predictions import check_follows, read_predictions
from qkd_jax.reports.results import write_results
from qkd_jax.runs import learning
from qkd_jax.runs.batches import training_batches
from qkd_jax.runs.checkpoint import Checkpoints
from qkd_jax.runs.evaluation import halves
from qkd_jax.runs.lock import exclusive
from qkd_jax.runs.loop import plan, run, run_folder
from qkd_jax.runs.model import Model
from qkd_jax.runs.progress import NullProgress
from qkd_jax.runs.slot_features import SlotFeatures
from qkd_jax.settings.config import override
from qkd_jax.settings.experiments import load_experiment
from qkd_jax.weights.load import load_backbone

pytestmark = pytest.mark.usefixtures("compiled")

TASKS, CLASSES_PER_TASK, TRAIN, TEST, EPOCHS, BATCH = 3, 2, 20, 5, 2, 8
FILES = {
    ".lock",
    "config.json",
    "environment.json",
    "files.json",
    "class_order.json",
    "circuit.txt",
    "metrics.jsonl",
    "examples.json",
    "images.npz",
    "matrix.json",
    "summary.json",
    *(f"predictions/after_task_{t}.npz" for t in range(TASKS)),
}


def smoke(method="qkd", *settings):
    config = load_experiment("smoke").get_config(method)
    return override(config, "train.devices=1", "gate.encoding=angle", *settings, where_read=True)


@pytest.fixture(scope="module")
def backbone():
    return load_backbone("tiny_random", image_size=32)


@pytest.fixture(scope="module")
def finished(backbone, tmp_path_factory):
    """(folder, summary) of a finished run, and where it lives."""
    out = tmp_path_factory.mktemp("runs")
    summary = run(smoke(), backbone, out)
    return out, run_folder(out, smoke()), summary


def predictions(folder, task):
    with np.load(folder / f"predictions/after_task_{task}.npz", allow_pickle=False) as arrays:
        return dict(arrays)


def test_the_folder_holds_these_files_and_no_others(finished):
    _, folder, _ = finished
    found = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert {name for name in found if not name.startswith("checkpoints/")} == FILES
    assert any(name.startswith("checkpoints/30000000/") for name in found)


def test_every_json_file_is_well_formed(finished):
    _, folder, summary = finished

    def no_nan(text):
        raise AssertionError(f"{text} is no JSON number")

    for path in folder.glob("*.json"):
        assert isinstance(json.loads(path.read_text(), parse_constant=no_nan), dict), path
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=no_nan)
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert json.loads((folder / "config.json").read_text())["shapes"]["num_classes"] == 6
    order = json.loads((folder / "class_order.json").read_text())
    assert sorted(order["order"]) == list(range(6))
    assert [c for task in order["tasks"] for c in task] == order["order"]
    assert len(order["class_names"]) == 6


def test_summary_has_the_promised_keys(finished):
    _, _, summary = finished
    promised = {
        *("experiment", "method", "seed", "num_tasks", "average_accuracy", "last_accuracy"),
        *("accuracy_curve", "forgetting", "routing_accuracy", "wall_seconds"),
        *("training_images_per_second", "inference_images_per_second", "peak_memory_mb"),
        *("train_seconds", "eval_seconds"),
        *("trainable_parameters", "compilations", "finished"),
        *("oracle_accuracy", "routing_recall_at_2", "passes_per_image", "kept_bytes"),
        *("nll", "ece", "nll_tempered", "ece_tempered", "temperatures"),
    }
    assert promised <= summary.keys()
    assert summary["finished"] is True and summary["method"] == "qkd" and summary["seed"] == 1993
    assert summary["compilations"] == 1 and summary["devices"] == 1
    for rate in ("wall_seconds", "training_images_per_second", "inference_images_per_second"):
        assert summary[rate] > 0
    assert summary["train_seconds"] + summary["eval_seconds"] < summary["wall_seconds"]


def test_parameters_are_counted_for_each_part_of_the_method(finished):
    """`tiny_random` has 2 blocks of width 32: adapters of bottleneck R, a map to 5 qubits."""
    _, _, summary = finished
    parts = summary["parameters"]
    assert parts.keys() == {"adapter", "gate", "head"}
    config = plan(smoke()).config
    assert parts["gate"] == 32 * 5 + 5 * config.gate.num_layers
    assert parts["head"] == 32 * CLASSES_PER_TASK + 1  # the scale
    assert sum(parts.values()) == summary["trainable_parameters"]


def test_throughput_is_of_the_steps_after_the_first_and_of_new_images(finished):
    """A run that trains nothing has no rate of training; the state remembers what was timed."""
    out, folder, summary = finished
    with Checkpoints(folder / "checkpoints") as checkpoints:
        planned = plan(smoke()).config
        state = verbs.init_state(
            jax.random.key(planned.seed), load_backbone("tiny_random", image_size=32), planned
        )
        spent = checkpoints.restore(state)[1]["spent"]
    steps = TASKS * EPOCHS * CLASSES_PER_TASK * TRAIN // BATCH
    assert spent["timed_images"] == (steps - 1) * BATCH  # the first step compiles
    rate = spent["timed_images"] / spent["steps"]
    assert summary["training_images_per_second"] == pytest.approx(rate, rel=1e-12)
    assert spent["steps"] < spent["train"] and 0 < spent["peak_memory_mb"]
    assert summary["peak_memory_mb"] >= spent["peak_memory_mb"]
    idle = run(smoke("simplecil"), load_backbone("tiny_random", image_size=32), out)
    assert idle["training_images_per_second"] is None and idle["trainable_parameters"] == 0
    assert idle["inference_images_per_second"] > 0


def test_predictions_hold_every_seen_test_image_once(finished):
    _, folder, _ = finished
    planned = plan(smoke())
    owner = task_of_class(planned.tasks, 6)
    for t in range(TASKS):
        saved = predictions(folder, t)
        seen = [c for task in planned.tasks[: t + 1] for c in task.classes]
        rows = np.flatnonzero(np.isin(planned.data.test.labels, seen))
        np.testing.assert_array_equal(saved["id"], planned.data.test.ids[rows])
        np.testing.assert_array_equal(saved["label"], planned.data.test.labels[rows])
        np.testing.assert_array_equal(saved["task"], owner[saved["label"]])
        np.testing.assert_array_equal(saved["predicted"], saved["top5"][:, 0])
        assert np.isin(saved["predicted"], seen).all()
        np.testing.assert_array_equal(owner[saved["within_task"]], saved["task"])
        assert all(len(set(row)) == len(row) for row in saved["top5"].tolist())
        weights = saved["relevance"]
        assert weights.shape == (len(rows), TASKS)
        assert (weights[:, t + 1 :] == 0).all()
        # A softmax of T float32 numbers sums to one within T rounding errors.
        np.testing.assert_allclose(weights.sum(1), 1.0, atol=4e-7)


def test_accuracies_recomputed_from_predictions_equal_the_summary(finished):
    """A brute-force count over the npz files alone gives matrix, curve, A-bar, A_B and routing."""
    _, folder, summary = finished
    matrix = json.loads((folder / "matrix.json").read_text())
    correct, total, curve = np.zeros((3, 3), int), np.zeros((3, 3), int), []
    for t in range(TASKS):
        saved = predictions(folder, t)
        for task, label, guess in zip(
            saved["task"].tolist(),
            saved["label"].tolist(),
            saved["predicted"].tolist(),
            strict=True,
        ):
            total[t, task] += 1
            correct[t, task] += label == guess
        curve.append(100.0 * correct[t].sum() / total[t].sum())
    assert matrix["correct"] == correct.tolist()  # row = after task, column = evaluated task
    assert matrix["total"] == total.tolist()
    assert total.tolist() == [[10, 0, 0], [10, 10, 0], [10, 10, 10]]
    assert summary["accuracy_curve"] == pytest.approx(curve, abs=1e-12)
    assert summary["average_accuracy"] == pytest.approx(np.mean(curve), abs=1e-12)
    assert summary["last_accuracy"] == pytest.approx(curve[-1], abs=1e-12)
    last = predictions(folder, 2)
    routed = 100.0 * (last["relevance"].argmax(1) == last["task"]).mean()
    assert summary["routing_accuracy"] == pytest.approx(routed, abs=1e-12)
    better = (last["relevance"] > last["relevance"][np.arange(30), last["task"]][:, None]).sum(1)
    second = 100.0 * (better < 2).mean()  # no two are equal
    assert summary["routing_recall_at_2"] == pytest.approx(second, abs=1e-12)
    oracle = 100.0 * (last["oracle"] == last["label"]).mean()
    assert summary["oracle_accuracy"] == pytest.approx(oracle, abs=1e-12)
    assert "oracle" not in predictions(folder, TASKS - 2)
    check_follows(read_predictions(folder), correct, total, summary)


def test_predictions_of_each_image_are_those_of_a_softmax_of_predict(finished, backbone):
    """What a record keeps, against fresh scores of the final model."""
    _, folder, summary = finished
    found, test = read_predictions(folder), plan(smoke()).data.test
    order = np.argsort(test.ids)
    images = test.load(np.arange(len(test)), backbone)
    state = final_state(folder, backbone)[0]
    scores, _ = predict_with_relevance(state, images)
    chances = np.asarray(jax.nn.softmax(scores))[order]
    np.testing.assert_array_equal(found.label, test.labels[order])
    own = chances[np.arange(len(test)), found.label]
    # float16 of a logarithm of order 1, and float32 scores that differ by 1e-4 (see above).
    np.testing.assert_allclose(np.exp(found.log_probability), own, rtol=2e-3)
    np.testing.assert_allclose(np.exp(found.predicted_log_probability), chances.max(1), rtol=2e-3)
    chances = np.asarray(jax.nn.softmax(scores, axis=1))
    # The scores of a batch differ by 1e-4 (see above), some per mille of the logarithms.
    nll = -np.log(chances[np.arange(len(test)), test.labels]).mean()
    assert summary["nll"] == pytest.approx(nll, rel=2e-3)
    again = calibration(scores, test.labels, halves(len(test), smoke().seed))
    assert again.keys() <= summary.keys()
    np.testing.assert_allclose(summary["temperatures"], again["temperatures"], rtol=0.05)
    tasks = task_of_class(plan(smoke()).tasks, 6)[test.labels].astype(np.int32)
    told = passes.score_with_task(state, verbs.slot_features(state, images), tasks)
    np.testing.assert_array_equal(found.oracle, np.asarray(told).argmax(axis=1)[order])


def test_the_task_that_is_told_is_the_true_one(backbone, tmp_path, monkeypatch):
    """A method that answers with the first class of the task that it is told."""
    owner = task_of_class(plan(smoke()).tasks, 6)

    def first_of_task(self, features, rows, tasks):
        yield owner[None, :] == tasks[:, None], None, np.ones(len(rows), bool)

    monkeypatch.setattr(Model, "scores_with_task", first_of_task)
    run(smoke("simplecil"), backbone, tmp_path)
    last = predictions(run_folder(tmp_path, smoke("simplecil")), TASKS - 1)
    np.testing.assert_array_equal(owner[last["oracle"]], last["task"])
    assert len(set(last["task"].tolist())) == TASKS


def test_environment_names_code_and_machine(finished):
    _, folder, _ = finished
    environment = json.loads((folder / "environment.json").read_text())
    assert {"commit", "dirty", "code", "processor", "cores"} <= environment.keys()
    assert "continued_by" not in environment
    assert environment["cores"] >= 1 and len(environment["code"]) == 16


def test_every_image_and_slot_is_computed_once(finished):
    """Closed form: an image meets slot s when trained (its own task's and older) and when tested.

    Training images of task t: slots 0..t and the frozen model, which QKD fuses with them. Test
    images, over the run: every class with every slot and once with the frozen model.
    """
    _, _, summary = finished
    assert smoke().fusion.frozen_weight > 0
    train = sum(CLASSES_PER_TASK * TRAIN * (t + 1 + 1) for t in range(TASKS))
    test = TASKS * CLASSES_PER_TASK * TEST * (TASKS + 1)
    assert summary["extracted_features"] == train + test
    assert summary["train_images"] == TASKS * CLASSES_PER_TASK * TRAIN * EPOCHS


def test_a_task_is_saved_before_it_is_told(backbone, tmp_path, monkeypatch):
    config, seen = smoke("simplecil"), []

    def told(_, line):
        folder = run_folder(tmp_path, config)
        newest = max(int(p.name) for p in (folder / "checkpoints").iterdir())
        summary = json.loads((folder / "summary.json").read_text())
        seen.append((line.split("  ")[0], newest, len(summary["accuracy_curve"])))

    monkeypatch.setattr(NullProgress, "end_task", told)
    run(config, backbone, tmp_path)
    assert seen == [(f"task {t}/3", t * 10_000_000, t) for t in (1, 2, 3)]


def test_log_is_one_rising_line_a_step(finished):
    _, folder, _ = finished
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = EPOCHS * CLASSES_PER_TASK * TRAIN // BATCH
    assert [(r["task"], r["step"]) for r in lines] == [
        (t, s) for t in range(TASKS) for s in range(1, steps + 1)
    ]
    assert [r["epoch"] for r in lines] == [e for _ in range(3) for e in (0, 1) for _ in range(5)]
    assert [r["images_seen"] for r in lines] == [BATCH * (n + 1) for n in range(len(lines))]
    walls = [r["wall_s"] for r in lines]
    assert walls == sorted(walls)
    assert {"loss", "loss_ce", "loss_kd", "gate_entropy", "learning_rate"} <= lines[-1].keys()
    assert lines[0]["loss_kd"] == 0.0 < lines[-1]["loss_kd"]  # no teacher in the first task


def final_state(folder, backbone):
    config = plan(smoke()).config
    state = verbs.init_state(jax.random.key(config.seed), backbone, config)
    with Checkpoints(folder / "checkpoints") as checkpoints:
        return checkpoints.restore(state)


def test_numbers_equal_those_of_predict_without_any_cache(finished, backbone):
    """The run scores cached features of batches of 8; `predict` sees 30 fresh images at once."""
    _, folder, _ = finished
    state, meta = final_state(folder, backbone)
    assert meta["finished_tasks"] == TASKS
    saved, test = predictions(folder, 2), plan(smoke()).data.test
    images = test.load(np.arange(len(test)), backbone)
    scores, relevance = predict_with_relevance(state, images)
    scores = np.asarray(scores)
    # Batch shapes change the order of float32 sums: 1e-4 on relevances of order 1.
    np.testing.assert_allclose(saved["relevance"], np.asarray(relevance), atol=1e-4)
    top = np.sort(scores, axis=1)
    clear = top[:, -1] - top[:, -2] > 1e-3  # ties may fall either way
    assert clear.sum() >= 25
    np.testing.assert_array_equal(saved["predicted"][clear], scores.argmax(1)[clear])


@pytest.mark.slow
def test_eight_devices_give_the_same_predictions(backbone, tmp_path):
    """Float32 sums in another order: relevance within 1e-3; a prediction may differ only at a tie.

    Error budget, on any processor: 30 steps of rate 0.05 and momentum 0.9 add gradients whose
    rounding is some 8 eps of their size, which is below 10: parameters and features within
    30 * 0.05 / 0.1 * 8 * 6e-8 * 10 = 7e-5. A fidelity of 5 qubits and 2 layers turns by at most
    half of what each of its 10 angles does, and an angle by pi times its feature: 1e-3 at the very
    most; typically the roundings cancel and a hundredth of it is left. Relevance, a softmax at
    temperature 1 of the fidelity, moves by at most a quarter of that. What would amplify rounding
    without bound is left out: the logarithm of small fidelities, and calibration, whose Adam steps
    divide by small gradients.
    """
    runs = []
    bounded = ("gate.calibration_steps=0", "gate.score=fidelity", "gate.temperature=1")
    for devices in (1, 8):
        config = smoke("qkd", *bounded, f"train.devices={devices}")
        summary = run(config, backbone, tmp_path / str(devices))
        assert (summary["devices"], summary["compilations"]) == (devices, 1)
        runs.append((run_folder(tmp_path / str(devices), config), summary))
    (one, summary_one), (eight, summary_eight) = runs
    assert summary_one["extracted_features"] == summary_eight["extracted_features"]
    for t in range(TASKS):
        a, b = predictions(one, t), predictions(eight, t)
        np.testing.assert_array_equal(a["id"], b["id"])
        np.testing.assert_allclose(a["relevance"], b["relevance"], atol=1e-3)
        assert np.sum(a["predicted"] != b["predicted"]) <= 1


def test_a_finished_run_is_only_read(finished, backbone, monkeypatch):
    out, folder, summary = finished
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}

    def never(*_, **__):
        raise AssertionError("a finished run computed something")

    monkeypatch.setattr(verbs, "init_state", never)
    monkeypatch.setattr(SlotFeatures, "fill", never)
    began = time.perf_counter()
    assert run(smoke(), backbone, out) == summary
    assert time.perf_counter() - began < 5.0
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()} == before


def test_other_settings_are_refused_key_by_key(finished, backbone):
    out, _, _ = finished
    with pytest.raises(CheckpointError) as refused:
        run(smoke("qkd", "train.epochs=3", "gate.rank=5"), backbone, out)
    message = str(refused.value)
    assert "train.epochs: 2 -> 3" in message and "gate.rank: 12 -> 5" in message
    assert message.count("->") == 2 and "--variant" in message


def test_other_weights_and_other_data_are_refused(finished, backbone, monkeypatch):
    out, _, _ = finished
    other = backbone.replace(params=jax.tree.map(lambda a: a + 1.0, backbone.params))
    with pytest.raises(CheckpointError, match="another backbone"):
        run(smoke(), other, out)
    planned = plan(smoke())
    fewer = planned.data.train.take(np.arange(len(planned.data.train) - 1))
    changed = planned._replace(data=Split(fewer, planned.data.test))
    monkeypatch.setattr("qkd_jax.runs.loop.plan", lambda config: changed)
    with pytest.raises(CheckpointError, match="other data"):
        run(smoke(), backbone, out)


def test_a_folder_in_use_is_refused(backbone, tmp_path):
    folder = run_folder(tmp_path, smoke())
    told = "another process is running in or reading"
    with exclusive(folder), pytest.raises(CheckpointError, match=told):
        run(smoke(), backbone, tmp_path)
    with exclusive(folder):
        pass  # free again


def test_bad_settings_leave_nothing_behind(backbone, tmp_path):
    for method, setting, message in [
        ("nosuch", "train.epochs=1", "method: expected one of .*qkd.* found 'nosuch'"),
        (
            "qkd",
            "adapter.bottleneck=33",
            "adapter.bottleneck: expected at most the backbone.s width 32",
        ),
        ("qkd", "data.num_classes=11", r"data.num_classes: expected 1 to 10, .* found 11"),
        ("qkd", "data.num_classes=-1", r"data.num_classes: expected 0 \(all\) or more, found -1"),
    ]:
        with pytest.raises(ConfigError, match=message):
            run(smoke(method, setting), backbone, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_nan_loss_stops_and_names_task_and_step(backbone, tmp_path):
    """Nothing was learned yet, so the same folder may then be begun with a sane rate."""
    settings = ("finetune", "train.checkpoint_every=1")
    with pytest.raises(QkdError) as stopped:
        run(smoke(*settings, "train.learning_rate=1e30"), backbone, tmp_path)
    message = str(stopped.value)
    assert re.match(
        r"loss and [a-z_]+\.[a-z_.0-9]+ became NaN or infinite in task 1 of 3, step \d+; ", message
    )
    folder = run_folder(tmp_path, smoke(*settings))
    assert str(folder / "checkpoints") in message and "learning_rate" in message
    config = plan(smoke(*settings)).config
    state = verbs.init_state(jax.random.key(0), backbone, config)
    with Checkpoints(folder / "checkpoints") as checkpoints:
        found = checkpoints.restore(state)  # raises if what was kept is not finite
    assert found is None or int(found[0].step) < 2


@pytest.mark.parametrize(
    ("method", "settings", "rate"),
    [
        *(
            pytest.param(
                *(method, ("alignment.learning_rate=1e25",), "alignment.learning_rate"),
                marks=pytest.mark.slow,
            )
            for method in ("mos", "ssiat", "tuna")
        ),
        ("qkd", ("gate.calibration_rate=1e38",), "gate.calibration_rate"),
        (
            "replay",
            ("alignment.generator=drifting", "drift.learning_rate=1e38", "drift.steps=3"),
            "drift.learning_rate",
        ),
        pytest.param(
            "replay",
            ("alignment.generator=drifting", "alignment.learning_rate=1e25", "drift.steps=3"),
            "alignment.learning_rate",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_what_diverges_when_a_task_ends_names_its_own_rate(
    backbone, tmp_path, method, settings, rate
):
    with pytest.raises(QkdError) as stopped:
        run(smoke(method, "train.epochs=0", *settings), backbone, tmp_path)
    message = str(stopped.value)
    assert f"Lower {rate} " in message and "train.learning_rate" not in message
    assert "of 3, when the task ended" in message
    assert re.match(r"(trainable|memory)\.[a-z_.0-9]+ became NaN", message)


def test_scores_that_are_not_finite_are_not_counted(backbone, tmp_path, monkeypatch):
    """Of a finite state too, whose features may overflow."""
    scores = Model.scores

    def overflowed(self, *given):
        for values, *rest in scores(self, *given):
            values = np.array(values)
            values[0] = np.nan
            yield values, *rest

    monkeypatch.setattr(Model, "scores", overflowed)
    told = r"scores of test images became NaN or infinite in task 1 of 3, in evaluation"
    with pytest.raises(QkdError, match=told):
        run(smoke("simplecil"), backbone, tmp_path)
    assert not (run_folder(tmp_path, smoke("simplecil")) / "predictions").exists()


def test_several_seeds_give_mean_and_sd(finished, backbone, tmp_path):
    """The mean and the standard deviation with n - 1, of two cheap runs."""
    values = []
    for seed in (1, 2):
        config = smoke("simplecil", f"seed={seed}", f"protocol.order_seed={seed}")
        values.append(run(config, backbone, tmp_path)["average_accuracy"])
    write_results(tmp_path / "smoke")
    row = json.loads((tmp_path / "smoke/results.json").read_text())["methods"]["simplecil"]
    assert row["average_accuracy"]["mean"] == pytest.approx(np.mean(values))
    assert row["average_accuracy"]["sd"] == pytest.approx(np.std(values, ddof=1))
    assert (tmp_path / "smoke/results.md").read_text().count("simplecil") >= 1


@pytest.mark.slow
def test_teachers_that_see_the_image_itself_are_asked_once_per_task(
    backbone, tmp_path, monkeypatch
):
    """Of augmented images every step is given kept features: those of the old adapters, of the
    images as they are, and nothing is computed in the step.
    """
    given = []

    def watched(features, *arguments, **settings):
        for batch, images in training_batches(features, *arguments, **settings):
            rows = [np.flatnonzero((features.values == f).all((1, 2))) for f in batch["features"]]
            given.append((settings["task"], features.known.copy(), rows, batch["inputs"]))
            yield batch, images

    monkeypatch.setattr(learning, "training_batches", watched)
    config = smoke("qkd", "data.augment=true", "distillation.teacher_view=test")
    config = override(config, "distillation.top_k=1", "protocol.increment=3", "train.epochs=1")
    summary = run(config, backbone, tmp_path)
    assert summary["compilations"] == 1
    steps = [(known[:, :task].all(), known[:, task:].any()) for task, known, _, _ in given]
    assert len(steps) > 2 and set(steps) == {(True, False)}
    _, _, rows, inputs = given[-1]
    assert all(len(found) == 1 for found in rows)  # the kept features of one image each
    assert {field for field in inputs.fields} == {"image"}  # crops, not the stem of the images
