"""The table of routers: docs/results.md shows what is recorded, which agrees with the recorded run;
its routers against formulas in float64.
"""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import routers
from qkd_jax.runs.load import load_run
from qkd_jax.runs.loop import run, run_folder
from qkd_jax.runs.plan import plan
from qkd_jax.settings.config import override
from qkd_jax.settings.experiments import load_experiment
from qkd_jax.weights.load import load_backbone

ROOT = Path(__file__).parents[2]
RECORD = json.loads((ROOT / "benchmarks" / "results" / "routers.json").read_text())


def run_of(stream):
    return ROOT / "results" / stream / "qkd" / "seed1993"


def test_the_page_shows_what_is_recorded():
    answers = {stream: routers.right_task(run_of(stream)) for stream in RECORD}
    assert routers.table(RECORD, answers) in (ROOT / "docs" / "results.md").read_text()


def test_the_task_of_an_answer(tmp_path):
    label, task = np.array([2, 0, 3, 1, 0]), np.array([1, 0, 1, 0, 0])
    predicted = np.array([[-1, 0, -1, 1, 1], [3, 1, 4, 2, 0]])
    names = {"label": label, "task": task, "predicted": predicted}
    np.savez(tmp_path / "predictions.npz", images="x", **names)
    assert routers.right_task(tmp_path) == 60.0


@pytest.mark.parametrize("stream", RECORD)
def test_the_gate_s_row_is_the_recorded_run_s(stream):
    summary = run_of(stream) / "summary.json"
    run, images = json.loads(summary.read_text()), RECORD[stream]["images"]
    counts = RECORD[stream]["routers"]["fidelity"]
    assert 100 * counts["mixed"] / images == pytest.approx(run["last_accuracy"])
    assert 100 * counts["routed"] / images == pytest.approx(run["routing_accuracy"])
    assert RECORD[stream]["routers"]["oracle"]["routed"] == images


def test_entropy_of_a_slot_s_own_classes():
    logits = np.random.default_rng(0).normal(size=(3, 2, 5)).astype(np.float32)
    owner = np.array([0, 1, 1, -1, 0])
    expected = np.zeros((3, 2))
    for task in range(2):
        own = np.float64(logits[:, task, owner == task])
        p = np.exp(own) / np.exp(own).sum(1, keepdims=True)
        expected[:, task] = -(p * np.log(p)).sum(1)
    found = routers.own_entropy(jnp.asarray(logits), jnp.asarray(owner))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_ridge_takes_the_penalty_of_the_least_leave_one_out_error():
    random = np.random.default_rng(1)
    tasks = random.integers(0, 3, 30)
    train = random.normal(size=(30, 6)) + np.eye(3)[tasks] @ random.normal(size=(3, 6))
    test = random.normal(size=(4, 6))

    def solved(x, targets, penalty):
        x = np.c_[x, np.ones(len(x))]
        return np.linalg.solve(x.T @ x + penalty * np.eye(7), x.T @ targets)

    targets, errors = np.eye(3)[tasks], []
    for penalty in routers.LAMBDAS:
        error = 0.0
        for left_out in range(30):
            others = np.arange(30) != left_out
            weights = solved(train[others], targets[others], penalty)
            error += np.sum((np.r_[train[left_out], 1.0] @ weights - targets[left_out]) ** 2)
        errors.append(error)
    best = routers.LAMBDAS[int(np.argmin(errors))]
    assert routers.LAMBDAS[0] < best < routers.LAMBDAS[-1]
    expected = np.c_[test, np.ones(4)] @ solved(train, targets, best)
    np.testing.assert_allclose(routers.ridge(train, tasks, test), expected, rtol=1e-8)


@pytest.mark.slow
def test_rows_are_those_of_the_run(tmp_path):
    backbone = load_backbone("tiny_random", image_size=32)
    config = load_experiment("smoke").get_config("qkd")
    summary = run(config, backbone=backbone, out=tmp_path)
    state = load_run(run_folder(tmp_path, config)).state
    planned = plan(state.config)
    found = routers.rows(state, planned, *routers.slot_features(state, planned))
    counts, images = found["routers"], found["images"]
    assert images == len(planned.data.test)
    assert 100 * counts["fidelity"]["mixed"] / images == pytest.approx(summary["last_accuracy"])
    assert 100 * counts["fidelity"]["routed"] / images == pytest.approx(summary["routing_accuracy"])
    oracle = counts["oracle"]
    assert oracle["routed"] == images
    assert oracle["chosen"] == oracle["two"] == oracle["mixed"]
    newest = counts["newest"]
    assert newest["chosen"] == newest["two"] == newest["mixed"] == found["slots"][-1]
    routed = override(config, "fusion.kind=routed", "fusion.top_k=2")
    summary = run(routed, backbone=backbone, out=tmp_path / "routed")
    assert 100 * counts["fidelity"]["two"] / images == pytest.approx(summary["last_accuracy"])
