"""Predictions of each image: packed into a few kB, read again, held against matrix and summary."""

import hashlib

import numpy as np
import pytest

from qkd_jax.errors import DataError
from qkd_jax.protocol import metrics
from qkd_jax.reports.predictions import (
    check_follows,
    joined,
    packed,
    read_predictions,
)

NUM_TASKS = 10
OWNER = np.arange(100) // 10  # task of class


def stages(num_images=300, seed=0):
    """Of a run of the size of the packaged stream: 300 images of 100 classes in 10 tasks."""
    random = np.random.default_rng(seed)
    ids = np.array([f"class {n % 100}/image {n}" for n in random.permutation(num_images)])
    labels = random.integers(100, size=num_images)
    labels[:100] = np.arange(100)  # no class without an image
    found = []
    for task in range(NUM_TASKS):
        seen = OWNER[labels] <= task
        own, count = labels[seen], int(seen.sum())
        guesses = np.where(random.random(count) < 0.85, own, random.integers(10 * task + 10))
        relevance = np.zeros((count, NUM_TASKS), np.float32)
        relevance[:, : task + 1] = random.random((count, task + 1))
        found.append(
            {
                "id": ids[seen],
                "label": own,
                "task": OWNER[own],
                "predicted": guesses,
                "within_task": np.where(random.random(count) < 0.95, own, 10 * OWNER[own]),
                "relevance": relevance,
                "log_probability": -random.exponential(size=count).astype(np.float32),
                "predicted_log_probability": -random.exponential(size=count).astype(np.float32),
            }
        )
    found[-1]["oracle"] = np.where(random.random(count) < 0.9, own, random.integers(100))
    return found


def measured(written):
    """(correct, total, summary) counted from what was written, without the code under test."""
    counts = np.zeros((3, NUM_TASKS, NUM_TASKS), np.int64)
    for task, stage in enumerate(written):
        for label, owner, guess, within in zip(
            *(stage[name] for name in ("label", "task", "predicted", "within_task")), strict=True
        ):
            counts[:, task, owner] += (guess == label, within == label, 1)
    correct, within, total = counts
    confusion = None
    if "relevance" in written[-1]:
        confusion = np.zeros((NUM_TASKS, NUM_TASKS), np.int64)
        for owner, weights in zip(written[-1]["task"], written[-1]["relevance"], strict=True):
            confusion[owner, weights.argmax()] += 1
    summary = metrics.summarise(correct, total, within_task_correct=within, confusion=confusion)
    if "oracle" in written[-1]:
        right = [a == b for a, b in zip(written[-1]["oracle"], written[-1]["label"], strict=True)]
        summary["oracle_accuracy"] = 100.0 * sum(right) / len(right)
    return correct, total, summary


def save(folder, written):
    (folder / "predictions").mkdir(parents=True)
    for task, arrays in enumerate(written):
        np.savez(folder / f"predictions/after_task_{task}.npz", **arrays)
    return folder


def equal(a, b):
    return all(
        np.array_equal(x, y) and getattr(x, "dtype", None) == getattr(y, "dtype", None)
        for x, y in zip(a, b, strict=True)
    )


def test_each_image_keeps_what_was_predicted_after_each_task(tmp_path):
    written = stages()
    found = read_predictions(save(tmp_path, written))
    ids = sorted(written[-1]["id"])
    assert found.images == hashlib.sha256(("\n".join(ids) + "\n").encode()).hexdigest()
    for task, stage in enumerate(written):
        place = {name: row for row, name in enumerate(stage["id"])}
        for n, name in enumerate(ids):
            row = place.get(name)
            if row is None:
                assert found.predicted[task, n] == found.routed[task, n] == -1
                continue
            assert found.label[n] == stage["label"][row] and found.task[n] == stage["task"][row]
            assert found.predicted[task, n] == stage["predicted"][row]
            assert found.within_task[task, n] == stage["within_task"][row]
            assert found.routed[task, n] == stage["relevance"][row].argmax()
    order = np.argsort(written[-1]["id"])
    assert found.oracle.tolist() == written[-1]["oracle"][order].tolist()
    for name in ("log_probability", "predicted_log_probability"):
        # float16 has 11 binary digits.
        np.testing.assert_allclose(
            getattr(found, name), written[-1][name][order], rtol=2**-11, atol=1e-7
        )


