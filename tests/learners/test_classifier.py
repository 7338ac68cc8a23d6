"""A classifier in closed form in place of a method's own: which features it reads, what it keeps,
and that a run with one can be stopped. Its formulas are tested in tests/nn/test_closed_form.py.
"""

import json
from hashlib import sha256
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qkd_jax
from qkd_jax.engine.engine import Engine
from qkd_jax.engine.verbs import slot_features
from qkd_jax.errors import ConfigError
from qkd_jax.learners.classifier import columns_read
from qkd_jax.learners.shape import learner_of
from qkd_jax.nn.closed_form import HEADS
from qkd_jax.nn.moments import as_float64
from qkd_jax.runs.checkpoint import named_arrays
from qkd_jax.runs.load import load_run
from qkd_jax.runs.loop import run, run_folder
from qkd_jax.settings.config import changeable_settings, digest, override, to_dict
from qkd_jax.settings.experiments import load_experiment
from qkd_jax.weights.load import load_backbone


@pytest.mark.parametrize(
    "features, expected",
    [
        ("shared", [[0], [0], [0], [0]]),
        ("newest", [[0], [1], [2], [3]]),
        ("joined", [[0, 0, 0, 0], [0, 1, 1, 1], [0, 1, 2, 2], [0, 1, 2, 3]]),
    ],
)
def test_the_slots_of_an_adapter_for_each_task(tiny, features, expected):
    """Of all side by side, the newest one stands in for those that are not filled yet."""
    config = tiny.config("method=ease", f"classifier.features={features}")
    slots = learner_of(config).slots
    assert columns_read(slots, config).tolist() == expected
    headed = learner_of(override(config, "classifier.kind=rls", "classifier.projection_dim=4"))
    assert columns_read(headed.slots, config).tolist() == expected
    for task in range(4):
        assert set(headed.slots.score(task)) == set(expected[task])
        assert set(headed.slots.at_end(task)) == {*slots.at_end(task), *expected[task]}


@pytest.mark.parametrize(
    "method, expected", [("aper", [[0, 1]] * 4), ("finetune", [[0], [1], [2], [3]])]
)
def test_by_default_what_all_tasks_have_in_common(tiny, method, expected):
    """Both features of aper; the newest where each task has a slot of its own."""
    config = tiny.config(f"method={method}", "classifier.kind=whitened")
    assert columns_read(learner_of(config).slots, config).tolist() == expected


def test_a_query_is_extracted_although_it_is_not_classified(tiny):
    settings = ("classifier.kind=whitened", "classifier.features=newest")
    config = tiny.config("method=l2p", *settings)
    assert learner_of(config).slots.score(2) == (0, 3)
    assert learner_of(config).slots.at_end(2) == (0, 3)


@pytest.fixture(scope="module")
def joined(tiny):
    """mote with a classifier on all of its slots: its own `finish` reads the newest alone."""
    config = tiny.config("method=mote", "classifier.kind=lr_rgda", "classifier.features=joined")
    return tiny.run(tiny.backbone, override(config, "classifier.rank=2"))


def test_sums_are_over_the_slots_that_the_learner_reads(tiny, joined):
    """Sums of 8 features near 1, in float32, computed twice: 100 eps."""
    ended = joined[-1].ended
    count, total = (as_float64(ended.classifier["sums"][name]) for name in ("count", "total"))
    assert count.tolist() == [8, 4, 4, 0, 4, 4, 0]
    for task, moment in zip(tiny.tasks, joined, strict=True):
        batches = [tiny.batch(task, step) for step in range(2)]
        features = [np.asarray(slot_features(moment.ended, b["image"])) for b in batches]
        labels = np.concatenate([b["label"] for b in batches])
        order = [min(slot, task.index) for slot in range(4)]
        rows = np.concatenate(features)[:, order].reshape(len(labels), -1)
        for c in task.classes:
            np.testing.assert_allclose(total[c], rows[labels == c].sum(0), atol=1e-4)


