"""Classifiers in closed form against the authors' code: `golden/make_closed_form_golden.py` says
which code, called how.

Error budget, in parts of the largest value: z is float32 here and float64 there. In the worst case
a solution carries eps of z times its condition, 500 to 1,600, which would hide a wrong formula; but
roundings of 60 images are independent, and 0.4 to 3 eps were found. Ten times that are allowed. The
scores of anacp pass two solutions: 70 eps were found, 250 are allowed.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkd_jax.nn import closed_form
from qkd_jax.nn.closed_form import HEADS
from qkd_jax.settings.sections import ClassifierConfig

EPS = 1.2e-7
BUDGET, TWO_LAYERS = 30 * EPS, 250 * EPS


@pytest.fixture(scope="module")
def golden():
    with np.load(Path(__file__).parent / "golden" / "closed_form.npz") as stored:
        return dict(stored)


def learned(golden, kind, tasks=(range(5),), **settings):
    """(the rule, scores [3, 5]) of a classifier with the random numbers of the authors' run."""
    settings, head = ClassifierConfig(kind=kind, **settings), HEADS[kind]
    names = ("projection", "phase", "second")
    drawn = {n: jnp.asarray(golden[f"{kind}/{n}"]) for n in names if f"{kind}/{n}" in golden}
    sums = head.empty(settings, drawn, 5, 8)
    for task in tasks:
        rows = np.isin(golden["labels"], task)
        given = golden["features"][rows], golden["labels"][rows]
        sums = head.add(settings, drawn, sums, *given, None)
    rule = head.solve(settings, drawn, sums, None)
    stored = {name: jnp.asarray(array, jnp.float32) for name, array in rule.items()}
    return rule, np.asarray(head.scores(drawn, stored, jnp.asarray(golden["queries"])))


def centred(scores):
    """Scores without what all classes have in common, which is left out here."""
    return scores - scores.mean(axis=1, keepdims=True)


def near(found, expected, budget=BUDGET):
    np.testing.assert_allclose(found, expected, rtol=0, atol=budget * np.abs(expected).max())


def test_klda(golden):
    settings = {"projection_dim": 24, "kernel_gamma": 0.05, "ridge": 0.01}
    _, scores = learned(golden, "klda", ((0, 1), (2, 3, 4)), **settings)
    near(centred(scores), centred(golden["klda/scores"]))


def test_the_recursion_of_rls_is_the_solution_of_its_sums(golden):
    rule, scores = learned(golden, "rls", ((0, 1), (2, 3, 4)), projection_dim=24)
    near(rule["rows"], golden["rls/rows"])
    near(scores, golden["rls/scores"])


def test_anacp(golden, monkeypatch):
    monkeypatch.setattr(closed_form, "noise_of", lambda key, c, width: golden["anacp/noise"][c])
    rule, scores = learned(golden, "anacp", projection_dim=24, ridge=0.5)
    near(rule["layers"], golden["anacp/layers"])
    near(scores, golden["anacp/scores"], TWO_LAYERS)


def test_the_targets_of_anacp(golden):
    """All in float64 but for the features, which are the same numbers."""
    features = golden["features"] / np.linalg.norm(golden["features"], axis=1, keepdims=True)
    means = np.stack([np.float64(features)[golden["labels"] == c].mean(0) for c in range(5)])
    found = closed_form.spread_means(means, golden["anacp/covariance"])
    near(found, golden["anacp/targets"])


def test_lr_rgda(golden):
    settings = {"class_share": 0.2, "shared_share": 2.0, "identity_share": 0.5, "rank": 8}
    _, scores = learned(golden, "lr_rgda", **settings)
    near(centred(scores), centred(golden["lr_rgda/scores"]))


def test_ranpac_in_two_tasks():
    """The arrays of tests/learners/test_golden_ranpac.py, whose budgets are those of float32."""
    path = Path(__file__).parents[1] / "learners" / "golden" / "ranpac.npz"
    golden = dict(np.load(path))
    labels = np.array([0, 1] * 12 + [0]), np.array([2, 3, 4] * 20)
    settings, head = ClassifierConfig(kind="ranpac", projection_dim=40), HEADS["ranpac"]
    drawn = {"projection": jnp.asarray(golden["projection"])}
    sums = head.empty(settings, drawn, 5, golden["features_0"].shape[1])
    for index in (0, 1):
        features = golden[f"features_{index}"]
        sums = head.add(settings, drawn, sums, features, labels[index], jax.random.key(0))
        z = np.float64(head.vectors(drawn, jnp.asarray(features))[0])
        errors = closed_form.held_out_errors(z, np.eye(5)[labels[index]])
        assert closed_form.RIDGES[errors.argmin()] == golden["ridges"][index]
        np.testing.assert_allclose(errors, golden["losses"][index], rtol=1e-4)
        sums["ridge"] = np.float64(golden["ridges"][index])  # theirs: of another fifth
        rows, expected = head.solve(settings, drawn, sums, None)["rows"], golden[f"rows_{index}"]
        near(rows[: len(expected)], expected)
    scores = head.scores(drawn, {"rows": jnp.asarray(rows, jnp.float32)}, golden["queries"])
    near(scores, golden["scores"])