def test_a_record_is_small_and_reads_as_the_run(tmp_path):
    whole = read_predictions(save(tmp_path / "run", stages()))
    (tmp_path / "record").mkdir()
    content = packed(whole)
    (tmp_path / "record/predictions.npz").write_bytes(content)
    assert equal(read_predictions(tmp_path / "record"), whole)
    assert content == packed(whole)
    # Random guesses and numbers; those of a model compress better.
    assert len(content) < 8_500
    assert read_predictions(tmp_path) is None


def test_older_runs_have_less_and_are_read(tmp_path):
    new = ("within_task", "log_probability", "predicted_log_probability", "relevance")
    new += ("oracle",)
    written = [{k: v for k, v in stage.items() if k not in new} for stage in stages()]
    found = read_predictions(save(tmp_path, written))
    assert found[4:] == (None,) * 5
    (tmp_path / "predictions.npz").write_bytes(packed(found))
    again = read_predictions(tmp_path)
    assert again[4:] == (None,) * 5 and equal(again[:4], found[:4])
    check_follows(found, *measured(stages()))


def test_images_that_were_removed_within_a_run_are_not_counted_later():
    written = stages()
    kept = np.arange(len(written[-1]["id"])) != 7
    gone = written[-1]["id"][7]
    written[-1] = {name: values[kept] for name, values in written[-1].items()}
    found = joined(written)
    n = sorted({*written[-1]["id"], gone}).index(gone)
    assert found.predicted[-1, n] == -1 and np.isnan(found.log_probability[n])
    check_follows(found, *measured(written))


def test_improbable_classes_stay_finite():
    written = stages()
    written[-1]["log_probability"][3] = -1e6
    values = joined(written).log_probability
    assert np.isfinite(values).all() and values.min() == np.finfo(np.float16).min


def test_matrix_and_summary_follow_from_the_predictions():
    written = stages()
    correct, total, summary = measured(written)
    check_follows(joined(written), correct, total, summary)
    edited = correct.copy()
    edited[4, 2] += 1
    with pytest.raises(DataError, match=r"matrix.json: expected correct\[4\]\[2\] = "):
        check_follows(joined(written), edited, total, summary)
    names = ("last_accuracy", "forgetting", "within_task_last_accuracy", "routing_accuracy")
    for name in (*names, "oracle_accuracy"):
        with pytest.raises(DataError, match=f"summary.json: expected {name} "):
            edited = summary | {name: summary[name] + 1e-9}
            check_follows(joined(written), correct, total, edited)


def test_a_lost_file_of_a_task_is_named(tmp_path):
    save(tmp_path, stages())
    (tmp_path / "predictions/after_task_3.npz").unlink()
    with pytest.raises(DataError, match=r"found none for task 3 \(after_task_3.npz\)"):
        read_predictions(tmp_path)


@pytest.mark.parametrize("missing", ["images", "label", "predicted"])
def test_a_file_of_something_else_is_refused(tmp_path, missing):
    held = joined(stages())._asdict()
    held.pop(missing)
    np.savez(tmp_path / "predictions.npz", **held)
    with pytest.raises(DataError, match=missing):
        read_predictions(tmp_path)


def test_damaged_files_are_one_error(tmp_path):
    (tmp_path / "predictions.npz").write_bytes(packed(joined(stages()))[:-30])
    with pytest.raises(DataError, match=r"predictions\.npz"):
        read_predictions(tmp_path)
    written = stages()
    written[2]["label"] = written[2]["label"][:-1]
    (tmp_path / "predictions.npz").unlink()
    with pytest.raises(DataError, match=r"after_task_2\.npz: expected arrays of the same images"):
        read_predictions(save(tmp_path, written))
