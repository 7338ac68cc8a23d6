"""Classifiers in closed form against the authors' code: `golden/make_closed_form_golden.py` says
which code, called how.

Error budget: z is float32 here and float64 there, so that z and scores carry 10 eps of their size
(sums of 8 or 24 products). A solution carries that times its condition number, which is at most 2e3
for klda, 1e3 for the layers of anacp, 3e4 for rls; lr_rgda solves for features as they are.
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


def test_klda(golden):
    settings = {"projection_dim": 24, "kernel_gamma": 0.05, "ridge": 0.01}
    _, scores = learned(golden, "klda", ((0, 1), (2, 3, 4)), **settings)
    expected = centred(golden["klda/scores"])
    np.testing.assert_allclose(centred(scores), expected, atol=10 * EPS * 2e3 * expected.max())


def test_the_recursion_of_rls_is_the_solution_of_its_sums(golden):
    rule, scores = learned(golden, "rls", ((0, 1), (2, 3, 4)), projection_dim=24)
    for found, name in ((rule["rows"], "rows"), (scores, "scores")):
        expected = golden[f"rls/{name}"]
        budget = 10 * EPS * 3e4 * np.abs(expected).max()
        np.testing.assert_allclose(found, expected, atol=budget)


def test_anacp(golden, monkeypatch):
    monkeypatch.setattr(closed_form, "noise_of", lambda key, c, width: golden["anacp/noise"][c])
    rule, scores = learned(golden, "anacp", projection_dim=24, ridge=0.5)
    for found, name in ((rule["layers"], "layers"), (scores, "scores")):
        expected = golden[f"anacp/{name}"]
        budget = 10 * EPS * 1e3 * np.abs(expected).max()
        np.testing.assert_allclose(found, expected, atol=budget)


def test_the_targets_of_anacp(golden):
    """All in float64 but for the features, which are the same numbers."""
    features = golden["features"] / np.linalg.norm(golden["features"], axis=1, keepdims=True)
    means = np.stack([np.float64(features)[golden["labels"] == c].mean(0) for c in range(5)])
    found = closed_form.spread_means(means, golden["anacp/covariance"])
    np.testing.assert_allclose(found, golden["anacp/targets"], atol=100 * EPS)


def test_lr_rgda(golden):
    settings = {"class_share": 0.2, "shared_share": 2.0, "identity_share": 0.5, "rank": 8}
    _, scores = learned(golden, "lr_rgda", **settings)
    expected = centred(golden["lr_rgda/scores"])
    np.testing.assert_allclose(centred(scores), expected, atol=100 * EPS * np.abs(expected).max())


def test_ranpac_in_two_tasks():
    """The arrays of tests/learners/test_golden_ranpac.py, with its budgets but for the solution's,
    which is float64 here: z alone is float32.
    """
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
        np.testing.assert_allclose(errors, golden["losses"][index], rtol=2.4e-3)
        sums["ridge"] = np.float64(golden["ridges"][index])  # theirs: of another fifth
        rows, expected = head.solve(settings, drawn, sums, None)["rows"], golden[f"rows_{index}"]
        budget = 1e-4 * np.abs(expected).max()
        np.testing.assert_allclose(rows[: len(expected)], expected, atol=budget)
    scores = head.scores(drawn, {"rows": jnp.asarray(rows, jnp.float32)}, golden["queries"])
    np.testing.assert_allclose(scores, golden["scores"], atol=1e-4 * golden["scores"].max())