def test_scores_are_those_of_the_rule(tiny, joined):
    ended = joined[-1].ended
    images = tiny.batch(tiny.tasks[0], 9)["image"]
    features = slot_features(ended, images)[:, jnp.array([0, 1, 2, 2])].reshape(len(images), -1)
    kept = ended.classifier
    expected = np.asarray(HEADS["lr_rgda"].scores(kept["drawn"], kept["rule"], features))
    scores, seen = np.asarray(qkd_jax.predict(ended, images)), [0, 1, 2, 4, 5]
    np.testing.assert_allclose(scores[:, seen], expected[:, seen], rtol=1e-4)
    assert (scores[:, [3, 6]] == -np.inf).all()


def test_a_method_without_features_says_so(texts):
    config = texts.config_of("method=qd_llm", "classifier.kind=rls")
    with pytest.raises(ConfigError, match=r"classifier\.kind: expected own, since .* qd_llm"):
        qkd_jax.init_state(jax.random.key(0), texts.backbone, config)


def test_own_leaves_no_trace(tiny):
    """Runs from before there were such classifiers have the same arrays and the same digest."""
    config = tiny.config("method=simplecil")
    state = qkd_jax.init_state(jax.random.key(0), tiny.backbone, config)
    assert not [name for name in named_arrays(state) if name.startswith("classifier")]
    sections = {name: part for name, part in to_dict(config).items() if name != "classifier"}
    leaves = {name: value for name, value in sections.items() if not isinstance(value, dict)}
    for name, part in sections.items():
        if isinstance(part, dict):
            leaves |= {f"{name}.{key}": value for key, value in part.items()}
    left_out = changeable_settings() | {"seed", "experiment"}
    kept = sorted((key, value) for key, value in leaves.items() if key not in left_out)
    assert digest(config) == sha256(json.dumps(kept).encode()).hexdigest()[:16]
    assert digest(config) != digest(override(config, "classifier.kind=rls"))


@pytest.mark.parametrize("kind", ["ranpac", pytest.param("anacp", marks=pytest.mark.slow)])
def test_stopped_while_a_task_ends_a_run_ends_with_the_same_bytes(kind, tmp_path, monkeypatch):
    backbone = load_backbone("tiny_random", image_size=32)
    settings = (f"classifier.kind={kind}", "classifier.projection_dim=32", "train.devices=1")
    config = override(load_experiment("smoke").get_config("simplecil"), *settings)
    run(config, backbone=backbone, out=tmp_path / "whole")
    finish, ended = Engine.finish, []

    def stops_once(*arguments):
        state = finish(*arguments)
        ended.append(1)
        if len(ended) == 2:
            raise KeyboardInterrupt
        return state

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Engine, "finish", stops_once)
        run(config, backbone=backbone, out=tmp_path / "parts")
    run(config, backbone=backbone, out=tmp_path / "parts")
    whole, parts = (
        SimpleNamespace(
            arrays=named_arrays(load_run(run_folder(tmp_path / name, config)).state),
            folder=run_folder(tmp_path / name, config),
        )
        for name in ("whole", "parts")
    )
    assert any(name.startswith("classifier.sums") for name in whole.arrays)
    for name, array in whole.arrays.items():
        assert array.tobytes() == parts.arrays[name].tobytes(), name
    for path in sorted(whole.folder.glob("predictions/*")):
        assert path.read_bytes() == (parts.folder / "predictions" / path.name).read_bytes()


def test_two_devices_extract_what_one_sums_up(tmp_path):
    """Features of divided batches differ by their rounding, below 1e-4 of sums near 10."""
    backbone = load_backbone("tiny_random", image_size=32)
    sums = []
    for devices in (1, 2):
        settings = ("classifier.kind=whitened", f"train.devices={devices}")
        config = override(load_experiment("smoke").get_config("simplecil"), *settings)
        run(config, backbone=backbone, out=tmp_path / str(devices))
        state = load_run(run_folder(tmp_path / str(devices), config)).state
        sums.append(jax.tree.map(np.asarray, state.classifier["sums"]["moments"][0]))
    for one, two in zip(*sums, strict=True):
        np.testing.assert_allclose(as_float64(one), as_float64(two), atol=1e-3)
    assert as_float64(sums[1].count).sum() > 0
